"""The pytest plugin: options, one test for each check and optimizer, the table at the end.

Used by `pytest --pyargs mlbfgs.testing -p mlbfgs.testing.plugin --optimizer module.Class`; see
:mod:`mlbfgs.testing`. With these options absent it does nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

import pytest

from mlbfgs.testing import conformance_checks
from mlbfgs.testing.outcome import ConstructionError, Outcome, one_line
from mlbfgs.testing.registry import BoundCheck, Check
from mlbfgs.testing.report import Report
from mlbfgs.testing.subject import Subject, name_of, subject_of

PROPERTY = "conformance"
#: The file that stands for the checks where pytest collects.
PLACE = Path(__file__).resolve().with_name("test_conformance.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the command-line options."""
    group = parser.getgroup("conformance", "conformance of optimizers (mlbfgs.testing)")
    group.addoption(
        "--optimizer",
        action="append",
        default=[],
        metavar="MODULE.CLASS",
        help="optimizer to check, such as torch.optim.SGD (repeatable)",
    )
    group.addoption(
        "--optimizer-kwargs",
        action="append",
        default=[],
        metavar="JSON",
        help="""settings such as '{"lr": 0.01}': once for all optimizers, or once for each""",
    )
    group.addoption(
        "--conformance-report", metavar="FILE", help="write the table there as Markdown"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make the subjects, so that a wrong name ends the run at once."""
    config.addinivalue_line("markers", "slow: takes seconds")
    target = config.getoption("--conformance-report")
    if target and Path(target).is_dir():
        raise pytest.UsageError(f"--conformance-report {target} is a folder: name a file")
    here = str(config.invocation_params.dir)
    if here not in sys.path:  # `pytest` alone, unlike `python -m pytest`, does not look here
        sys.path.append(here)
    config.pluginmanager.register(Conformance(_subjects(config)), "conformance-report")


def _subjects(config: pytest.Config) -> list[Subject]:
    names: list[str] = config.getoption("--optimizer")
    given: list[str] = config.getoption("--optimizer-kwargs")
    if len(given) not in (0, 1, len(names)):
        raise pytest.UsageError(
            f"--optimizer-kwargs: given {len(given)} times for {len(names)} optimizers; "
            "give it once for all or once for each"
        )
    texts = given if len(given) == len(names) else (given or ["{}"]) * len(names)
    subjects: list[Subject] = []
    for name, text in zip(names, texts, strict=True):
        try:
            settings = json.loads(text)
        except json.JSONDecodeError as error:
            raise pytest.UsageError(f"--optimizer-kwargs {text!r} is no JSON: {error}") from error
        if not isinstance(settings, dict):
            raise pytest.UsageError(f"--optimizer-kwargs {text!r} is no JSON object")
        known = [other.name for other in subjects]
        subjects.append(_subject(name, settings, _unique(name_of(name), text, known)))
    return subjects


def _unique(name: str, text: str, known: Sequence[str]) -> str:
    """A name that no other optimizer has: with its settings, then with a number."""
    candidates = chain((name, f"{name} {text}"), (f"{name} {text} #{k}" for k in count(2)))
    return next(candidate for candidate in candidates if candidate not in known)


def _subject(full_name: str, settings: dict[str, Any], name: str) -> Subject:
    try:
        return subject_of(full_name, settings, name=name)
    except ConstructionError as error:
        reason = one_line(error).removeprefix("ConstructionError: ")
        return Subject(name, _nothing, settings, {}, broken=reason)
    except ValueError as error:
        raise pytest.UsageError(f"--optimizer {full_name}: {error}") from error


def _nothing(*_: Any, **__: Any) -> Any:
    raise AssertionError("there is no such optimizer")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """One test for each check and optimizer, whatever the names of tests are elsewhere."""
    if file_path.name == PLACE.name and file_path.resolve() == PLACE:
        return ConformanceFile.from_parent(parent, path=file_path)
    return None


class ConformanceFile(pytest.File):
    """All checks of all optimizers of the command line."""

    def collect(self) -> Iterator[pytest.Item]:
        """The tests."""
        plugin = self.config.pluginmanager.get_plugin("conformance-report")
        assert isinstance(plugin, Conformance)
        for subject in plugin.subjects:
            for bound in conformance_checks(subject):
                name = f"test_conformance[{bound}]"
                item: ConformanceItem = ConformanceItem.from_parent(self, name=name, bound=bound)
                if bound.check.slow:
                    item.add_marker("slow")
                yield item


class ConformanceItem(pytest.Item):
    """One check of one optimizer."""

    def __init__(self, *, bound: BoundCheck, **given: Any):
        """Remember the check."""
        super().__init__(**given)
        self.bound = bound

    def runtest(self) -> None:
        """Pass, or fail with the check's reason; `unsupported` and `not run` are told apart."""
        outcome = run_and_record(self.bound, lambda *found: self.user_properties.append(found))
        if outcome.status == "not run":
            pytest.skip(f"not run: {outcome.reason}")
        if outcome.status == "fail":
            pytest.fail(f"{outcome.reason}\n\n{outcome.details}", pytrace=False)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Where it stands, for reports."""
        return self.path, None, self.name


def run_and_record(bound: BoundCheck, record: Any) -> Outcome:
    """Run a check inside a test, so that the table at the end shows it.

    Args:
        bound: the check and its optimizer.
        record: called with a name and a value, as pytest's fixture `record_property`.

    Returns:
        The outcome, whatever it is.
    """
    outcome = bound.run()
    made = f"{bound.subject.name}({', '.join(f'{k}={v}' for k, v in bound.subject.kwargs.items())})"
    check = bound.check
    record(
        PROPERTY,
        {
            "check": [check.name, check.title, check.section],
            "optimizer": bound.subject.name,
            "settings": made,
            "outcome": [outcome.status, outcome.reason],
        },
    )
    return outcome


@dataclass(eq=False)  # hashed by identity, as pytest wants its plugins
class Conformance:
    """Collects outcomes over a session.

    Attributes:
        subjects: the optimizers of the command line.
        report: the outcomes so far.
    """

    subjects: list[Subject]
    report: Report = field(default_factory=Report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Enter the outcome of one test."""
        found = _recorded(report)
        if found is not None:
            name, title, section = found["check"]
            self.report.add(
                Check(name, title, section, lambda subject: None),
                found["optimizer"],
                Outcome(*found["outcome"]),
                settings=found["settings"],
            )

    def pytest_report_teststatus(
        self, report: pytest.TestReport
    ) -> tuple[str, str, str | tuple[str, dict[str, bool]]] | None:
        """Show what is unsupported as such."""
        found = _recorded(report)
        if found is not None and report.passed and found["outcome"][0] == "unsupported":
            return "unsupported", "u", ("UNSUPPORTED", {"yellow": True})
        return None

    def pytest_terminal_summary(self, terminalreporter: Any, config: pytest.Config) -> None:
        """Print the table; write it where asked."""
        if not self.report.outcomes:
            return
        self.report.sort([subject.name for subject in self.subjects])
        terminalreporter.section("conformance")
        terminalreporter.write_line(self.report.text())
        target = config.getoption("--conformance-report")
        if target:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            Path(target).write_text(self.report.markdown(), encoding="utf-8")
            terminalreporter.write_line(f"written to {target}")


def _recorded(report: pytest.TestReport) -> dict[str, Any] | None:
    if report.when != "call":
        return None
    return next((value for key, value in report.user_properties if key == PROPERTY), None)  # type: ignore[return-value]
