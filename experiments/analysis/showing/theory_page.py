"""The page of verdicts on the claims that need no training: `results/theory/README.md`."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.analysis.judging.claims import DEFAULT_CLAIMS, load_claims
from experiments.analysis.judging.theory import (
    Subject,
    judge_theory,
    likely_reason,
    load_subjects,
    short,
)
from experiments.analysis.judging.verdicts import Verdict
from experiments.analysis.measuring.quantities import MINUS
from experiments.analysis.showing.tables import TERMINAL_WIDTH, Table
from experiments.errors import UserError
from experiments.runs.owned_folder import OwnedFolder

CELL_ROW = "M-T2"
#: The parts of the page: heading, rows of the registry, subjects, figure.
PARTS: tuple[tuple[str, tuple[str, ...], tuple[str, ...], str], ...] = (
    ("Figure 1: a noisy quadratic", ("S-F1", "M-F1"), ("quadratic",), "figure1"),
    ("Noise in averages", ("S-T1", "M-L1"), ("noise",), ""),
    ("Averages on a quadratic, and the floor", ("M-L2", "M-Th1"), ("lemmas",), "floor"),
    ("The damping bound", ("S-L1", "M-A.2.4"), ("damping_bound",), ""),
    (
        "The bounds on H",
        ("S-L2", "M-L4"),
        ("counterexamples", "hessian_bounds"),
        "bounds",
    ),
    (
        "Blocks and the linear rate",
        ("M-L3", "S-Th1", "S-Th2", "M-Th2"),
        ("linear_rate",),
        "rate",
    ),
    ("Complexity", ("S-T2", "M-T1", CELL_ROW), ("complexity",), ""),
)


@dataclass(frozen=True)
class Page:
    """The judged claims of theory.

    Attributes:
        verdicts: in the registry's order.
        subjects: what was found.
        folder: where the page lies.
    """

    verdicts: tuple[Verdict, ...]
    subjects: Mapping[str, Subject]
    folder: Path

    def terminal(self) -> str:
        """The verdicts as text of at most 100 columns."""
        widths = (30, 12, 18, 25)
        table = Table("Claims that need no training", *_judged_rows(self.verdicts, brief=True))
        table = Table(table.title, table.columns, table.rows, widths)
        return f"{table.terminal()}\n{textwrap.fill(self._counts(), TERMINAL_WIDTH)}\n"

    def markdown(self) -> str:
        """The page."""
        blocks = [
            "# The claims that need no training\n",
            "Written by `make theory`; the verdicts are computed from the JSON files here and from "
            "`results/claims.yaml`, which says the rule and the margin of every claim. An exact "
            "quantity (closed form, count, worst case of a search) has no interval.\n",
            f"{self._counts()}\n",
        ]
        for heading, rows, subjects, figure in PARTS:
            blocks += self._part(heading, rows, subjects, figure)
        return "\n".join(blocks)

    def _counts(self) -> str:
        counts: dict[str, int] = {}
        for verdict in self.verdicts:
            counts[verdict.outcome] = counts.get(verdict.outcome, 0) + 1
        listing = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        return f"{len(self.verdicts)} claims: {listing}."

    def _part(
        self, heading: str, rows: Sequence[str], names: Sequence[str], figure: str
    ) -> list[str]:
        own = [v for v in self.verdicts if v.claim.row in rows and v.claim.row != CELL_ROW]
        blocks = [f"## {heading}\n"]
        if figure:
            blocks.append(f"![{heading}]({figure}.png)\n")
        blocks.append(_table("Verdicts", *_judged_rows(own)))
        notes = [f"- `{v.claim.id}`: {v.claim.note}" for v in own if v.claim.note]
        if notes:
            blocks.append("\n".join(notes) + "\n")
        if CELL_ROW in rows:
            cells = [v for v in self.verdicts if v.claim.row == CELL_ROW]
            blocks.append(_table("M Table 2, cell by cell", *_cell_rows(cells, self.subjects)))
        for name in names:
            if name in self.subjects:
                blocks += _details(self.subjects[name])
        return blocks


def write_page(folder: Path, claims_path: Path = DEFAULT_CLAIMS) -> Page:
    """Judge what a folder holds; write `README.md` and the figures there.

    Args:
        folder: with the files of findings.
        claims_path: the registry.

    Raises:
        UserError: nothing was found, or a file or a claim is not valid.
    """
    # drawing takes most of the import time; a message about a wrong file need not wait for it
    subjects = load_subjects(folder)
    if not subjects:
        raise UserError(f"no findings in {folder}: run make theory")
    page = Page(judge_theory(load_claims(claims_path), subjects), subjects, folder)
    from experiments.analysis.showing.theory_figures import figures_of

    files: dict[str, str | bytes] = dict(figures_of(subjects))
    OwnedFolder(folder).replace({**files, "README.md": page.markdown()})
    return page


def _judged_rows(
    verdicts: Iterable[Verdict], *, brief: bool = False
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...], tuple[int, ...]]:
    if brief:
        columns: tuple[str, ...] = ("claim", "paper", "ours", "verdict")
    else:
        columns = ("claim", "what the paper says", "quantity", "paper", "ours", "verdict")
    rows: list[tuple[str, ...]] = []
    for v in verdicts:
        said = () if brief else (f"{v.claim.place}: {v.claim.statement}", _about(v))
        rows.append((v.claim.id, *said, allowed(v), ours(v), str(v)))
    return columns, tuple(rows), tuple(0 for _ in columns)


def _cell_rows(
    verdicts: Sequence[Verdict], subjects: Mapping[str, Subject]
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...], tuple[int, ...]]:
    words = {"reproduced": "matches", "not reproduced": "differs"}
    rows = []
    for v in verdicts:
        theirs = "" if v.claim.printed is None else short(v.claim.printed.value)
        ours = "" if v.effect is None or v.effect.centre is None else short(v.effect.centre)
        reason = likely_reason(v, subjects)
        rows.append((v.claim.statement, theirs, ours, words.get(v.outcome, v.outcome), reason))
    columns = ("cell", "theirs", "ours", "verdict", "likely reason")
    return columns, tuple(rows), tuple(0 for _ in columns)


def _about(verdict: Verdict) -> str:
    return verdict.effect.reason if verdict.effect else verdict.reason


def allowed(verdict: Verdict) -> str:
    """What the paper prints, with the margin."""
    claim = verdict.claim
    assert claim.printed is not None
    printed = _number(claim.printed.value)
    margin = _number(claim.margin)
    if claim.rule == "within":
        return f"{printed} ± {margin}" if claim.margin else printed
    sign = {"above": (">", MINUS), "below": ("<", "+")}[claim.rule]
    return f"{sign[0]} {printed}" + (f" ({sign[1]} {margin})" if claim.margin else "")


def ours(verdict: Verdict) -> str:
    """Our quantity with its interval."""
    effect = verdict.effect
    if effect is None or effect.centre is None or effect.interval is None:
        return "–"
    text, bounds = _number(effect.centre), effect.interval
    if bounds.low == bounds.high:
        return text
    return f"{text} [{_number(bounds.low)}, {_number(bounds.high)}]"


def _number(value: float) -> str:
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    return short(value).replace("-", MINUS)


def _table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    widths: Sequence[int] = (),
) -> str:
    return Table(title, tuple(columns), tuple(map(tuple, rows)), tuple(widths)).markdown()


def _details(subject: Subject) -> list[str]:
    """Notes in full, tables folded away."""
    blocks = ["\n".join(f"- {note}" for note in subject.notes) + "\n"] if subject.notes else []
    for table in subject.tables:
        rows = [[_cell(value) for value in row] for row in table["rows"]]
        body = _table("", table["columns"], rows).replace("****\n\n", "")
        title = table["title"]
        blocks.append(f"<details><summary>{title}</summary>\n\n{body}\n</details>\n")
    return blocks


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return _number(float(value))
