"""Memory of freed tensors, kept by a process that trains on the CPU.

A pass allocates and frees the same activations in every step. glibc gives large blocks back to the
system as soon as they are free, and the system hands every page out again zeroed: a page fault for
every 4 KiB, tens of thousands of them in a step. Kept by the process, they are reused as they are.
No number changes; `experiments.benchmarks.allocator` measures what it saves. Whoever sets glibc's
own variables, or another allocator in front of it, has it as set.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from functools import cache

# malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_NEVER = -1  # man mallopt: "Setting M_TRIM_THRESHOLD to -1 disables trimming completely"
# Blocks above it still are the system's. The largest that glibc takes; before 2.35 a smaller one.
_LARGEST_KEPT = (2**30, 32 * 2**20)
_SET_BY_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Let this process keep what it frees, until it ends.

    Args:
        environment: where one of glibc's variables, or a preloaded library, is set by the user,
            nothing is changed.

    Returns:
        Whether it does now; False without glibc.
    """
    libc = _glibc()
    if libc is None or any(environment.get(name) for name in _SET_BY_USER):
        return False
    # Either call also ends glibc's own adjusting of both thresholds.
    kept = any(libc.mallopt(_M_MMAP_THRESHOLD, size) for size in _LARGEST_KEPT)
    return kept and bool(libc.mallopt(_M_TRIM_THRESHOLD, _NEVER))


def return_freed_memory() -> None:
    """Give the system all that this process has freed, once; nothing without glibc."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
