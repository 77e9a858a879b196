"""Child processes of a launcher: their environment, their signals, their command as a line."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

# Every one of them is read once, when the library is loaded.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_FORWARDED = (signal.SIGTERM, signal.SIGUSR1)


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
    process = subprocess.Popen(command, env=dict(environment), preexec_fn=_end_with_parent())
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


def _end_with_parent() -> Callable[[], None] | None:
    """What a child runs before its program so that the death of its parent is a signal to it."""
    if sys.platform != "linux":
        return None
    # loaded here: nothing but the call itself may happen between fork and exec
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != parent:  # it died before the call
            os._exit(1)

    return ask


@contextmanager
def _forwarding(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Pass signals on to a child while inside; outside the main thread there are none."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def forward(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        os.kill(process.pid, number)

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
