"""Commands replace and remove what commands wrote, and nothing else, wherever they are pointed."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from experiments import tune
from experiments.analysis.__main__ import main as analyse
from experiments.benchmarks.measure import folder_for
from experiments.data import prepare
from experiments.errors import UserError
from experiments.gpu_check.__main__ import main as gpu_check
from experiments.report.__main__ import main as report
from experiments.runs.directory import RunDirectory
from experiments.runs.outcome import freeze
from experiments.runs.owned_folder import LIST_FILE, OwnedFolder
from experiments.theory.__main__ import main as theory
from experiments.training.trainer import Trainer
from experiments.tuning.chosen import Chosen
from tests.experiments.report.report_toys import write_results
from tests.experiments.run_configs import run_spec
from tests.file_systems import exit_status


def seen(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.name != LIST_FILE
    }


def refused(capfd: pytest.CaptureFixture[str], code: int, name: str = "") -> None:
    err = capfd.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and name in lines[0] and "Traceback" not in err, err


def test_a_folder_replaces_and_removes_what_it_listed(tmp_path):
    folder = OwnedFolder(tmp_path / "out")
    folder.replace({"a": "1", "b": "1", "images/c": "1"})
    (tmp_path / "out" / "mine").write_text("mine")
    (tmp_path / "out" / "images" / "mine").write_text("mine")
    OwnedFolder(tmp_path / "out", alone=True).replace({"a": b"2"}, outdated=lambda name: True)
    kept = {"a": b"2", "mine": b"mine", "images": None, "images/mine": b"mine"}
    assert seen(tmp_path / "out") == kept
    with pytest.raises(UserError, match="mine was not written by this command"):
        OwnedFolder(tmp_path / "out").replace({"new": "1", "mine": "1"})
    assert seen(tmp_path / "out") == kept  # refused before anything was written


@pytest.mark.parametrize(
    "name", ["../x", "/tmp/x", "a/../../x", ".written", "images/.written", "", "a\nb", ".."]
)
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    with pytest.raises(UserError, match="cannot be the name"):
        OwnedFolder(tmp_path / "out").replace({name: "1"})
    assert seen(tmp_path / "out") == {}


def test_a_list_from_elsewhere_names_nothing_outside(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "link").symlink_to(tmp_path)
    lines = f"../victim\n{victim}\nlink/victim\n.\n\n\x00\n"
    (tmp_path / "out" / LIST_FILE).write_text(lines)
    OwnedFolder(tmp_path / "out").replace({"a": "1"}, outdated=lambda name: True)
    assert victim.read_text() == "mine" and (tmp_path / "out" / "a").read_text() == "1"


def claim_often(path: str, number: int) -> None:
    for i in range(40):
        OwnedFolder(Path(path)).replace({f"{number}-{i}": "x", "shared": "y" * 1000})


def test_processes_that_write_into_one_folder_lose_no_name(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=claim_often, args=(tmp_path / "x", n)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    listed = (tmp_path / "x" / LIST_FILE).read_text().splitlines()[1:]
    assert sorted(listed) == sorted(seen(tmp_path / "x")) and len(listed) == 161


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    return write_results(tmp_path_factory.mktemp("results") / "results")


@pytest.fixture
def mine(tmp_path):
    """Somebody's folder, with the names that commands like to write."""
    folder = tmp_path / "mine"
    (folder / "images").mkdir(parents=True)
    for name in (
        *("index.html", "thesis.html", "images/photo.png", "README.md", "summary.md", "table.csv"),
        *("quadratic.json", "optimizer_step.json", "b.md", "report.css", "trials.csv", "x.tmp"),
        *("curves-mine-reduced.png", "gpu_check.json", "traceback-of-mine.txt", "lock"),
    ):
        (folder / name).write_text("mine")
    before = seen(folder)
    yield folder
    assert {name: seen(folder).get(name) for name in before} == before


def test_a_report_is_not_written_into_somebodys_folder(judged, mine, capfd, tmp_path):
    arguments = ["--results-dir", str(judged), "--out"]
    refused(capfd, report([*arguments, str(mine)]), "is not empty")
    refused(capfd, report([*arguments, str(mine / "images")]), "is not empty")
    refused(capfd, report([*arguments, str(judged)]), "is not empty")
    refused(capfd, report([*arguments, str(mine / "index.html")]))
    (tmp_path / "link").symlink_to(mine)
    refused(capfd, report([*arguments, str(tmp_path / "link")]), "is not empty")
    (tmp_path / "empty").mkdir()
    assert report([*arguments, str(tmp_path / "empty")]) == 0
    (tmp_path / "empty" / "note.html").write_text("mine")
    (tmp_path / "empty" / "images").mkdir()
    (tmp_path / "empty" / "images" / "photo.png").write_text("mine")
    assert report([*arguments, str(tmp_path / "empty")]) == 0
    assert (tmp_path / "empty" / "note.html").read_text() == "mine"
    assert (tmp_path / "empty" / "images" / "photo.png").read_text() == "mine"


def test_no_other_command_replaces_somebodys_files(judged, mine, capfd):
    out = ["--experiment", "toy", "--out", str(mine)]
    refused(capfd, analyse([str(judged), *out]), "was not written by this command")
    refused(capfd, theory(["quadratic", "--out", str(mine)]), "was not written")
    refused(capfd, theory(["--judge-only", "--out", str(mine)]))
    refused(capfd, exit_status(lambda: folder_for(mine, "optimizer_step") and 0), "optimizer_step")
    refused(capfd, exit_status(lambda: folder_for(mine, "b") and 0), "b.md")
    at = ["--device", "cpu", "--out", str(mine / "gpu_check.json")]
    refused(capfd, gpu_check(at), "gpu_check.json")


