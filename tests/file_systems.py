"""A disk that is really full, a second user: what only the superuser can set up."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

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


def run_as(
    user: int,
    arguments: Sequence[str],
    *,
    umask: int = 0o002,
    group: int = GROUP,
    home: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `python <arguments>` as another user; the test is skipped where nobody may become one.

    Args:
        user: number of the user.
        arguments: of Python.
        umask: of the process.
        group: its only group.
        home: its home, for caches.
    """
    if os.geteuid() != 0:
        pytest.skip("only the superuser can become a second user")

    def become() -> None:
        os.setgroups([])
        os.setgid(group)
        os.setuid(user)
        os.umask(umask)

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"HOME": str(home or "/nonexistent"), "MPLCONFIGDIR": "/tmp/mpl-of-nobody"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=become,
        timeout=600,
    )
