r"""What a drop-in torch optimizer must survive, as checks for any optimizer.

From the command line, on classes given by name::

    pytest --pyargs mlbfgs.testing -p mlbfgs.testing.plugin \
        --optimizer torch.optim.SGD --optimizer-kwargs '{"momentum": 0.9}' \
        --optimizer mypackage.MyOptimizer --optimizer-kwargs '{}' \
        --conformance-report report.md

`--optimizer` names a class, or any callable that takes parameters and keyword arguments and returns
an optimizer, and may be repeated. `--optimizer-kwargs` is a JSON object; given once it is for all,
otherwise once for each optimizer, in the same order. An optimizer that cannot be constructed fails
the check `construction`. At the end a table `check x optimizer` is printed. `-m 'not slow'` leaves
out what compiles, `-k` selects as always.

From a project's own tests, without the plugin::

    import pytest
    from mlbfgs.testing import conformance_checks

    @pytest.mark.parametrize("check", conformance_checks(MyOptimizer, {"lr": 0.1}), ids=str)
    def test_conformance(check):
        check()                   # raises AssertionError on a failure, else returns an Outcome

An outcome is `pass`, `fail`, `unsupported` (the optimizer itself refuses in words that name what
was asked, or has no such setting) or `not run` (something that the check needs is missing).

Optimizers whose settings contain `update_interval` and `history_size` are run with 4 and 3, unless
told otherwise, so that a few dozen steps pass through all phases of warm-up and history.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlbfgs.testing.outcome import CheckFailedError, Outcome, Status
from mlbfgs.testing.registry import CONSTRUCTION, BoundCheck, Check
from mlbfgs.testing.report import Report
from mlbfgs.testing.subject import Factory, Subject, subject_of

__all__ = [
    "BoundCheck",
    "Check",
    "CheckFailedError",
    "Outcome",
    "Report",
    "Status",
    "Subject",
    "conformance_checks",
    "subject_of",
]


def conformance_checks(
    optimizer: Factory | str | Subject,
    kwargs: Mapping[str, Any] | None = None,
    *,
    slow: bool = True,
) -> list[BoundCheck]:
    """Every check, bound to one optimizer.

    Args:
        optimizer: a class, a callable that takes parameters and keyword arguments and returns an
            optimizer, the full name of either, or what `subject_of` made of them.
        kwargs: settings that every check passes on.
        slow: whether to include the checks that compile.

    Returns:
        Objects to call, or to `run()`; `str()` gives a test id.

    Raises:
        ValueError: no such optimizer, or it cannot be constructed with these settings (a
            `Subject` that is `broken` has one check, which fails with the reason).
    """
    from mlbfgs.testing.checks import all_checks

    subject = optimizer if isinstance(optimizer, Subject) else subject_of(optimizer, kwargs)
    if subject.broken:
        return [BoundCheck(CONSTRUCTION, subject)]
    return [BoundCheck(check, subject) for check in all_checks() if slow or not check.slow]
