"""The campaign: what it plans, that it survives being killed, what it shows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.analysis.judging.claims import load_claims
from experiments.campaign.campaign import Campaign
from experiments.campaign.states import state_of
from experiments.contestants import optimizers_with_recipe
from experiments.reproduce import main
from experiments.runs.directory import RunDirectory, RunStatus, is_locked, read_status

ROOT = Path(__file__).resolve().parents[3]


def test_default_optimizers_are_those_with_a_recipe_in_the_papers_order() -> None:
    assert optimizers_with_recipe("digits_mlp") == (
        *("sgd", "adam", "kfac", "slbfgs", "slimqn", "mlbfgs"),
    )
    assert optimizers_with_recipe("cifar10_resnet18_slimqn") == ("sgd", "slimqn")


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("digits", "did you mean 'digits_mlp'"),
        ("digits_mlp --optimizers sgd,sdg", "did you mean 'sgd'"),
        ("digits_mlp --optimizers sgd,sgd", "each entry once"),
        ("digits_mlp --seeds 0,x", "--seeds '0,x'"),
        ("digits_mlp --seeds -1", "--seeds '-1'"),
        ("digits_mlp --scale huge", "scale=huge does not exist"),
        ("digits_mlp --jobs 0", "--jobs 0"),
        ("M-T3 --optimizers sgd", "--optimizers belongs to one experiment"),
        ("digits_mlp controls --arms mlbfgs", "--arms belongs to one experiment"),
        ("digits_mlp --ranks two", "--ranks 'two' must be auto or a number from 1 to 999999"),
        ("digits_mlp --ranks 0", "--ranks '0'"),
        ("digits_mlp --ranks 2 --jobs 2", "--jobs 2 with --ranks 2: use --jobs 1 or --ranks 1"),
        ("digits_mlp seed=3", "write --seeds"),
        ("digits_mlp optimizer=sgd", "write --optimizers"),
        ("digits_mlp train.epoch=3", "did you mean 'epochs'"),
        ("digits_mlp --optimizers sgd --seeds 0 train.batch_size=5000", "batch size 5000"),
    ],
)
def test_mistake_is_one_line_and_exit_code_2(
    line: str, wanted: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [*line.replace("--seeds -1", "--seeds=-1").split(), "--results-dir", str(tmp_path)]
    assert main(arguments) == 2
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith("error: ") and wanted in told[0]


@pytest.mark.slow
def test_campaign_runs_judges_and_does_nothing_twice(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "with space, and comma"
    campaign = ["digits_mlp", "--scale", "smoke", "--seeds", "0,1", "--results-dir", str(folder)]
    campaign += ["--optimizers", "sgd,mlbfgs", "--jobs", "2"]
    assert main([*campaign, "--plan"]) == 0
    planned = capfd.readouterr().out
    assert "4 runs, 0 finished, 4 to run" in planned
    assert planned.count("experiments.train") == 4 and not folder.exists()

    assert main([*campaign]) == 0
    said = capfd.readouterr().out
    assert "[4/4]" in said and "mL-BFGS" in said
    paths = [Path(line) for line in said.splitlines() if line.startswith(str(folder))]
    assert paths and all(path.is_file() for path in paths)
    assert {".svg", ".png", ".md", ".csv"} <= {path.suffix for path in paths}
    records = {path: path.read_bytes() for path in folder.glob("runs/*/*/*/metrics.jsonl")}
    assert len(records) == 4

    assert main([*campaign, "--status"]) == 0
    assert "4 runs, 4 finished, 0 to run" in capfd.readouterr().out
    assert main([*campaign]) == 0
    assert "[" not in capfd.readouterr().out.split("Accuracy")[0]
    assert all(path.read_bytes() == before for path, before in records.items())

    # A part of the campaign writes the same table: nobody is taken out of it.
    table = folder / "summary" / "digits_mlp-smoke" / "table.csv"
    complete = table.read_bytes()
    assert b",mlbfgs," in complete
    part = ["digits_mlp", "--scale", "smoke", "--seeds", "1", "--optimizers", "sgd"]
    assert main([*part, "--results-dir", str(folder)]) == 0
    assert table.read_bytes() == complete


def test_runs_with_other_overrides_do_not_come_into_the_table(tmp_path: Path) -> None:
    def keys(campaign: Campaign) -> set[str]:
        return {spec.key for spec in campaign.compose().specs}

    def begin(campaign: Campaign) -> None:
        for spec in campaign.compose().specs:
            spec.directory.mkdir(parents=True)

    whole = Campaign("digits_mlp", ("sgd", "mlbfgs"), (), (0, 1), "smoke", tmp_path)
    begin(whole)
    longer = replace(whole, overrides=("train.epochs=3",))
    begin(longer)
    # mL-BFGS alone takes this one; SGD's runs cannot have been made with it.
    damped = replace(whole, optimizers=("mlbfgs",), overrides=("optimizer.damping=0.1",))
    begin(damped)
    begin(replace(whole, optimizers=("adam",), scale="reduced"))
    (tmp_path / "runs" / "digits_mlp" / "gone" / "smoke-seed0-0123456789").mkdir(parents=True)

    for campaign in (whole, longer, damped):
        part = replace(campaign, optimizers=("mlbfgs",), seeds=(1,))
        assert part.comparable_keys(part.compose()) == keys(campaign)
    new = replace(whole, optimizers=("kfac",), seeds=(2,))
    assert new.comparable_keys(new.compose()) == keys(whole) | keys(new)


def test_part_of_the_arms_is_compared_with_the_others(tmp_path: Path) -> None:
    begun = Campaign("controls", (), ("mlbfgs", "sgd_lr1.0"), (0, 1), "smoke", tmp_path)
    specs = begun.compose().specs
    for spec in specs:
        spec.directory.mkdir(parents=True)
    part = replace(begun, arms=("sgd_lr1.0",), seeds=(1,))
    assert part.comparable_keys(part.compose()) == {spec.key for spec in specs}


@pytest.mark.slow
@pytest.mark.parametrize("victims", ["runner", "runner and pool"])
def test_campaign_survives_being_killed_and_a_diverging_run(tmp_path: Path, victims: str) -> None:
    command = [sys.executable, "-m", "experiments.reproduce", "digits_mlp", "optimizer.lr=1e6"]
    command += ["--optimizers", "adam,sgd", "--seeds", "0", "--results-dir", str(tmp_path)]
    command += ["train.epochs=60"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    first = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while not list(tmp_path.glob("runs/digits_mlp/adam/*/checkpoints/*.pt")):
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.05)
        (directory,) = tmp_path.glob("runs/digits_mlp/adam/*")
        worker = int((directory / "lock").read_text())
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    if victims == "runner and pool":
        os.kill(worker, signal.SIGKILL)
    # A worker ends with its parent, within moments, and its lock goes with it.
    deadline = time.monotonic() + 30
    while is_locked(directory):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert state_of(directory).name == "interrupted"
    again = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert again.returncode == 0, again.stderr
    assert "sgd seed 0 diverged" in again.stdout
    meta = json.loads((directory / "meta.json").read_text())
    assert meta["resumes"][0]["step"] > 0  # from a checkpoint, not from the start
    statuses = {}
    for directory in tmp_path.glob("runs/*/*/*"):
        status = read_status(directory)
        assert status is not None
        statuses[directory.parent.name] = status.status
    assert statuses["sgd"] == "diverged" and statuses["adam"] in ("done", "diverged")


def test_outlook_says_what_is_missing_before_anything_is_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "results"
    arguments = ["imagenet_vit", "--ranks", "8", "--results-dir", str(folder), "--optimizers"]
    arguments += ["sgd,slimqn", f"dataset.root={tmp_path / 'absent'}"]
    assert main([*arguments, "--plan"]) == 0
    planned = capfd.readouterr().out
    assert planned.count("launch=torchrun launch.nproc=8") == 6
    assert main(arguments) == 2
    said = capfd.readouterr()
    for text in (planned, said.out):
        assert "6 runs, 0 finished, 6 to run" in text
        assert f"missing: ImageNet was not found: dataset.root = '{tmp_path / 'absent'}'" in text
        assert "GB free for checkpoints" in text and "min for 6 runs on 8 of 8 x" in text
    assert said.err.startswith("error: ImageNet was not found") and said.err.count("\n") == 1
    assert not folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_smoke_of_imagenet_trains_on_generated_images_and_does_nothing_twice(
    ranks: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = ["imagenet_resnet50", "--scale", "smoke", "--seeds", "0", "--ranks", ranks]
    arguments += ["--optimizers", "mlbfgs", "--results-dir", str(tmp_path), "train.device=cpu"]
    assert main(arguments) == 0
    said = capfd.readouterr().out
    assert f"ranks     {ranks}" in said and "64 training and 32 test images (generated)" in said
    assert "M-T4" in said and "M-F4" in said
    (meta,) = tmp_path.glob("runs/imagenet_resnet50/mlbfgs/*/meta.json")
    assert json.loads(meta.read_text())["ranks"] == int(ranks)
    written = meta.stat().st_mtime_ns
    assert main(arguments) == 0
    assert "1 runs, 1 finished, 0 to run" in capfd.readouterr().out
    assert meta.stat().st_mtime_ns == written


def test_claim_is_planned_with_its_contestants_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = ["S-F5-late", "M-L1", "--scale", "smoke", "--seeds", "0,4", "--results-dir"]
    assert main([*line, str(tmp_path), "--plan"]) == 0
    said = capfd.readouterr().out
    assert "cifar10_resnet18_slimqn, scale smoke" in said and "4 runs, 0 finished" in said
    assert said.count("experiments.train") == 4 and "seed=4" in said
    assert "training left: unknown" in said and "no run to tell it by" in said
    assert "settled by: make theory" in said


def test_missing_data_of_one_experiment_do_not_keep_the_others_from_running(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLBFGS_DATA", str(tmp_path / "nowhere"))
    line = ["cifar100_resnet18", "digits_mlp", "--seeds", "0", "train.epochs=2"]
    assert main([*line, "--results-dir", str(tmp_path), "--jobs", "2"]) == 3
    said = capfd.readouterr()
    assert said.err.startswith("data missing for cifar100_resnet18 (rows M-T3, M-F3, M-F8")
    assert "cifar100 was not found: dataset.root = " in said.err and "train.parquet" in said.err
    assert len(list(tmp_path.glob("runs/digits_mlp/*/*/status.json"))) == 6
    assert not (tmp_path / "runs" / "cifar100_resnet18").exists()
    page = (tmp_path / "summary" / "README.md").read_text()
    assert "| `M-T3-cifar100-resnet18-sgd` |" in page
    assert main(["cifar100_resnet18", "--seeds", "0", "--results-dir", str(tmp_path)]) == 2
    assert capfd.readouterr().err.startswith("error: cifar100 was not found")


def test_runs_of_another_process_are_left_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = ["digits_mlp", "--optimizers", "sgd", "--seeds", "0", "--scale", "smoke"]
    line += ["--results-dir", str(tmp_path)]
    campaign = Campaign("digits_mlp", ("sgd",), (), (0,), "smoke", tmp_path)
    (spec,) = campaign.compose().specs
    with RunDirectory.open(spec) as directory:
        directory.write_status(RunStatus("running", epoch=1))
        assert main([*line, "--status"]) == 0
        assert "sgd  running 1/2" in capfd.readouterr().out
        assert main(line) == 3
        assert "1 runs are queued, or another process trains them" in capfd.readouterr().err
        directory.write_status(RunStatus("crashed", message="it broke"))
    assert main([*line, "--missing-only"]) == 1
    assert "it broke (1 of 1 runs)" in capfd.readouterr().err
    assert main([*line, "--retry-failed"]) == 0
    status = read_status(spec.directory)
    assert status is not None and status.status == "done"


@pytest.mark.slow
def test_two_rows_are_reproduced_at_smoke_scale_on_generated_data(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLBFGS_DATA", str(tmp_path / "nowhere"))
    line = ["S-F5", "M-T3-cifar100-deit-tiny-sgd", "--scale", "smoke", "--seeds", "0,1"]
    assert main([*line, "--results-dir", str(tmp_path), "--jobs", "2"]) == 0
    said = capfd.readouterr().out
    assert "[6/6]" in said and "M-T3-cifar100-resnet18-sgd" not in said
    entries = json.loads((tmp_path / "summary" / "claims.json").read_text())
    judged = {
        entry["id"]: judgement
        for entry in entries
        for judgement in entry["judgements"]
        if judgement["scale"] == "smoke"
    }
    assert {"S-F5-speed", "S-F5-late", "S-F5-loss"} <= set(judged)
    for name in ("S-F5-late", "S-F5-loss"):
        assert judged[name]["n"] == 2 and judged[name]["paired"]
        assert judged[name]["outcome"] in ("reproduced", "not reproduced", "inconclusive")
        assert judged[name]["verdict"].endswith("at smoke scale")
    assert len(entries) == len(load_claims())


def test_claims_of_theory_are_judged_without_a_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["M-L1", "--results-dir", str(tmp_path)]) == 0
    said = capfd.readouterr().out
    for claim in load_claims():
        assert (f"{claim.id}: " in said) == (claim.row == "M-L1")
    assert "settled by: make theory" in said
    assert (tmp_path / "summary" / "README.md").is_file() and not (tmp_path / "runs").exists()
