"""Sweeps: several runs from one command line, of which one failing does not end the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.runs.directory import read_status
from experiments.runs.metrics import read_metrics
from experiments.runs.spec import RunSpec
from experiments.train import main

BROKEN = "tests.experiments.optimizers.odd_optimizers.BrokenSGD"


def statuses(results_dir: Path) -> dict[str, str]:
    found = {}
    for directory in results_dir.glob("runs/*/*/*"):
        status = read_status(directory)
        assert status is not None
        found[f"{directory.parent.name}/{directory.name.rsplit('-', 1)[0]}"] = status.status
    return found


def test_sweep_trains_all_combinations_and_then_skips_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = ["-m", "optimizer=sgd,mlbfgs", "seed=0,1", "scale=smoke", "results_dir=here"]
    assert main(sweep) == 0
    wanted = {f"{o}/smoke-seed{s}": "done" for o in ("sgd", "mlbfgs") for s in (0, 1)}
    assert statuses(tmp_path / "here") == wanted
    # Hydra's own sweep file must not land here.
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    records = {path: path.read_bytes() for path in tmp_path.glob("here/runs/*/*/*/metrics.jsonl")}
    assert all(read_metrics(path) for path in records)
    capfd.readouterr()
    assert main([*sweep[:2], "seed=0,1,2", *sweep[3:]]) == 0
    said = capfd.readouterr().out
    assert "6 runs:" in said and said.count("(finished before)") == 4
    assert all(path.read_bytes() == before for path, before in records.items())


def test_diverging_run_is_a_result_and_does_not_end_the_sweep(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sweep = ["-m", "optimizer=sgd", "optimizer.lr=1e6,0.1", "train.epochs=3", "scale=smoke"]
    assert main([*sweep, f"results_dir={tmp_path}"]) == 0
    found = {}
    for directory in tmp_path.glob("runs/digits_mlp/sgd/*"):
        status = read_status(directory)
        assert status is not None
        found[RunSpec.load(directory / "config.yaml").config.optimizer.lr] = status.status
    assert found == {1e6: "diverged", 0.1: "done"}
    listing = capfd.readouterr().out.split("2 runs:")[1].splitlines()
    assert [line.split()[0] for line in listing if line] == ["diverged", "done"]


def test_crashing_run_is_reported_with_exit_code_1_and_does_not_end_the_sweep(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sweep = ["-m", f"optimizer._target_={BROKEN}", "optimizer=sgd", "scale=smoke"]
    sweep += [f"~optimizer.{key}" for key in ("momentum", "weight_decay", "nesterov")]
    assert main([*sweep, "+optimizer.fails_at=3,100", f"results_dir={tmp_path}"]) == 1
    said = capfd.readouterr()
    listing = [line.split()[0] for line in said.out.split("2 runs:")[1].splitlines() if line]
    assert listing == ["crashed", "done"]
    assert "the optimizer broke" in said.out
    crashed = [
        directory
        for directory in tmp_path.glob("runs/*/*/*")
        if (status := read_status(directory)) and status.message.startswith("RuntimeError")
    ]
    assert len(crashed) == 1 and (crashed[0] / "traceback.txt").is_file()


def test_run_that_cannot_start_does_not_end_the_sweep(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sweep = ["-m", "optimizer=sgd", "train.batch_size=5000,-1,128", "scale=smoke"]
    assert main([*sweep, f"results_dir={tmp_path}"]) == 2
    said = capfd.readouterr()
    listing = [line.split()[0] for line in said.out.split("3 runs:")[1].splitlines() if line]
    assert listing == ["refused", "refused", "done"]
    assert "batch size 5000" in said.err and "train.batch_size=-1" in said.err
    assert "Traceback" not in said.err
