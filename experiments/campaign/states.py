"""How far a run is, read from its directory without touching it.

Besides the statuses that a run records there is what only the directory tells: `running` is held by
a live process, `interrupted` says running but is not, `queued` was given to a scheduler, `missing`
never began.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments.launching.slurm import is_queued
from experiments.runs.directory import FINISHED, RunStatus, is_locked, read_status
from experiments.runs.spec import RunSpec

StateName = Literal[
    "done",
    "diverged",
    "timeout",
    "crashed",
    "refused",
    "running",
    "interrupted",
    "queued",
    "missing",
]
FAILED: tuple[StateName, ...] = ("crashed", "refused", "timeout")
ELSEWHERE: tuple[StateName, ...] = ("running", "queued")
Choice = Literal["unfinished", "missing", "failed"]


@dataclass(frozen=True)
class State:
    """How far one run is.

    Attributes:
        name: the state.
        epoch: finished epochs.
        message: one line for people; may be empty.
    """

    name: StateName
    epoch: int = 0
    message: str = ""

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to train."""
        return self.name in FINISHED


def state_of(directory: Path) -> State:
    """Read how far a run is.

    Args:
        directory: of the run; it may not exist.

    Raises:
        UserError: `status.json` is corrupt.
    """
    status = read_status(directory)
    if status is not None and status.status in FINISHED:
        return _state(status.status, status)
    if is_locked(directory):
        return _state("running", status)
    if is_queued(directory):
        return _state("queued", status)
    if status is None:
        return State("missing")
    return _state("interrupted" if status.status == "running" else status.status, status)


@dataclass(frozen=True)
class Chosen:
    """The runs of a command, by what is to be done with them.

    Attributes:
        finished: nothing.
        to_run: they are to be made.
        passed_over: they failed before, and the command does not want them.
        elsewhere: another process or a scheduler has them.
    """

    finished: tuple[RunSpec, ...]
    to_run: tuple[RunSpec, ...]
    passed_over: tuple[RunSpec, ...]
    elsewhere: tuple[RunSpec, ...]


def choose(specs: Sequence[RunSpec], choice: Choice) -> Chosen:
    """Choose what a command shall run.

    Args:
        specs: all runs of the command.
        choice: `unfinished`: whatever is neither done nor diverged, failed runs too; `missing`:
            what never began or was interrupted; `failed`: what crashed, was refused, ran out of
            time, or was queued and never came.
    """
    wanted: dict[Choice, tuple[StateName, ...]] = {
        "unfinished": ("missing", "interrupted", *FAILED),
        "missing": ("missing", "interrupted"),
        "failed": (*FAILED, "queued"),
    }
    states = [(spec, state_of(spec.directory)) for spec in specs]
    rest = [(spec, state) for spec, state in states if state.name not in wanted[choice]]
    return Chosen(
        tuple(spec for spec, state in rest if state.finished),
        tuple(spec for spec, state in states if state.name in wanted[choice]),
        tuple(spec for spec, state in rest if state.name in FAILED),
        tuple(spec for spec, state in rest if state.name in ELSEWHERE),
    )


def _state(name: StateName, status: RunStatus | None) -> State:
    if status is None:
        return State(name)
    return State(name, status.epoch, "" if name in ELSEWHERE else status.message)
