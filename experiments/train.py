"""Train: compose a config, freeze it into a run, launch the run; one run, or with -m a sweep.

    python -m experiments.train experiment=cifar10_resnet18 optimizer=mlbfgs
    python -m experiments.train -m optimizer=sgd,adam,mlbfgs seed=0,1,2 scale=smoke

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

import hydra
from omegaconf import DictConfig

from experiments.composition import (
    COMPOSITION_ERRORS,
    CONFIG_DIR,
    CONFIG_NAME,
    explained,
    recipe_note,
)
from experiments.errors import UserError
from experiments.launch import Outcome, launch
from experiments.spec import RunSpec

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the command's name; that of this process by default.

    Returns:
        The exit code.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    outcomes: list[Outcome] = []
    try:
        _compose_and_train(arguments, outcomes)
    except UserError as error:
        return _refuse(error)
    except COMPOSITION_ERRORS as error:
        return _refuse(UserError(explained(error, arguments)))
    except KeyboardInterrupt:
        print(
            "\ninterrupted; the same command goes on from the last checkpoint (resume=auto)",
            file=sys.stderr,
        )
        return 130
    if len(outcomes) > 1:
        print(summary(outcomes))
    statuses = {outcome.status for outcome in outcomes}
    return 1 if "crashed" in statuses else 2 if "refused" in statuses else 0


def summary(outcomes: Sequence[Outcome]) -> str:
    """Say what happened to each run of a sweep, a line each."""
    lines = [f"\n{len(outcomes)} runs:"]
    for outcome in outcomes:
        note = "finished before" if outcome.repeated else outcome.message
        lines.append(f"  {outcome.status:<9} {outcome.directory}{f'  ({note})' if note else ''}")
    return "\n".join(lines)


def _compose_and_train(arguments: Sequence[str], outcomes: list[Outcome]) -> None:
    """Let Hydra compose each run of the command line and train it as it comes."""

    @hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=CONFIG_NAME)
    def train(config: DictConfig) -> None:
        outcomes.append(_train_one(config, alone=not _is_sweep(arguments)))

    with tempfile.TemporaryDirectory() as scratch:
        # Hydra shows errors itself unless it is told to raise them; a sweep writes a file of
        # Hydra's own, which nobody reads here, into the scratch directory (configs/train.yaml).
        with _process_state(arguments, {"HYDRA_FULL_ERROR": "1", "MLBFGS_SWEEP_SCRATCH": scratch}):
            train()


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


def _is_sweep(arguments: Sequence[str]) -> bool:
    return any(argument in ("-m", "--multirun") for argument in arguments)


def _train_one(config: DictConfig, *, alone: bool) -> Outcome:
    """Freeze and launch one run; in a sweep a run that cannot start is an outcome as well."""
    note = recipe_note(config)
    if note is not None:
        logger.info(note)
    spec = RunSpec.from_config(config)
    print(f"run directory: {spec.directory}", flush=True)
    try:
        outcome = launch(spec)
    except UserError as error:
        if alone:
            raise
        print(f"error: {error}", file=sys.stderr)
        return Outcome(spec.directory, "refused", str(error))
    if outcome.status == "planned":
        print(outcome.message)
    else:
        before = " before" if outcome.repeated else ""
        print(f"{outcome.status}{before}{f': {outcome.message}' if outcome.message else ''}")
    return outcome


def _refuse(error: UserError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
