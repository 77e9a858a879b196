"""Real processes of the suite, seen from outside: started, looked at, waited for, killed.

Processes are found in /proc, so this is for Linux.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """For processes that find this copy of the project, take a thread each, and keep bytecode."""
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return {**inherited, **own, "MPLBACKEND": "Agg"}


@contextmanager
def started(
    arguments: Sequence[str],
    log: Path,
    *,
    cwd: Path = ROOT,
    variables: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> Iterator[subprocess.Popen[bytes]]:
    """A command of this Python, in a session of its own, whose output goes to a file.

    What is left of it and of its descendants is killed in the end.

    Args:
        arguments: of Python.
        log: gets all output.
        cwd: where it runs.
        variables: of the environment, besides `environment()`.
        prefix: a program that starts Python, with its arguments.
    """
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [*prefix, sys.executable, *arguments],
            cwd=cwd,
            env={**environment(), **(variables or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=_hear_signals,
        )
    try:
        yield process
    finally:
        kill([*descendants(process.pid), process.pid])
        process.wait()


def _hear_signals() -> None:
    """Undo what nohup and a shell's background do to whatever they start."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def kill(pids: Iterable[int], number: int = signal.SIGKILL) -> None:
    """Send a signal to processes; some may be gone."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not collected yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, directly or not; the direct ones first."""
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):
            found += map(int, file.read_text().split())
    return found + [one for child in found for one in descendants(child)]


def running(words: str) -> list[int]:
    """The processes whose command line, its words parted by spaces, contains some words."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(FileNotFoundError, ProcessLookupError):
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if words in line and is_alive(int(file.parent.name)):
                found.append(int(file.parent.name))
    return found


def ranks_of(directory: Path) -> list[int]:
    """The processes that train a run directory: ranks, or a worker alone; torchrun is none."""
    words = f"-m experiments.worker {directory}"
    agents = running("torch.distributed.run --nnodes")
    return [pid for pid in running(words) if pid not in agents]


def wait_for(condition: Callable[[], object], seconds: float = 120.0) -> bool:
    """Wait until a condition holds.

    Returns:
        Whether it does; False after so many seconds.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
