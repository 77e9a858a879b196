"""A run that is really killed ends with the records and weights of one that is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from experiments.errors import UserError
from experiments.runs.directory import read_status
from experiments.runs.metrics import read_metrics
from experiments.training.trainer import Trainer
from tests.experiments.run_configs import ROOT, SGD, assert_same_run, newest_state, run_spec

UPDATE_INTERVAL = 30
HISTORY_SIZE = 3
WARM_UP = 2 * UPDATE_INTERVAL
# The first pair comes with the end of the warm-up.
HISTORY_FULL = (HISTORY_SIZE + 1) * UPDATE_INTERVAL
STEPS = 220
MLBFGS = {
    "name": "mlbfgs",
    "_target_": "mlbfgs.MLBFGS",
    "lr": 0.02,
    "momentum": 0.9,
    "weight_decay": 2e-4,
    "betas": [0.99, 0.99],
    "update_interval": UPDATE_INTERVAL,
    "history_size": HISTORY_SIZE,
}
# 22 steps an epoch; wide enough for a step of some milliseconds, so that the polling
# below, once a millisecond, hits the steps it aims at.
RUN = {
    "model": {"name": "mlp", "hidden": [256, 256]},
    "train.epochs": STEPS // 22,
    "train.log_interval": 1,
    "train.checkpoint_interval": 9,
}
START_LIMIT_S = 120.0


@dataclass(frozen=True)
class Kill:
    """Where a worker was killed: steps on record before the start, and in the end."""

    before: int
    after: int


@pytest.fixture(autouse=True)
def _keep_thread_count():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def steps_on_record(directory: Path) -> int:
    """The newest step of a metrics file that a live process may be writing."""
    file = directory / "metrics.jsonl"
    if not file.exists():
        return 0
    lines = file.read_bytes().split(b"\n")[:-1]
    return max((json.loads(line)["step"] for line in lines[-3:]), default=0)


def start_worker(directory: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "experiments.worker", str(directory)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE)


def kill_worker_at(directory: Path, step: int) -> Kill:
    """Start a worker and kill it once a step is on record; it is the first to reach that step."""
    before = steps_on_record(directory)
    assert before < step
    process = start_worker(directory)
    deadline = time.monotonic() + START_LIMIT_S
    while steps_on_record(directory) < step and process.poll() is None:
        assert time.monotonic() < deadline, "the worker did not get to the step"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    _, error = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL, error.decode()
    return Kill(before, steps_on_record(directory))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [SGD, MLBFGS], ids=lambda optimizer: optimizer["name"])
def test_run_killed_in_warm_up_and_with_a_full_history_ends_as_if_it_was_not(tmp_path, optimizer):
    whole = run_spec(tmp_path / "whole", optimizer=optimizer, **RUN)
    assert Trainer(whole).run() == "done"
    killed = run_spec(tmp_path / "killed", optimizer=optimizer, **RUN)
    killed.directory.mkdir(parents=True)
    killed.save(killed.directory / "config.yaml")

    first = kill_worker_at(killed.directory, 15)
    # Past a checkpoint (every 9 steps), before the end of the warm-up.
    assert 15 <= first.after < WARM_UP
    assert read_status(killed.directory).status == "running"
    second = kill_worker_at(killed.directory, HISTORY_FULL + 15)
    assert HISTORY_FULL + 15 <= second.after < STEPS
    resumed_from = newest_state(killed)
    if optimizer is MLBFGS:
        records = read_metrics(killed.directory / "metrics.jsonl")
        pairs = [record["pairs"] for record in records if record["kind"] == "curvature"]
        assert pairs[-1] == HISTORY_SIZE
    assert 0 < resumed_from["position"]["step"] <= second.after

    process = start_worker(killed.directory)
    _, error = process.communicate(timeout=START_LIMIT_S)
    assert process.returncode == 0, error.decode()
    assert f"resumed at step {resumed_from['position']['step']}" in error.decode()
    assert read_status(killed.directory).status == "done"
    assert_same_run(killed, whole)
    resumes = json.loads((killed.directory / "meta.json").read_text())["resumes"]
    assert len(resumes) == 2 and 0 < resumes[0]["step"] <= first.after


DIE_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path

import torch

from experiments import worker
from experiments.training import checkpoint

saved = 0
save = torch.save


def save_half_and_die(payload, handle):
    global saved
    saved += 1
    if saved < 3:
        return save(payload, handle)
    save(payload, handle)
    handle.flush()
    os.truncate(handle.name, os.path.getsize(handle.name) // 2)
    os.kill(os.getpid(), signal.SIGKILL)


checkpoint.torch.save = save_half_and_die
worker.main([sys.argv[1]])
"""


