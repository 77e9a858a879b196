"""Which seeds are pairs, and what happens to those that are not."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from experiments.analysis.measuring.comparison import compare
from experiments.analysis.measuring.groups import group_runs
from experiments.analysis.measuring.pairing import compare_groups, start_differs
from experiments.analysis.measuring.runs import load_runs
from tests.experiments.analysis.run_factory import FakeRun, write_runs


def results_of(tmp_path, config):
    """SGD, and Adam whose config differs, each with the final top-1 of three seeds."""
    runs = []
    for name, finals in (("sgd", (80.0, 90.0, 85.0)), ("adam", (81.0, 91.1, 85.9))):
        for seed, final in enumerate(finals):
            extra = config if name == "adam" else {}
            top1, loss = (50.0, final), (2.0, 1.0)
            runs.append(FakeRun(name, seed=seed, top1=top1, loss=loss, extra_config=extra))
    (results,) = group_runs(load_runs(write_runs(tmp_path, *runs), "toy"))
    return results


@pytest.mark.parametrize(
    ("config", "differs"),
    [
        ({}, ""),
        ({"schedule": {"name": "steps"}}, ""),
        ({"train": {"epochs": 99}}, ""),
        ({"dataset": {"mean": [0.5], "test_limit": 10}}, ""),
        ({"train": {"batch_size": 64}}, "train.batch_size"),
        ({"model": {"width": 8}}, "model.width"),
        ({"dataset": {"train_limit": 512}}, "dataset.train_limit"),
    ],
)
def test_seeds_are_pairs_where_weights_and_images_are_the_same(tmp_path, config, differs):
    results = results_of(tmp_path, config)
    sgd, adam = results.of_contestant("sgd")[0], results.of_contestant("adam")[0]
    assert start_differs(sgd, adam) == start_differs(adam, sgd) == differs
    comparison = compare_groups(results, adam, sgd, "final_top1")
    assert comparison.paired == (not differs)
    assert comparison.centre == pytest.approx(1.0)
    # Seeds differ by 5 points, the two by 0.1: only pairs show it.
    assert (comparison.interval.high < 2.0) == (not differs)


def test_without_pairs_the_interval_is_welchs():
    rng = np.random.default_rng(1)
    left, right = rng.normal(90, 2, 4), rng.normal(88, 0.5, 3)
    comparison = compare(dict(enumerate(left)), dict(enumerate(right, 7)), paired=False)
    expected = stats.ttest_ind(left, right, equal_var=False).confidence_interval(0.95)
    got = [comparison.interval.low, comparison.interval.high]
    np.testing.assert_allclose(got, [expected.low, expected.high], rtol=1e-12)
    assert comparison.n == 3 and not comparison.paired


def test_without_pairs_a_miss_is_still_infinite():
    hit, miss = {0: 5.0, 1: 6.0}, dict.fromkeys(range(2, 6), math.inf)
    more = {**hit, 6: 5.0, 7: 4.0}
    # chance parts four from four in 2 of 70 ways, two from four in 2 of 15
    assert compare(miss, more, logarithmic=True, paired=False).interval.low == math.inf
    assert compare(more, miss, logarithmic=True, paired=False).interval.high == 0.0
    assert compare(miss, hit, logarithmic=True, paired=False).interval is None
    some = compare(hit, {2: 5.0, 3: math.inf}, logarithmic=True, paired=False)
    assert some.interval is None and some.reason == "not computable: 1 of 4 missed"
    assert compare(hit, {}, paired=False).reason == "no run on one side"
    assert compare({0: 1.0}, hit, paired=False).reason == "n = 1, no interval"
    assert compare({0: 1.0, 1: 1.0}, {0: 3.0, 1: 3.0}, paired=False).interval.low == -2.0
