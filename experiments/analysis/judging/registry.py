"""The whole registry judged: every claim, at every scale that has runs, and what is still to do.

`claims.json` is a list with one entry a claim: what the claim says (id, row, paper, place,
statement, experiment, metric, kind, optimizer, reference, rule, margin, printed, zone, judged_at,
contradicts, presupposes, note) and its `judgements`, one a scale. A claim without runs at full
scale has a judgement `not run` there, since full scale alone speaks for the paper. Infinite numbers
are the strings "inf" and "-inf".
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.analysis.judging.claims import (
    DEFAULT_CLAIMS,
    Claim,
    load_claims,
    reproduce_command,
)
from experiments.analysis.judging.costs import (
    PREDICTIONS,
    Cost,
    Predictions,
    cost_of_runs,
    load_predictions,
)
from experiments.analysis.judging.theory import judge_theory, load_subjects
from experiments.analysis.judging.verdicts import Verdict, judge, judge_experiment, zone_of
from experiments.analysis.measuring.groups import Results, group_runs
from experiments.analysis.measuring.quantities import steady
from experiments.analysis.measuring.runs import SCALES, load_runs
from experiments.runs.atomic import write_atomically

THEORY = "theory"


@dataclass(frozen=True)
class Judgement:
    """One claim at one scale.

    Attributes:
        verdict: the verdict.
        more_command: what runs the seeds that would settle it; "" where no number is known.
        cost: of the command that would give a verdict; None unless it is not run.
    """

    verdict: Verdict
    more_command: str
    cost: Cost | None


@dataclass(frozen=True)
class Entry:
    """One claim with its judgements, full scale first."""

    claim: Claim
    judgements: tuple[Judgement, ...]


@dataclass(frozen=True)
class Registry:
    """All claims, in the registry's order.

    Attributes:
        entries: one a claim.
        results: the runs of every experiment, one entry a scale; empty where a claim is about one
            that has none.
        results_dir: what holds `runs/`.
    """

    entries: tuple[Entry, ...]
    results: Mapping[str, tuple[Results, ...]]
    results_dir: Path

    def as_json(self) -> list[dict[str, Any]]:
        """The content of `claims.json`."""
        return [_entry(entry, self.results_dir) for entry in self.entries]


def judge_registry(results_dir: Path, claims_path: Path = DEFAULT_CLAIMS) -> Registry:
    """Judge every claim by the runs of a folder, and by the findings beside the registry.

    Args:
        results_dir: the directory that holds `runs/`; it may have none.
        claims_path: the registry; `theory/` and `predictions.json` lie beside it.

    Raises:
        UserError: a file cannot be read.
    """
    claims = load_claims(claims_path)
    predictions = load_predictions(claims_path.parent / PREDICTIONS)
    theory = {
        verdict.claim.id: verdict
        for verdict in judge_theory(claims, load_subjects(claims_path.parent / THEORY))
    }
    trained = dict.fromkeys(claim.experiment for claim in claims if claim.kind != "theory")
    results = {name: results_of(results_dir, name) for name in trained}
    verdicts = [v for name in trained for v in judge_experiment(claims, name, results[name])]
    for folder in sorted((results_dir / "runs").glob("*")):
        if folder.name not in results and (found := results_of(results_dir, folder.name)):
            results[folder.name] = found
    entries = []
    for claim in claims:
        if claim.id in theory:
            judgements: tuple[Judgement, ...] = (Judgement(theory[claim.id], "", None),)
        else:
            own = [verdict for verdict in verdicts if verdict.claim is claim]
            judgements = _judgements(claim, own, results[claim.experiment], predictions)
        entries.append(Entry(claim, judgements))
    return Registry(tuple(entries), results, results_dir)


def results_of(results_dir: Path, experiment: str) -> tuple[Results, ...]:
    """The runs of one experiment, one entry a scale; none where it was never run."""
    if not (results_dir / "runs" / experiment).is_dir():
        return ()
    found = load_runs(results_dir, experiment)
    return group_runs(found) if found.runs else ()


def write_json(registry: Registry, path: Path) -> None:
    """Write `claims.json`; the same runs and claims give the same bytes.

    Raises:
        UnwritableError: it cannot be written.
    """
    text = json.dumps(registry.as_json(), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(path, text + "\n")


def _judgements(
    claim: Claim, verdicts: Sequence[Verdict], results: Sequence[Results], predictions: Predictions
) -> tuple[Judgement, ...]:
    by_scale = {verdict.scale: verdict for verdict in verdicts}
    by_scale.setdefault("full", judge(claim, None))
    runs = {entry.scale: entry for entry in results}
    return tuple(
        _judgement(by_scale[scale], runs.get(scale), predictions=predictions)
        for scale in SCALES
        if scale in by_scale
    )


def _judgement(verdict: Verdict, results: Results | None, *, predictions: Predictions) -> Judgement:
    claim, more = verdict.claim, verdict.more
    more_command = ""
    if more is not None and more.seeds is not None:
        seeds = _with_more(_common_seeds(verdict), more.seeds)
        more_command = reproduce_command(claim.experiment, claim.optimizers, verdict.scale, seeds)
    cost = None
    if verdict.outcome == "not run" and verdict.scale in claim.judged_at and not claim.command:
        wanted = {name: _missing_seeds(claim, name, results) for name in claim.optimizers}
        cost = cost_of_runs(claim.experiment, verdict.scale, wanted, results, predictions)
    return Judgement(verdict, more_command, cost)


def _common_seeds(verdict: Verdict) -> set[int]:
    """The seeds that every contestant of a claim has."""
    return set.intersection(*({run.seed for run in group.ended} for group in verdict.groups))


def _with_more(seeds: set[int], count: int) -> tuple[int, ...]:
    """So many more seeds, the smallest that are free."""
    free = (seed for seed in itertools.count() if seed not in seeds)
    return tuple(sorted(seeds.union(itertools.islice(free, count))))


def _missing_seeds(claim: Claim, contestant: str, results: Results | None) -> int:
    groups = results.of_contestant(contestant) if results is not None else ()
    ended = {run.seed for group in groups for run in group.ended}
    return len(set(claim.seeds) - ended)


def _entry(entry: Entry, results_dir: Path) -> dict[str, Any]:
    claim = entry.claim
    zone = zone_of(claim)
    return {
        "id": claim.id,
        "row": claim.row,
        "paper": claim.paper,
        "place": claim.place,
        "statement": claim.statement,
        "experiment": claim.experiment,
        "metric": claim.metric,
        "kind": claim.kind,
        "optimizer": claim.optimizer,
        "reference": claim.reference,
        "rule": claim.rule,
        "margin": claim.margin,
        "printed": None if claim.printed is None else asdict(claim.printed),
        "zone": {"low": _number(zone.low), "high": _number(zone.high)},
        "judged_at": list(claim.judged_at),
        "contradicts": list(claim.contradicts),
        "presupposes": claim.presupposes,
        "note": claim.note,
        "judgements": [_judgement_as_json(each, results_dir) for each in entry.judgements],
    }


def _judgement_as_json(judgement: Judgement, results_dir: Path) -> dict[str, Any]:
    verdict, cost = judgement.verdict, judgement.cost
    effect, more = verdict.effect, verdict.more
    bounds = effect.interval if effect else None
    runs = [run.path for group in verdict.groups for run in group.ended]
    return {
        "scale": verdict.scale,
        "outcome": verdict.outcome,
        "verdict": str(verdict),
        "centre": _number(effect.centre if effect else None),
        "low": _number(bounds.low if bounds else None),
        "high": _number(bounds.high if bounds else None),
        "n": effect.n if effect else 0,
        "paired": effect.paired if effect else None,
        "first_look": verdict.after_a_look,
        "reason": verdict.reason,
        "command": verdict.command,
        "predicted_cost_s": _number(cost.seconds if cost else None),
        "predicted_from": cost.source if cost else "",
        "more_seeds": more.seeds if more else None,
        "more_seeds_reason": more.reason if more else "",
        "more_seeds_cost_s": _number(verdict.more_cost_s),
        "more_seeds_command": judgement.more_command,
        "runs": [path.relative_to(results_dir).as_posix() for path in runs],
    }


def _number(value: float | None) -> float | str | None:
    if value is None:
        return None
    return steady(value) if math.isfinite(value) else repr(value)
