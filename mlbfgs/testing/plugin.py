"""The pytest plugin: options, one test for each check and optimizer, the table at the end.

Used by `pytest --pyargs mlbfgs.testing -p mlbfgs.testing.plugin --optimizer module.Class`; see
:mod:`mlbfgs.testing`. With these options absent it does nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mlbfgs.testing import conformance_checks
from mlbfgs.testing.outcome import Outcome
from mlbfgs.testing.registry import BoundCheck, Check
from mlbfgs.testing.report import Report
from mlbfgs.testing.subject import Subject, subject_of

PROPERTY = "conformance"


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
        try:
            subject = subject_of(name, settings)
        except ValueError as error:
            raise pytest.UsageError(f"--optimizer {name}: {error}") from error
        if any(other.name == subject.name for other in subjects):
            subject = subject_of(name, settings, name=f"{subject.name} {text}")
        subjects.append(subject)
    return subjects


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each check and optimizer."""
    if "conformance_check" not in metafunc.fixturenames:
        return
    plugin = metafunc.config.pluginmanager.get_plugin("conformance-report")
    assert isinstance(plugin, Conformance)
    metafunc.parametrize(
        "conformance_check",
        [
            pytest.param(bound, id=str(bound), marks=[pytest.mark.slow] if bound.check.slow else [])
            for subject in plugin.subjects
            for bound in conformance_checks(subject)
        ],
    )


def run_and_record(bound: BoundCheck, record: Any) -> Outcome:
    """Run a check inside a test, so that the table at the end shows it.

    Args:
        bound: the check and its optimizer.
        record: pytest's fixture `record_property`.

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


@dataclass
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
        terminalreporter.section("conformance")
        terminalreporter.write_line(self.report.text())
        target = config.getoption("--conformance-report")
        if target:
            Path(target).write_text(self.report.markdown(), encoding="utf-8")
            terminalreporter.write_line(f"written to {target}")


def _recorded(report: pytest.TestReport) -> dict[str, Any] | None:
    if report.when != "call":
        return None
    return next((value for key, value in report.user_properties if key == PROPERTY), None)  # type: ignore[return-value]
