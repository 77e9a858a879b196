"""The table `check x optimizer`, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

import torch

from mlbfgs.testing.outcome import Outcome, Status
from mlbfgs.testing.registry import SECTIONS, Check

STATUSES: tuple[Status, ...] = ("pass", "fail", "unsupported", "not run")


@dataclass
class Report:
    """Outcomes by check and optimizer.

    Attributes:
        optimizers: the columns: name, and how it was made.
        checks: the rows, by name.
        outcomes: by name of the check and of the optimizer.
    """

    optimizers: dict[str, str] = field(default_factory=dict)
    checks: dict[str, Check] = field(default_factory=dict)
    outcomes: dict[tuple[str, str], Outcome] = field(default_factory=dict)

    def add(self, check: Check, optimizer: str, outcome: Outcome, *, settings: str = "") -> None:
        """Enter one outcome.

        Args:
            check: what was asked.
            optimizer: its name.
            outcome: what came out.
            settings: how the optimizer was made.
        """
        self.optimizers.setdefault(optimizer, settings)
        self.checks[check.name] = check
        self.outcomes[check.name, optimizer] = outcome

    def sort(self, optimizers: Iterable[str]) -> None:
        """Bring columns and rows into their own order, whatever order the outcomes came in.

        Args:
            optimizers: the columns' order.
        """
        from mlbfgs.testing.checks import all_checks

        rank = {name: i for i, name in enumerate(optimizers)}
        row = {check.name: i for i, check in enumerate(all_checks())}
        columns = sorted(self.optimizers, key=lambda name: rank.get(name, len(rank)))
        self.optimizers = {name: self.optimizers[name] for name in columns}
        rows = sorted(self.checks, key=lambda name: row.get(name, -1))
        self.checks = {name: self.checks[name] for name in rows}

    def counts(self, optimizer: str) -> dict[Status, int]:
        """How many checks of one optimizer ended in each status."""
        found = [o.status for (_, name), o in self.outcomes.items() if name == optimizer]
        return {status: found.count(status) for status in STATUSES}

    def notes(self) -> list[tuple[str, str, Outcome]]:
        """Check, optimizer and outcome of everything that did not pass, row by row."""
        return [
            (check.name, optimizer, outcome)
            for section in SECTIONS
            for check in self._rows(section)
            for optimizer in self.optimizers
            if (outcome := self.outcomes.get((check.name, optimizer))) and outcome.status != "pass"
        ]

    def _rows(self, section: str) -> list[Check]:
        return [c for c in self.checks.values() if c.section == section]

    def _numbers(self) -> dict[tuple[str, str], int]:
        """Numbers of the notes: equal reasons of one optimizer share one."""
        numbers: dict[tuple[str, str], int] = {}
        of_reason: dict[tuple[str, str, str], int] = {}
        for check, optimizer, outcome in self.notes():
            key = (optimizer, outcome.status, outcome.reason)
            numbers[check, optimizer] = of_reason.setdefault(key, len(of_reason) + 1)
        return numbers

    def _cells(self, check: Check) -> list[str]:
        numbers = self._numbers()
        cells = []
        for optimizer in self.optimizers:
            outcome = self.outcomes.get((check.name, optimizer))
            number = numbers.get((check.name, optimizer))
            status = outcome.status if outcome else "-"
            cells.append(f"{status} [{number}]" if number else status)
        return cells

    def _numbered_reasons(self) -> list[str]:
        numbers = self._numbers()
        reasons: dict[int, str] = {}
        for check, optimizer, outcome in self.notes():
            reason = f"{optimizer}, {outcome.status}: {outcome.reason}"
            reasons.setdefault(numbers[check, optimizer], reason)
        return [f"{number}. {reason}" for number, reason in reasons.items()]

    def _summary(self) -> Iterable[str]:
        for optimizer in self.optimizers:
            counts = self.counts(optimizer)
            told = ", ".join(f"{n} {status}" for status, n in counts.items() if n)
            yield f"{optimizer}: {told}"

    def text(self) -> str:
        """The table for a terminal."""
        names = list(self.optimizers)
        rows: list[list[str]] = [["", *names]]
        for section in SECTIONS:
            checks = self._rows(section)
            if checks:
                rows.append([section.upper(), *[""] * len(names)])
                rows += [[f"  {check.title}", *self._cells(check)] for check in checks]
        widths = [max(len(row[i]) for row in rows) for i in range(len(names) + 1)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, "", *self._numbered_reasons(), "", *self._summary()])

    def markdown(self) -> str:
        """The table as Markdown, a section for each part; the same for the same outcomes."""
        lines = [
            "# Conformance of optimizers",
            "",
            "Written by `mlbfgs.testing`; do not edit.",
            "",
            f"On a CPU, with {_versions()}.",
            "",
            "| optimizer | made with | " + " | ".join(STATUSES) + " |",
            "|---|---|" + "---|" * len(STATUSES),
        ]
        for name, settings in self.optimizers.items():
            counts = self.counts(name)
            lines.append(f"| {name} | `{settings}` | {' | '.join(map(str, counts.values()))} |")
        for section in SECTIONS:
            checks = self._rows(section)
            if not checks:
                continue
            lines += ["", f"## {section}", "", "| check | " + " | ".join(self.optimizers) + " |"]
            lines.append("|---|" + "---|" * len(self.optimizers))
            for check in checks:
                row = [f"{_escaped(check.title)} (`{check.name}`)", *self._cells(check)]
                lines.append("| " + " | ".join(row) + " |")
        reasons = [_escaped(reason) for reason in self._numbered_reasons()]
        return "\n".join([*lines, "", "## Reasons", "", *reasons, ""])


def _versions() -> str:
    found = [f"torch {torch.__version__.partition('+')[0]}"]
    for package in ("timm", "lightning", "accelerate", "transformers"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def statuses_in(markdown: str) -> dict[tuple[str, str], str]:
    """Read the statuses back from `Report.markdown`, by check and optimizer."""
    found: dict[tuple[str, str], str] = {}
    header: list[str] = []
    for line in markdown.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| check | "):
            header = cells[1:]
        elif line.startswith("## "):
            header = []
        elif line.startswith("| ") and header:
            name = cells[0].rpartition("(`")[2].removesuffix("`)")
            for optimizer, cell in zip(header, cells[1:], strict=True):
                found[name, optimizer] = cell.partition(" [")[0].strip()
    return found
