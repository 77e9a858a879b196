"""A lock of the operating system that belongs to one process and to none of its children.

`flock` goes with an open file, which a forked process shares: a worker that outlives its parent
would keep the lock. So a child closes what it has inherited as its first act; what is started
through `exec` never gets it.
"""

from __future__ import annotations

import os
import weakref


class HeldLock:
    """An open file that is, or shall be, locked; `release` or the end of the process frees it.

    Args:
        descriptor: of the open file.
    """

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        _held.add(self)

    def release(self) -> None:
        """Close the file; more than once does no harm."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def holder(descriptor: int) -> str:
    """Who holds a lock, as the file says, for messages.

    Args:
        descriptor: of the lock's file, in which the holder has written its process id.

    Returns:
        `pid 17`; where that process is dead, what else may hold the lock.
    """
    owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
    if not owner.isdecimal():
        return "an unknown process"
    if _is_alive(int(owner)):
        return f"pid {owner}"
    return f"a process of another machine or a child of pid {owner}, which is dead here"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def _let_go() -> None:
    for lock in list(_held):
        lock.release()


# All that this process holds, for the moment when it forks.
_held: weakref.WeakSet[HeldLock] = weakref.WeakSet()
os.register_at_fork(after_in_child=_let_go)
