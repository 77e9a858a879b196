"""Links in results: nothing is written, cut or deleted through them, and a line names them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from experiments import tune, worker
from experiments.analysis.__main__ import main as analyse
from experiments.errors import UserError
from experiments.launching.slurm import SlurmSettings, submit
from experiments.report.__main__ import main as report
from experiments.runs.directory import is_locked
from experiments.runs.outcome import freeze
from experiments.training.checkpoint import CheckpointStore
from experiments.training.trainer import Trainer
from tests.experiments.report.report_toys import write_results
from tests.experiments.run_configs import assert_same_run, newest_state, run_spec, stop_at
from tests.file_systems import exit_status

RUN = {"model": {"name": "mlp", "hidden": [8]}, "train.epochs": 1, "train.checkpoint_interval": 5}


@pytest.fixture
def victim(tmp_path):
    """Somebody's folder and file; whoever changes them fails the test."""
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "precious").write_text("precious\n" * 100)
    for name in ("step00000001.tmp", "traceback.txt", "step00000005-0123456789abcdef.pt"):
        (folder / name).write_text("precious")
    before = seen(folder)
    yield folder
    assert seen(folder) == before


def seen(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def begun(tmp_path):
    """A run that was stopped at its 12th step."""
    spec = run_spec(tmp_path / "results", **RUN)
    stop_at(12, Trainer(spec))
    return spec


def put_link(path: Path, target: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize(
    "name", ["lock", "metrics.jsonl", "checkpoints", "config.yaml", "status.json", "meta.json"]
)
@pytest.mark.parametrize("target", ["precious", "nothing", "."])
def test_no_file_of_a_run_is_written_through_a_link(tmp_path, victim, capfd, name, target):
    spec = begun(tmp_path)
    put_link(spec.directory / name, victim / target)
    code = worker.main([str(spec.directory)])
    told = capfd.readouterr().err
    assert "Traceback" not in told and not (victim / "nothing").exists()
    lines = [line for line in told.splitlines() if line.startswith("error: ")]
    if name in ("lock", "metrics.jsonl", "checkpoints"):
        assert code == 2 and len(lines) == 1 and name in lines[0], told
    elif code == 0:  # what is replaced as a whole takes the place of the link
        assert not (spec.directory / name).is_symlink()
    else:
        assert code == 2 and len(lines) == 1 and name in lines[0], told


@pytest.mark.parametrize(
    "name",
    [
        *("config.yaml.tmp", "status.json.0123abcd.tmp", "traceback.txt", "traceback-rank1.txt"),
        *("checkpoints/step00000005.tmp", "checkpoints/step00000012.tmp"),
        "checkpoints/step00000001-0123456789abcdef.tmp",
        *(
            "checkpoints/step00000099-0123456789abcdef",
            "checkpoints/step00000098-0123456789abcdef.pt",
        ),
    ],
)
@pytest.mark.parametrize("target", ["precious", "nothing", "."])
def test_links_among_the_leftovers_are_removed_and_the_run_goes_on(tmp_path, victim, name, target):
    spec = begun(tmp_path)
    put_link(spec.directory / name, victim / target)
    assert Trainer(spec).run() == "done"
    assert not os.path.islink(spec.directory / name) and not (victim / "nothing").exists()
    undisturbed = run_spec(tmp_path / "other", **RUN)
    assert Trainer(undisturbed).run() == "done"
    assert_same_run(spec, undisturbed)


@pytest.mark.parametrize("part", ["runs", "runs/test", "runs/test/sgd", ""])
def test_no_folder_below_the_results_is_reached_through_a_link(tmp_path, victim, part):
    spec = begun(tmp_path)
    link = tmp_path / "results" / part if part else spec.directory
    put_link(link, victim)
    with pytest.raises(UserError, match="is a link"):
        freeze(spec)
    with pytest.raises(UserError, match="is a link"):
        Trainer(spec).run()


def test_results_that_the_user_linked_are_fine(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "results").symlink_to(tmp_path / "scratch")
    spec = run_spec(tmp_path / "results", **RUN)
    assert Trainer(spec).run() == "done"
    latest = tmp_path / "latest"
    latest.symlink_to(spec.directory)
    assert worker.main([str(latest)]) == 0  # named on the command line: what it leads to is meant


@pytest.mark.parametrize("what", ["checkpoints", "step00000010.tmp"])
def test_a_link_that_appears_while_the_run_goes_on_is_not_followed(tmp_path, victim, what):
    spec = run_spec(tmp_path / "results", **{**RUN, "train.epochs": 2})
    folder = spec.directory / "checkpoints"
    moved = tmp_path / "moved"

    def swap(record):
        if what == "checkpoints":
            folder.rename(moved)
            folder.symlink_to(victim)
        else:
            (folder / "step00000025.tmp").symlink_to(victim / "precious")

    trainer = Trainer(spec, on_epoch=swap)
    if what == "checkpoints":
        with pytest.raises(UserError, match="is a link"):
            trainer.run()
        folder.unlink()
        moved.rename(folder)
        assert Trainer(spec).run() == "done"
    else:
        assert trainer.run() == "done"
    assert newest_state(spec)["position"]["step"] == 44


def test_a_lock_that_leads_elsewhere_locks_nothing_there(tmp_path, victim):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").symlink_to(victim / "precious")
    assert not is_locked(tmp_path / "run")
    (tmp_path / "run" / "lock").unlink()
    os.mkfifo(tmp_path / "run" / "lock")
    assert not is_locked(tmp_path / "run")


def test_deleting_a_checkpoint_ends_at_a_link(tmp_path, victim):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "step00000001-0123456789abcdef").symlink_to(victim)
    (folder / "step00000002-0123456789abcdef.pt").symlink_to(victim / "precious")
    assert CheckpointStore(folder, key="k", keep=1).load_newest() is None
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["wandb", "slurm"])
def test_folders_of_other_packages_are_no_links_either(tmp_path, victim, name):
    pytest.importorskip("submitit" if name == "slurm" else "experiments")
    logger = {"name": "wandb", "mode": "offline"} if name == "wandb" else {"name": "files"}
    spec = run_spec(tmp_path / "results", logger=logger, **RUN)
    freeze(spec)
    (spec.directory / name).symlink_to(victim)
    with pytest.raises(UserError, match="is a link"):
        if name == "wandb":
            Trainer(spec).run()
        else:
            submit(spec, SlurmSettings(name="slurm", cluster="local", nproc=1))


