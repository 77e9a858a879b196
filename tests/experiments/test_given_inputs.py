"""What users give on command lines and in files: a line for what will not do, never a traceback."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from experiments import reproduce
from experiments.analysis.__main__ import main as analyse
from experiments.analysis.judging.claims import load_claims
from experiments.analysis.measuring.runs import load_runs
from experiments.composition import compose_config, override
from experiments.contestants import CONFIG_DIR, options
from experiments.errors import UserError
from experiments.runs.atomic import write_atomically
from experiments.runs.directory import read_status
from experiments.runs.provenance import describe_git
from experiments.runs.spec import RunSpec
from experiments.train import main as train
from experiments.tuning.chosen import Chosen
from tests.experiments.analysis.judging.test_analysis_claims import CLAIM, PAPER

DRY = ["scale=smoke", "launch.dry_run=true"]
CHOSEN = {
    "experiment": "digits_mlp",
    "scale": "smoke",
    "space": "learning_rate",
    "metric": "test_top1",
    "holdout": 288,
    "seeds": [100],
    "trials": 2,
    "settings": {"sgd": {"optimizer.lr": 0.1}},
}


def told(run: Callable[[], int], capfd: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that refuses."""
    assert run() == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


# --- values that are wrong without a word ------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["seed=18446744073709551616"], "seed=18446744073709551616 "),
        (["train.epochs=1e400"], "train.epochs=inf"),
        (["train.epochs=100000000000000"], "from 1 to 2147483647"),
        (["experiment.target.value=nan"], "experiment.target.value=nan"),
        (["train.micro_batch=100000"], "more than train.batch_size"),
        (["optimizer=sgd", "optimizer.weight_decay=inf"], "optimizer.weight_decay=inf"),
        (["optimizer=sgd", "optimizer.momentum=-inf"], "optimizer.momentum=-inf"),
        (["schedule.min_lr=nan"], "schedule.min_lr=nan"),
        (["optimizer.betas=[0.9,nan]"], "optimizer.betas.1=nan"),
        (["dataset.mean=[inf]"], "dataset.mean.0=inf"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(changes: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        RunSpec.from_config(compose_config(changes))
    assert message in str(caught.value)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "paper.yaml").write_text(yaml.safe_dump(PAPER))
    one = yaml.safe_dump({"X": CLAIM})
    path = tmp_path / "claims.yaml"
    path.write_text(one)
    assert len(load_claims(path)) == 1
    path.write_text(one + one.replace("value", "value").replace("0.5", "50"))
    with pytest.raises(UserError, match="'X' stands twice"):
        load_claims(path)
    path.write_text(one + "  margin: 50\n")
    with pytest.raises(UserError, match="'margin' stands twice"):
        load_claims(path)
    path.write_text(one)
    (tmp_path / "paper" / "._paper.yaml").write_bytes(b"\x00\x05\x16\x07")
    assert len(load_claims(path)) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"margin": float("nan")},
        {"margin": True},
        {"judged_at": 5},
        {"contradicts": "abc"},
        {"deterministic": "no"},
        {"optimizer": "a; rm -rf x"},
        {"experiment": "../../x"},
        {"statement": ["a"]},
        {"cell": 5},
    ],
    ids=str,
)
def test_an_entry_of_another_type_is_named(tmp_path: Path, change: dict[str, object]) -> None:
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "paper.yaml").write_text(yaml.safe_dump(PAPER))
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump({"X": {**CLAIM, **change}}))
    (key,) = change
    with pytest.raises(UserError, match=f"X: {key} is .* is needed"):
        load_claims(tmp_path / "claims.yaml")


def test_a_copy_inside_another_repository_has_no_commit(tmp_path: Path) -> None:
    inner = tmp_path / "copy"
    (inner / "experiments").mkdir(parents=True)
    (inner / "experiments" / "a.py").write_text("1")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init"], ["add", "."], [*who, "commit", "-m", "outer"]):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)
    assert describe_git(tmp_path) is not None
    assert describe_git(inner) is None


