"""What a run is measured by, above all when it did not end well."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.analysis.measuring.measures import Target, measure_named, reach, target_of
from experiments.analysis.measuring.runs import load_run
from experiments.errors import UserError
from tests.experiments.analysis.run_factory import FakeRun


def loaded(tmp_path, **fields):
    return load_run(FakeRun(**fields).write(tmp_path))


def test_measures_of_a_done_run(tmp_path):
    run = loaded(tmp_path, top1=(50.0, 92.0, 91.0), loss=(2.0, 1.0, 0.5))
    expected = {
        "final_top1": 91.0,
        "best_top1": 92.0,
        "final_train_loss": 0.5,
        "mean_log_train_loss": (math.log(2.0) + math.log(0.5)) / 3,
        "steps_to_target": 200.0,
        "seconds_to_target": 20.0,
        "seconds_per_epoch": 10.0,
        "optimizer_share": 10.0,
        "peak_memory": 100 * 2**20,
        "diverged": 0.0,
        "final:test_top5": 91.0,
    }
    assert {name: measure_named(name)(run) for name in expected} == pytest.approx(expected)


def test_target_not_reached_is_infinite(tmp_path):
    run = loaded(tmp_path, top1=(50.0, 80.0, 89.9))
    assert measure_named("steps_to_target")(run) == math.inf


@pytest.mark.parametrize("status", ["diverged", "timeout", "crashed"])
def test_target_reached_before_a_bad_end_counts(tmp_path, status):
    run = loaded(tmp_path, status=status, top1=(91.0, 10.0, None))
    assert measure_named("steps_to_target")(run) == 100.0


def test_running_run_enters_nothing(tmp_path):
    run = loaded(tmp_path, status="running")
    assert measure_named("steps_to_target")(run) is None
    assert measure_named("final_top1")(run) is None


def test_diverged_run_counts_with_its_last_evaluated_accuracy(tmp_path):
    run = loaded(tmp_path, status="diverged", top1=(50.0, 60.0, None), loss=(2.0, 1.9, None))
    assert measure_named("final_top1")(run) == 60.0
    assert measure_named("final_train_loss")(run) == math.inf
    assert measure_named("diverged")(run) == 1.0


def test_run_diverged_before_any_evaluation_is_below_everything(tmp_path):
    run = loaded(tmp_path, status="diverged", top1=(), loss=())
    assert measure_named("final_top1")(run) == -math.inf
    assert measure_named("steps_to_target")(run) == math.inf


@pytest.mark.parametrize("status", ["timeout", "crashed"])
def test_unfinished_run_has_no_final_values(tmp_path, status):
    run = loaded(tmp_path, status=status)
    assert measure_named("final_top1")(run) is None


def test_falling_metric_is_reached_from_above(tmp_path):
    run = loaded(tmp_path, loss=(2.0, 0.9, 1.1))
    assert reach(run, Target("train_loss", 1.0), "step") == 200.0
    assert str(Target("train_loss", 1.0)) == "train_loss <= 1"


def test_unknown_metric_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'final_top1'"):
        measure_named("final_top")


def test_malformed_target_names_the_file(tmp_path):
    run = loaded(tmp_path, target={"metric": "test_top1"})
    with pytest.raises(UserError, match=r"config\.yaml: experiment\.target is"):
        target_of(run)
    assert target_of(loaded(tmp_path / "none", target=None)) is None


@given(
    st.lists(st.floats(0, 100) | st.none(), min_size=1, max_size=6),
    st.floats(0, 100),
    st.floats(0, 100),
)
@settings(max_examples=40, deadline=None)  # each example writes a run directory
def test_time_to_target_never_falls_when_the_target_rises(top1, first, second):
    with tempfile.TemporaryDirectory() as folder:
        run = load_run(FakeRun(top1=top1, loss=[1.0] * len(top1)).write(Path(folder)))
    low, high = sorted((first, second))
    assert reach(run, Target("test_top1", low), "step") <= reach(
        run, Target("test_top1", high), "step"
    )
