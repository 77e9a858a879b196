"""Curves over seeds, on each axis, with a known answer."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest

from experiments.analysis.measuring.curves import GRID_POINTS, curve, extent
from experiments.analysis.measuring.groups import group_runs
from experiments.analysis.measuring.runs import load_runs
from experiments.analysis.measuring.statistics import t_quantile
from experiments.analysis.showing.csv_files import curves_csv
from tests.experiments.analysis.run_factory import FakeRun, write_runs


def only_group(tmp_path, *runs):
    write_runs(tmp_path, *runs)
    (results,) = group_runs(load_runs(tmp_path, "toy"))
    (group,) = results.groups
    return group


def test_mean_and_spread_at_each_epoch(tmp_path):
    group = only_group(
        tmp_path,
        FakeRun(seed=0, top1=(10.0, 20.0), loss=(1, 1)),
        FakeRun(seed=1, top1=(14.0, 20.0), loss=(1, 1)),
    )
    line = curve(group, "test_top1", "epoch")
    np.testing.assert_array_equal(line.x, [1, 2])
    np.testing.assert_array_equal(line.n, [2, 2])
    np.testing.assert_allclose(line.mean, [12.0, 20.0])
    np.testing.assert_array_equal([line.low, line.high], [[10, 20], [14, 20]])
    # s = sqrt(8), s / sqrt(2) = 2.
    np.testing.assert_allclose(line.half_width, [2 * t_quantile(1), 0.0])
    np.testing.assert_array_equal(curve(group, "test_top1", "step").x, [100, 200])


def test_diverged_seed_ends_and_n_says_so(tmp_path):
    group = only_group(
        tmp_path,
        FakeRun(seed=0, top1=(10.0, 20.0, 30.0)),
        FakeRun(seed=1, top1=(20.0, None, None), status="diverged"),
    )
    line = curve(group, "test_top1", "epoch")
    np.testing.assert_array_equal(line.n, [2, 1, 1])
    np.testing.assert_allclose(line.mean, [15.0, 20.0, 30.0])
    assert np.isnan(line.half_width[1])
    assert line.ends == ((1.0, 20.0),)


def test_seconds_are_interpolated_and_a_finished_seed_keeps_its_last_value(tmp_path):
    group = only_group(
        tmp_path,
        FakeRun(seed=0, top1=(10.0, 20.0, 30.0), seconds_per_epoch=10.0),
        FakeRun(seed=1, top1=(10.0, 20.0, 30.0), seconds_per_epoch=20.0),
    )
    line = curve(group, "test_top1", "train_time_s")
    assert (line.x[0], line.x[-1], line.x.size) == (20.0, 60.0, GRID_POINTS)
    np.testing.assert_array_equal(line.n, 2)
    # Seed 0 gains 1 a second until it ends with 30 at 30 s, seed 1 half of that: at 20 s they stand
    # at 20 and 10.
    first, second = np.minimum(line.x, 30.0), line.x / 2
    np.testing.assert_allclose(line.mean, (first + second) / 2)
    assert line.mean[-1] == 30.0


def test_seconds_of_seeds_that_did_not_finish_end_with_the_first(tmp_path):
    runs = [
        FakeRun(seed=i, seconds_per_epoch=s, status="timeout") for i, s in ((0, 10.0), (1, 20.0))
    ]
    line = curve(only_group(tmp_path, *runs), "test_top1", "train_time_s")
    assert (line.x[0], line.x[-1]) == (20.0, 30.0)


def test_seeds_without_common_seconds_give_no_curve(tmp_path):
    runs = [
        FakeRun(seed=i, seconds_per_epoch=s, status="timeout") for i, s in ((0, 1.0), (1, 100.0))
    ]
    assert curve(only_group(tmp_path, *runs), "test_top1", "train_time_s").x.size == 0


def test_one_record_gives_one_point(tmp_path):
    group = only_group(tmp_path, FakeRun(top1=(10.0,), loss=(1.0,)))
    line = curve(group, "train_loss", "train_time_s")
    assert (line.x.tolist(), line.mean.tolist()) == ([10.0], [1.0])


def test_a_metric_that_no_run_has_gives_no_curve(tmp_path):
    line = curve(only_group(tmp_path, FakeRun()), "test_top3", "epoch")
    assert line.x.size == 0 and not line.drawn


@pytest.mark.parametrize("axis", ["epoch", "step", "train_time_s"])
def test_unfinished_seed_is_a_line_of_its_own_and_in_no_mean(tmp_path, axis):
    begun = FakeRun(seed=1, status="running", top1=(5.0, None, 40.0), loss=(9.0, 7.0, 0.1))
    group = only_group(tmp_path, FakeRun(top1=(10.0, 20.0, 30.0), loss=(2.0, 1.0, 0.5)), begun)
    line = curve(group, "test_top1", axis)
    assert line.n.max() == 1 and line.high.max() == line.mean.max() == 30.0
    (trace,) = line.unfinished
    assert (trace.run.seed, list(trace.y)) == (1, [5.0, 40.0])
    np.testing.assert_allclose(trace.x, np.array([1, 3]) * {"epoch": 1, "step": 100}.get(axis, 10))
    shown = extent([curve(group, "train_loss", axis)])
    assert (shown.low, shown.high) == (0.1, 9.0)


def test_seeds_that_are_all_unfinished_have_an_extent_of_their_own(tmp_path):
    group = only_group(tmp_path, FakeRun(status="running", loss=(2.0, 90.0, 1.0)))
    line = curve(group, "train_loss", "epoch")
    shown = extent([line])
    assert line.x.size == 0 and line.drawn
    assert (shown.low, shown.ceiling, shown.explodes) == (1.0, 20.0, True)


@pytest.mark.parametrize("seeds", [(0, 1, 2), (2, 0, 1)])
def test_order_of_the_seeds_changes_nothing(tmp_path, seeds):
    runs = [FakeRun(seed=s, top1=(0.1 * s, 0.7 * s), loss=(1.0, 1.0)) for s in seeds]
    line = curve(only_group(tmp_path, *runs), "test_top1", "epoch")
    np.testing.assert_allclose(line.mean, [0.1, 0.7], rtol=1e-15)


def test_csv_holds_every_point_with_its_scale(tmp_path):
    only_group(tmp_path, FakeRun(), FakeRun(seed=1))
    rows = list(csv.DictReader(io.StringIO(curves_csv(group_runs(load_runs(tmp_path, "toy"))))))
    epoch = [r for r in rows if (r["metric"], r["axis"]) == ("test_top1", "epoch")]
    assert [(r["x"], r["mean"], r["n"]) for r in epoch] == [
        ("1", "50", "2"),
        ("2", "80", "2"),
        ("3", "91", "2"),
    ]
    assert {row["scale"] for row in rows} == {"reduced"}
