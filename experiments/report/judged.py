"""The judged claims: `results/summary/claims.json`, read and checked, never judged again.

Every entry is a claim of the registry with one judgement per scale that has runs, or with the one
judgement *not run* and the command that would settle it. Run directories are relative to the
results directory; those of a claim without training are files of findings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.errors import UserError

CLAIMS_FILE = "summary/claims.json"
OUTCOMES = ("reproduced", "not reproduced", "inconclusive", "not run")
_TEXTS = ("id", "row", "paper", "place", "statement", "experiment", "metric", "kind", "rule")


@dataclass(frozen=True)
class Judgement:
    """What our runs of one scale say about a claim.

    Attributes:
        scale: full, reduced or smoke.
        outcome: one of `OUTCOMES`.
        centre: our effect; None if not computable.
        low: lower end of its interval; None without one.
        high: upper end.
        n: number of runs or pairs of runs behind it.
        reason: why, where the outcome alone does not say it.
        command: what would repeat or settle it.
        more_seeds: number of further seeds that are predicted to settle it; None where unknown.
        more_seeds_cost_s: predicted cost of them, seconds; None where unknown.
        runs: run directories, or files of findings, relative to the results directory.
    """

    scale: str
    outcome: str
    centre: float | None
    low: float | None
    high: float | None
    n: int
    reason: str
    command: str
    more_seeds: int | None
    more_seeds_cost_s: float | None
    runs: tuple[str, ...]


@dataclass(frozen=True)
class JudgedClaim:
    """A claim with its judgements; the first nine fields are those of `analysis.claims.Claim`.

    Attributes:
        margin: how far our effect may lie from the printed one.
        printed: what the paper prints for the effect; None if it prints no number.
        judgements: one per scale.
    """

    id: str
    row: str
    paper: str
    place: str
    statement: str
    experiment: str
    metric: str
    kind: str
    rule: str
    margin: float
    printed: float | None
    judgements: tuple[Judgement, ...]


def load_judged(results_dir: Path) -> tuple[JudgedClaim, ...]:
    """Read the judged claims of a set of results.

    Args:
        results_dir: the directory that holds `summary/claims.json`.

    Raises:
        UserError: the file is missing or not what the judging command writes, or a run that it
            names does not exist.
    """
    path = results_dir / CLAIMS_FILE
    try:
        if path.is_file():
            entries = json.loads(path.read_text(encoding="utf-8"))
        else:
            from experiments.report.provisional import judge_all

            entries = judge_all(results_dir)
        claims = tuple(_claim(entry) for entry in entries)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {JUDGE}") from error
    except (ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a list of judged claims ({reason}): {JUDGE}") from error
    for claim in claims:
        for judgement in claim.judgements:
            for run in judgement.runs:
                if not (results_dir / run).exists():
                    raise UserError(
                        f"{path}, {claim.id}: {results_dir / run} does not exist: {JUDGE}"
                    )
    return claims


JUDGE = "write it with make summary"


def _claim(entry: Mapping[str, Any]) -> JudgedClaim:
    judgements: Sequence[Mapping[str, Any]] = entry["judgements"]
    return JudgedClaim(
        **{name: str(entry[name]) for name in _TEXTS},
        margin=float(entry["margin"] or 0.0),
        printed=_number(_printed(entry["printed"])),
        judgements=tuple(_judgement(part) for part in judgements),
    )


def _printed(value: Any) -> Any:
    return value["value"] if isinstance(value, Mapping) else value


def _judgement(entry: Mapping[str, Any]) -> Judgement:
    if entry["outcome"] not in OUTCOMES:
        raise ValueError(f"outcome {entry['outcome']!r}")
    return Judgement(
        scale=str(entry["scale"] or ""),
        outcome=entry["outcome"],
        centre=_number(entry["centre"]),
        low=_number(entry["low"]),
        high=_number(entry["high"]),
        n=int(entry["n"]),
        reason=str(entry["reason"] or ""),
        command=str(entry["command"] or ""),
        more_seeds=entry.get("more_seeds"),
        more_seeds_cost_s=_number(entry.get("more_seeds_cost_s")),
        runs=tuple(map(str, entry["runs"])),
    )


def _number(value: Any) -> float | None:
    """JSON has no infinities: they stand there as text."""
    if value is None:
        return None
    number = float(value)
    if math.isnan(number):
        raise ValueError("a number is NaN")
    return number
