"""Launching on several ranks: commands, machines, schedulers, and what is told in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from experiments.errors import UserError
from experiments.launching import slurm, torchrun
from experiments.launching.launch import launch
from experiments.runs.directory import read_status
from experiments.runs.outcome import freeze
from experiments.runs.spec import RunSpec
from experiments.training.trainer import Trainer
from tests.experiments.run_configs import ROOT, assert_same_run, newest_state, numbers, run_spec

pytest.importorskip("submitit")

TORCHRUN = {"name": "torchrun", "nproc": 2, "timeout_s": 200.0}
SLURM = {"name": "slurm", "cluster": "local", "nproc": 1, "timeout_s": 200.0}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
# Steps of some milliseconds, for some seconds: long enough to be met by a signal.
LONG = {
    "model": {"name": "mlp", "hidden": [256, 256]},
    "train.epochs": 60,
    "train.log_interval": 2,
    "train.checkpoint_interval": 10,
    "train.eval_interval": 20,
}


def wait_for(condition: Callable[[], bool], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def step_of(spec: RunSpec) -> int:
    status = read_status(spec.directory)
    return -1 if status is None else status.step


def test_dry_run_prints_the_command_of_each_launcher(tmp_path: Path) -> None:
    torch_line = launch(run_spec(tmp_path, launch={**TORCHRUN, "dry_run": True})).message
    directory = run_spec(tmp_path).directory
    assert torch_line.startswith("OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 ")
    for part in (
        f"{sys.executable} -m torch.distributed.run --nnodes=1 --nproc-per-node=2 ",
        "--rdzv-endpoint=localhost:0 ",
        "--max-restarts=3 ",
        f"-m experiments.worker {directory}",
    ):
        assert part in torch_line
    several = {**TORCHRUN, "nnodes": 2, "node_rank": 1, "rdzv_endpoint": "a:29400"}
    line = launch(run_spec(tmp_path, launch={**several, "dry_run": True})).message
    assert "--nnodes=2 " in line and "--rdzv-endpoint=a:29400" in line
    assert "--rdzv-conf=join_timeout=200" in line
    job = {**SLURM, "cluster": "slurm", "nproc": 8, "nnodes": 2, "gpus_per_node": 8}
    job |= {"partition": "gpu", "mem_gb": 64, "setup": ["module load cuda"], "dry_run": True}
    batch = launch(run_spec(tmp_path, launch=job)).message
    for part in (
        "#SBATCH --nodes=2",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --partition=gpu",
        "#SBATCH --mem=64GB",
        "#SBATCH --signal=USR2@120",
        "#SBATCH --time=240",
        "module load cuda",
        "submitit.core._submit",
        "--nnodes=2 --nproc-per-node=8",
    ):
        assert part in batch, batch
    assert read_status(directory) is None and (directory / "config.yaml").exists()


def test_launch_does_not_enter_the_key(tmp_path: Path) -> None:
    keys = {
        run_spec(tmp_path, launch=launcher).key
        for launcher in ({"name": "local"}, TORCHRUN, SLURM, {**TORCHRUN, "nproc": 3})
    }
    assert len(keys) == 1


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({**TORCHRUN, "nproc": 65}, "65 ranks for train.batch_size=64 images: .* at most 64 ranks"),
    ({**TORCHRUN, "nproc": 0}, "launch.nproc=0 must be at least 1"),
    ({**TORCHRUN, "nnodes": 2}, "needs launch.rdzv_endpoint=HOST:PORT"),
    ({**TORCHRUN, "node_rank": 1}, "launch.node_rank=1 must be 0 to 0"),
    ({**TORCHRUN, "rdzv_endpoint": "here"}, "launch.rdzv_endpoint=here must be HOST:PORT"),
    ({**TORCHRUN, "max_restarts": -1}, "launch.max_restarts=-1 must be at least 0"),
    ({**TORCHRUN, "timeout_s": 0.0}, "launch.timeout_s=0.0 must be above 0"),
    ({**TORCHRUN, "nprocs": 2}, "unknown key launch.nprocs; did you mean 'nproc'"),
    ({**SLURM, "cluster": "pbs"}, "launch.cluster = 'pbs'; valid: local, slurm"),
    ({**SLURM, "cluster": "slurm"}, "there is no sbatch on this machine"),
    ({**SLURM, "nnodes": 2}, "launch.cluster=local is one machine"),
    ({**SLURM, "signal_delay_s": 60, "time_min": 1}, "not before the end of launch.time_min=1"),
    ({**SLURM, "nproc": 4, "gpus_per_node": 2}, "launch.nproc=4 ranks for launch.gpus_per_node=2"),
]


@pytest.mark.parametrize(("launcher", "wanted"), MISTAKES)
def test_mistake_is_told_before_anything_is_written(
    launcher: dict[str, Any], wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some machines of the tests have SLURM.
    monkeypatch.setattr(slurm.shutil, "which", lambda command: None)
    with pytest.raises(UserError, match=wanted) as raised:
        launch(run_spec(tmp_path, launch=launcher))
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_ranks_beyond_the_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # No machine of the tests has GPUs, so torch's answer is set.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    torchrun.check_devices("auto", 2)
    torchrun.check_devices("cpu", 8)
    with pytest.raises(UserError, match=r"launch.nproc=8 ranks, but torch sees 2 GPUs"):
        torchrun.check_devices("auto", 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torchrun.check_devices("auto", 8)
    with pytest.raises(UserError, match=r"train.device=cuda, but torch sees no GPU"):
        torchrun.check_devices("cuda", 8)


def test_absent_submitit_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"pip install 'mlbfgs\[slurm\]'"):
        launch(run_spec(tmp_path, launch=SLURM))


def test_second_machine_waits_for_the_first_and_gives_up(tmp_path: Path) -> None:
    several = {"nnodes": 2, "node_rank": 1, "rdzv_endpoint": "localhost:29400", "timeout_s": 0.5}
    with pytest.raises(UserError, match=r"start launch.node_rank=0 too, with results_dir on"):
        launch(run_spec(tmp_path, launch={**TORCHRUN, **several}))


@pytest.mark.slow
def test_two_machines_meet_and_train_one_run(tmp_path: Path) -> None:
    """Two launchers on this machine, with one rank each, that know nothing but an address."""
    port = 20000 + os.getpid() % 20000
    line = [
        *(sys.executable, "-m", "experiments.train", "scale=smoke", "optimizer=mlbfgs"),
        *("launch=torchrun", "launch.nproc=1", "launch.nnodes=2", "launch.timeout_s=200"),
        *(f"launch.rdzv_endpoint=localhost:{port}", f"results_dir={tmp_path}"),
        *("train.device=cpu", "optimizer.distribution=sharded"),
    ]
    machines = [
        subprocess.Popen([*line, f"launch.node_rank={rank}"], cwd=ROOT, env=ENVIRONMENT)
        for rank in (1, 0)
    ]
    assert [machine.wait(timeout=400) for machine in machines] == [0, 0]
    (directory,) = (path.parent for path in tmp_path.glob("runs/*/*/*/status.json"))
    status, spec = read_status(directory), RunSpec.load(directory / "config.yaml")
    assert status is not None and status.status == "done"
    assert '"ranks": 2' in (directory / "meta.json").read_text()
    # the same run here, on one rank, with the whole state
    alone = RunSpec.from_config(
        OmegaConf.merge(
            OmegaConf.create(OmegaConf.to_container(spec.config)),
            {"results_dir": str(tmp_path / "alone"), "optimizer": {"distribution": "replicated"}},
        )
    )
    assert Trainer(alone).run() == "done"
    accuracies = [
        [record["test_top1"] for record in numbers(path) if record["kind"] == "epoch"]
        for path in (directory, alone.directory)
    ]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.6)  # two of 355 images


@pytest.mark.slow
def test_preempted_job_ends_at_a_checkpoint_and_is_put_back(tmp_path: Path) -> None:
    """submitit's job, its controller and its signal, without the scheduler.

    Like SLURM, the test signals every process of the job, torchrun and ranks included.
    """
    spec = run_spec(tmp_path / "job", launch=SLURM, **LONG)
    before = os.environ.copy()
    os.environ.update(ENVIRONMENT)
    try:
        outcome = launch(spec)
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert outcome.status == "submitted" and outcome.message.startswith("job ")
    controller = int(outcome.message.split()[1].rstrip(","))
    wait_for(lambda: step_of(spec) >= 20)
    job = _tree(_task_of(controller))
    assert len(job) >= 3  # the task, torchrun, a rank
    for process in job:
        os.kill(process, signal.SIGUSR2)
    logs = spec.directory / slurm.LOG_FOLDER
    wait_for(lambda: "Requeued job" in _said(logs))
    assert "SIGTERM: stopped at a checkpoint" in _said(logs)
    wait_for(
        lambda: (status := read_status(spec.directory)) is not None and status.status == "done"
    )
    assert _said(logs).count("resumed at step") == 1
    undisturbed = run_spec(tmp_path / "undisturbed", **LONG)
    Trainer(undisturbed).run()
    assert_same_run(spec, undisturbed)


def _task_of(controller: int) -> int:
    (task,) = _children(controller)
    return task


def _children(process: int) -> list[int]:
    return [*map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split())]


def _tree(process: int) -> list[int]:
    return [process, *(each for child in _children(process) for each in _tree(child))]


def _said(folder: Path) -> str:
    files = [*folder.glob("*.out"), *folder.glob("*.err")]
    return "".join(path.read_text(errors="replace") for path in files)


@pytest.mark.slow
def test_batch_script_ends_at_a_checkpoint_queues_again_and_goes_on(tmp_path: Path) -> None:
    """The script with its real torchrun and signals; srun, scancel, scontrol stand for SLURM."""
    spec = run_spec(tmp_path / "run", **LONG)
    freeze(spec)
    commands = tmp_path / "bin"
    commands.mkdir()
    # As SLURM 22.05 does: scancel signals all processes of a step, srun kills them when it is told
    # to end.
    (commands / "srun").write_text(
        f'#!/bin/bash\n"$@" & child=$!\necho $child > {tmp_path}/step\n'
        "trap 'kill -KILL $child $(pgrep -P $child)' TERM\nwait $child\n"
    )
    (commands / "scancel").write_text(
        f'#!/bin/bash\n[ "$*" = "--signal=TERM 7.0" ] || exit 1\nstep=$(cat {tmp_path}/step)\n'
        "kill -TERM $step $(pgrep -P $step)\n"
    )
    (commands / "scontrol").write_text(
        f'#!/bin/bash\n[ "$1" = show ] && echo localhost || echo "$@" >> {tmp_path}/requeued\n'
    )
    for command in commands.iterdir():
        command.chmod(0o755)
    environment = {
        **ENVIRONMENT,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "NPROC": "1",
        "PORT": "0",
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "localhost",
    }
    script = ["bash", str(ROOT / "scripts/slurm.sbatch"), str(spec.directory)]
    job = subprocess.Popen(script, cwd=ROOT, env=environment)
    wait_for(lambda: step_of(spec) >= 20)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=120) == 0
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    status = read_status(spec.directory)
    assert status is not None and status.message == "stopped by a signal; resumable"
    assert newest_state(spec)["position"]["step"] == status.step < 60 * 22
    assert subprocess.run(script, cwd=ROOT, env=environment, timeout=400).returncode == 0
    assert step_of(spec) == 60 * 22
