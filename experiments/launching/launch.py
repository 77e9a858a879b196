"""How a run is started: in this process, in one of its own, in several, or by a scheduler.

A launcher gets a run and returns what became of it. Whatever starts a process hands it nothing but
a run directory with a frozen config; every rank of a run gets the same one. The settings of a
launcher (`configs/launch/`) do not decide the numbers of a run.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from experiments.errors import UserError, nearest
from experiments.launching import slurm, torchrun
from experiments.launching.processes import run_to_end, shell_line, thread_environment
from experiments.runs.directory import read_status
from experiments.runs.outcome import Outcome, finished_outcome, freeze, recorded_outcome
from experiments.runs.spec import RunSpec
from experiments.settings import read_settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LocalSettings:
    """Keys of `launch` where one process of this machine trains.

    Attributes:
        name: `local` or `subprocess`.
        dry_run: freeze the config and say the command instead of running it.
    """

    name: str
    dry_run: bool = False


@dataclass(frozen=True)
class Launcher:
    """One way to start a run.

    Attributes:
        settings: the dataclass of its keys.
        run: starts the run, waits for it, and says what became of it.
        planned: what `run` would run, for people and shells.
        check: raises `UserError` where the run cannot be started like this; before anything is
            written.
    """

    settings: type[Any]
    run: Callable[[RunSpec, Any], Outcome]
    planned: Callable[[RunSpec, Any], str]
    check: Callable[[RunSpec, Any], None] = lambda spec, settings: None


def launch(spec: RunSpec) -> Outcome:
    """Start a run as its config's `launch` says, wait for it, and say what became of it.

    A finished run is left alone. With `launch.dry_run` the config is frozen in the run directory
    and the command that would train it is returned in the outcome's message. `launch=slurm` does
    not wait.

    Args:
        spec: the run.

    Raises:
        UserError: the launcher does not exist, or the run cannot start as it is configured.
    """
    name = spec.config.launch.name
    if name not in LAUNCHERS:
        raise UserError(f"launch={name} does not exist; {nearest(name, LAUNCHERS)}")
    launcher = LAUNCHERS[name]
    settings = read_settings(launcher.settings, spec.config.launch, "launch")
    launcher.check(spec, settings)
    finished = finished_outcome(spec)
    if finished is not None:
        return finished
    if settings.dry_run:
        # An unfinished run keeps its config: nothing but a new directory may come of a dry run.
        if read_status(spec.directory) is None:
            freeze(spec)
        return Outcome(spec.directory, "planned", launcher.planned(spec, settings))
    return launcher.run(spec, settings)


def worker_command(spec: RunSpec) -> list[str]:
    """The command that trains a run whose config is frozen in its directory."""
    return [sys.executable, "-m", "experiments.worker", str(spec.directory)]


def run_here(spec: RunSpec, _settings: LocalSettings | None = None) -> Outcome:
    """Train in this process.

    Raises:
        UserError: the run cannot start as it is configured.
    """
    # Imported here because it loads torch, which planning and judging do without.
    from experiments.training.trainer import Trainer

    try:
        Trainer(spec).run()
    except UserError:
        raise
    except Exception as error:
        logger.exception("%s crashed", spec.directory)
        return Outcome(spec.directory, "crashed", _one_line(error))
    return recorded_outcome(spec.directory)


def run_in_worker(spec: RunSpec, _settings: LocalSettings) -> Outcome:
    """Train in a process of its own, whose output goes where this one's goes."""
    freeze(spec)
    environment = {**os.environ, **thread_environment(spec.config.train.threads)}
    code = run_to_end(worker_command(spec), environment)
    return recorded_outcome(spec.directory, exit_code=code)


def _planned_here(spec: RunSpec, _settings: LocalSettings) -> str:
    return shell_line(worker_command(spec), thread_environment(spec.config.train.threads))


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


LAUNCHERS: Mapping[str, Launcher] = {
    "local": Launcher(LocalSettings, run_here, _planned_here),
    "subprocess": Launcher(LocalSettings, run_in_worker, _planned_here),
    "torchrun": Launcher(torchrun.TorchrunSettings, torchrun.run, torchrun.planned, torchrun.check),
    "slurm": Launcher(slurm.SlurmSettings, slurm.submit, slurm.planned, slurm.check),
}
