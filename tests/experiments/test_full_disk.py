"""A disk that is really full: one line, exit code 2, nothing half written, and then on it goes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import tune, worker
from experiments.analysis.__main__ import main as analyse
from experiments.analysis.documents import main as write_documents
from experiments.benchmarks.measure import folder_for, write_measured
from experiments.data import decoded_cache, prepare
from experiments.data.batches import ImageSet
from experiments.launching.launch import launch
from experiments.launching.pool import WorkerPool
from experiments.report.__main__ import main as report
from experiments.runs.directory import read_status
from experiments.runs.outcome import freeze
from experiments.runs.spec import RunSpec
from experiments.training.trainer import Trainer
from tests.experiments.report.report_toys import write_results
from tests.experiments.run_configs import MLBFGS, ROOT, assert_same_run, run_spec
from tests.file_systems import disk, exit_status, fill

# 22 steps; a checkpoint has some 80 kB, and two are kept.
RUN = {
    "model": {"name": "mlp", "hidden": [128]},
    "train.epochs": 1,
    "train.checkpoint_interval": 5,
    "train.log_interval": 1,
}


def temporary_files(folder: Path) -> list[Path]:
    return list(folder.rglob("*.tmp"))


def errors(capfd: pytest.CaptureFixture[str]) -> list[str]:
    err = capfd.readouterr().err
    assert "Traceback" not in err
    return [line for line in err.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("room", [8, 16, 24, 40, 70, 100, 120, 150, 180, 210, 240, 300])
def test_a_run_that_fills_the_disk_says_so_and_goes_on_with_room(tmp_path, capfd, room):
    """From a disk without room for the config to one on which the fifth checkpoint fails."""
    with disk(tmp_path / "disk", f"{room}k") as folder:
        spec = run_spec(folder, **RUN)
        code = exit_status(lambda: freeze(spec))
        if code == 0:
            code = worker.main([str(spec.directory)])
        told = errors(capfd)
        assert temporary_files(folder) == []
        if code == 0:
            assert room >= 240 and told == []
            return
        assert code == 2 and len(told) == 1 and "No space left" in told[0], told
        status = read_status(spec.directory)
        assert status is None or status.status == "refused", status
        if room >= 100:
            assert status is not None and "No space left" in status.message
        subprocess.run(["mount", "-o", "remount,size=10m", str(folder)], check=True)
        assert Trainer(spec).run() == "done"
        undisturbed = run_spec(tmp_path / "other", **RUN)
        assert Trainer(undisturbed).run() == "done"
        assert_same_run(spec, undisturbed)


def test_a_disk_that_others_fill_to_the_last_byte_still_gets_the_status(tmp_path, capfd):
    with disk(tmp_path / "disk", "2m") as folder:
        spec = run_spec(folder, **{**RUN, "train.epochs": 3})

        def somebody_fills(record):
            fill(folder)

        code = exit_status(lambda: Trainer(spec, on_epoch=somebody_fills).run() and 0)
        (line,) = errors(capfd)
        assert code == 2 and "No space left" in line
        status = read_status(spec.directory)
        assert status is not None and status.status == "refused" and status.step >= 22
        assert "No space left" in status.message and temporary_files(folder) == []
        (folder / "filler").unlink()
        assert Trainer(spec).run() == "done"


def test_a_pool_goes_on_with_the_other_runs(tmp_path):
    with disk(tmp_path / "disk", "100k") as folder:
        large = run_spec(folder, **RUN)
        small = run_spec(folder, **{**RUN, "model": {"name": "mlp", "hidden": [4]}, "seed": 1})
        for spec in (large, small):
            freeze(spec)
        with WorkerPool(1) as pool:
            found = pool.outcomes([large.directory, small.directory])
            outcomes = [outcome for outcome in found if not isinstance(outcome, tuple)]
        assert [outcome.status for outcome in outcomes] == ["refused", "done"]
        assert "No space left" in outcomes[0].message


@pytest.mark.slow
def test_ranks_that_fill_the_disk_say_so_once_and_go_on_with_room(tmp_path, capfd):
    torchrun = {"name": "torchrun", "nproc": 2, "timeout_s": 60.0, "max_restarts": 1}
    run = {**RUN, "optimizer": {**MLBFGS, "distribution": "sharded"}, "launch": torchrun}
    with disk(tmp_path / "disk", "1500k") as folder:
        spec = run_spec(folder, **run)
        outcome = launch(spec)
        told = capfd.readouterr().err
        assert outcome.status == "refused" and "cannot be written" in outcome.message, told
        lines = [line for line in told.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, told
        status = read_status(spec.directory)
        assert status is not None and status.status == "refused"
        assert temporary_files(folder) == []
        subprocess.run(["mount", "-o", "remount,size=20m", str(folder)], check=True)
        assert launch(spec).status == "done"
    undisturbed = run_spec(tmp_path / "other", **run)
    assert launch(undisturbed).status == "done"


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "filler")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Results with everything that commands write into them."""
    folder = write_results(tmp_path_factory.mktemp("judged") / "results")
    assert analyse([str(folder), "--experiment", "toy"]) == 0
    assert report(["--results-dir", str(folder)]) == 0
    return folder


