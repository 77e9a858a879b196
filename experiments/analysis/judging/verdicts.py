"""A verdict is a function of run files and of a claim that was written down before the run.

The effect of a claim has an interval over seeds. The claim allows a zone:

* `within`: printed value ± margin (bounds included);
* `above`: everything above printed value - margin (bound excluded, so a tie is inconclusive;
  printed value 0 or, for a ratio, 1 where the paper prints no number);
* `below`: everything below printed value + margin (bound excluded).

Interval inside the zone: *reproduced*. Interval outside: *not reproduced*. Otherwise, or without an
interval: *inconclusive*, with how many more seeds would settle it. No runs that may judge the
claim: *not run*, with the command that would settle it. A verdict carries the scale of its runs,
and speaks for no other. The effect of a claim about what happens (`share`) is the share of the
seeds in which it happened. Seconds of several machines judge nothing.

A claim that presupposes another ("damping prevents divergence": that there is one without it) is
*inconclusive* in place of *reproduced* where the other is not reproduced at the same scale. Where
more seeds than those of the claim came in, and its own alone say something else, the verdict tells
what they say (`first_look`): who looks again and again finds a difference too easily.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from experiments.analysis.judging.claims import Claim
from experiments.analysis.judging.settling import Effect, MoreSeeds, more_seeds, seconds_of_a_seed
from experiments.analysis.measuring.groups import Group, Results, display_name
from experiments.analysis.measuring.measures import measure_named
from experiments.analysis.measuring.pairing import compare_groups, start_differs
from experiments.analysis.measuring.statistics import (
    MEDIAN_SEEDS,
    Estimate,
    Interval,
    median_interval,
    share_interval,
)

Outcome = Literal["reproduced", "not reproduced", "inconclusive", "not run"]


@dataclass(frozen=True)
class Verdict:
    """The judgement of one claim at one scale.

    Attributes:
        claim: the claim.
        scale: of the runs it was judged by.
        outcome: reproduced, not reproduced, inconclusive or not run.
        effect: ours; None without runs.
        reason: why, where the outcome alone does not say it.
        command: what would settle it; "" if it is settled.
        groups: the contestants that it was judged by, the subject first.
        more: the seeds that would settle it; None unless it is inconclusive and was judged by runs.
        first_look: the outcome with the claim's own seeds alone; None where it is the same.
    """

    claim: Claim
    scale: str
    outcome: Outcome
    effect: Effect | None
    reason: str
    command: str
    groups: tuple[Group, ...] = ()
    more: MoreSeeds | None = None
    first_look: Outcome | None = None

    def __str__(self) -> str:
        if self.outcome == "not run":
            return f"not run (shown: {self.scale} scale)" if self.effect else "not run"
        return self.outcome if self.scale == "full" else f"{self.outcome} at {self.scale} scale"

    @property
    def after_a_look(self) -> str:
        """In words what the claim's own seeds alone say, where that is something else."""
        if self.first_look is None:
            return ""
        return f"{self.first_look} with seeds {', '.join(map(str, self.claim.seeds))} alone"

    @property
    def difference(self) -> float | None:
        """Ours minus the printed effect; None without either."""
        printed = self.claim.printed
        if self.effect is None or self.effect.centre is None or printed is None:
            return None
        return self.effect.centre - printed.value

    @property
    def more_cost_s(self) -> float | None:
        """Training seconds of the seeds that would settle it, from the runs that there are."""
        if self.more is None or self.more.seeds is None:
            return None
        seconds = seconds_of_a_seed(self.groups)
        return None if seconds is None else self.more.seeds * seconds


def zone_of(claim: Claim) -> Interval:
    """The effects the claim allows."""
    neutral = 1.0 if claim.kind in ("ratio", "speedup") else 0.0
    printed = neutral if claim.printed is None else claim.printed.value
    low = -math.inf if claim.rule == "below" else _decimal(printed - claim.margin)
    high = math.inf if claim.rule == "above" else _decimal(printed + claim.margin)
    return Interval(low, high)


