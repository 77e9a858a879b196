"""Intervals against scipy, their coverage by simulation, and what a miss does."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from experiments.analysis.measuring.comparison import compare
from experiments.analysis.measuring.statistics import Estimate, share_interval, t_quantile

values = st.floats(-1e6, 1e6)
samples = st.lists(values, min_size=2, max_size=8)


@pytest.mark.parametrize("n", [2, 3, 5, 30])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_interval_is_that_of_scipy(n, confidence):
    sample = np.random.default_rng(n).normal(90, 2, n)
    interval = Estimate(tuple(sample), confidence).interval
    expected = stats.t.interval(confidence, n - 1, loc=sample.mean(), scale=stats.sem(sample))
    # Both are float64 formulas of a few operations.
    np.testing.assert_allclose([interval.low, interval.high], expected, rtol=1e-12)


def test_quantile_at_three_seeds_is_the_tabulated_one():
    assert t_quantile(2) == pytest.approx(4.3027, abs=1e-4)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        t_quantile(0)


def test_interval_of_three_seeds_covers_the_mean_95_percent_of_the_time():
    repeats = 4000
    draws = np.random.default_rng(7).normal(10.0, 3.0, (repeats, 3))
    intervals = [Estimate(tuple(row)).interval for row in draws]
    hits = sum(interval.low <= 10.0 <= interval.high for interval in intervals)
    # Four standard errors of a binomial: 0.95 ± 0.0138. A normal quantile gives 0.87.
    assert hits / repeats == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / repeats))


def test_interval_of_the_paired_difference_is_the_paired_t_test():
    left, right = np.random.default_rng(3).normal(90, 2, (2, 4))
    comparison = compare(dict(enumerate(left)), dict(enumerate(right)))
    expected = stats.ttest_rel(left, right).confidence_interval(0.95)
    got = [comparison.interval.low, comparison.interval.high]
    np.testing.assert_allclose(got, [expected.low, expected.high], rtol=1e-12)


def test_pairing_removes_what_seeds_have_in_common():
    reference = {0: 80.0, 1: 90.0, 2: 70.0}
    subject = {seed: value + 1.0 for seed, value in reference.items()}
    comparison = compare(subject, reference)
    assert comparison.centre == 1.0
    assert comparison.interval.low == comparison.interval.high == 1.0


def test_speedup_is_the_geometric_mean_of_the_ratios():
    comparison = compare({0: 200.0, 1: 800.0}, {0: 100.0, 1: 100.0}, logarithmic=True)
    assert comparison.centre == pytest.approx(4.0)
    logs = np.log([2.0, 8.0])
    expected = np.exp(stats.t.interval(0.95, 1, loc=logs.mean(), scale=stats.sem(logs)))
    got = [comparison.interval.low, comparison.interval.high]
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_one_value_has_no_interval_and_says_so():
    assert Estimate((93.0,)).interval is None
    assert Estimate((93.0,)).half_width is None
    comparison = compare({0: 2.0}, {0: 1.0})
    assert comparison.interval is None and comparison.reason == "n = 1, no interval"


def test_misses_are_infinite_and_never_dropped():
    estimate = Estimate((100.0, math.inf, 300.0))
    assert (estimate.n, estimate.misses, estimate.median) == (3, 1, 300.0)
    assert estimate.mean is None and estimate.interval is None
    assert Estimate((100.0, math.inf, math.inf)).median == math.inf


@pytest.mark.parametrize("seeds", [5, 6])
def test_misses_on_one_side_alone_are_evidence_from_six_seeds_on(seeds):
    never, always = dict.fromkeys(range(seeds), math.inf), dict.fromkeys(range(seeds), 5.0)
    assert Estimate(tuple(never.values())).interval is None
    interval = compare(never, always, logarithmic=True).interval
    assert interval is None if seeds < 6 else interval.low == math.inf


@pytest.mark.parametrize(
    ("subject", "reference", "reason"),
    [
        ({0: math.inf, 1: 5.0, 2: 6.0}, {0: 1.0, 1: 1.0, 2: 1.0}, "1 of 3 missed"),
        ({0: math.inf, 1: 5.0}, {0: math.inf, 1: 1.0}, "1 of 2 missed"),
        ({0: 5.0, 1: 5.0}, {0: math.inf, 1: math.inf}, "2 of 2 missed"),
        ({0: 1.0}, {1: 1.0}, "no seed in common"),
    ],
)
def test_comparison_says_why_it_is_not_computable(subject, reference, reason):
    comparison = compare(subject, reference, logarithmic=True)
    assert comparison.centre is None
    assert reason in comparison.reason


def test_unpaired_seeds_are_named_and_left_out():
    comparison = compare({0: 2.0, 1: 3.0, 5: 99.0}, {0: 1.0, 1: 1.0, 4: 0.0})
    assert comparison.seeds == (0, 1) and comparison.unpaired == (4, 5)
    assert comparison.centre == 1.5


def test_nan_and_non_positive_times_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        Estimate((1.0, math.nan))
    with pytest.raises(ValueError, match="positive"):
        compare({0: 0.0}, {0: 1.0}, logarithmic=True)


@given(samples, st.randoms())
def test_permuting_the_seeds_changes_nothing(sample, random):
    shuffled = sample.copy()
    random.shuffle(shuffled)
    first, second = Estimate(tuple(sample)), Estimate(tuple(shuffled))
    assert (first.mean, first.half_width, first.median) == (
        second.mean,
        second.half_width,
        second.median,
    )


@given(samples, values)
def test_shifting_all_values_shifts_the_interval(sample, shift):
    before = Estimate(tuple(sample)).interval
    after = Estimate(tuple(value + shift for value in sample)).interval
    # Rounding: values up to 2e6 in float64, and t up to 12.7 at n = 2.
    assert after.low == pytest.approx(before.low + shift, abs=1e-6)
    assert after.high == pytest.approx(before.high + shift, abs=1e-6)


@given(st.dictionaries(st.integers(0, 9), st.floats(0.1, 1e4), min_size=2))
def test_speedup_of_swapped_sides_is_the_reciprocal(times):
    others = {seed: value * (1 + seed) for seed, value in times.items()}
    forth = compare(times, others, logarithmic=True)
    back = compare(others, times, logarithmic=True)
    assert forth.centre * back.centre == pytest.approx(1.0)
    assert forth.interval.low * back.interval.high == pytest.approx(1.0)


@pytest.mark.parametrize(("happened", "n"), [(0, 3), (3, 3), (2, 3), (1, 6), (6, 6), (5, 6)])
def test_interval_of_a_share_is_that_of_scipy(happened, n):
    interval = share_interval(happened, n)
    expected = stats.binomtest(happened, n).proportion_ci(0.95, method="exact")
    # scipy finds the same root by bisection.
    np.testing.assert_allclose([interval.low, interval.high], expected, atol=1e-9)


def test_six_seeds_that_agree_are_the_fewest_that_settle_a_share():
    assert share_interval(5, 5).low < 0.5 < share_interval(6, 6).low
    assert share_interval(0, 6).high < 0.5 < share_interval(0, 5).high
    with pytest.raises(ValueError, match="4 of 3 seeds"):
        share_interval(4, 3)


def test_from_six_seeds_on_a_miss_leaves_the_interval_of_the_median():
    # Two-fold, five times; missed once: the smallest and largest of six hold the median with
    # probability 1 - 2 / 2**6 = 0.969.
    subject = {seed: 200.0 for seed in range(5)} | {5: math.inf}
    reference = {seed: 100.0 for seed in range(6)}
    slower = compare(subject, reference, logarithmic=True)
    assert slower.centre == pytest.approx(2.0) and slower.missed == 1
    assert slower.interval.low == pytest.approx(2.0) and slower.interval.high == math.inf
    assert slower.reason == "1 of 6 missed: the median and its interval"
    faster = compare(reference, subject, logarithmic=True)
    assert (faster.interval.low, faster.interval.high) == pytest.approx((0.0, 0.5))


def test_pair_that_missed_on_both_sides_may_be_any_ratio():
    both = {seed: 100.0 for seed in range(5)} | {5: math.inf}
    other = {seed: 200.0 + seed for seed in range(5)} | {5: math.inf}
    unknown = compare(both, other, logarithmic=True)
    assert (unknown.interval.low, unknown.interval.high) == (0.0, math.inf)
    nine = {seed: 100.0 for seed in range(8)} | {8: math.inf}
    twice = {seed: 200.0 for seed in range(8)} | {8: math.inf}
    # Of nine the second smallest and largest: one unknown pair does not reach them.
    assert compare(nine, twice, logarithmic=True).interval.high == pytest.approx(0.5)
