"""Intervals for a handful of seeds.

`n` seeds give values `x_1 ... x_n`. With mean `m` and sample standard deviation `s` (divisor
n - 1), Student's interval is `m ± t_{0.975, n-1} s / sqrt(n)`. A percentile bootstrap of three
values cannot leave their range and covers far less than it promises, so it is not offered.

Where something happened in `k` of `n` seeds, its share has the interval of Clopper and Pearson
(1934), which is exact. Six seeds that agree are the fewest that put it on one side of one half.

A run that misses its target has an infinite time. It is never dropped: the mean then does not exist
and the median stands in for it. Its interval, that of order statistics, takes six values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.special import betaincinv, stdtrit

CONFIDENCE = 0.95
# The fewest values whose smallest and largest hold the median between them 95 % of the time.
MEDIAN_SEEDS = 6


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
    def standard_error(self) -> float | None:
        """Deviation of the mean; None where there is no deviation."""
        return None if self.deviation is None else self.deviation / math.sqrt(self.n)

    @cached_property
    def half_width(self) -> float | None:
        """Half the width of Student's interval; None where there is no deviation."""
        if self.deviation is None:
            return None
        return t_quantile(self.n - 1, self.confidence) * self.deviation / math.sqrt(self.n)

    @cached_property
    def interval(self) -> Interval | None:
        """Student's interval of the mean; None for one value and with a miss."""
        if self.half_width is None or self.mean is None:
            return None
        return Interval(self.mean - self.half_width, self.mean + self.half_width)

    def exp(self) -> Estimate:
        """The values transformed back from logarithms (for a median or a range)."""
        return Estimate(tuple(exp(value) for value in self.values), self.confidence)


def share_interval(happened: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Clopper and Pearson's interval of a share.

    Args:
        happened: in how many seeds.
        n: seeds, at least 1.
        confidence: at least this often the interval has the true share in it.
    """
    if not 0 <= happened <= n or n < 1:
        raise ValueError(f"happened in {happened} of {n} seeds is no share")
    tail = (1 - confidence) / 2
    low = betaincinv(happened, n - happened + 1, tail) if happened else 0.0
    high = betaincinv(happened + 1, n - happened, 1 - tail) if happened < n else 1.0
    return Interval(float(low), float(high))


def t_quantile(degrees: float, confidence: float = CONFIDENCE) -> float:
    """Two-sided quantile of Student's t.

    Args:
        degrees: degrees of freedom, n - 1.
        confidence: probability between minus and plus the result.
    """
    if degrees < 1:
        raise ValueError(f"degrees of freedom must be at least 1, got {degrees}")
    return float(stdtrit(degrees, 0.5 + confidence / 2))


def median_interval(values: Sequence[float]) -> tuple[float, Interval]:
    """The median with the distribution-free interval of order statistics, misses infinite.

    The interval [x_(k), x_(n+1-k)] covers the median with probability 1 - 2 P(Bin(n, 1/2) < k); k
    is the largest for which that is at least 95 %.

    Args:
        values: at least six of them.

    Returns:
        The median and its interval.
    """
    ordered, n = sorted(values), len(values)
    if n < MEDIAN_SEEDS:
        raise ValueError(f"six values are needed for a 95 % interval of the median, got {n}")
    below, k = 0.0, 0
    while below + math.comb(n, k) / 2**n <= (1 - CONFIDENCE) / 2:
        below += math.comb(n, k) / 2**n
        k += 1
    middle = Estimate(tuple(ordered)).median
    assert middle is not None
    return middle, Interval(ordered[k - 1], ordered[n - k])


def exp(value: float) -> float:
    """Exponential; infinity where it overflows."""
    return float(np.exp(value))
