"""Whoever supervises dies: what was started ends too, and leaves no lock behind."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from experiments.data import prepare
from experiments.errors import UserError
from experiments.faults.processes import (
    descendants,
    is_alive,
    kill,
    ranks_of,
    running,
    started,
    wait_for,
)
from experiments.runs.directory import LOCK_FILE, RunDirectory, is_locked, read_status
from experiments.runs.metrics import read_metrics
from experiments.runs.spec import RunSpec
from tests.experiments.data import image_trees
from tests.experiments.run_configs import newest_state, run_spec

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

# Steps of some milliseconds, for a minute: nothing here ends by itself.
LONG = {
    "model": {"name": "mlp", "hidden": [256, 256]},
    "train.epochs": 6000,
    "train.log_interval": 2,
    "train.checkpoint_interval": 10,
    "train.eval_interval": 100,
}
#: Moments, on a machine that does other things too; torch's loaders look every five seconds.
SOON_S = 3.0
LAUNCH = (
    "import sys\n"
    "from pathlib import Path\n"
    "from experiments.launching.launch import launch\n"
    "from experiments.runs.spec import RunSpec\n"
    "launch(RunSpec.load(Path(sys.argv[1])))\n"
)


def written(spec: RunSpec, folder: Path) -> str:
    spec.save(folder / "asked.yaml")
    return str(folder / "asked.yaml")


def has_step(directory: Path, step: int) -> bool:
    """Whether a run that may not have begun has a step on record."""
    file = directory / "metrics.jsonl"
    return file.exists() and any(r["step"] >= step for r in read_metrics(file))


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["agent", "group", "launcher"])
def test_ranks_end_with_torchrun_and_their_launcher(victim: str, tmp_path: Path) -> None:
    torchrun = {"name": "torchrun", "nproc": 2, "timeout_s": 100.0, "max_restarts": 3}
    spec = run_spec(tmp_path, launch=torchrun, **LONG)
    with started(["-c", LAUNCH, written(spec, tmp_path)], tmp_path / "log") as launcher:
        assert wait_for(lambda: has_step(spec.directory, 12))
        ranks = ranks_of(spec.directory)
        agents = [pid for pid in descendants(launcher.pid) if pid not in ranks]
        assert len(ranks) == 2 and len(agents) == 1
        try:
            if victim == "group":
                os.killpg(launcher.pid, signal.SIGKILL)  # ranks have groups of their own
            else:
                kill(agents if victim == "agent" else [launcher.pid])
            # torchrun lets its ranks end at a checkpoint when it is told to end
            limit_s = 30.0 if victim == "launcher" else SOON_S
            assert wait_for(lambda: not any(map(is_alive, [*agents, *ranks])), limit_s)
            assert wait_for(lambda: not is_locked(spec.directory), SOON_S)
        finally:
            kill(ranks)
    assert newest_state(spec)["position"]["step"] >= 10


@pytest.mark.slow
def test_ranks_end_with_the_job_of_a_scheduler(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    local = {"name": "slurm", "cluster": "local", "nproc": 2, "gpus_per_node": 0}
    spec = run_spec(tmp_path, launch=local, **LONG)
    with started(["-c", LAUNCH, written(spec, tmp_path)], tmp_path / "log"):
        assert wait_for(lambda: has_step(spec.directory, 12))
        jobs = running(f"submitit.core._submit {spec.directory}")
        ranks = running(f"-m experiments.worker {spec.directory}")
        try:
            assert jobs and len(ranks) == 3  # two, and torchrun
            kill(jobs)
            assert wait_for(lambda: not any(map(is_alive, ranks)), 30.0)
            assert wait_for(lambda: not is_locked(spec.directory), SOON_S)
        finally:
            kill([*jobs, *ranks])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_campaign_that_is_ended_leaves_checkpoints_of_its_runs(
    number: int, code: int, tmp_path: Path
) -> None:
    with started(campaign_of_two(tmp_path), tmp_path / "log") as campaign:
        assert wait_for(lambda: all(has_step(path, 5) for path in two_runs(tmp_path)))
        workers = descendants(campaign.pid)
        os.kill(campaign.pid, number)
        assert campaign.wait(60) == code, (tmp_path / "log").read_text()
        assert wait_for(lambda: not any(map(is_alive, workers)), SOON_S)
    for directory in two_runs(tmp_path):
        status = read_status(directory)
        assert status is not None and status.step > 0
        assert status.message == "stopped by a signal; resumable"
        newest = max(path.name for path in (directory / "checkpoints").iterdir())
        assert newest.startswith(f"step{status.step:08d}")
    told = (tmp_path / "log").read_text()
    assert "for a checkpoint of" in told and "Traceback" not in told


@pytest.mark.slow
def test_second_signal_ends_a_campaign_at_once(tmp_path: Path) -> None:
    """Its runs cannot answer, because they are stopped."""
    with started(campaign_of_two(tmp_path), tmp_path / "log") as campaign:
        assert wait_for(lambda: all(has_step(path, 5) for path in two_runs(tmp_path)))
        workers = [int((path / LOCK_FILE).read_text()) for path in two_runs(tmp_path)]
        kill(workers, signal.SIGSTOP)
        try:
            os.kill(campaign.pid, signal.SIGTERM)
            assert wait_for(lambda: "for a checkpoint of" in (tmp_path / "log").read_text(), 20)
            time.sleep(0.5)
            assert campaign.poll() is None
            os.kill(campaign.pid, signal.SIGTERM)
            assert campaign.wait(20) == 143
            assert wait_for(lambda: not any(map(is_alive, workers)), SOON_S)
            assert wait_for(lambda: not any(map(is_locked, two_runs(tmp_path))), SOON_S)
        finally:
            kill(workers)


def campaign_of_two(folder: Path) -> list[str]:
    """One that writes no checkpoint before it is told to end."""
    command = ["-m", "experiments.reproduce", "digits_mlp", "--jobs", "2", "--seeds", "0"]
    command += ["--optimizers", "adam,sgd", "--results-dir", str(folder / "results")]
    command += ["train.epochs=100000", "train.eval_interval=100000", "train.log_interval=5"]
    # an epoch of 1,400 steps ends with a checkpoint of its own
    return [*command, "train.checkpoint_interval=1000000", "train.batch_size=1"]


def two_runs(folder: Path) -> list[Path]:
    found = [folder / "results/runs/digits_mlp" / name for name in ("adam", "sgd")]
    return [next(iter(path.glob("*")), path / "none") for path in found]


HOLD_AND_FORK = """
import multiprocessing, sys, time
from pathlib import Path
from experiments.runs.directory import RunDirectory
from experiments.runs.spec import RunSpec

