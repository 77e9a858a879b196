"""The judged claims until the judging command writes them (see `judged`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.analysis.claims import load_claims
from experiments.analysis.groups import group_runs
from experiments.analysis.runs import load_runs
from experiments.analysis.theory import judge_theory, load_subjects
from experiments.analysis.verdicts import Verdict, judge_experiment


def judge_all(results_dir: Path) -> list[dict[str, Any]]:
    """One entry a claim."""
    claims = load_claims(results_dir / "claims.yaml")
    verdicts = list(judge_theory(claims, load_subjects(results_dir / "theory")))
    results_of: dict[str, Any] = {}
    for name in {c.experiment for c in claims if c.kind != "theory"}:
        there = (results_dir / "runs" / name).is_dir()
        results_of[name] = group_runs(load_runs(results_dir, name)) if there else ()
        verdicts += judge_experiment(claims, name, results_of[name])
    entries = []
    for claim in claims:
        own = [v for v in verdicts if v.claim.id == claim.id]
        entries.append(
            {
                "id": claim.id,
                "row": claim.row,
                "paper": claim.paper,
                "place": claim.place,
                "statement": claim.statement,
                "experiment": claim.experiment,
                "metric": claim.metric,
                "kind": claim.kind,
                "rule": claim.rule,
                "margin": claim.margin,
                "printed": claim.printed and claim.printed.value,
                "judgements": [_judgement(v, results_of, results_dir) for v in own],
            }
        )
    return entries


def _judgement(verdict: Verdict, results_of: Any, results_dir: Path) -> dict[str, Any]:
    effect, claim = verdict.effect, verdict.claim
    bounds = effect.interval if effect else None
    runs = []
    if claim.kind == "theory":
        runs = [f"theory/{claim.metric.partition('/')[0]}.json"]
    else:
        for entry in results_of[claim.experiment]:
            if entry.scale == verdict.scale:
                for group in entry.groups:
                    if group.contestant in claim.optimizers:
                        runs += [r.path.relative_to(results_dir).as_posix() for r in group.ended]
    return {
        "scale": verdict.scale,
        "outcome": verdict.outcome,
        "centre": effect and effect.centre,
        "low": bounds and bounds.low,
        "high": bounds and bounds.high,
        "n": effect.n if effect else 0,
        "reason": verdict.reason,
        "command": verdict.command,
        "more_seeds": None,
        "more_seeds_cost_s": None,
        "runs": runs if verdict.outcome != "not run" else [],
    }
