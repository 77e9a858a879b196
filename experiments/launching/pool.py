"""Processes that train one run after the other, so that a campaign loads torch once for each.

A process gets nothing but run directories with frozen configs. One that dies takes its run alone
with it, and all of them end with the process that started them.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path
from typing import Any

from experiments.entry import steady_output
from experiments.errors import UserError
from experiments.launching.launch import run_here
from experiments.launching.processes import thread_environment
from experiments.runs.directory import CONFIG_FILE, InUseError
from experiments.runs.outcome import Outcome, elsewhere, finished_outcome, recorded_outcome
from experiments.runs.spec import RunSpec
from experiments.supervision import end_with_parent

logger = logging.getLogger(__name__)

# How long runs have for the step they are in, and a checkpoint, when their campaign is to end.
END_LIMIT_S = 60.0


class WorkerPool:
    """Processes that train one run after the other, each started once.

    Loading torch takes seconds, which short runs would spend on nothing else. A process that dies
    takes its run alone with it: the run counts as crashed and another process takes its place.

    Args:
        jobs: processes side by side.
        threads: of each process; None: torch decides.
        gpus: names for CUDA_VISIBLE_DEVICES; each process sees one of them, in turn. None: each
            process sees what this one sees.
    """

    def __init__(self, jobs: int, threads: int | None = None, gpus: Sequence[str] = ()):
        self._context = multiprocessing.get_context("spawn")
        self._threads = threads
        self._jobs = jobs
        self._gpus = tuple(gpus)
        self._free = list(range(jobs))
        self._idle: list[_Worker] = []
        self._busy: dict[_Worker, Path] = {}

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        workers = (*self._idle, *self._busy)
        for worker in self._idle:
            worker.dismiss()
        for worker in self._busy:
            worker.process.terminate()
        if self._busy:
            runs = ", ".join(map(str, self._busy.values()))
            logger.warning(
                "waiting up to %.0f s for a checkpoint of %s; another signal ends at once",
                END_LIMIT_S,
                runs,
            )
        try:
            deadline = time.monotonic() + END_LIMIT_S
            for worker in workers:
                worker.process.join(timeout=max(0.0, deadline - time.monotonic()))
        finally:
            for worker in workers:
                worker.end()

    def outcomes(
        self, directories: Sequence[Path], *, every_s: float = 0.5
    ) -> Iterator[Outcome | tuple[Path, ...]]:
        """Train the runs in these directories, in order.

        Args:
            directories: run directories with frozen configs.
            every_s: how often to report the runs in progress, seconds.

        Yields:
            An `Outcome` as each run ends; in between, the directories of the runs in progress.
        """
        waiting = list(directories)
        while waiting or self._busy:
            while waiting and len(self._busy) < self._jobs:
                worker = self._idle.pop() if self._idle else self._start()
                self._busy[worker] = waiting.pop(0)
                worker.give(self._busy[worker])
            connection.wait([worker.pipe for worker in self._busy], timeout=every_s)
            for worker in [worker for worker in self._busy if worker.pipe.poll()]:
                directory = self._busy.pop(worker)
                outcome = worker.collect()
                if outcome is None:
                    self._free.append(worker.slot)
                    yield recorded_outcome(directory, exit_code=worker.exit_code())
                else:
                    self._idle.append(worker)
                    yield outcome
            yield tuple(self._busy.values())

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        # Not a daemon, which could have no processes that load images; it ends with its parent by
        # itself (`end_with_parent`).
        process = self._context.Process(target=_serve, args=(theirs,))
        slot = self._free.pop(0)
        variables = thread_environment(self._threads)
        if self._gpus:
            variables["CUDA_VISIBLE_DEVICES"] = self._gpus[slot % len(self._gpus)]
        with _environment(variables), _interrupts_ignored():
            process.start()
        theirs.close()
        return _Worker(process, ours, slot)


class _Worker:
    """The parent's end of one process of the pool; `slot` counts them, from 0."""

    def __init__(self, process: Any, pipe: connection.Connection, slot: int):
        self.process = process
        self.pipe = pipe
        self.slot = slot

    def give(self, directory: Path) -> None:
        """Hand over a run."""
        try:
            self.pipe.send(directory)
        except OSError:
            # The process died while it was idle; collecting will say so.
            logger.debug("worker %s is gone", self.process.pid)

    def collect(self) -> Outcome | None:
        """Take the result of the run handed over last; None where the process died."""
        try:
            outcome = self.pipe.recv()
        except (EOFError, OSError):
            return None
        assert isinstance(outcome, Outcome)
        return outcome

    def exit_code(self) -> int:
        """Exit code of a process that died."""
        self.process.join(timeout=10)
        return int(self.process.exitcode or 0)

    def dismiss(self) -> None:
        """Let the idle process end by itself, and close what its data sets have open."""
        self.pipe.close()

    def end(self) -> None:
        """End the process; a run in progress resumes from its last checkpoint."""
        self.pipe.close()
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(pipe: connection.Connection) -> None:
    """Train what comes through the pipe until it closes: the main function of a pool process."""
    end_with_parent()
    try:
        with steady_output():
            while True:
                directory = pipe.recv()
                pipe.send(_train_frozen(directory))
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        return


def _train_frozen(directory: Path) -> Outcome:
    try:
        spec = RunSpec.load(directory / CONFIG_FILE)
        return finished_outcome(spec) or run_here(spec)
    except InUseError as error:
        return elsewhere(spec, error)
    except UserError as error:
        return Outcome(directory, "refused", str(error))


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the processes started inside."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Let the processes started inside ignore Ctrl-C: their parent hears it and ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