directory = RunDirectory.open(RunSpec.load(Path(sys.argv[1])))
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
child.start()
print(child.pid, flush=True)
time.sleep(600)
"""


def test_forked_child_that_outlives_the_owner_holds_no_lock(tmp_path: Path) -> None:
    spec, log = run_spec(tmp_path), tmp_path / "log"
    with started(["-c", HOLD_AND_FORK, written(spec, tmp_path)], log) as owner:
        assert wait_for(lambda: log.read_text().endswith("\n"))
        child = int(log.read_text())
        try:
            with pytest.raises(UserError, match=rf"in use by pid {owner.pid}: .*; wait for it"):
                RunDirectory.open(spec)
            owner.kill()
            owner.wait()
            assert is_alive(child)
            assert not is_locked(spec.directory)
            RunDirectory.open(spec).close()
        finally:
            kill([child])


def test_owner_that_is_dead_is_told_as_dead(tmp_path: Path) -> None:
    """A lock of another machine, or of what an owner gave its own file: the number says nothing."""
    spec = run_spec(tmp_path)
    with RunDirectory.open(spec):
        dead = os.fork()
        if dead == 0:
            os._exit(0)
        os.waitpid(dead, 0)
        (spec.directory / LOCK_FILE).write_text(f"{dead}\n")
        with pytest.raises(UserError, match=rf"in use by .*pid {dead}, which is dead here"):
            RunDirectory.open(spec)
        (spec.directory / LOCK_FILE).write_text("")
        with pytest.raises(UserError, match="in use by an unknown process"):
            RunDirectory.open(spec)


def images_run(tree: Path, folder: Path, **changes: Any) -> RunSpec:
    """A long run whose images are loaded by two processes, which are always busy."""
    dataset = image_trees.config(tree, workers=2)
    changes = {"train.batch_size": 2, "train.epochs": 6000, "train.log_interval": 2, **changes}
    return run_spec(folder, dataset=dataset, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [False, True])
def test_loaders_end_with_a_killed_training(
    stopped: bool, image_tree: Path, tmp_path: Path
) -> None:
    spec = images_run(image_tree, tmp_path)
    with started(["-c", LAUNCH, written(spec, tmp_path)], tmp_path / "log") as training:
        assert wait_for(lambda: has_step(spec.directory, 4)), (tmp_path / "log").read_text()
        loaders = descendants(training.pid)
        assert len(loaders) == 2
        try:
            if stopped:  # as one is that waits for a file server
                kill(loaders, signal.SIGSTOP)
            training.kill()
            assert wait_for(lambda: not any(map(is_alive, loaders)), SOON_S)
            assert wait_for(lambda: not is_locked(spec.directory), SOON_S)
        finally:
            kill(loaders)


@pytest.mark.slow
def test_workers_of_a_killed_preparation_end_and_leave_the_folder_free(tmp_path: Path) -> None:
    tree = image_trees.make_tree(tmp_path / "tree")
    command = [
        "-c",
        "import sys, time\n"
        "from experiments.data import prepare\n"
        "make = prepare._image\n"
        "prepare._image = lambda *a: time.sleep(30) or make(*a)\n"  # as a slow file server does
        "sys.exit(prepare.main(sys.argv[1:]))\n",
        str(tree), str(tmp_path / "to"), "--workers", "2", "--shard-size", "4",
        *(f"dataset.{k}={v}" for k, v in image_trees.VALUES.items()),
    ]  # fmt: skip
    with started(command, tmp_path / "log") as preparation:
        assert wait_for(lambda: len(descendants(preparation.pid)) == 2)
        workers = descendants(preparation.pid)
        try:
            with pytest.raises(UserError, match="another preparation is writing"):
                with prepare.locked(tmp_path / "to"):
                    pass
            time.sleep(0.5)
            preparation.kill()
            assert wait_for(lambda: not any(map(is_alive, workers)), SOON_S)
            preparation.wait()
            with prepare.locked(tmp_path / "to"):
                pass
        finally:
            kill(workers)
