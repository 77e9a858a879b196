"""How a run is started: in this process, or in a process of its own.

A launcher gets a run and returns what became of it. Whatever starts a process hands it nothing but
a run directory with a frozen config, so that a launcher for another machine is one more function in
`LAUNCHERS` that runs the same command (`worker_command`) elsewhere.
"""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments.errors import UserError, nearest
from experiments.run_directory import FINISHED, RunDirectory, Status, read_status
from experiments.spec import RunSpec

logger = logging.getLogger(__name__)

# Every one of them is read once, when the library is loaded.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


_SETTINGS = ("name", "dry_run")

# Exit code of a worker whose run cannot start as it is configured.
_USER_ERROR = 2


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        directory: the run directory.
        status: the run's status; `refused` where it never started because of a mistake of the
            user, `planned` where it was only to be shown.
        message: one line for people; for `planned` the command.
        repeated: the run was finished before, so nothing was trained.
    """

    directory: Path
    status: Status | Literal["refused", "planned"]
    message: str = ""
    repeated: bool = False


def launch(spec: RunSpec) -> Outcome:
    """Start a run as its config's `launch` says, wait for it, and say what became of it.

    A finished run is left alone. With `launch.dry_run` the config is frozen in the run directory
    and the command that would train it is returned in the outcome's message.

    Args:
        spec: the run.

    Raises:
        UserError: the launcher does not exist, or the run cannot start as it is configured.
    """
    settings = spec.config.launch
    if settings.name not in LAUNCHERS:
        raise UserError(
            f"launch={settings.name} does not exist; {nearest(settings.name, LAUNCHERS)}"
        )
    for key in settings:
        if key not in _SETTINGS:
            raise UserError(f"launch.{key} is no setting; {nearest(str(key), _SETTINGS)}")
    finished = finished_outcome(spec)
    if finished is not None:
        return finished
    if settings.get("dry_run", False):
        # An unfinished run keeps its config: nothing but a new directory may come of a dry run.
        if read_status(spec.directory) is None:
            freeze(spec)
        return Outcome(spec.directory, "planned", shell_command(spec))
    return LAUNCHERS[settings.name](spec)


def finished_outcome(spec: RunSpec) -> Outcome | None:
    """Say what became of a run that is already finished; None where there is something to train.

    Raises:
        UserError: the directory of the finished run holds another config.
    """
    status = read_status(spec.directory)
    if status is None or status.status not in FINISHED:
        return None
    RunDirectory.open(spec).close()
    return Outcome(spec.directory, status.status, status.message, repeated=True)


def freeze(spec: RunSpec) -> None:
    """Write the config of a run into its directory, where a worker finds it.

    What does not decide the numbers (threads, intervals) is taken over into an unfinished run.

    Raises:
        UserError: the directory cannot be written, is in use, or holds another config.
    """
    RunDirectory.open(spec).close()


def worker_command(spec: RunSpec) -> list[str]:
    """The command that trains a run whose config is frozen in its directory."""
    return [sys.executable, "-m", "experiments.worker", str(spec.directory)]


def thread_environment(threads: int | None) -> dict[str, str]:
    """Environment variables that bound the threads of a new process; none where `threads` is."""
    return {} if threads is None else {name: str(threads) for name in _THREAD_VARIABLES}


def shell_command(spec: RunSpec) -> str:
    """The worker's command with its environment, to be typed in the root of the project."""
    assignments = [f"{k}={v}" for k, v in thread_environment(spec.config.train.threads).items()]
    return shlex.join([*assignments, *worker_command(spec)])


def run_here(spec: RunSpec) -> Outcome:
    """Train in this process.

    Raises:
        UserError: the run cannot start as it is configured.
    """
    # Imported here because it loads torch, which planning and judging do without.
    from experiments.trainer import Trainer

    try:
        Trainer(spec).run()
    except UserError:
        raise
    except Exception as error:
        logger.exception("%s crashed", spec.directory)
        return Outcome(spec.directory, "crashed", _one_line(error))
    return recorded_outcome(spec.directory)


def run_in_worker(spec: RunSpec) -> Outcome:
    """Train in a process of its own, whose output goes where this one's goes."""
    freeze(spec)
    environment = {**os.environ, **thread_environment(spec.config.train.threads)}
    code = subprocess.run(worker_command(spec), env=environment, check=False).returncode
    return recorded_outcome(spec.directory, exit_code=code)


def recorded_outcome(directory: Path, exit_code: int = 0) -> Outcome:
    """Read from a run directory what became of a run whose process has ended.

    Args:
        directory: the run directory.
        exit_code: of the process; negative for a signal.
    """
    recorded = read_status(directory)
    if exit_code == _USER_ERROR:
        said = recorded.message if recorded else "see what the worker said above"
        return Outcome(directory, "refused", said)
    if recorded is not None and recorded.status != "running":
        return Outcome(directory, recorded.status, recorded.message)
    cause = f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
    return Outcome(directory, "crashed", f"the worker ended with {cause} and recorded no result")


LAUNCHERS: Mapping[str, Callable[[RunSpec], Outcome]] = {
    "local": run_here,
    "subprocess": run_in_worker,
}


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
