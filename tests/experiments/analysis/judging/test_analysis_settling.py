"""How many more seeds: against sums done by hand, with the tabulated quantiles of Student's t."""

from __future__ import annotations

import math

import pytest

from experiments.analysis.judging.settling import Effect, more_seeds, seconds_of_a_seed
from experiments.analysis.measuring.groups import group_runs
from experiments.analysis.measuring.runs import load_runs
from experiments.analysis.measuring.statistics import Interval
from tests.experiments.analysis.run_factory import FakeRun, write_runs

ABOVE_ZERO = Interval(0.0, math.inf)


def effect(centre, error, n=3, half=9.0, **fields):
    return Effect(centre, Interval(centre - half, centre + half), n, "", error, **fields)


@pytest.mark.parametrize(
    ("centre", "deviation", "zone", "in_all"),
    [
        # (90, 91, 92): s = 1, centre 0.5 outside. t_16 / sqrt(17) = 2.1199 / 4.1231 = 0.514,
        # t_17 / sqrt(18) = 2.1098 / 4.2426 = 0.497: 18 seeds.
        (91.0, 1.0, Interval(89.5, 90.5), 18),
        # Inside, 0.3 from the nearer edge: t_44 / sqrt(45) = 2.0154 / 6.7082 = 0.3004, and
        # t_45 / sqrt(46) = 2.0141 / 6.7823 = 0.2970: 46 seeds.
        (90.2, 1.0, Interval(89.5, 90.5), 46),
        # An ordering, 2 s above zero: t_3 / 2 = 3.1824 / 2 = 1.591 < 2: one more of three.
        (2.0, 1.0, ABOVE_ZERO, 4),
    ],
)
def test_number_of_seeds_is_the_one_found_by_hand(centre, deviation, zone, in_all):
    found = more_seeds(effect(centre, deviation / math.sqrt(3)), zone)
    assert found.seeds == in_all - 3
    assert found.reason.startswith(f"{in_all} seeds in all")


def test_ratio_is_settled_in_logarithms():
    # log 2 = 0.693 from the edge 1, s of the logarithms 0.6: t_5 0.6 / sqrt(6) = 2.5706 x 0.2449 =
    # 0.630 < 0.693, while t_4 0.6 / sqrt(5) = 2.7764 x 0.2683 = 0.745: 6 seeds.
    ratio = effect(2.0, 0.6 / math.sqrt(3), logarithmic=True)
    assert more_seeds(ratio, Interval(1.0, math.inf)).seeds == 3


@pytest.mark.parametrize(
    ("given", "zone", "seeds", "reason"),
    [
        (effect(0.0, 1.0), ABOVE_ZERO, None, "not by more seeds: the centre lies on an edge"),
        (effect(0.01, 1.0), ABOVE_ZERO, None, "not by up to 50 seeds"),
        (Effect(1.0, None, 1, ""), ABOVE_ZERO, 2, "no spread is known yet"),
        (Effect(None, None, 0, ""), ABOVE_ZERO, None, "no value to judge by"),
        (Effect(None, None, 4, "", missed=1), ABOVE_ZERO, 2, "6 seeds give the median an interval"),
        (Effect(None, None, 7, "", missed=7), ABOVE_ZERO, None, "misses on both sides"),
        (Effect(2.0, Interval(-1.0, math.inf), 6, "", missed=1), ABOVE_ZERO, None, "the median"),
    ],
)
def test_it_says_when_more_seeds_are_no_answer(given, zone, seeds, reason):
    found = more_seeds(given, zone)
    assert found.seeds == seeds and reason in found.reason


def test_a_seed_costs_one_run_of_every_contestant(tmp_path):
    runs = [FakeRun("sgd", seed=s, seconds_per_epoch=10.0 + s) for s in (0, 1)]
    runs += [FakeRun("adam", seed=0, status="diverged", seconds_per_epoch=20.0)]
    runs += [FakeRun("kfac", seed=0, status="running")]
    runs += [FakeRun("slimqn", seed=0, status="crashed", top1=(), loss=())]
    (results,) = group_runs(load_runs(write_runs(tmp_path, *runs), "toy"))
    groups = {group.contestant: group for group in results.groups}
    # Three epochs: (30 + 33) / 2 and 60. Of 30 epochs KFAC has trained three.
    assert seconds_of_a_seed([groups["sgd"], groups["adam"]]) == pytest.approx(91.5)
    assert seconds_of_a_seed([groups["kfac"]]) == pytest.approx(300.0)
    assert seconds_of_a_seed([groups["sgd"], groups["slimqn"]]) is None