COMMANDS = {
    "analysis --experiment": lambda f: analyse([str(f), "--experiment", "toy"]),
    "analysis --summaries": lambda f: analyse([str(f), "--summaries"]),
    "report": lambda f: report(["--results-dir", str(f)]),
    "benchmark": lambda f: exit_status(
        lambda: write_measured(folder_for(f / "benchmarks", "b"), "b", {"a": 1}, "page")
    ),
}


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("leave", [0, 40_000, 150_000])
@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_no_command_leaves_half_a_file(tmp_path, capfd, judged, command, leave, again):
    """With the old output there (again) or not: each file is the old one, or whole, or absent."""
    with disk(tmp_path / "disk", "8m") as folder:
        results = folder / "results"
        shutil.copytree(judged, results)
        whole = contents(results)
        if not again:
            for name in ("report", "summary/toy-reduced", "summary/toy-full"):
                shutil.rmtree(results / name)
        fill(folder, leave)
        capfd.readouterr()
        code = COMMANDS[command](results)
        told = errors(capfd)
        assert temporary_files(folder) == []
        for name, content in contents(results).items():
            if not name.endswith(".written") and "benchmarks/" not in name:
                assert content == whole[name], name
        if code == 0:
            assert told == [] and leave > 0
            return
        assert code == 2 and len(told) == 1 and "No space left" in told[0]
        (folder / "filler").unlink()
        assert COMMANDS[command](results) == 0
        part = {"report": "report/", "benchmark": "nothing"}.get(command, "summary/toy")
        for name in (name for name in whole if name.startswith(part)):
            assert contents(results).get(name) == whole[name], name


def test_documents_keep_their_text_where_the_disk_is_full(tmp_path, capfd):
    with disk(tmp_path / "disk", "200k") as folder:
        (folder / "block.md").write_text("new\n")
        text = "before\n<!-- generated: block.md -->\n\nold\n\n<!-- end generated -->\n"
        (folder / "README.md").write_text(text)
        fill(folder)
        assert write_documents([], root=folder, documents=["README.md"]) == 2
        (line,) = errors(capfd)
        assert "No space left" in line and (folder / "README.md").read_text() == text


def test_a_search_ends_with_a_line_and_goes_on_with_room(tmp_path, capfd):
    arguments = ["digits_mlp", "--optimizers", "sgd", "--trials", "1", "--scale", "smoke"]
    with disk(tmp_path / "disk", "4m") as folder:
        arguments += ["--results-dir", str(folder)]
        assert tune.main(arguments) == 0
        shutil.rmtree(next(folder.glob("tuning/*/runs")).parent / "runs" / "nothing", True)
        written = next(folder.glob("tuning/*"))
        before = contents(written)
        for name in ("trials.csv", "summary.md", "chosen.yaml"):
            (written / name).unlink()
        fill(folder)
        capfd.readouterr()
        assert tune.main(arguments) == 2
        (line,) = errors(capfd)
        assert "No space left" in line and temporary_files(folder) == []
        (folder / "filler").unlink()
        assert tune.main(arguments) == 0 and contents(written) == before


def test_prepared_images_are_there_in_whole_shards_or_not_at_all(tmp_path, capfd, image_tree):
    mark = json.loads((image_tree / "synthetic.json").read_text())
    settings = [f"dataset.num_classes={mark['num_classes']}"]
    settings += [f"dataset.{split}_images=null" for split in ("train", "test")]
    with disk(tmp_path / "disk", "1m") as folder:
        arguments = [str(image_tree), str(folder / "prepared"), "--workers", "1", *settings]
        arguments += ["--shard-size", "8", "dataset.resized=32", "dataset.crop=32"]
        for leave in (0, 4096, 16384, 40960, 81920):
            filler = fill(folder, leave)
            code = prepare.main(arguments)
            told = errors(capfd)
            assert temporary_files(folder) == [] and code in (0, 2)
            if code == 2:
                assert len(told) == 1 and "space" in told[0], told
            filler.unlink()
        assert prepare.main(arguments) == 0


def test_the_cache_of_decoded_images_costs_a_warning(tmp_path, caplog):
    import numpy as np

    images = ImageSet(np.zeros((100, 3, 32, 32), np.uint8), np.zeros(100, np.int64))
    source = tmp_path / "source"
    source.write_text("x")
    with disk(tmp_path / "disk", "400k") as folder:
        fill(folder, 100_000)
        found = decoded_cache.load_or_make(folder / "cache", "name", [source], lambda: images)
        assert found is images and "cannot be kept" in caplog.text
        assert list((folder / "cache").iterdir()) == []
        (folder / "filler").unlink()
        decoded_cache.load_or_make(folder / "cache", "name", [source], lambda: images)
        assert len(list((folder / "cache").iterdir())) == 1


def test_a_full_temporary_folder_is_told_too(tmp_path):
    """Hydra and torch put files of theirs there."""
    with disk(tmp_path / "disk", "100k") as folder:
        fill(folder)
        environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "experiments.train", "-m", "experiment=digits_mlp"]
        command += ["scale=smoke", "seed=0,1", f"results_dir={tmp_path / 'results'}"]
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert "Traceback" not in ended.stderr, ended.stderr
        assert ended.returncode in (0, 2)


def test_a_frozen_config_is_the_first_thing_on_a_disk(tmp_path):
    with disk(tmp_path / "disk", "100k") as folder:
        spec = run_spec(folder, **RUN)
        freeze(spec)
        assert RunSpec.load(spec.directory / "config.yaml").key == spec.key
