"""What the campaign of faults disturbs: small runs, each started as a user starts it.

Digits, a small MLP, 132 steps with a checkpoint every seventh: a run of about a second, most of
whose checkpoints are met in the making. The first process of a command is forked from one that has
loaded torch; whatever it starts (torchrun and its ranks, the pool of a campaign) is started anew.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.faults.processes import descendants, environment, kill

_PRELOADED = [
    *("experiments.train", "experiments.reproduce", "experiments.training.trainer"),
    *("experiments.training.sharded_checkpoint", "experiments.campaign.judging", "mlbfgs"),
]
STEPS = 132  # 6 epochs of 22 batches
_SIZES = (
    *("train.epochs=6", "train.batch_size=64", "model.hidden=[128]", "train.log_interval=1"),
    *("train.checkpoint_interval=7", "train.eval_interval=2"),
)
OPTIMIZERS = ("sgd", "adam", "mlbfgs", "slimqn", "slbfgs")
# Those that several ranks share.
SHARED = ("sgd", "mlbfgs", "slimqn")


@dataclass(frozen=True)
class Setup:
    """A command.

    Attributes:
        name: what it is called.
        module: of the project, with a function `main(arguments)`.
        arguments: but for where results go.
        folder_option: how that is said.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    folder_option: str = "results_dir={}"

    def command_line(self, results: Path) -> list[str]:
        """What follows the module's name."""
        return [*self.arguments, *self.folder_option.format(results).split("\n")]


def alone(optimizer: str) -> Setup:
    """One process."""
    return Setup(f"one process, {optimizer}", "experiments.train", _run(optimizer))


def ranks(optimizer: str) -> Setup:
    """Two ranks under torchrun; ranks that wait for others give up after a minute."""
    launch = ("launch=torchrun", "launch.nproc=2", "launch.timeout_s=60")
    own = () if optimizer == "sgd" else ("optimizer.distribution=blocks",)
    return Setup(f"two ranks, {optimizer}", "experiments.train", (*_run(optimizer), *own, *launch))


def campaign() -> Setup:
    """Two runs side by side, which are judged together."""
    options = ("digits_mlp", "--optimizers", "sgd,mlbfgs", "--seeds", "0", "--scale", "smoke")
    return Setup(
        "a campaign of two runs",
        "experiments.reproduce",
        (*options, "--jobs", "2", *_SIZES),
        "--results-dir\n{}",
    )


def _run(optimizer: str) -> tuple[str, ...]:
    return ("experiment=digits_mlp", f"optimizer={optimizer}", "scale=smoke", *_SIZES)


def run_directories(results: Path) -> list[Path]:
    """The run directories under a results folder."""
    return sorted(path for path in results.glob("runs/*/*/*") if path.is_dir())


def steps_on_record(results: Path) -> int:
    """The newest step of any run; of files that live processes may be writing."""
    newest = 0
    for directory in run_directories(results):
        try:
            with open(directory / "metrics.jsonl", "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 2000))
                lines = file.read().split(b"\n")[:-1]
            newest = max([newest, *(json.loads(line)["step"] for line in lines[-2:])])
        except (OSError, ValueError, KeyError):
            continue  # not there, or its last line is half a line
    return newest


class Command:
    """A setup that is being run, in a session of its own.

    Attributes:
        process: its first process, the supervisor of all others.
        log: a file with all that was said.
    """

    def __init__(self, setup: Setup, results: Path, log: Path):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self.log = log
        self._seen: set[int] = set()
        self.process = context.Process(
            target=_serve, args=(setup.module, setup.command_line(results), str(log))
        )
        self.process.start()

    @property
    def pid(self) -> int:
        """Of the first process."""
        assert self.process.pid is not None
        return self.process.pid

    def family(self) -> list[int]:
        """The first process and all that came of it, as far as was looked."""
        self._seen |= {self.pid, *descendants(self.pid)}
        return sorted(self._seen)

    def exit_code(self, limit_s: float) -> int | None:
        """Wait for the end; None where there is none within so many seconds."""
        self.process.join(limit_s)
        return self.process.exitcode

    def clear(self) -> None:
        """Kill what is left."""
        kill(self.family())
        self.process.join()


@contextmanager
def begun(setup: Setup, results: Path, log: Path) -> Iterator[Command]:
    """Run a setup; what is left of it in the end is killed."""
    command = Command(setup, results, log)
    try:
        yield command
    finally:
        command.clear()


def _serve(module: str, arguments: Sequence[str], log: str) -> None:
    """Be that command: the main function of its first process."""
    os.setsid()
    with open(log, "ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.stdout = open(1, "w", closefd=False, buffering=1)
    sys.stderr = open(2, "w", closefd=False, buffering=1)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ.update(environment())
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main: Callable[[Any], int] = __import__(module, fromlist=["main"]).main
    code = main(list(arguments))
    sys.stdout.flush()
    sys.exit(code)