def test_a_summary_folder_from_elsewhere_stays(judged, capfd, tmp_path):
    results = write_results(tmp_path / "other" / "results")
    (results / "summary" / LIST_FILE).unlink()
    (results / "summary" / "README.md").write_text("mine")
    refused(capfd, analyse([str(results), "--all"]), "README.md")
    (results / "summary" / "toy-reduced").mkdir()
    (results / "summary" / "toy-reduced" / "summary.md").write_text("mine")
    refused(capfd, analyse([str(results), "--summaries"]), "summary.md")
    assert (results / "summary" / "README.md").read_text() == "mine"
    assert (results / "summary" / "toy-reduced" / "summary.md").read_text() == "mine"


def test_a_search_and_its_adoption_replace_nothing_written_by_hand(tmp_path, capfd):
    folder = tmp_path / "tuning" / "digits_mlp-smoke"
    folder.mkdir(parents=True)
    (folder / "trials.csv").write_text("mine")
    arguments = ["digits_mlp", "--optimizers", "sgd", "--trials", "1", "--scale", "smoke"]
    refused(capfd, tune.main([*arguments, "--results-dir", str(tmp_path)]), "trials.csv")
    assert (folder / "trials.csv").read_text() == "mine"
    (folder / "trials.csv").unlink()
    assert tune.main([*arguments, "--results-dir", str(tmp_path)]) == 0
    chosen = Chosen.load(folder / "chosen.yaml")
    (path,) = chosen.adopt(tmp_path / "configs")
    assert chosen.adopt(tmp_path / "configs") == [path]  # its own may be replaced
    path.write_text("# by hand\n")
    with pytest.raises(UserError, match="not written by --adopt"):
        chosen.adopt(tmp_path / "configs")
    assert path.read_text() == "# by hand\n"


@pytest.mark.parametrize("way", ["same", "inside", "around", "link", "dots", "split"])
def test_images_are_not_prepared_into_the_originals(tmp_path, image_tree, capfd, way):
    import shutil

    tree = tmp_path / "around" / "tree"
    shutil.copytree(image_tree, tree)
    (tmp_path / "link").symlink_to(tree)
    targets = {
        "same": tree,
        "inside": tree / "prepared",
        "around": tmp_path / "around",
        "link": tmp_path / "link" / "p",
        "dots": tree / ".." / "tree",
        "split": tree / "train",
    }
    before = seen(tmp_path)
    refused(capfd, prepare.main([str(tree), str(targets[way])]), "neither within the other")
    assert seen(tmp_path) == before


@pytest.mark.parametrize("name", ["thesis.txt", "train/mine.jpg", "complete.json", "train"])
def test_images_are_not_prepared_into_somebodys_folder(tmp_path, image_tree, capfd, name):
    target = tmp_path / "mine"
    (target / name).parent.mkdir(parents=True)
    (target / name).write_text("mine")
    before = seen(target)
    sizes = ["dataset.num_classes=4", "dataset.train_images=null", "dataset.test_images=null"]
    code = prepare.main([str(image_tree), str(target), *sizes])
    refused(capfd, code, "holds no preparation")
    assert seen(target) == before


def test_a_preparation_keeps_foreign_files_beside_its_own(tmp_path, image_tree):
    target = tmp_path / "prepared"
    sizes = ["dataset.num_classes=4", "dataset.train_images=null", "dataset.test_images=null"]
    arguments = [str(image_tree), str(target), "--workers", "1", *sizes]
    assert prepare.main(arguments) == 0
    (target / "train" / "notes.tmp").write_text("mine")
    (target / "train" / "00000.bin.0123abcd.tmp").write_text("left by a killed process")
    assert prepare.main(arguments) == 0
    assert (target / "train" / "notes.tmp").read_text() == "mine"
    assert len(list((target / "train").glob("*.tmp"))) == 1


def test_a_run_directory_keeps_what_no_run_wrote(tmp_path):
    spec = run_spec(tmp_path, **{"train.epochs": 1})
    freeze(spec)
    own = ("traceback.txt", "traceback-rank3.txt", "status.json.tmp", "meta.json.0123abcd.tmp")
    mine = ("traceback-of-mine.txt", "notes.tmp", "checkpoints/best.pt", "checkpoints/notes.tmp")
    for name in (*own, *mine):
        (spec.directory / name).write_text("x")
    assert Trainer(spec).run() == "done"
    assert [name for name in own if (spec.directory / name).exists()] == []
    assert [name for name in mine if not (spec.directory / name).exists()] == []


def test_a_folder_that_is_no_run_directory_is_refused(tmp_path, mine):
    spec = run_spec(tmp_path / "results")
    with pytest.raises(UserError, match="is no run directory"):
        RunDirectory.open(spec, mine)
    spec.directory.parent.mkdir(parents=True)
    spec.directory.mkdir()
    (spec.directory / "lock").touch()  # left by a process that was killed at once
    RunDirectory.open(spec).close()
    assert os.path.exists(spec.directory / "config.yaml")


def test_a_command_that_is_refused_gets_no_right_to_the_names_of_its_files(tmp_path, capfd):
    out = tmp_path / "mine" / "gpu_check.json"
    refused(capfd, gpu_check(["--device", "cpu", "--parts", "nothing", "--out", str(out)]))
    out.write_text("the user's own")
    refused(capfd, gpu_check(["--device", "cpu", "--limit-s", "0", "--out", str(out)]), out.name)
    assert out.read_text() == "the user's own"
