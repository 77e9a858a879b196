"""The checks, one module for each subject."""

from __future__ import annotations

from mlbfgs.testing.checks import (
    construction,
    copies,
    frameworks,
    inputs,
    mathematics,
    parameters,
    parts,
    schedules,
    settings,
    speed,
    state,
    traps,
)
from mlbfgs.testing.registry import SECTIONS, Check

_MODULES = (
    traps,
    construction,
    settings,
    parameters,
    inputs,
    schedules,
    copies,
    state,
    parts,
    mathematics,
    speed,
    frameworks,
)


def all_checks() -> list[Check]:
    """Every check, by section, in the order of the modules.

    Raises:
        ValueError: two checks have the same name or title.
    """
    checks = [check for module in _MODULES for check in module.CHECKS.checks.values()]
    for words in ([c.name for c in checks], [c.title for c in checks]):
        twice = {word for word in words if words.count(word) > 1}
        if twice:
            raise ValueError(f"checks of the same name or title: {', '.join(sorted(twice))}")
    return [check for section in SECTIONS for check in checks if check.section == section]
