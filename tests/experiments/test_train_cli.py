"""The command `python -m experiments.train`: what it writes, and how it tells mistakes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.runs.directory import read_status
from experiments.train import main

ROOT = Path(__file__).resolve().parents[2]

MISTAKES = [
    ("optimizer=sdg", "did you mean 'sgd'"),
    ("experiment=cifar10_resnet", "did you mean 'cifar10_resnet18'"),
    ("scale=huge", "scale=huge does not exist; valid: full, reduced, smoke"),
    ("launch=slrum", "did you mean 'slurm'"),
    ("optimizer.lrr=3", "did you mean 'lr'"),
    ("train.epoch=3", "did you mean 'epochs'"),
    ("optimzer=sgd", "did you mean 'optimizer'"),
    ("train.epochs.x=3", "train.epochs=2 has no keys below it"),
    ("~optimizer.nesterov", "optimizer.nesterov is no key"),
    ("hydra.foo=3", "hydra.foo is no setting of Hydra"),
    ("+optimizer.lrr=3", "optimizer.lrr is no argument of optimizer 'mlbfgs'"),
    ("+optimizer.lr=3", "without the +"),
    ("+foo=3", "foo is no key of the config"),
    ("+launch.foo=3", "unknown key launch.foo"),
    ("optimizer=null", "group=option"),
    ("optimizer.lr=a,b", "add -m"),
    ("optimizer.lr=[", "cannot read 'optimizer.lr=['"),
    ("foo", "cannot read 'foo'"),
    ("optimizer.lr=-1", "optimizer.lr=-1"),
    ("optimizer.lr=big", "optimizer.lr='big'"),
    ("optimizer.momentum=-2", "momentum"),
    ("train.epochs=0", "train.epochs=0"),
    ("train=3", "train.epochs"),
    ("train.batch_size=5000", "batch size 5000 is larger than the training set"),
    ("dataset=cifar10 model=resnet18 dataset.root=/nowhere", "/nowhere"),
    ("-m optimizer=sgd,sdg", "did you mean 'sgd'"),
    ("-m optimizer.lrr=1,2", "did you mean 'lr'"),
]


@pytest.mark.parametrize(("line", "wanted"), MISTAKES)
def test_mistake_is_one_line_and_exit_code_2(
    line: str, wanted: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [*line.split(), "scale=smoke"] if "scale=" not in line else line.split()
    # Flags go first, as argparse wants them.
    assert main([*arguments, f"results_dir={tmp_path}"]) == 2
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 1, told
    assert told[0].startswith("error: ") and wanted in told[0]


def test_unwritable_results_directory_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    assert main(["scale=smoke", f"results_dir={file}"]) == 2
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 1 and "cannot be written" in told[0]


def test_changed_config_in_the_run_directory_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["scale=smoke", "optimizer=sgd", f"results_dir={tmp_path}"]) == 0
    (frozen,) = tmp_path.glob("runs/*/*/*/config.yaml")
    frozen.write_text(frozen.read_text().replace("lr: 0.1", "lr: 0.2"))
    capfd.readouterr()
    assert main(["scale=smoke", "optimizer=sgd", f"results_dir={tmp_path}"]) == 2
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 1 and "optimizer.lr is 0.2" in told[0]


def test_run_writes_its_directory_and_nothing_else(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    command_line = list(sys.argv)
    assert main(["scale=smoke", "optimizer=adamw"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
    (directory,) = tmp_path.glob("results/runs/digits_mlp/adamw/smoke-seed0-*")
    status = read_status(directory)
    assert status is not None and (status.status, status.epoch) == ("done", 2)
    assert sys.argv == command_line and "HYDRA_FULL_ERROR" not in os.environ
    assert str(directory.relative_to(tmp_path)) in capfd.readouterr().out
    # Without the words "no recipe" a run on bare defaults would pass for one with settings.
    assert "no recipe for optimizer adamw" in caplog.text


def test_entry_point_shows_the_printed_values_and_writes_nothing(tmp_path: Path) -> None:
    overrides = ["experiment=cifar10_resnet18", "optimizer=mlbfgs", "--cfg", "job"]
    shown = _run(overrides, cwd=tmp_path)
    assert shown.returncode == 0
    for line in ("lr: 0.1", "weight_decay: 0.0002", "damping: 0.99", "update_interval: 50"):
        assert f"  {line}\n" in shown.stdout
    for line in ("batch_size: 256", "epochs: 150", "min_lr: 0.0001", "name: cosine"):
        assert f"  {line}\n" in shown.stdout
    mistaken = _run(["optimizer=sdg"], cwd=tmp_path)
    assert (mistaken.returncode, mistaken.stdout) == (2, "")
    assert mistaken.stderr.startswith("error: ") and mistaken.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "optimizer"),
    [
        ("cifar10_resnet18", "mlbfgs"),
        ("cifar10_resnet18_slimqn", "slimqn"),
        ("cifar100_resnet18", "mlbfgs"),
    ],
)
def test_smoke_scale_trains_on_the_real_data(
    experiment: str, optimizer: str, real_data: Path, tmp_path: Path
) -> None:
    folder = real_data / experiment.split("_")[0]
    if not folder.is_dir():
        pytest.skip(f"no {folder.name} in {real_data}")
    arguments = [f"experiment={experiment}", f"optimizer={optimizer}", "scale=smoke"]
    assert main([*arguments, f"dataset.root={folder}", f"results_dir={tmp_path}"]) == 0
    (directory,) = tmp_path.glob("runs/*/*/*")
    status = read_status(directory)
    assert status is not None and (status.status, status.step) == ("done", 4)


@pytest.mark.slow
def test_interrupt_says_how_to_go_on_and_the_same_command_does(tmp_path: Path) -> None:
    overrides = ["optimizer=sgd", "train.epochs=2000", "results_dir=here"]
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.train", *overrides],
        cwd=tmp_path,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 90
        while not list(tmp_path.glob("here/runs/*/*/*/checkpoints/*.pt")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "the same command goes on" in told and "Traceback" not in told
    again = _run([*overrides, "train.timeout_s=0.01"], cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "resumed at step" in again.stderr


def _run(arguments: list[str], *, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "experiments.train", *arguments],
        cwd=cwd,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
