"""Run directories are read as the contract says, and whatever is wrong is named."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from experiments.analysis.measuring.runs import load_run, load_runs
from experiments.errors import UserError
from tests.experiments.analysis.run_factory import FakeRun, write_runs


def test_load_runs_reads_every_file(tmp_path):
    write_runs(
        tmp_path, FakeRun(seed=1), FakeRun(optimizer="adam", status="timeout", message="9 s")
    )
    adam, sgd = load_runs(tmp_path, "toy").runs
    assert (adam.optimizer, adam.status, adam.message) == ("adam", "timeout", "9 s")
    assert (sgd.seed, sgd.scale, sgd.experiment) == (1, "reduced", "toy")
    assert sgd.config["optimizer"]["lr"] == 0.1 and sgd.meta["parameters"] == 1000
    np.testing.assert_array_equal(sgd.epoch_series("test_top1"), [50.0, 80.0, 91.0])
    assert [record["step"] for record in sgd.steps] == [100, 200, 300]


def test_null_and_absent_fields_become_nan(tmp_path):
    path = FakeRun(top1=(50.0, None, 91.0)).write(tmp_path)
    run = load_run(path)
    np.testing.assert_array_equal(run.epoch_series("test_top1"), [50.0, np.nan, 91.0])
    assert np.isnan(run.epoch_series("no_such_field")).all()


@pytest.mark.parametrize("cut", [1, 20, 150])
def test_torn_last_line_is_left_out_and_reported(tmp_path, cut):
    path = FakeRun().write(tmp_path) / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[: -cut - 1])
    run = load_run(path.parent)
    assert run.torn
    assert len(run.epochs) == 2


def test_complete_last_line_without_newline_counts(tmp_path):
    path = FakeRun().write(tmp_path) / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    run = load_run(path.parent)
    assert not run.torn and len(run.epochs) == 3


@pytest.mark.parametrize("number", [1, 3, 6])
def test_corrupt_complete_line_names_file_and_line(tmp_path, number):
    path = FakeRun().write(tmp_path) / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[number - 1] = lines[number - 1][:-5]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=rf"metrics\.jsonl, line {number}: corrupt record"):
        load_run(path.parent)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1, 2]", "'kind' is needed"),
        ('{"kind": "epoc"}', "did you mean 'epoch'"),
        ('{"kind": "epoch", "epoch": 4, "train_time_s": 1.0}', "no number in 'step'"),
        ('{"kind": "epoch", "epoch": 3, "step": 9, "train_time_s": 1.0}', "follows epoch 3"),
        (
            '{"kind": "epoch", "epoch": 4, "step": 9, "train_time_s": 1.0, "test_top1": "high"}',
            "'test_top1' is 'high'",
        ),
    ],
)
def test_record_that_breaks_the_contract_names_its_line(tmp_path, line, message):
    path = FakeRun().write(tmp_path) / "metrics.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=f"line 7: .*{message}"):
        load_run(path.parent)


@pytest.mark.parametrize("name", ["config.yaml", "meta.json", "status.json"])
def test_directory_without_a_file_is_a_problem_and_not_dropped_in_silence(tmp_path, name):
    broken = FakeRun(seed=1).write(tmp_path)
    FakeRun(seed=0).write(tmp_path)
    (broken / name).unlink()
    found = load_runs(tmp_path, "toy")
    assert [run.seed for run in found.runs] == [0]
    assert found.problems == (f"{broken}: {name} missing; not counted",)


def test_unknown_file_and_foreign_directory_are_named(tmp_path):
    path = FakeRun().write(tmp_path)
    (path / "model_final.pt").touch()
    (path.parent / "old").mkdir()
    problems = load_runs(tmp_path, "toy").problems
    assert any("unknown file model_final.pt" in line for line in problems)
    assert any(line.startswith(f"{path.parent / 'old'}: not named") for line in problems)


def test_directory_name_and_meta_must_agree(tmp_path):
    path = FakeRun().write(tmp_path)
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps(meta | {"seed": 7}))
    with pytest.raises(UserError, match=r"meta\.json: seed is 7, but the directory's name says 0"):
        load_run(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("status.json", '{"status": "finished"}', "status 'finished'"),
        ("status.json", "{", "not valid JSON"),
        ("meta.json", "[]", "an object is needed"),
        ("config.yaml", "a: [", "not valid YAML"),
        ("config.yaml", "- a", "a mapping is needed"),
    ],
)
def test_unreadable_file_is_named(tmp_path, name, content, message):
    path = FakeRun().write(tmp_path)
    (path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name}.*{message}"):
        load_run(path)


def test_unknown_experiment_and_scale_name_the_nearest(tmp_path):
    FakeRun().write(tmp_path)
    with pytest.raises(UserError, match="did you mean 'toy'"):
        load_runs(tmp_path, "toys")
    with pytest.raises(UserError, match="did you mean 'reduced'"):
        load_runs(tmp_path, "toy", scale="reduce")
    with pytest.raises(UserError, match="does not exist"):
        load_runs(tmp_path / "nowhere", "toy")


def test_scale_and_keys_select(tmp_path):
    runs = [FakeRun(seed=0), FakeRun(seed=1), FakeRun(seed=0, scale="full")]
    write_runs(tmp_path, *runs)
    assert [run.scale for run in load_runs(tmp_path, "toy", scale="full").runs] == ["full"]
    (only,) = load_runs(tmp_path, "toy", keys={runs[1].key}).runs
    assert only.seed == 1


def test_run_without_records_is_loaded(tmp_path):
    path = replace(FakeRun(status="running"), top1=(), loss=()).write(tmp_path)
    (path / "metrics.jsonl").unlink()
    assert load_run(path).epochs == ()