@pytest.mark.parametrize("link", ["summary", "summary/toy-reduced", "summary/claims.json"])
def test_summaries_are_written_through_no_link(tmp_path, victim, capfd, link):
    results = write_results(tmp_path / "toy" / "results")
    assert analyse([str(results), "--experiment", "toy"]) == 0
    put_link(results / link, victim / "precious" if link.endswith("json") else victim)
    assert analyse([str(results), "--all"]) == (2 if link == "summary" else 0)
    assert analyse([str(results), "--experiment", "toy"]) == (0 if link.endswith("json") else 2)
    assert "Traceback" not in capfd.readouterr().err
    assert not (results / "summary" / "claims.json").is_symlink()


@pytest.mark.parametrize("link", ["index.html", "images", "report.css", ".written"])
def test_a_report_is_written_through_no_link(tmp_path, victim, capfd, link):
    results = write_results(tmp_path / "toy" / "results")
    assert report(["--results-dir", str(results)]) == 0
    (results / "theory").mkdir()
    (results / "theory" / "README.md").write_text("# t\n\n![a](a.png)\n")
    (results / "theory" / "a.png").write_bytes(b"x")
    inside = link == "images"
    put_link(results / "report" / link, victim if inside else victim / "precious")
    code = report(["--results-dir", str(results)])
    assert code == (2 if link in ("images", ".written") else 0), capfd.readouterr().err
    assert "Traceback" not in capfd.readouterr().err


def test_a_search_is_written_through_no_link(tmp_path, victim, capfd):
    (tmp_path / "results" / "tuning").mkdir(parents=True)
    (tmp_path / "results" / "tuning" / "digits_mlp-smoke").symlink_to(victim)
    arguments = ["digits_mlp", "--optimizers", "sgd", "--trials", "1", "--scale", "smoke"]
    assert tune.main([*arguments, "--results-dir", str(tmp_path / "results")]) == 2
    assert "is a link" in capfd.readouterr().err


def test_a_folder_in_the_place_of_a_file_is_told(tmp_path, capfd):
    spec = begun(tmp_path)
    (spec.directory / "lock").unlink()
    (spec.directory / "lock").mkdir()
    assert exit_status(lambda: freeze(spec)) == 2
    assert "Is a directory" in capfd.readouterr().err
