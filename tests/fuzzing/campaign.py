"""Runs generated inputs one after the other and counts what none of them may do.

An input fails if it lets an exception or a traceback out, takes more than `LIMIT_S` seconds, or
leaves a file outside of the results directory. Everything happens in this process, through the
functions that the commands are made of, so that an input costs a fraction of a second.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

LIMIT_S = 20
ROOT = Path(__file__).resolve().parents[2]


class Hang(BaseException):
    """An input took longer than `LIMIT_S`; no handler of exceptions may catch it."""


@dataclass(frozen=True)
class Subject:
    """What is fed with generated inputs.

    Attributes:
        name: of the kind of input.
        inputs: what is generated.
        feed: takes a scratch folder and an input; returns an exit code, or a word for what came of
            it. Only `<scratch>/results` may be written.
        prepare: makes what all inputs start from; its seconds are nobody's.
    """

    name: str
    inputs: st.SearchStrategy[Any]
    feed: Callable[[Path, Any], object]
    prepare: Callable[[], object] = lambda: None


@dataclass
class Tally:
    """What became of the inputs of a subject."""

    inputs: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    failures: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Count what became of other inputs, too."""
        self.inputs += other.inputs
        self.answers.update(other.answers)
        self.slowest_s = max(self.slowest_s, other.slowest_s)
        self.failures += other.failures


def run(subject: Subject, scratch: Path, *, examples: int, number: int) -> Tally:
    """Feed a subject.

    Args:
        subject: the subject.
        scratch: an empty folder.
        examples: how many inputs.
        number: seed of the generator.
    """
    tally = Tally()
    for name in ("cwd", "home", "results"):
        (scratch / name).mkdir()

    @seed(number)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(subject.inputs)
    def feed_all(example: Any) -> None:
        if tally.inputs < examples:
            _feed(subject, scratch, example, tally)

    subject.prepare()
    with _inside(scratch):
        feed_all()
    return tally


def _feed(subject: Subject, scratch: Path, example: Any, tally: Tally) -> None:
    tally.inputs += 1
    before = _outside(scratch)
    said = io.StringIO()
    trouble = ""
    start, queued = time.perf_counter(), _queued_s()
    try:
        with _captured(said), _limited():
            answer = subject.feed(scratch, example)
    except SystemExit as stop:  # of argparse
        answer = stop.code
    except Hang:
        answer, trouble = "hang", f"took more than {LIMIT_S} s"
    except BaseException:
        answer, trouble = "exception", traceback.format_exc()[-1500:]
    seconds = time.perf_counter() - start - (_queued_s() - queued)
    tally.slowest_s = max(tally.slowest_s, seconds)
    tally.answers[str(answer)] += 1
    left = sorted(_outside(scratch) - before)
    if "Traceback" in said.getvalue():
        trouble = trouble or f"showed a traceback: {said.getvalue()[-1500:]}"
    if left:
        trouble = trouble or f"left {left[:3]} outside of the results directory"
    if trouble:
        tally.failures.append(f"{subject.name} {example!r:.600}\n{trouble}")


def _outside(scratch: Path) -> set[str]:
    """Every file and folder that no input may add to: all around the results directory."""
    found = {str(path) for name in ("cwd", "home") for path in (scratch / name).rglob("*")}
    for folder in (scratch, scratch.parent, ROOT, ROOT / "results", ROOT / "configs"):
        found.update(str(path) for path in folder.iterdir())
    return found


@contextlib.contextmanager
def _inside(scratch: Path) -> Iterator[None]:
    """Work in a folder of the campaign's own, with a home of its own."""
    variables = {
        "HOME": str(scratch / "home"),
        "XDG_CACHE_HOME": str(scratch / "results" / "cache"),
        "MPLCONFIGDIR": str(scratch / "results" / "matplotlib"),
    }
    before, folder = {name: os.environ.get(name) for name in variables}, os.getcwd()
    os.environ.update(variables)
    os.chdir(scratch / "cwd")
    try:
        yield
    finally:
        os.chdir(folder)
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def _captured(said: io.StringIO) -> Iterator[None]:
    """Take everything that is printed or logged."""
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, [logging.StreamHandler(said)]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    finally:
        root.handlers = handlers


def _queued_s() -> float:
    """Seconds for which the main thread wanted a processor and had none; Linux says them."""
    try:
        return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    start, queued_before = time.monotonic(), _queued_s()

    def ring(_number: int, _frame: FrameType | None) -> None:
        # On a machine that others use, too, the time in which this process had to stand back.
        used = time.monotonic() - start - (_queued_s() - queued_before)
        if used >= LIMIT_S - 1:
            raise Hang
        signal.alarm(max(1, int(LIMIT_S - used)))

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
