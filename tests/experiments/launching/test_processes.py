"""Processes that a launcher starts do not outlive it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
LAUNCHER = """
import os, sys
from experiments.launching.processes import run_to_end
child = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); "
run_to_end([sys.executable, "-c", child + "time.sleep(120)", sys.argv[1]], os.environ)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody tells a child")
def test_child_ends_when_its_launcher_is_killed_outright(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(note)], cwd=ROOT)
    try:
        wait_for(lambda: note.exists() and note.read_text() != "")
        child = int(note.read_text())
        assert is_alive(child)
    finally:
        launcher.send_signal(signal.SIGKILL)
        launcher.wait()
    wait_for(lambda: not is_alive(child))


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not collected yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"timed out (pid {os.getpid()})"
        time.sleep(0.05)