# --- files that are no such files -----------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.mkdir(),
        lambda path: path.write_text(yaml.safe_dump({**CHOSEN, "settings": None})),
        lambda path: path.write_text(yaml.safe_dump({**CHOSEN, "settings": {"sgd": None}})),
        lambda path: path.write_text(yaml.safe_dump({**CHOSEN, "seeds": "x"})),
        lambda path: path.write_text(yaml.safe_dump({**CHOSEN, "experiment": "../x"})),
        lambda path: path.write_text("[" * 100_000),
        lambda path: path.write_text("2024-99-99"),
        lambda path: path.write_text(""),
        lambda path: path.write_bytes(b"\xff\xfea\x00"),
        lambda path: path.symlink_to(path),
        lambda path: os.mkfifo(path),
        lambda path: path.symlink_to("/dev/zero"),
    ],
)
def test_tuned_that_is_no_file_of_settings_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], make: Callable[[Path], object]
) -> None:
    path = tmp_path / "chosen.yaml"
    make(path)
    command = ["digits_mlp", "--scale", "smoke", "--seeds", "0", "--tuned", str(path), "--plan"]
    assert str(path) in told(lambda: reproduce.main(command), capfd)


def test_settings_of_a_search_call_nothing(tmp_path: Path) -> None:
    path = tmp_path / "chosen.yaml"
    path.write_text("\ufeff" + yaml.safe_dump(CHOSEN), encoding="utf-8")
    assert Chosen.load(path).settings == CHOSEN["settings"]
    for key, value in (
        ("optimizer._target_", "os.system"),
        ("optimizer._target_", 1.0),
        ("optimizer.lr", "${oc.env:HOME}"),
        ("optimizer.lr", float("nan")),
        ("results_dir", 1.0),
        ("optimizer.lr=1 hydra.run.dir", 1.0),
    ):
        path.write_text(yaml.safe_dump({**CHOSEN, "settings": {"sgd": {key: value}}}))
        with pytest.raises(UserError, match=r"is no chosen\.yaml"):
            Chosen.load(path)


@pytest.mark.parametrize("name", ["x" * 300, "loop/x", "file/x"])
def test_a_results_directory_that_cannot_be_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / name
    line = told(lambda: train([*DRY, f"results_dir={folder}"]), capfd)
    assert str(folder) in line
    for command in (
        ["digits_mlp", "--scale", "smoke", "--seeds", "0", "--results-dir", str(folder)],
        ["digits_mlp", "--scale", "smoke", "--seeds", "0", "--results-dir", str(folder), "--tuned"],
    ):
        if command[-1] == "--tuned":
            command.append(str(folder))
        assert str(folder) in told(lambda c=command: reproduce.main(c), capfd)
    assert str(folder) in told(lambda: analyse([str(folder), "--all"]), capfd)


def test_hidden_files_beside_configs_are_no_configs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "configs"
    (copy / "optimizer").mkdir(parents=True)
    for name in ("sgd.yaml", "._sgd.yaml"):
        (copy / "optimizer" / name).write_text("name: sgd")
    monkeypatch.setattr("experiments.contestants.CONFIG_DIR", copy)
    assert options("optimizer") == ["sgd"]
    assert CONFIG_DIR != copy


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("status.json", '{"status": "done", "status": "running"}'),
        ("status.json", '{"status": ["done"]}'),
        ("status.json", '{"status": "done", "epoch": "x"}'),
        ("status.json", "[" * 100_000),
        ("meta.json", '{"key": NaN}'),
        ("config.yaml", "a: 1\na: 2\n"),
        ("metrics.jsonl", '{"kind": "epoch", "epoch": 1e999, "step": 1, "train_time_s": 1}\n'),
        ("metrics.jsonl", '{"kind": ["epoch"]}\n'),
        ("metrics.jsonl", '{"kind": "epoch", "epoch": true, "step": 1, "train_time_s": 1}\n'),
        ("metrics.jsonl", '{"kind": "ema", "epoch": 1' + "0" * 400 + ', "step": 1}\n'),
    ],
)
def test_a_file_of_a_run_that_cannot_be_right_is_named(
    tmp_path: Path, file: str, content: str
) -> None:
    key = "0123456789"
    path = tmp_path / "runs" / "toy" / "sgd" / f"smoke-seed0-{key}"
    path.mkdir(parents=True)
    meta = {"key": key, "experiment": "toy", "optimizer": "sgd", "seed": 0, "scale": "smoke"}
    files = {
        "meta.json": json.dumps(meta),
        "config.yaml": "train: {epochs: 1}",
        "status.json": '{"status": "done"}',
        "metrics.jsonl": '{"kind": "epoch", "epoch": 1, "step": 1, "train_time_s": 1}\n',
    }
    for name, text in files.items():
        (path / name).write_text(text)
    assert len(load_runs(tmp_path, "toy").runs) == 1
    (path / file).write_text(content)
    with pytest.raises(UserError, match=file):
        load_runs(tmp_path, "toy")
        read_status(path)


