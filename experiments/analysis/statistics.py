"""Intervals for a handful of seeds.

`n` seeds give values `x_1 ... x_n`. With mean `m` and sample standard deviation `s` (divisor
n - 1), Student's interval is `m ± t_{0.975, n-1} s / sqrt(n)`. A percentile bootstrap of three
values cannot leave their range and covers far less than it promises, so it is not offered.

Two optimizers that ran the same seed began with the same weights and saw the same batches: they
are compared seed by seed, and the interval is that of the mean of the differences. A speed-up is a
ratio, so its differences are those of logarithms and its interval is transformed back.

A run that misses its target has an infinite time. It is never dropped: the mean then does not exist
and the median stands in for it, and a comparison says why it cannot be computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A closed interval; the bounds may be infinite."""

    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """What `n` values, one a seed, say about their expectation.

    Attributes:
        values: one a seed; infinite for a miss.
        confidence: of the interval.
    """

    values: tuple[float, ...]
    confidence: float = CONFIDENCE

    def __post_init__(self) -> None:
        if any(math.isnan(value) for value in self.values):
            raise ValueError(f"a value is NaN: {self.values}; a miss is infinite, absent is absent")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must lie between 0 and 1, got {self.confidence}")

    @property
    def n(self) -> int:
        """Number of values, misses included."""
        return len(self.values)

    @cached_property
    def misses(self) -> int:
        """Number of infinite values."""
        return sum(math.isinf(value) for value in self.values)

    @cached_property
    def mean(self) -> float | None:
        """Arithmetic mean; None without values or with a miss."""
        if self.n == 0 or self.misses:
            return None
        if min(self.values) == max(self.values):
            return self.values[0]  # exactly: rounding must not pretend a spread
        # fsum: the result must not depend on the order of the seeds.
        return math.fsum(self.values) / self.n

    @cached_property
    def median(self) -> float | None:
        """Median with misses counted as infinite; None without values."""
        if self.n == 0:
            return None
        ordered = sorted(self.values)
        low, high = ordered[(self.n - 1) // 2], ordered[self.n // 2]
        return low if low == high else (low + high) / 2

    @cached_property
    def deviation(self) -> float | None:
        """Sample standard deviation (divisor n - 1); None below two values or with a miss."""
        if self.n < 2 or self.mean is None:
            return None
        squares = math.fsum((value - self.mean) ** 2 for value in self.values)
        return math.sqrt(squares / (self.n - 1))

    @cached_property
    def half_width(self) -> float | None:
        """Half the width of Student's interval; None where there is no deviation."""
        if self.deviation is None:
            return None
        return t_quantile(self.n - 1, self.confidence) * self.deviation / math.sqrt(self.n)

    @cached_property
    def interval(self) -> Interval | None:
        """Student's interval of the mean.

        Two or more misses and nothing but misses give an interval at infinity: that a target was
        never reached is certain. One value, or misses beside values, give none.
        """
        if self.half_width is not None and self.mean is not None:
            return Interval(self.mean - self.half_width, self.mean + self.half_width)
        if self.n >= 2 and self.misses == self.n and len(set(self.values)) == 1:
            return Interval(self.values[0], self.values[0])
        return None

    def exp(self) -> Estimate:
        """The values transformed back from logarithms (for a median or a range)."""
        return Estimate(tuple(_exp(value) for value in self.values), self.confidence)


@dataclass(frozen=True)
class Comparison:
    """Subject against reference, seed by seed.

    Attributes:
        estimate: of the difference, or of the logarithm of the ratio; None if not computable.
        seeds: the seeds both sides have.
        unpaired: the seeds only one side has; they do not enter.
        reason: why there is no estimate, or why it has no interval; "" if there is one.
        logarithmic: whether the estimate is that of a logarithm.
    """

    estimate: Estimate | None
    seeds: tuple[int, ...]
    unpaired: tuple[int, ...]
    reason: str
    logarithmic: bool = False

    @property
    def centre(self) -> float | None:
        """Mean difference, or geometric mean of the ratios; None if not computable."""
        if self.estimate is None or self.estimate.mean is None:
            return None
        return _exp(self.estimate.mean) if self.logarithmic else self.estimate.mean

    @property
    def interval(self) -> Interval | None:
        """Interval of the difference or of the ratio."""
        if self.estimate is None or self.estimate.interval is None:
            return None
        bounds = self.estimate.interval
        return Interval(_exp(bounds.low), _exp(bounds.high)) if self.logarithmic else bounds


def t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """Two-sided quantile of Student's t.

    Args:
        degrees: degrees of freedom, n - 1.
        confidence: probability between minus and plus the result.
    """
    if degrees < 1:
        raise ValueError(f"degrees of freedom must be at least 1, got {degrees}")
    return float(stdtrit(degrees, 0.5 + confidence / 2))


def compare(
    subject: Mapping[int, float],
    reference: Mapping[int, float],
    *,
    logarithmic: bool = False,
    confidence: float = CONFIDENCE,
) -> Comparison:
    """Subject minus reference (or subject over reference), paired by seed.

    Args:
        subject: value by seed; infinite for a miss.
        reference: value by seed; infinite for a miss.
        logarithmic: compare logarithms, for ratios; all values must then be positive.
        confidence: of the interval.

    Returns:
        The comparison over the seeds both have.
    """
    seeds = tuple(sorted(subject.keys() & reference.keys()))
    unpaired = tuple(sorted(subject.keys() ^ reference.keys()))
    left = _transform([subject[seed] for seed in seeds], logarithmic)
    right = _transform([reference[seed] for seed in seeds], logarithmic)
    if not seeds:
        return Comparison(None, seeds, unpaired, "no seed in common", logarithmic)
    missed = [math.isinf(a) or math.isinf(b) for a, b in zip(left, right, strict=True)]
    both = any(math.isinf(a) and math.isinf(b) for a, b in zip(left, right, strict=True))
    reason = f"not computable: {sum(missed)} of {len(seeds)} missed" if any(missed) else ""
    if both:  # infinity minus infinity says nothing about which is faster
        return Comparison(None, seeds, unpaired, reason, logarithmic)
    differences = tuple(a - b for a, b in zip(left, right, strict=True))
    if not reason and len(seeds) == 1:
        reason = "n = 1, no interval"
    return Comparison(Estimate(differences, confidence), seeds, unpaired, reason, logarithmic)


def _transform(values: Sequence[float], logarithmic: bool) -> list[float]:
    if not logarithmic:
        return [float(value) for value in values]
    if any(value <= 0 for value in values):
        raise ValueError(f"a ratio needs positive values, got {list(values)}")
    return [math.inf if math.isinf(value) else math.log(value) for value in values]


def _exp(value: float) -> float:
    return float(np.exp(value))
