"""Claims that need no training: what was found, read from files, and the verdicts on it.

`results/theory/<subject>.json` holds quantities with intervals, tables, series and notes; a claim
of kind `theory` names a quantity as `<subject>/<quantity>`. Rules are those of `verdicts.decide`. A
cell of a printed table that does not follow is compared with other readings of its formula; the
first that lies in the claim's zone is the likely reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.analysis.judging.claims import Claim
from experiments.analysis.judging.settling import Effect
from experiments.analysis.judging.verdicts import Outcome, Verdict, decide, zone_of
from experiments.analysis.measuring.statistics import Interval
from experiments.errors import UserError, nearest, one_line
from experiments.given import MALFORMED, read_json, visible


@dataclass(frozen=True)
class Subject:
    """One file of findings.

    Attributes:
        name: of the subject.
        settings: the numbers that were chosen.
        quantities: effects by name; their `reason` says what they are.
        tables: title, columns and rows.
        series: numbers for the figures.
        notes: sentences for the page.
    """

    name: str
    settings: Mapping[str, Any]
    quantities: Mapping[str, Effect]
    tables: Sequence[Mapping[str, Any]]
    series: Mapping[str, Any]
    notes: Sequence[str]


def load_subjects(folder: Path) -> dict[str, Subject]:
    """Read every file of findings in a folder.

    Args:
        folder: with one `<subject>.json` each.

    Returns:
        The subjects by name; empty if there are none.

    Raises:
        UserError: a file is not what `python -m experiments.theory` writes.
    """
    subjects = {}
    for path in visible(folder, "*.json"):
        try:
            content = read_json(path)
            subjects[path.stem] = Subject(
                name=path.stem,
                settings=content["settings"],
                quantities={k: _effect(v) for k, v in content["quantities"].items()},
                tables=content["tables"],
                series=content["series"],
                notes=content["notes"],
            )
        except MALFORMED as error:
            reason = one_line(error)
            raise UserError(
                f"{path}: not a file of findings ({reason}): run make theory"
            ) from error
    return subjects


def judge_theory(claims: Sequence[Claim], subjects: Mapping[str, Subject]) -> tuple[Verdict, ...]:
    """Judge every claim of kind `theory`.

    Args:
        claims: the registry.
        subjects: what was found.

    Returns:
        One verdict a claim; `not run` where its subject has no file.

    Raises:
        UserError: a claim names a quantity that its subject does not have.
    """
    return tuple(_judge(claim, subjects) for claim in claims if claim.kind == "theory")


def likely_reason(verdict: Verdict, subjects: Mapping[str, Subject]) -> str:
    """Why a cell differs: the first other reading of its formula that gives the printed number.

    Args:
        verdict: of a claim about a cell.
        subjects: what was found; readings are in the series `readings` of the claim's subject.

    Returns:
        A sentence; "" for a cell that matches.
    """
    if verdict.outcome != "not reproduced" or verdict.claim.printed is None:
        return ""
    subject, _, name = verdict.claim.metric.partition("/")
    readings = subjects[subject].series.get("readings", {}).get(name, [])
    zone, printed = zone_of(verdict.claim), verdict.claim.printed.value
    for words, value in readings:
        if zone.low <= float(value) <= zone.high:
            return f"{words}: {short(float(value))}"
    if not readings:
        return "no other reading was tried"
    words, value = min(readings, key=lambda reading: abs(float(reading[1]) - printed))
    count = len(readings)
    return f"none of {count} other readings gives it; nearest, {words}: {short(float(value))}"


def short(value: float) -> str:
    """Four significant digits, with M and B for millions and billions."""
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if size <= abs(value) < 1e15:
            return f"{value / size:.4g}{unit}"
    return "0" if value == 0 else f"{value:.4g}"


def _judge(claim: Claim, subjects: Mapping[str, Subject]) -> Verdict:
    subject, _, name = claim.metric.partition("/")
    if subject not in subjects:
        reason = f"{subject}.json does not exist"
        return Verdict(claim, "full", "not run", None, reason, claim.settled_by())
    quantities = subjects[subject].quantities
    if name not in quantities:
        raise UserError(
            f"claim {claim.id}: {subject} has no quantity {name!r}: {nearest(name, quantities)}"
        )
    effect = quantities[name]
    outcome: Outcome = decide(effect.interval, zone_of(claim), claim.rule)
    return Verdict(claim, "full", outcome, effect, effect.reason, "")


def _effect(entry: Mapping[str, Any]) -> Effect:
    value, low, high = (float(entry[key]) for key in ("value", "low", "high"))
    if any(map(math.isnan, (value, low, high))) or low > high:
        raise ValueError(f"a quantity is {entry!r}")
    return Effect(value, Interval(low, high), int(entry["n"]), str(entry["about"]))
