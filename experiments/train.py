"""Train: compose a config, freeze it into a run, launch the run; one run, or with -m a sweep.

    python -m experiments.train experiment=cifar10_resnet18 optimizer=mlbfgs
    python -m experiments.train -m optimizer=sgd,adam,mlbfgs seed=0,1,2 scale=smoke
    python -m experiments.train experiment=controls arm=sgd_lr1.0 scale=reduced

Exit code 0: every run ended (a run that diverged is a result); 1: a run crashed; 2: something that
the user wrote will not do, told in one line; 130: interrupted.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from experiments.composition import (
    COMPOSITION_ERRORS,
    CONFIG_NAME,
    explained,
    recipe_note,
    refuse_unknown_keys,
    with_arms_as_groups,
    with_paths_quoted,
)
from experiments.contestants import CONFIG_DIR
from experiments.entry import entry, reason, tell
from experiments.errors import UserError
from experiments.launching.launch import launch
from experiments.runs.replay import fill, missing_source
from experiments.runs.spec import RunSpec

logger = logging.getLogger(__name__)


@entry
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the command's name; that of this process by default.

    Returns:
        The exit code.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    entries: list[Entry] = []
    try:
        arguments = with_arms_as_groups(with_paths_quoted(arguments))
        _compose_and_train(arguments, entries)
    except COMPOSITION_ERRORS as error:
        print(f"error: {explained(error, arguments)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\ninterrupted; the same command goes on from the last checkpoint (resume=auto)",
            file=sys.stderr,
        )
        return 130
    if len(entries) > 1:
        print(summary(entries))
    statuses = {each.status for each in entries}
    return 1 if "crashed" in statuses else 2 if "refused" in statuses else 0


@dataclass(frozen=True)
class Entry:
    """One run in the list at the end of a sweep.

    Attributes:
        name: the run directory; the overrides where the config will not do.
        status: as in `Outcome`.
        note: why, in one line; may be empty.
    """

    name: str
    status: str
    note: str = ""


def summary(entries: Sequence[Entry]) -> str:
    """Say what happened to each run of a sweep, a line each."""
    lines = [f"\n{len(entries)} runs:"]
    for each in entries:
        lines.append(f"  {each.status:<9} {each.name}{f'  ({each.note})' if each.note else ''}")
    return "\n".join(lines)


def _compose_and_train(arguments: Sequence[str], entries: list[Entry]) -> None:
    """Let Hydra compose each run of the command line, and train it as it comes."""

    @hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=CONFIG_NAME)
    def train(config: DictConfig) -> None:
        name = " ".join(HydraConfig.get().overrides.task)
        try:
            refuse_unknown_keys(config)
            if not fill(config):
                raise UserError(missing_source(config))
            spec = RunSpec.from_config(config)
            name = str(spec.directory)
            entries.append(_train_one(spec))
        except (UserError, OSError) as error:
            # A run that cannot start ends neither Hydra, which would say so in its own way, nor
            # the other runs of a sweep.
            tell(error)
            entries.append(Entry(name, "refused", reason(error)))

    with tempfile.TemporaryDirectory() as scratch:
        # Hydra shows errors itself unless it is told to raise them; a sweep writes a file of
        # Hydra's own, which nobody reads here, into the scratch directory (configs/train.yaml).
        with _process_state(arguments, {"HYDRA_FULL_ERROR": "1", "MLBFGS_SWEEP_SCRATCH": scratch}):
            train()


def _train_one(spec: RunSpec) -> Entry:
    """Launch one run and say what became of it.

    Raises:
        UserError: the run cannot start as it is configured.
    """
    note = recipe_note(spec.config)
    if note is not None:
        logger.info(note)
    print(f"run directory: {spec.directory}", flush=True)
    outcome = launch(spec)
    if outcome.status == "planned":
        print(outcome.message)
    else:
        before = " before" if outcome.repeated else ""
        print(f"{outcome.status}{before}{f': {outcome.message}' if outcome.message else ''}")
    return Entry(
        str(spec.directory),
        outcome.status,
        "finished before" if outcome.repeated else outcome.message,
    )


@contextmanager
def _process_state(arguments: Sequence[str], variables: Mapping[str, str]) -> Iterator[None]:
    """Set the command line and the environment, which is where Hydra looks for its input."""
    command_line = sys.argv
    before = {name: os.environ.get(name) for name in variables}
    sys.argv = [command_line[0], *arguments]
    os.environ.update(variables)
    try:
        yield
    finally:
        sys.argv = command_line
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


if __name__ == "__main__":
    sys.exit(main())
