"""Starting runs: in this process, in one of its own, and by a pool of processes."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.errors import UserError
from experiments.launching.launch import launch
from experiments.launching.pool import WorkerPool
from experiments.runs.directory import RunStatus, read_status
from experiments.runs.outcome import Outcome, freeze, recorded_outcome
from experiments.runs.spec import RunSpec
from tests.experiments.run_configs import run_spec

ROOT = Path(__file__).resolve().parents[3]
BROKEN = {
    "name": "broken",
    "_target_": "tests.experiments.optimizers.odd_optimizers.BrokenSGD",
    "lr": 0.1,
    "fails_at": 3,
}


def status_of(spec: RunSpec) -> RunStatus:
    status = read_status(spec.directory)
    assert status is not None
    return status


def test_local_trains_here_and_leaves_a_finished_run_alone(tmp_path: Path) -> None:
    spec = run_spec(tmp_path, **{"train.epochs": 1})
    assert launch(spec) == Outcome(spec.directory, "done")
    records = (spec.directory / "metrics.jsonl").read_bytes()
    assert launch(spec) == Outcome(spec.directory, "done", repeated=True)
    assert (spec.directory / "metrics.jsonl").read_bytes() == records


def test_local_reports_a_crash_as_an_outcome(tmp_path: Path) -> None:
    outcome = launch(run_spec(tmp_path, optimizer=BROKEN))
    assert (outcome.status, outcome.message) == ("crashed", "RuntimeError: the optimizer broke")


def test_unknown_launcher_and_setting_are_told(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"did you mean 'local'\? \(valid: local, slurm, subprocess, torchrun\)"
    ):
        launch(run_spec(tmp_path, launch={"name": "lokal"}))
    with pytest.raises(UserError, match=r"unknown key launch\.dry; did you mean 'dry_run'"):
        launch(run_spec(tmp_path, launch={"name": "local", "dry": True}))


def test_dry_run_prints_a_command_that_trains_the_run(tmp_path: Path) -> None:
    changes = {"train.epochs": 1, "train.threads": 1}
    spec = run_spec(tmp_path, launch={"name": "subprocess", "dry_run": True}, **changes)
    planned = launch(spec)
    assert planned.status == "planned"
    assert "OMP_NUM_THREADS=1" in shlex.split(planned.message)
    assert read_status(spec.directory) is None
    subprocess.run(planned.message, shell=True, cwd=ROOT, check=True, timeout=120)
    assert status_of(spec).status == "done"
    assert launch(spec).repeated


def test_subprocess_trains_diverges_and_refuses(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    changes = {"launch.name": "subprocess", "train.epochs": 1}
    assert launch(run_spec(tmp_path, **changes, **{"optimizer.lr": 1e30})).status == "diverged"
    refused = launch(run_spec(tmp_path, **changes, **{"train.batch_size": 5000}))
    assert refused.status == "refused" and "5000" in refused.message
    assert "Traceback" not in capfd.readouterr().err


def test_worker_that_records_nothing_counts_as_crashed(tmp_path: Path) -> None:
    spec = run_spec(tmp_path)
    freeze(spec)
    killed = recorded_outcome(spec.directory, exit_code=-9)
    assert killed.status == "crashed" and "signal 9" in killed.message


def test_pool_goes_on_after_a_killed_process_and_a_crash(tmp_path: Path) -> None:
    long = run_spec(tmp_path, **{"train.epochs": 100_000})
    crashing = run_spec(tmp_path, optimizer=BROKEN)
    short = run_spec(tmp_path, **{"train.epochs": 1, "seed": 1})
    specs = [long, crashing, short]
    for spec in specs:
        freeze(spec)
    outcomes = []
    killed = False
    with WorkerPool(jobs=1, threads=1) as pool:
        for report in pool.outcomes([spec.directory for spec in specs], every_s=0.1):
            if isinstance(report, Outcome):
                outcomes.append(report)
            elif not killed and report == (long.directory,) and read_status(long.directory):
                os.kill(int((long.directory / "lock").read_text()), signal.SIGKILL)
                killed = True
    assert [outcome.directory for outcome in outcomes] == [spec.directory for spec in specs]
    assert [outcome.status for outcome in outcomes] == ["crashed", "crashed", "done"]
    assert "signal 9" in outcomes[0].message and "broke" in outcomes[1].message
    # an idle process ends by itself, and so closes what its data sets have open
    assert [worker.exit_code() for worker in pool._idle] == [0]


@pytest.mark.slow
def test_pool_processes_end_with_their_parent(tmp_path: Path) -> None:
    spec = run_spec(tmp_path, **{"train.epochs": 100_000})
    freeze(spec)
    script = tmp_path / "campaign.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from experiments.launching.pool import WorkerPool\n"
        "if __name__ == '__main__':\n"
        "    with WorkerPool(jobs=1) as pool:\n"
        "        list(pool.outcomes([Path(sys.argv[1])]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, str(script), str(spec.directory)], env=environment)
    try:
        _wait_for(lambda: read_status(spec.directory) is not None)
        worker = int((spec.directory / "lock").read_text())
        assert worker != parent.pid
    finally:
        parent.kill()
        parent.wait()
    _wait_for(lambda: not Path(f"/proc/{worker}").exists(), seconds=20)


def _wait_for(condition: object, seconds: float = 90) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.1)
