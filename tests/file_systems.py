"""A disk that is really full, a second user: what only the superuser can set up."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from experiments.entry import entry

ROOT = Path(__file__).resolve().parents[1]
#: Two users of one group, and no others of the machine.
ALICE, BOB, GROUP = 61001, 61002, 61000


@contextmanager
def disk(folder: Path, size: str, *options: str) -> Iterator[Path]:
    """A file system of its own; the test is skipped where the user may mount none.

    Args:
        folder: where it is mounted; made.
        size: as of tmpfs, such as `700k`.
        options: further ones of tmpfs, such as `nr_inodes=20`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    data = ",".join((f"size={size}", "mode=0755", *options)).encode()
    if libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, data) != 0:
        pytest.skip(f"no tmpfs may be mounted here: {os.strerror(ctypes.get_errno())}")
    try:
        yield folder
    finally:
        libc.umount2(bytes(folder), 2)  # MNT_DETACH


def fill(folder: Path, leave: int = 0) -> Path:
    """Fill the disk of a folder to its last page, but for `leave` bytes; returns the filler."""
    filler = folder / "filler"
    with open(filler, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(max(0, file.tell() - leave))
    return filler


def exit_status(command: Callable[[], object]) -> int:
    """What a command made of a function would end with; 0 where it returns nothing."""
    return entry(lambda _: int(command() or 0))()


_SCRIPT = """
import encodings.ascii, encodings.cp437, os, sys  # asked for later
{code}
if __name__ == "__main__":
    main({before!r})
    sys.stdout.flush()
    for stream in (1, 2):
        os.write(stream, b"{mark}")
    os.setgroups([])
    os.setgid({group})
    os.setuid({user})
    os.umask({umask})
    sys.exit(main({arguments!r}))
"""
_MARK = "-- from here on as the user --\\n"


def run_as(
    user: int,
    code: str,
    arguments: Sequence[str],
    before: Sequence[str],
    *,
    umask: int = 0o002,
    group: int = GROUP,
) -> subprocess.CompletedProcess[str]:
    """Run a function as another user; the test is skipped where nobody may become one.

    Python itself may lie where that user cannot read. So the function runs once as the superuser,
    which imports what it needs, before the process becomes the user and runs it for good.

    Args:
        user: number of the user.
        code: defines `main(arguments)`, which returns an exit code.
        arguments: of the function.
        before: its arguments as the superuser.
        umask: of the process.
        group: its only group.

    Returns:
        The exit code and what the user's process printed.
    """
    if os.geteuid() != 0:
        pytest.skip("only the superuser can become a second user")
    script = _SCRIPT.format(
        code=code,
        before=list(before),
        arguments=list(arguments),
        mark=_MARK,
        group=group,
        user=user,
        umask=umask,
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    mark = _MARK.replace("\\n", "\n")
    assert mark in ended.stderr, ended.stderr
    ended.stdout, ended.stderr = (text.split(mark)[1] for text in (ended.stdout, ended.stderr))
    return ended
