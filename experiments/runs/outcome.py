"""What became of a run, and the frozen config that any process which trains it starts from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments.runs.directory import FINISHED, InUseError, RunDirectory, Status, read_status
from experiments.runs.spec import RunSpec

# Exit code of a worker whose run cannot start as it is configured.
USER_ERROR = 2


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        directory: the run directory.
        status: the run's status; `refused` also where it never got a directory, `planned` where it
            was only to be shown, `submitted` where a scheduler has it, `elsewhere` where another
            process does.
        message: one line for people; for `planned` the command.
        repeated: the run was finished before, so nothing was trained.
    """

    directory: Path
    status: Status | Literal["planned", "submitted", "elsewhere"]
    message: str = ""
    repeated: bool = False


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


def elsewhere(spec: RunSpec, error: InUseError) -> Outcome:
    """What a campaign makes of a run that another process has: it is left alone."""
    return Outcome(spec.directory, "elsewhere", str(error))


def recorded_mistake(directory: Path) -> str | None:
    """The mistake of the user that ended a run's last attempt; None where none did."""
    recorded = read_status(directory)
    return recorded.message if recorded is not None and recorded.status == "refused" else None


def recorded_outcome(directory: Path, exit_code: int = 0) -> Outcome:
    """Read from a run directory what became of a run whose process has ended.

    Args:
        directory: the run directory.
        exit_code: of the process; negative for a signal.
    """
    recorded = read_status(directory)
    mistake = recorded_mistake(directory)
    if exit_code == USER_ERROR or (exit_code != 0 and mistake is not None):
        said = recorded.message if recorded else "see what the worker said above"
        return Outcome(directory, "refused", mistake or said)
    if recorded is not None and recorded.status != "running":
        return Outcome(directory, recorded.status, recorded.message)
    cause = f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
    return Outcome(directory, "crashed", f"the worker ended with {cause} and recorded no result")
