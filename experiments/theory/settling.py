"""One subject of the theory, settled in a process of its own.

A spawned process looks its function up in the module that holds it, which a package's `__main__`
cannot be: there it is another module.
"""

from __future__ import annotations

import importlib
import time
from pathlib import Path

import torch


def settle(subject: str, folder: Path) -> tuple[str, float]:
    """Run one subject and write its file.

    Returns:
        The subject and the seconds it took.
    """
    torch.set_num_threads(1)
    started = time.perf_counter()
    module = importlib.import_module(f"experiments.theory.{subject}")
    module.run().write(folder)
    return subject, time.perf_counter() - started
