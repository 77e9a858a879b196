"""How many more seeds would settle a verdict that is inconclusive, and what they would cost.

With the standard error `e` of `n` seeds, the interval of `N` seeds has the half width
`t_{0.975, N-1} e sqrt(n / N)`, if the spread stays what it is. A verdict is settled by the smallest
`N` for which that is less than the distance from the centre to the nearest edge of the zone that
the claim allows, if the centre stays where it is. For ratios all of this is in logarithms. A share
of the seeds has its own interval, that of Clopper and Pearson, at every `N`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.analysis.measuring.groups import Group
from experiments.analysis.measuring.measures import FINISHED
from experiments.analysis.measuring.runs import Run
from experiments.analysis.measuring.statistics import (
    MEDIAN_SEEDS,
    Interval,
    share_interval,
    t_quantile,
)

# Nobody will run more; a centre this near to an edge is as good as on it.
MOST_SEEDS = 50
# The fewest whose interval is of use: Student's quantile is 12.7 at two seeds and 4.3 at three.
FIRST_SEEDS = 3


@dataclass(frozen=True)
class Effect:
    """What our runs say about the effect of a claim.

    Attributes:
        centre: mean effect (geometric mean of a ratio); None if not computable.
        interval: of the mean; None if there is none.
        n: number of runs, or of pairs of runs, in it.
        reason: why something is not computable, or which runs did not enter.
        standard_error: of the mean, or of the mean logarithm; None where there is none.
        logarithmic: whether the effect is a ratio, compared in logarithms.
        paired: whether it is of pairs of seeds; None where it is of one contestant.
        missed: runs, or pairs, that are infinite.
        happened: runs in which it happened, where the effect is a share of the runs.
    """

    centre: float | None
    interval: Interval | None
    n: int
    reason: str
    standard_error: float | None = None
    logarithmic: bool = False
    paired: bool | None = None
    missed: int = 0
    happened: int | None = None


@dataclass(frozen=True)
class MoreSeeds:
    """What would settle an inconclusive verdict.

    Attributes:
        seeds: how many more, of every contestant of the claim; None: no number of them is known.
        reason: what they would do, or why no number of them is known.
    """

    seeds: int | None
    reason: str


def more_seeds(effect: Effect, zone: Interval) -> MoreSeeds:
    """How many more seeds would settle an inconclusive verdict.

    Args:
        effect: whose interval does not decide.
        zone: what the claim allows.
    """
    if effect.n == 0:
        return MoreSeeds(None, "not by more seeds: there is no value to judge by")
    if effect.happened is not None:
        return _more_for_a_share(effect.happened / effect.n, effect.n, zone)
    if effect.interval is None and effect.missed:
        more = MEDIAN_SEEDS - effect.n
        if more <= 0:
            return MoreSeeds(None, "not by more seeds: there are misses on both sides")
        return MoreSeeds(more, f"{MEDIAN_SEEDS} seeds give the median an interval, misses or not")
    if effect.interval is None:
        return MoreSeeds(
            FIRST_SEEDS - effect.n, f"{FIRST_SEEDS} seeds give an interval; no spread is known yet"
        )
    if effect.standard_error is None or effect.centre is None:
        return MoreSeeds(None, "not known: an interval of the median says nothing about more seeds")
    distance = _distance(effect, zone)
    if distance == 0:
        return MoreSeeds(None, "not by more seeds: the centre lies on an edge of the claim's zone")
    for n in range(effect.n + 1, MOST_SEEDS + 1):
        half = t_quantile(n - 1) * effect.standard_error * math.sqrt(effect.n / n)
        if half < distance:
            return MoreSeeds(
                n - effect.n, f"{n} seeds in all, if centre and spread stay what they are"
            )
    return MoreSeeds(None, f"not by up to {MOST_SEEDS} seeds: the centre is too near to an edge")


def _more_for_a_share(share: float, n: int, zone: Interval) -> MoreSeeds:
    """The same where it is a share of the seeds, if that stays what it is up to a whole seed."""
    for total in range(n + 1, MOST_SEEDS + 1):
        interval = share_interval(round(share * total), total)
        inside = interval.low > zone.low and interval.high < zone.high
        if inside or interval.low > zone.high or interval.high < zone.low:
            return MoreSeeds(total - n, f"{total} seeds in all, if the share stays what it is")
    return MoreSeeds(None, f"not by up to {MOST_SEEDS} seeds: the share is too near to an edge")


def seconds_of_a_seed(groups: Sequence[Group]) -> float | None:
    """Training seconds of one more seed of these contestants, from the runs that they have.

    Args:
        groups: the contestants of a claim.

    Returns:
        The sum of their mean training seconds; None if one of them has no run that tells.
    """
    means = [seconds_of_a_run(group) for group in groups]
    known = [mean for mean in means if mean is not None]
    return sum(known) if known and len(known) == len(means) else None


def seconds_of_a_run(group: Group) -> float | None:
    """Mean training seconds of one run; one that is not over counts as long as it will be.

    Args:
        group: the seeds of one contestant.

    Returns:
        None where no run has trained an epoch.
    """
    seconds = [
        float(run.epochs[-1]["train_time_s"]) * _epochs_left_over(run)
        for run in group.runs
        if run.epochs
    ]
    return math.fsum(seconds) / len(seconds) if seconds else None


def _epochs_left_over(run: Run) -> float:
    """All epochs of a run over those that it has trained; 1 where it is over."""
    if run.status in FINISHED:
        return 1.0
    return float(run.config["train"]["epochs"]) / float(run.epochs[-1]["epoch"])


def _distance(effect: Effect, zone: Interval) -> float:
    """From the centre to the nearest edge of the zone, in the effect's own units."""
    assert effect.centre is not None
    edges = [edge for edge in (zone.low, zone.high) if math.isfinite(edge)]
    if not effect.logarithmic:
        return min(abs(effect.centre - edge) for edge in edges)
    return min(abs(math.log(effect.centre / edge)) for edge in edges if edge > 0)
