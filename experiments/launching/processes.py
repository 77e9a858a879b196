"""Child processes of a launcher: their environment, their signals, their command as a line."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from experiments.supervision import signalled_at_parents_death

# Every one of them is read once, when the library is loaded.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def thread_environment(threads: int | None) -> dict[str, str]:
    """Environment variables that bound the threads of a new process; none where `threads` is."""
    return {} if threads is None else {name: str(threads) for name in _THREAD_VARIABLES}


def shell_line(command: Sequence[str], variables: Mapping[str, str]) -> str:
    """A command with its environment, to be typed in the root of the project."""
    return shlex.join([*(f"{k}={v}" for k, v in variables.items()), *command])


def run_to_end(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command whose output goes where this process's goes, and let it end by itself.

    SIGTERM and SIGUSR1 are passed on, so that the training ends at a checkpoint; Ctrl-C reaches
    the child from the terminal. In all three cases this process waits for the child and then ends
    as the signal says. Where this process is killed outright, the child gets SIGTERM (on Linux), so
    that nothing trains on unseen with its run locked.

    Args:
        command: program and arguments.
        environment: the whole environment of the child.

    Returns:
        The exit code; negative for a signal.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once the child has ended.
        SystemExit: after SIGTERM or SIGUSR1, once the child has ended.
    """
    process = subprocess.Popen(
        command, env=dict(environment), preexec_fn=signalled_at_parents_death()
    )
    with _forwarding(process) as received:
        while True:
            try:
                code = process.wait()
                break
            except KeyboardInterrupt:
                received.append(signal.SIGINT)
    if signal.SIGINT in received:
        raise KeyboardInterrupt
    if received:
        raise SystemExit(128 + received[0])
    return code


@contextmanager
def _forwarding(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Pass signals on to a child while inside; outside the main thread there are none."""
    received: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(process.pid, number)

    with handling(forward, _FORWARDED):
        yield received


@contextmanager
def endings_raised() -> Iterator[None]:
    """Have the signals to end raise SystemExit while inside, so that what was begun ends too."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    with handling(end, _FORWARDED):
        yield


@contextmanager
def handling(
    handler: Callable[[int, FrameType | None], None], numbers: Iterable[int]
) -> Iterator[None]:
    """Handle signals while inside; those that this process was started to ignore stay ignored.

    Outside the main thread, where none can be handled, they are left as they are.

    Args:
        handler: gets the signal's number and the interrupted frame.
        numbers: of the signals.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
