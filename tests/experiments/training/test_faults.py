"""Faults, really injected into real processes: what a run says of them, and what it loses.

Each row of the table in docs/distributed.md names one of these tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from experiments.errors import UserError
from experiments.launching.launch import launch
from experiments.runs.directory import read_status
from experiments.runs.spec import RunSpec
from experiments.training.ranks import JoinedRanks, LostRankError
from experiments.training.trainer import Trainer
from tests.experiments.run_configs import ROOT, SGD, assert_same_run, newest_state, run_spec
from tests.gloo import run_ranks

TORCHRUN = {"name": "torchrun", "nproc": 2, "timeout_s": 120.0, "max_restarts": 4}
# 22 steps an epoch.
RUN = {
    "model": {"name": "mlp", "hidden": [64]},
    "train.epochs": 2,
    "train.log_interval": 5,
    "train.checkpoint_interval": 5,
}


def faulty(folder: Path, *faults: str) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "name": "faulty",
        "_target_": "tests.experiments.training.faults.FaultyMLBFGS",
        "lr": 0.05,
        "update_interval": 4,
        "history_size": 3,
        "betas": [0.9, 0.9],
        "blocks": 2,
        "distribution": "blocks",
        "folder": str(folder),
        "faults": list(faults),
    }


def train_joined(rank: int, spec: RunSpec, store: str, timeout_s: float) -> str:
    """Train as one of two ranks; what is raised in the end, or the status."""
    ranks = JoinedRanks(dist.FileStore(store, 2), timeout_s=timeout_s, local_rank=rank)
    try:
        return Trainer(spec, ranks=ranks).run()
    except (LostRankError, UserError, OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def undisturbed(folder: Path) -> RunSpec:
    spec = run_spec(folder / "undisturbed", optimizer=faulty(folder / "none"), **RUN)
    ended = run_ranks(train_joined, 2, spec, str(folder / "store"), 60.0)
    assert ended == ["done", "done"]
    return spec


@pytest.mark.slow
def test_ranks_killed_in_step_all_gather_and_checkpoint_and_a_full_disk(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """torchrun starts the ranks anew after each kill; after the full disk, the same command does.

    The run ends with the records, weights and optimizer state of an undisturbed one, bit for bit.
    """
    faults = [
        "killed_in_step@8@1",
        "killed_in_all_gather@13@0",  # the leader
        "killed_in_checkpoint@20@1",
        "killed_before_manifest@25@1",
        "full_disk@34@0",
        "full_disk@34@1",
    ]
    optimizer = faulty(tmp_path / "marks", *faults)
    spec = run_spec(tmp_path / "disturbed", optimizer=optimizer, launch=TORCHRUN, **RUN)

    outcome = launch(spec)
    told = capfd.readouterr().err
    assert outcome.status == "refused", told
    assert "the checkpoint at step 35 cannot be written" in outcome.message
    assert "the disk did not take all of it" in outcome.message
    assert "step 30 is still there" in outcome.message
    assert told.count("error: the checkpoint at step 35") == 1
    marks = sorted(path.name for path in (tmp_path / "marks").iterdir())
    assert marks == sorted(faults)
    # The leader names the rank that died wherever it lives to tell.
    assert told.count("error: rank 0: rank 1 ended without a word: killed, or out of memory") >= 2
    assert newest_state(spec)["position"]["step"] == 30
    resumed = [line for line in told.splitlines() if "resumed at step" in line]
    # Lost is the work since the last checkpoint; the one that was torn or unnamed was never used.
    assert [int(line.split("resumed at step ")[1].split(":")[0]) for line in resumed] == [
        5,
        10,
        15,
        22,
    ]
    assert launch(spec).status == "done"
    assert_same_run(spec, undisturbed(tmp_path))
    leftovers = [p for p in (spec.directory / "checkpoints").iterdir() if p.suffix == ".tmp"]
    assert leftovers == []


@pytest.mark.slow
def test_hanging_rank_ends_the_run_with_a_message_after_the_time_limit(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A stopped process does not hear SIGTERM either: torchrun kills it, the launcher returns."""
    optimizer = faulty(tmp_path / "marks", "stopped@8@1")
    impatient = {**TORCHRUN, "timeout_s": 6.0, "max_restarts": 0}
    spec = run_spec(tmp_path, optimizer=optimizer, launch=impatient, **RUN)
    outcome = launch(spec)
    wanted = "rank 1 did not answer within launch.timeout_s=6 s"
    assert outcome.status == "crashed" and outcome.message.startswith(wanted)
    assert f"error: rank 0: {wanted}" in capfd.readouterr().err
    assert newest_state(spec)["position"]["step"] == 5
    # Neither rank is left behind.
    found = subprocess.run(["pgrep", "-f", str(spec.directory)], capture_output=True, text=True)
    assert found.stdout == ""


def test_rank_whose_data_raises_is_named_by_the_leader(tmp_path: Path) -> None:
    optimizer = faulty(tmp_path / "marks", "broken_data@8@1")
    spec = run_spec(tmp_path, optimizer=optimizer, **RUN)
    leader, other = run_ranks(train_joined, 2, spec, str(tmp_path / "store"), 30.0)
    assert other == "OSError: cannot read image 17"
    assert leader == "LostRankError: rank 1: OSError: cannot read image 17"
    status = read_status(spec.directory)
    assert status is not None and status.status == "crashed"
    assert status.message == "rank 1: OSError: cannot read image 17"
    traceback = (spec.directory / "traceback-rank1.txt").read_text()
    assert traceback.endswith("OSError: cannot read image 17\n") and "train_epoch" in traceback
    assert newest_state(spec)["position"]["step"] == 5


def test_full_disk_leaves_a_single_process_its_last_checkpoint(tmp_path: Path) -> None:
    script = (
        "import resource, sys\n"
        "from experiments import worker\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))\n"
        "sys.exit(worker.main([sys.argv[1]]))\n"
    )
    spec = run_spec(tmp_path, optimizer=SGD, **{**RUN, "train.epochs": 1})
    spec.directory.mkdir(parents=True)
    spec.save(spec.directory / "config.yaml")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # 4,810 weights and as much momentum: 40 kB
    command = [sys.executable, "-c", script, str(spec.directory), "20000"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert "step 5 cannot be written" in line and "File too large" in line
    assert "there is none before it" in line
    assert list((spec.directory / "checkpoints").iterdir()) == []
    assert Trainer(spec).run() == "done"