def decide(interval: Interval | None, zone: Interval, rule: str) -> Outcome:
    """Compare an interval with the zone a claim allows.

    Args:
        interval: of the effect; None gives inconclusive.
        zone: what the claim allows.
        rule: within, above or below.
    """
    if interval is None:
        return "inconclusive"
    if rule == "above":
        if interval.low > zone.low:
            return "reproduced"
        return "not reproduced" if interval.high < zone.low else "inconclusive"
    if rule == "below":
        if interval.high < zone.high:
            return "reproduced"
        return "not reproduced" if interval.low > zone.high else "inconclusive"
    if zone.low <= interval.low and interval.high <= zone.high:
        return "reproduced"
    outside = interval.high < zone.low or interval.low > zone.high
    return "not reproduced" if outside else "inconclusive"


def judge(claim: Claim, results: Results | None) -> Verdict:
    """Judge one claim by the runs of one scale.

    Args:
        claim: the claim.
        results: the runs of its experiment at one scale; None if there are none at any.
    """
    command = claim.settled_by()
    if results is None:
        return Verdict(claim, "full", "not run", None, "no runs", command)
    groups: list[Group] = []
    for name in (name for name in (claim.optimizer, claim.reference) if name):
        candidates = [group for group in results.of_contestant(name) if group.ended]
        scale_command = claim.settled_by(_judging_scale(claim, results.scale))
        if not candidates:
            reason = f"no ended run of {display_name(name)}{_begun(results.of_contestant(name))}"
            return Verdict(claim, results.scale, "not run", None, reason, scale_command)
        if len(candidates) > 1:
            keys = ", ".join(key for key, _ in candidates[0].differs)
            reason = f"{display_name(name)} was run under several configs ({keys})"
            outcome: Outcome = "inconclusive" if results.scale in claim.judged_at else "not run"
            return Verdict(claim, results.scale, outcome, None, reason, "")
        groups.append(candidates[0])
    effect = _effect(claim, results, groups)
    used = tuple(groups)
    if results.scale not in claim.judged_at:
        reason = f"judged by runs at {' or '.join(claim.judged_at)} scale only"
        return Verdict(claim, results.scale, "not run", effect, reason, command, used)
    machines = {run.machine for group in groups for run in group.ended}
    if measure_named(claim.metric).kind == "seconds" and len(machines) > 1:
        reason = f"seconds of several machines are not compared: {'; '.join(sorted(machines))}"
        scale = results.scale
        return Verdict(claim, scale, "inconclusive", effect, reason, command, used)
    zone = zone_of(claim)
    decided = decide(effect.interval, zone, claim.rule)
    first = decide(_first_effect(claim, results, groups).interval, zone, claim.rule)
    return Verdict(
        claim,
        results.scale,
        decided,
        effect,
        effect.reason,
        "" if results.scale == "full" and decided != "inconclusive" else command,
        used,
        more_seeds(effect, zone) if decided == "inconclusive" else None,
        None if first == decided else first,
    )


def judge_experiment(
    claims: Sequence[Claim], experiment: str, results: Sequence[Results]
) -> tuple[Verdict, ...]:
    """Judge every claim of an experiment at every scale that has runs.

    Args:
        claims: the registry.
        experiment: name of the experiment.
        results: its runs, one entry per scale; may be empty.
    """
    own = [claim for claim in claims if claim.experiment == experiment]
    judged = []
    for entry in results or (None,):
        by_id = {claim.id: judge(claim, entry) for claim in own}
        judged += [_unless_presupposed(verdict, by_id) for verdict in by_id.values()]
    return tuple(judged)


def _begun(groups: Sequence[Group]) -> str:
    """Which seeds have begun; not how far they are: a verdict shall not change with every epoch."""
    seeds = sorted({run.seed for group in groups for run in group.unfinished})
    return f"; begun: seed {', '.join(map(str, seeds))}" if seeds else ""


