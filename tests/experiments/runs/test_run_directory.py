"""The files of a run: who may work in a directory, and what is found there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from experiments.errors import UserError
from experiments.runs.directory import RunDirectory, RunStatus, read_status
from experiments.runs.provenance import describe_git, describe_origin
from experiments.runs.spec import NUMERICS_ROUNDING
from tests.experiments.run_configs import ROOT, run_spec

HOLD = """
import sys, time
from tests.experiments.run_configs import run_spec
from experiments.runs.directory import RunDirectory
directory = RunDirectory.open(run_spec(sys.argv[1]))
print("locked", flush=True)
time.sleep(600)
"""


@pytest.fixture
def spec(tmp_path):
    return run_spec(tmp_path)


def test_new_directory_has_the_frozen_config_and_no_status(spec):
    with RunDirectory.open(spec) as directory:
        assert directory.path == spec.directory
        assert directory.status is None and not directory.finished
        frozen = yaml.safe_load((directory.path / "config.yaml").read_text())
        assert frozen["train"]["epochs"] == 2
        assert directory.checkpoints_path.is_dir()


def test_directory_in_use_names_the_live_process_and_is_free_once_it_is_killed(spec, tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    holder = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(UserError, match=rf"in use by pid {holder.pid}\b"):
            RunDirectory.open(spec)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait(timeout=30)
        holder.stdout.close()
    RunDirectory.open(spec).close()


def test_lock_is_released_where_opening_fails(spec):
    RunDirectory.open(spec).close()
    (spec.directory / "status.json").write_text("{")
    for _ in range(2):
        with pytest.raises(UserError, match=r"status\.json is corrupt"):
            RunDirectory.open(spec)


def test_unwritable_results_directory_is_told(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="results directory cannot be written") as caught:
        RunDirectory.open(run_spec(tmp_path / "file" / "results"))
    assert "results_dir" in str(caught.value) and "\n" not in str(caught.value)


def test_read_only_file_system_is_told():
    if not Path("/proc/self").exists():
        pytest.skip("needs /proc, where nobody can make a folder")
    with pytest.raises(UserError, match="results directory cannot be written"):
        RunDirectory.open(run_spec("/proc/results"))


def test_changed_config_names_the_first_differing_key_with_both_values(spec):
    RunDirectory.open(spec).close()
    file = spec.directory / "config.yaml"
    content = file.read_text().replace("momentum: 0.9", "momentum: 0.8")
    content = content.replace("min_lr: 0.0001", "min_lr: 0.0002")
    file.write_text(content)
    with pytest.raises(UserError) as caught:
        RunDirectory.open(spec)
    message = str(caught.value)
    assert "resuming under a changed config: optimizer.momentum is 0.8 in" in message
    assert "but 0.9 was asked for" in message
    assert file.read_text() == content


def test_changed_cosmetics_are_taken_over(spec, tmp_path):
    RunDirectory.open(spec).close()
    RunDirectory.open(run_spec(tmp_path, **{"train.log_interval": 3})).close()
    assert yaml.safe_load((spec.directory / "config.yaml").read_text())["train"][
        "log_interval"
    ] == (3)


@pytest.mark.parametrize("status", ["done", "diverged"])
def test_finished_run_is_left_untouched(spec, status, tmp_path):
    with RunDirectory.open(spec) as directory:
        directory.write_status(RunStatus(status, 2, 44))
    before = {path: path.read_bytes() for path in spec.directory.iterdir() if path.is_file()}
    with RunDirectory.open(run_spec(tmp_path, **{"train.log_interval": 3})) as directory:
        assert directory.finished
        assert directory.status == RunStatus(status, 2, 44)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("status", ["running", "timeout", "crashed", "refused"])
def test_unfinished_run_is_open_for_a_resume(spec, status):
    with RunDirectory.open(spec) as directory:
        directory.write_status(RunStatus(status, 1, 30, "why"))
    with RunDirectory.open(spec) as directory:
        assert not directory.finished
        assert directory.status == RunStatus(status, 1, 30, "why")


def test_resume_never_refuses_an_unfinished_run(spec, tmp_path):
    with RunDirectory.open(spec) as directory:
        directory.write_status(RunStatus("running", 1, 30))
    with pytest.raises(UserError, match=r"resume=never.*step 30"):
        RunDirectory.open(run_spec(tmp_path, resume="never"))


def test_leftovers_of_a_killed_process_are_removed(spec):
    RunDirectory.open(spec).close()
    leftovers = [
        spec.directory / "status.json.tmp",
        spec.directory / "checkpoints" / "step00000007.tmp",
    ]
    for leftover in leftovers:
        leftover.write_text("half")
    RunDirectory.open(spec).close()
    assert not any(leftover.exists() for leftover in leftovers)


def test_status_is_replaced_as_a_whole(spec):
    with RunDirectory.open(spec) as directory:
        directory.write_status(RunStatus("running", 1, 22))
        directory.write_status(RunStatus("done", 2, 44, "a message"))
    assert read_status(spec.directory) == RunStatus("done", 2, 44, "a message")
    assert not list(spec.directory.glob("*.tmp"))


def test_status_of_an_absent_run_is_none(tmp_path):
    assert read_status(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"status": "finished"}', '{"status": "done", "steps": 3}']
)
def test_corrupt_status_is_named(tmp_path, content):
    (tmp_path / "status.json").write_text(content)
    with pytest.raises(UserError, match=r"status\.json is corrupt"):
        read_status(tmp_path)


def test_crash_leaves_traceback_and_status_and_a_new_start_clears_the_first(spec):
    with RunDirectory.open(spec) as directory:
        directory.write_status(RunStatus("running", 1, 30))
        try:
            raise RuntimeError("broken\npipe")
        except RuntimeError as error:
            directory.record_crash(error)
    assert read_status(spec.directory) == RunStatus("crashed", 1, 30, "RuntimeError: broken pipe")
    assert "raise RuntimeError" in (spec.directory / "traceback.txt").read_text()
    RunDirectory.open(spec).close()
    assert not (spec.directory / "traceback.txt").exists()


def test_meta_says_what_the_run_was_made_with_and_keeps_it_on_resume(spec):
    origin = describe_origin(torch.device("cpu"))
    with RunDirectory.open(spec) as directory:
        directory.write_meta(origin=origin, parameters=2410, resumed_at=0)
        directory.write_meta(origin={"versions": {"torch": "later"}}, parameters=1, resumed_at=7)
    meta = json.loads((spec.directory / "meta.json").read_text())
    assert meta["key"] == spec.key
    assert (meta["experiment"], meta["optimizer"], meta["seed"], meta["scale"]) == (
        "test",
        "sgd",
        0,
        "smoke",
    )
    assert meta["parameters"] == 2410
    assert meta["versions"]["torch"] == torch.__version__.split("+")[0]
    assert meta["versions"]["python"] == sys.version.split()[0]
    assert meta["hardware"]["memory_bytes"] > 2**28
    assert meta["hardware"]["threads"] == torch.get_num_threads()
    assert meta["resumes"] == [
        {"step": 7, "numerics_rounding": NUMERICS_ROUNDING, "versions": {"torch": "later"}}
    ]


def test_git_state_is_commit_and_whether_code_differs(tmp_path):
    assert describe_git(tmp_path) is None
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init")
    for name in ("mlbfgs/a.py", "results/b.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    commit = git("rev-parse", "HEAD")
    (tmp_path / "results" / "b.txt").write_text("2")
    assert describe_git(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "mlbfgs" / "new.py").write_text("2")
    assert describe_git(tmp_path) == {"commit": commit, "dirty": True}
