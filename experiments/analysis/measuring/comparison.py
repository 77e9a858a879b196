"""Subject against reference: a difference or a ratio of two sides' seeds, with its interval.

Two optimizers that ran the same seed began with the same weights and saw the same batches: they
are compared seed by seed, and the interval is that of the mean of the differences. Where they did
not (`pairing`), the interval is Welch's, of the difference of two means. A speed-up is a ratio: its
differences are those of logarithms, its interval is transformed back.

A miss is infinite: there is no mean, and from six seeds on the median and its interval stand in
for it. With fewer, that every seed misses on one side alone is still too little for an interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from experiments.analysis.measuring.statistics import (
    CONFIDENCE,
    MEDIAN_SEEDS,
    Estimate,
    Interval,
    exp,
    median_interval,
    t_quantile,
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Subject against reference.

    Attributes:
        middle: mean difference or mean logarithm of the ratio; the median where a seed missed; None
            if not computable.
        bounds: 95 % interval of it; None if there is none.
        standard_error: of the mean; None where there is none.
        seeds: the seeds in it: those that both sides have, or all where it is not paired.
        unpaired: the seeds only one side has; they do not enter a paired comparison.
        n: pairs of seeds, or the smaller number of runs of the two sides.
        missed: pairs, or runs, that are infinite.
        reason: why there is no number, or no interval, or what is special about it; "" otherwise.
        logarithmic: whether the numbers are logarithms.
        paired: whether it goes seed by seed.
    """

    middle: float | None = None
    bounds: Interval | None = None
    standard_error: float | None = None
    seeds: tuple[int, ...]
    unpaired: tuple[int, ...] = ()
    n: int
    missed: int = 0
    reason: str = ""
    logarithmic: bool = False
    paired: bool = True

    @property
    def centre(self) -> float | None:
        """Mean difference, or geometric mean of the ratios; None if not computable."""
        if self.middle is None:
            return None
        return exp(self.middle) if self.logarithmic else self.middle

    @property
    def interval(self) -> Interval | None:
        """Interval of the difference or of the ratio."""
        if self.bounds is None or not self.logarithmic:
            return self.bounds
        return Interval(exp(self.bounds.low), exp(self.bounds.high))


def compare(
    subject: Mapping[int, float],
    reference: Mapping[int, float],
    *,
    logarithmic: bool = False,
    paired: bool = True,
    confidence: float = CONFIDENCE,
) -> Comparison:
    """Subject minus reference (or subject over reference).

    Args:
        subject: value by seed; infinite for a miss.
        reference: value by seed; infinite for a miss.
        logarithmic: compare logarithms, for ratios; all values must then be positive.
        paired: seed by seed; False where equal seeds have nothing in common.
        confidence: of the interval.

    Returns:
        The comparison over the seeds both have; over all seeds of each where it is not paired.
    """
    if not paired:
        return _independent(subject, reference, logarithmic, confidence)
    seeds = tuple(sorted(subject.keys() & reference.keys()))
    told = partial(
        Comparison,
        seeds=seeds,
        unpaired=tuple(sorted(subject.keys() ^ reference.keys())),
        n=len(seeds),
        logarithmic=logarithmic,
    )
    left = _transform([subject[seed] for seed in seeds], logarithmic)
    right = _transform([reference[seed] for seed in seeds], logarithmic)
    if not subject or not reference:
        return told(reason="no run on one side has a value")
    if not seeds:
        return told(reason="no seed in common")
    if any(map(math.isinf, (*left, *right))):
        return _with_misses(left, right, told)
    estimate = Estimate(tuple(a - b for a, b in zip(left, right, strict=True)), confidence)
    return told(
        middle=estimate.mean,
        bounds=estimate.interval,
        standard_error=estimate.standard_error,
        reason="n = 1, no interval" if len(seeds) == 1 else "",
    )


def _with_misses(
    left: Sequence[float],
    right: Sequence[float],
    told: Callable[..., Comparison],
) -> Comparison:
    """Pairs of which some are infinite; both infinite may be any difference, from lowest on."""
    pairs = list(zip(left, right, strict=True))
    n, missed = len(pairs), sum(math.isinf(a) or math.isinf(b) for a, b in pairs)
    told = partial(told, missed=missed)
    without = f"not computable: {missed} of {n} missed"
    if n < MEDIAN_SEEDS:
        return told(reason=without)
    lowest = tuple(-math.inf if math.isinf(a) and a == b else a - b for a, b in pairs)
    highest = tuple(math.inf if math.isinf(a) and a == b else a - b for a, b in pairs)
    (low_middle, low), (high_middle, high) = median_interval(lowest), median_interval(highest)
    bounds = Interval(low.low, high.high)
    if bounds.low == bounds.high:  # infinite
        return told(bounds=bounds, reason=without)
    return told(
        middle=low_middle if low_middle == high_middle else None,
        bounds=bounds,
        reason=f"{missed} of {n} missed: the median and its interval",
    )


def _independent(
    subject: Mapping[int, float],
    reference: Mapping[int, float],
    logarithmic: bool,
    confidence: float,
) -> Comparison:
    """Difference of two means with Welch's interval.

    With the squared standard errors `a = s_1²/n_1`, `b = s_2²/n_2` it is
    `m_1 - m_2 ± t_{0.975, ν} sqrt(a + b)`, `ν = (a + b)² / (a²/(n_1 - 1) + b²/(n_2 - 1))`.
    """
    left, right = (
        Estimate(tuple(_transform([by_seed[seed] for seed in sorted(by_seed)], logarithmic)))
        for by_seed in (subject, reference)
    )
    told = partial(
        Comparison,
        seeds=tuple(sorted(subject.keys() | reference.keys())),
        n=min(left.n, right.n),
        logarithmic=logarithmic,
        paired=False,
    )
    if not left.n or not right.n:
        return told(reason="no run on one side")
    if left.mean is None or right.mean is None:
        missed = left.misses + right.misses
        reason = f"not computable: {missed} of {left.n + right.n} missed"
        return told(bounds=_certain(left, right), reason=reason, missed=missed)
    middle = left.mean - right.mean
    if left.deviation is None or right.deviation is None:
        return told(middle=middle, reason="n = 1, no interval")
    a, b = left.deviation**2 / left.n, right.deviation**2 / right.n
    half = 0.0
    if a + b > 0:
        degrees = (a + b) ** 2 / (a**2 / (left.n - 1) + b**2 / (right.n - 1))
        half = t_quantile(degrees, confidence) * math.sqrt(a + b)
    return told(
        middle=middle,
        bounds=Interval(middle - half, middle + half),
        standard_error=math.sqrt(a + b),
    )


def _certain(left: Estimate, right: Estimate) -> Interval | None:
    """Infinity, where all of one side are infinite alike, none of the other is, and both are many.

    Chance alone parts n_1 + n_2 runs so in 2 of `comb(n_1 + n_2, n_1)` ways: that must be rarer
    than the interval may err.
    """
    if not left.n or 2 > (1 - CONFIDENCE) * math.comb(left.n + right.n, left.n):
        return None
    for side, other, sign in ((left, right, 1), (right, left, -1)):
        if side.misses == side.n and len(set(side.values)) == 1 and not other.misses:
            return Interval(sign * side.values[0], sign * side.values[0])
    return None


def _transform(values: Sequence[float], logarithmic: bool) -> list[float]:
    if not logarithmic:
        return [float(value) for value in values]
    if any(value <= 0 for value in values):
        raise ValueError(f"a ratio needs positive values, got {list(values)}")
    return [math.inf if math.isinf(value) else math.log(value) for value in values]