def test_what_a_run_says_does_not_command_the_terminal(tmp_path: Path) -> None:
    said = "\x1b]0;x\x07\n\x9bH"
    (tmp_path / "status.json").write_text(json.dumps({"status": "crashed", "message": said}))
    status = read_status(tmp_path)
    assert status is not None and status.message.isprintable()


def test_an_experiment_is_a_name_and_no_path(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "outside" / "sgd" / "smoke-seed0-0123456789"
    run.mkdir(parents=True)
    (tmp_path / "results" / "runs").mkdir(parents=True)
    arguments = [str(tmp_path / "results"), "--experiment", "../../outside"]
    assert "is no experiment" in told(lambda: analyse(arguments), capfd)


def test_a_folder_that_the_system_cannot_write_out_is_good_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "as CIFS and some FUSE file systems say")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomically(tmp_path / "x", "new \udcff")
    assert (tmp_path / "x").read_text(encoding="utf-8") == r"new \udcff"


@pytest.mark.parametrize("seeds", ["0,00", "9" * 5000, "٣", "²", "-1", "1,,2"])
def test_seeds_are_whole_numbers_each_once(seeds: str, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["digits_mlp", "--scale", "smoke", f"--seeds={seeds}", "--plan"]
    assert "--seeds" in told(lambda: reproduce.main(command), capfd)


# --- text that leaves the process -------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    ["a=b", "a#b", "a&b", "a[b", "~", "ü x", "it's", "a\\", "null", "1e3", "a,b", "{a}", "x: y"],
)
def test_a_printed_command_is_taken_as_it_is_printed(tmp_path: Path, value: str) -> None:
    assert compose_config([override("results_dir", value)]).results_dir == value


def test_the_plan_of_a_campaign_is_typed_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a=b [c] ~'#&"
    arguments = ["digits_mlp", "--optimizers", "sgd", "--seeds", "0", "--scale", "smoke"]
    assert reproduce.main([*arguments, "--results-dir", str(folder), "--plan"]) == 0
    lines = capfd.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.strip().startswith("python -m")]
    # through a real shell, as a reader would
    shell = line.strip().replace("python -m experiments.train", "printf '%s\\n'")
    said = subprocess.run(shell, shell=True, check=True, capture_output=True, text=True).stdout
    assert compose_config(said.splitlines()).results_dir == str(folder)


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert train([*DRY, "results_dir=~/here"]) == 0
    arguments = ["digits_mlp", "--seeds", "0", "--scale", "smoke", "--plan"]
    assert reproduce.main([*arguments, "--results-dir=~/here"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_how_to_quote_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    line = told(lambda: train(["experiment.name=a=b"]), capfd)
    assert """'experiment.name='"'"'a=b'"'"''""" in line or "experiment.name=" in line
    assert "in quotes" in line


SWEEP = "python -m experiments.train -m scale=smoke seed=0,1,2 results_dir={}"


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # `python` is this one
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, **environment}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], env=variables, capture_output=True, text=True
    )


@pytest.mark.slow
def test_a_reader_that_leaves_does_not_end_a_sweep(tmp_path: Path) -> None:
    done = shell(f"{SWEEP.format(tmp_path)} | head -1")
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 1)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
    statuses = [json.loads(p.read_text())["status"] for p in tmp_path.rglob("status.json")]
    assert statuses == ["done"] * 3


@pytest.mark.slow
@pytest.mark.parametrize("where", [">/dev/full", ">&-", "2>&-", "2>/dev/full"])
def test_output_that_goes_nowhere_does_not_end_a_command(tmp_path: Path, where: str) -> None:
    command = f"python -m experiments.train scale=smoke results_dir={tmp_path} {where}"
    done = shell(command)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert OmegaConf.load(next(tmp_path.rglob("config.yaml"))).scale.name == "smoke"


@pytest.mark.slow
def test_a_terminal_without_the_characters_shows_escapes(tmp_path: Path) -> None:
    ascii_terminal = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    folder = tmp_path / "ergebnisse-ü-μ"
    command = (
        f"python -m experiments.reproduce digits_mlp --optimizers sgd,mlbfgs --seeds 0 "
        f"--scale smoke --results-dir {folder}"
    )
    done = shell(command, **ascii_terminal)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert r"\xb1" in done.stdout and done.stdout.isascii()  # the ± of the tables
    assert (folder / "summary").is_dir()