def _unless_presupposed(verdict: Verdict, by_id: Mapping[str, Verdict]) -> Verdict:
    """The verdict, withheld where it presupposes what is not reproduced."""
    other = verdict.claim.presupposes
    if verdict.outcome != "reproduced" or not other or by_id[other].outcome == "reproduced":
        return verdict
    reason = f"it presupposes {other}, which is {by_id[other]}"
    return replace(
        verdict,
        outcome="inconclusive",
        reason="; ".join(filter(None, (verdict.reason, reason))),
        command=verdict.claim.settled_by(),
        more=MoreSeeds(None, f"not by more seeds: {reason}"),
    )


def _judging_scale(claim: Claim, scale: str) -> str:
    return scale if scale in claim.judged_at else claim.judged_at[0]


def _first_effect(claim: Claim, results: Results, groups: Sequence[Group]) -> Effect:
    """The effect as the claim's own seeds have it; that of all seeds where they have no runs."""
    first = [
        replace(group, runs=tuple(run for run in group.runs if run.seed in claim.seeds))
        for group in groups
    ]
    return _effect(claim, results, first if all(group.ended for group in first) else groups)


def _effect(claim: Claim, results: Results, groups: Sequence[Group]) -> Effect:
    if claim.kind == "value":
        values = results.values(groups[0], claim.metric)
        return _effect_of_value(claim, values, len(groups[0].ended))
    if claim.kind == "share":
        values = results.values(groups[0], claim.metric)
        return _effect_of_share(values, len(groups[0].ended))
    first, second = reversed(groups) if claim.kind == "speedup" else groups
    logarithmic = claim.kind in ("ratio", "speedup")
    comparison = compare_groups(results, first, second, claim.metric, logarithmic=logarithmic)
    reasons = [comparison.reason]
    if comparison.unpaired:
        seeds = ", ".join(map(str, comparison.unpaired))
        reasons.append(f"seed {seeds} on one side only, left out")
    if not comparison.paired:
        reasons.append(f"not paired by seed: {start_differs(*groups)} differs")
    interval = comparison.interval
    if claim.deterministic and interval is None and comparison.centre is not None:
        interval = Interval(comparison.centre, comparison.centre)
    return Effect(
        comparison.centre,
        interval,
        comparison.n,
        "; ".join(filter(None, reasons)),
        standard_error=comparison.standard_error,
        logarithmic=logarithmic,
        paired=comparison.paired,
        missed=comparison.missed,
    )


def _effect_of_share(values: dict[int, float], ended: int) -> Effect:
    n = len(values)
    reason = "" if n == ended else f"{ended - n} of {ended} ended runs have no value"
    if n == 0:
        return Effect(None, None, 0, reason)
    happened = sum(value == 1 for value in values.values())
    seen = f"in {happened} of {n} seeds"
    reason = "; ".join(filter(None, (seen, reason)))
    return Effect(happened / n, share_interval(happened, n), n, reason, happened=happened)


def _effect_of_value(claim: Claim, values: dict[int, float], ended: int) -> Effect:
    estimate = Estimate(tuple(values.values()))
    centre, interval, error = estimate.mean, estimate.interval, estimate.standard_error
    reason = ""
    if estimate.n == 0:
        reason = "no run has this value"
    elif estimate.misses and interval is None and estimate.n >= MEDIAN_SEEDS:
        centre, interval = median_interval(estimate.values)
        reason = f"{estimate.misses} of {estimate.n} without a value: the median and its interval"
    elif estimate.misses:
        reason = f"mean not computable: {estimate.misses} of {estimate.n} without a value"
    elif estimate.n == 1 and claim.deterministic:
        interval = Interval(estimate.values[0], estimate.values[0])
    elif estimate.n == 1:
        reason = "n = 1, no interval"
    if estimate.n < ended:
        left_out = f"{ended - estimate.n} of {ended} ended runs have no value"
        reason = "; ".join(filter(None, (reason, left_out)))
    return Effect(
        centre, interval, estimate.n, reason, standard_error=error, missed=estimate.misses
    )


def _decimal(value: float) -> float:
    """Undo binary rounding, so that 94.1 - 0.3 is the 93.8 of the claim."""
    return round(value, 9)
