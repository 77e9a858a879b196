"""Two users of one results folder, and commands that run twice at once."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.campaign.running import run_missing
from experiments.launching.pool import WorkerPool
from experiments.runs.directory import InUseError, RunDirectory, read_status
from experiments.runs.outcome import finished_outcome, freeze
from experiments.training.trainer import Trainer
from tests.experiments.run_configs import ROOT, assert_same_run, run_spec
from tests.file_systems import ALICE, BOB, GROUP, run_as

TRAIN = """
import torch._dynamo
from experiments import worker
from experiments.errors import UserError
from experiments.runs.outcome import freeze
from tests.experiments.run_configs import run_spec
def main(arguments):
    spec = run_spec(arguments[0], **{"train.timeout_s": arguments[1]})
    try:
        freeze(spec)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return worker.main([str(spec.directory)])
"""


@pytest.fixture
def shared():
    """A folder that both users may write, outside of pytest's, which only its owner may enter."""
    if os.geteuid() != 0:
        pytest.skip("only the superuser can become a second user")
    folder = Path("/tmp") / f"shared-folder-test-{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir()
    os.chown(folder, ALICE, GROUP)
    folder.chmod(0o2775)
    yield folder
    shutil.rmtree(folder)


def test_what_one_user_began_another_of_the_group_goes_on_with(shared, tmp_path):
    begun = run_as(ALICE, TRAIN, [str(shared), 1e-9], [str(tmp_path / "a"), None])
    assert begun.returncode == 0, begun.stderr
    spec = run_spec(shared)
    status = read_status(spec.directory)
    assert status is not None and status.status == "timeout"
    for path in spec.directory.rglob("*"):
        wanted = stat.S_IRGRP | stat.S_IWGRP
        assert path.stat().st_mode & wanted == wanted, path
    ended = run_as(BOB, TRAIN, [str(shared), None], [str(tmp_path / "b"), None])
    assert ended.returncode == 0, ended.stderr
    assert "from the start" not in ended.stderr and "resumed at step" in ended.stderr
    undisturbed = run_spec(tmp_path)
    Trainer(undisturbed).run()
    assert_same_run(spec, undisturbed)


def test_under_a_strict_umask_the_other_user_gets_one_line(shared, tmp_path):
    assert (
        run_as(
            ALICE, TRAIN, [str(shared), 1e-9], [str(tmp_path / "a"), None], umask=0o022
        ).returncode
        == 0
    )
    refused = run_as(BOB, TRAIN, [str(shared), None], [str(tmp_path / "b"), None])
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: ") and "Permission denied" in line
    spec = run_spec(shared)
    # once the folders are opened to the group, a lock that only its owner may write is no hindrance
    for path in (shared, *shared.rglob("*")):
        if path.is_dir():
            path.chmod(0o2775)
    (spec.directory / "metrics.jsonl").chmod(0o664)
    resumed = run_as(BOB, TRAIN, [str(shared), None], [str(tmp_path / "b"), None])
    assert resumed.returncode == 0, resumed.stderr


READ = """
from experiments import reproduce, train
def main(arguments):
    folder = arguments[0]
    asked = ["digits_mlp", "--optimizers", "sgd", "--seeds", "0", "--scale", "smoke"]
    code = reproduce.main([*asked, "--results-dir", folder])
    run = ["experiment=digits_mlp", "optimizer=sgd", "scale=smoke", f"results_dir={folder}"]
    return code or train.main(run)
"""


def test_finished_runs_are_judged_by_who_may_not_write(shared, tmp_path):
    command = [sys.executable, "-m", "experiments.reproduce", "digits_mlp", "--optimizers", "sgd"]
    command += ["--seeds", "0", "--scale", "smoke", "--results-dir", str(shared / "results")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    shutil.copytree(shared / "results", tmp_path / "results")
    for path in (shared, *shared.rglob("*")):
        os.chown(path, 0, 0)
        path.chmod(0o755 if path.is_dir() else 0o644)
    before = {path: path.stat().st_mtime_ns for path in shared.rglob("*")}
    judged = run_as(BOB, READ, [str(shared / "results")], [str(tmp_path / "results")])
    assert judged.returncode == 0, judged.stdout + judged.stderr
    assert "final top-1" in judged.stdout.lower()
    assert "done before" in judged.stdout
    assert "not written: cannot write" in judged.stderr and "Traceback" not in judged.stderr
    assert {path: path.stat().st_mtime_ns for path in shared.rglob("*")} == before


def test_a_finished_run_is_opened_without_a_lock(tmp_path):
    spec = run_spec(tmp_path, **{"train.epochs": 1})
    Trainer(spec).run()
    (spec.directory / "lock").unlink()
    with RunDirectory.open(spec), RunDirectory.open(spec):
        assert finished_outcome(spec) is not None
    assert not (spec.directory / "lock").exists()


HOLD = """
import sys, time
from tests.experiments.run_configs import run_spec
from experiments.runs.directory import RunDirectory
directory = RunDirectory.open(run_spec(sys.argv[1], seed=int(sys.argv[2])))
print("locked", flush=True)
time.sleep(600)
"""


@pytest.fixture
def held(tmp_path):
    """A run of seed 0 that another process has."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), "0"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"locked\n"
    yield run_spec(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()


def test_a_campaign_leaves_a_run_alone_that_another_process_has(tmp_path, held):
    other = run_spec(tmp_path, seed=1, **{"train.epochs": 1})
    outcomes = {o.directory: o.status for o in run_missing([held, other], jobs=1)}
    assert outcomes == {held.directory: "elsewhere", other.directory: "done"}
    with pytest.raises(InUseError, match="in use by pid"):
        freeze(held)


def test_a_pool_leaves_a_run_alone_that_is_taken_after_it_was_frozen(held):
    with WorkerPool(1) as pool:
        (outcome,) = [o for o in pool.outcomes([held.directory]) if not isinstance(o, tuple)]
    assert outcome.status == "elsewhere" and "in use by pid" in outcome.message


@pytest.mark.slow
@pytest.mark.parametrize("command", ["tune", "reproduce"])
def test_two_equal_commands_share_the_work_and_neither_fails(tmp_path, command):
    """Who ends while the other still trains says so (3); the same command then finds all done."""
    arguments = [sys.executable, "-m", f"experiments.{command}", "digits_mlp", "--scale", "smoke"]
    arguments += ["--optimizers", "sgd,adam", "--results-dir", str(tmp_path / "results")]
    arguments += ["--trials", "2"] if command == "tune" else ["--seeds", "0,1,2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            arguments,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    ended = [(*process.communicate(timeout=500), process.returncode) for process in started]
    for out, err, code in ended:
        assert code in (0, 3), out + err
        assert "Traceback" not in err and ("left alone" in err) == (code == 3), err
    again = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    statuses = {read_status(p.parent).status for p in tmp_path.rglob("status.json")}  # type: ignore[union-attr]
    assert statuses <= {"done", "diverged"}
    assert list(tmp_path.rglob("*.tmp")) == []
