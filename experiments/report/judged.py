"""The judged claims: `results/summary/claims.json`, read and checked, never judged again.

Every entry is a claim of the registry with one judgement per scale that has runs, or with the one
judgement *not run* and the command that would settle it. Run directories are relative to the
results directory; those of a claim without training are files of findings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from experiments.analysis.judging.claims import DEFAULT_CLAIMS
from experiments.analysis.judging.registry import judge_registry
from experiments.analysis.measuring.measures import measure_named
from experiments.errors import UserError, one_line
from experiments.given import MALFORMED, read_json

CLAIMS_FILE = "summary/claims.json"
OUTCOMES = ("reproduced", "not reproduced", "inconclusive", "not run")
JUDGE = "write it with make judge (python -m experiments.analysis <results dir> --all)"
_TEXTS = (
    *("id", "row", "paper", "place", "statement"),
    *("experiment", "metric", "kind", "rule", "note"),
)


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
        first_look: what the claim's own seeds alone say, in words; "" where it is the same.
        command: what would repeat or settle it.
        predicted_cost_s: of that command, seconds; None where unknown.
        predicted_from: what the prediction rests on.
        more_seeds: number of further seeds that are predicted to settle it; None where unknown.
        more_seeds_reason: what that number rests on, or why there is none.
        more_seeds_cost_s: predicted cost of them, seconds; None where unknown.
        more_seeds_command: what runs them.
        runs: run directories, or files of findings, relative to the results directory.
    """

    scale: str
    outcome: str
    centre: float | None
    low: float | None
    high: float | None
    n: int
    reason: str
    first_look: str
    command: str
    predicted_cost_s: float | None
    predicted_from: str
    more_seeds: int | None
    more_seeds_reason: str
    more_seeds_cost_s: float | None
    more_seeds_command: str
    runs: tuple[str, ...]


@dataclass(frozen=True)
class JudgedClaim:
    """A claim with its judgements; its first ten fields are those of `analysis.claims.Claim`.

    Attributes:
        note: what else a reader must know.
        margin: how far our effect may lie from the printed one.
        printed: what the paper prints for the effect; None if it prints no number.
        printed_spread: what stands there after the ±; None if nothing does.
        zone: the lowest and the highest effect that the claim allows; may be infinite.
        judged_at: the scales whose runs may give a verdict.
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
    note: str
    margin: float
    printed: float | None
    printed_spread: float | None
    zone: tuple[float, float]
    judged_at: tuple[str, ...]
    judgements: tuple[Judgement, ...]

    @property
    def number_kind(self) -> str:
        """How `analysis.measuring.quantities` prints its effects."""
        if self.kind in ("ratio", "speedup"):
            return "ratio"
        return "plain" if self.kind == "theory" else measure_named(self.metric).kind


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
        claims = tuple(_claim(each) for each in read_json(path))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {JUDGE}") from error
    except MALFORMED as error:
        reason = one_line(error)
        raise UserError(f"{path} is not a list of judged claims ({reason}): {JUDGE}") from error
    for claim in claims:
        for judgement in claim.judgements:
            for run in judgement.runs:
                if not (results_dir / run).exists():
                    raise UserError(
                        f"{path}, {claim.id}: {results_dir / run} does not exist: {JUDGE}"
                    )
    return claims


def refuse_outdated(results_dir: Path) -> None:
    """Check that the judged claims are those of the runs and of the registry as they are now.

    Raises:
        UserError: they differ; the message names the first claim that does.
    """
    path = results_dir / CLAIMS_FILE
    written = read_json(path)
    own = results_dir / DEFAULT_CLAIMS.name
    registry = own if own.is_file() else DEFAULT_CLAIMS
    current = judge_registry(results_dir, registry).as_json()
    for before, after in zip_longest(written, current):
        if before != after:
            name = (after or before)["id"]
            raise UserError(f"{path} is not that of the runs: it differs at {name}: {JUDGE}")


def _claim(entry: Mapping[str, Any]) -> JudgedClaim:
    judgements: Sequence[Mapping[str, Any]] = entry["judgements"]
    printed: Mapping[str, Any] = entry["printed"] or {}
    return JudgedClaim(
        **{name: str(entry[name]) for name in _TEXTS},
        margin=float(entry["margin"]),
        printed=_number(printed.get("value")),
        printed_spread=_number(printed.get("spread")),
        zone=(float(entry["zone"]["low"]), float(entry["zone"]["high"])),
        judged_at=tuple(entry["judged_at"]),
        judgements=tuple(_judgement(part) for part in judgements),
    )


def _judgement(entry: Mapping[str, Any]) -> Judgement:
    if entry["outcome"] not in OUTCOMES:
        raise ValueError(f"outcome {entry['outcome']!r}")
    return Judgement(
        scale=str(entry["scale"]),
        outcome=entry["outcome"],
        centre=_number(entry["centre"]),
        low=_number(entry["low"]),
        high=_number(entry["high"]),
        n=int(entry["n"]),
        reason=str(entry["reason"]),
        first_look=str(entry["first_look"]),
        command=str(entry["command"]),
        predicted_cost_s=_number(entry["predicted_cost_s"]),
        predicted_from=str(entry["predicted_from"]),
        more_seeds=entry["more_seeds"],
        more_seeds_reason=str(entry["more_seeds_reason"]),
        more_seeds_cost_s=_number(entry["more_seeds_cost_s"]),
        more_seeds_command=str(entry["more_seeds_command"]),
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
