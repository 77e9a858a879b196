"""Processes that end with the one that started them, however that one ends.

On Linux the kernel sends the signal (`PR_SET_PDEATHSIG`), also to a process that waits in a
library or is stopped. Everywhere a thread looks whether the parent is still there; the kernel's
word is bound to the thread that started the process, and other systems have none.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LOOK_EVERY_S = 0.5


def end_with_parent() -> None:
    """Let this process be killed as soon as the process that started it is gone.

    For processes that are nothing without their parent: ranks, loaders, the pool. What they leave
    is what `kill -9` leaves.
    """
    parent = os.getppid()
    started_by = multiprocessing.parent_process()

    def is_alone() -> bool:
        # A forked process may hold open what its siblings' `is_alive` looks at; one of a fork
        # server has another parent than the process that wanted it. Either sign will do.
        gone = started_by is not None and not started_by.is_alive()
        return gone or os.getppid() != parent

    def watch() -> None:
        while not is_alone():
            time.sleep(_LOOK_EVERY_S)
        os.kill(os.getpid(), signal.SIGKILL)

    _ask_the_kernel(signal.SIGKILL)
    if is_alone():  # since before the call
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Thread(target=watch, name="parent watch", daemon=True).start()


def signalled_at_parents_death(number: int = signal.SIGTERM) -> Callable[[], None] | None:
    """What `subprocess.Popen` runs in a child, as `preexec_fn`, so that its parent's death is told.

    Args:
        number: the signal that the child gets.

    Returns:
        None where the system has no such signal.
    """
    if sys.platform != "linux":
        return None
    # loaded here: nothing but the call itself may happen between fork and exec
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, int(number))
        if os.getppid() != parent:  # it died before the call
            os._exit(1)

    return ask


def _ask_the_kernel(number: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))