SLBFGS = {
    "name": "slbfgs",
    "_target_": "experiments.optimizers.slbfgs.SLBFGS",
    "lr": 0.05,
    "update_interval": 3,  # pairs before and after the checkpoint at step 10
    "curvature_batch_size": 100,
}


@pytest.mark.parametrize("optimizer", [MLBFGS, SLBFGS], ids=lambda optimizer: optimizer["name"])
def test_run_killed_while_a_checkpoint_is_written_goes_on_from_the_one_before(tmp_path, optimizer):
    changes = {"train.checkpoint_interval": 5, "optimizer": optimizer}
    whole = run_spec(tmp_path / "whole", **changes)
    Trainer(whole).run()
    killed = run_spec(tmp_path / "killed", **changes)
    killed.directory.mkdir(parents=True)
    killed.save(killed.directory / "config.yaml")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DIE_WHILE_WRITING, str(killed.directory)]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    assert [p.name for p in (killed.directory / "checkpoints").glob("*.tmp")] == [
        "step00000015.tmp"
    ]
    assert newest_state(killed)["position"]["step"] == 10
    assert Trainer(killed).run() == "done"
    assert_same_run(killed, whole)
    assert not list((killed.directory / "checkpoints").glob("*.tmp"))


def cut_short(tmp_path: Path) -> tuple:
    """A whole run, and one that was stopped in the middle of its third epoch."""
    changes = {"train.epochs": 3, "train.checkpoint_interval": 10}
    whole = run_spec(tmp_path / "whole", **changes)
    Trainer(whole).run()
    cut = run_spec(tmp_path / "cut", **changes)
    with pytest.raises(SystemExit):
        Trainer(cut, on_epoch=_terminate_after_second).run()
    return whole, cut


def _terminate_after_second(record) -> None:
    if record.epoch == 2:
        os.kill(os.getpid(), signal.SIGTERM)


def test_corrupt_newest_checkpoint_costs_only_the_way_from_the_one_before(tmp_path, caplog):
    whole, cut = cut_short(tmp_path)
    newest = max((cut.directory / "checkpoints").iterdir())
    assert "00000044" in newest.name
    newest.write_bytes(newest.read_bytes()[:-100])
    assert Trainer(cut).run() == "done"
    assert str(newest) in caplog.text
    assert_same_run(cut, whole)


def test_run_without_any_intact_checkpoint_starts_over(tmp_path, caplog):
    whole, cut = cut_short(tmp_path)
    for path in (cut.directory / "checkpoints").iterdir():
        path.write_bytes(b"")
    assert Trainer(cut).run() == "done"
    assert "from the start" in caplog.text
    assert_same_run(cut, whole)


def test_resume_goes_on_with_the_clock(tmp_path):
    _, cut = cut_short(tmp_path)
    clock = newest_state(cut)["clock"]
    Trainer(cut).run()
    last = newest_state(cut)["clock"]
    assert last.pop("extra_passes") == clock.pop("extra_passes") == 0  # SGD makes none
    assert all(last[part] > clock[part] > 0 for part in clock)


def test_resume_refuses_records_that_are_shorter_than_the_checkpoint_says(tmp_path):
    _, cut = cut_short(tmp_path)
    metrics = cut.directory / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:50])
    with pytest.raises(UserError, match="50 bytes but the checkpoint was written at"):
        Trainer(cut).run()
