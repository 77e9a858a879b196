"""mL-BFGS that injects faults, once each: a rank dies, hangs, has no data or no room on the disk.

A fault is `<kind>@<step>@<rank>`. It happens when that rank takes that step (from 1) for the first
time; a file in the folder remembers that it did, so the rank that takes its place is spared.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from experiments.data import Batch
from experiments.training.passes import Passes
from mlbfgs import MLBFGS


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class FaultyMLBFGS(MLBFGS):
    def __init__(self, params: Iterable[Any], *, folder: str, faults: Iterable[str], **rest: Any):
        super().__init__(params, **rest)
        self._folder = Path(folder)
        self._faults = {}
        for fault in faults:
            kind, step, rank = fault.split("@")
            self._faults[int(step), int(rank)] = kind

    def bind(self, passes: Passes) -> None:
        self._data = passes._data

    def before_step(self, batch: Batch, epoch: int) -> None:
        step = next(iter(self.state.values()))["step"] + 1
        rank = dist.get_rank()
        kind = self._faults.get((step, rank))
        if kind is not None and self._first_time(f"{kind}@{step}@{rank}"):
            getattr(self, kind)()

    def _first_time(self, name: str) -> bool:
        try:
            (self._folder / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def killed_in_step(self) -> None:
        kill()

    def killed_in_all_gather(self) -> None:
        """After the first message of the exchange of parameters."""
        broadcast = dist.broadcast

        def broadcast_and_die(*arguments: Any, **keywords: Any) -> None:
            broadcast(*arguments, **keywords)
            kill()

        dist.broadcast = broadcast_and_die

    def killed_in_checkpoint(self) -> None:
        """While the file of this rank is half on the disk."""
        fsync = os.fsync

        def tear_and_die(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if path.endswith(".distcp"):
                os.truncate(path, os.path.getsize(path) // 2)
                kill()
            fsync(descriptor)

        os.fsync = tear_and_die

    def killed_before_manifest(self) -> None:
        """When all ranks have written their files, and the checkpoint has no name yet."""
        from experiments.training import sharded_checkpoint

        sharded_checkpoint.file_digest = lambda _path: kill()

    def full_disk(self) -> None:
        """No file may grow beyond 40 KiB: the records do not, a checkpoint would."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (40 << 10, resource.RLIM_INFINITY))

    def stopped(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def broken_data(self) -> None:
        def fail(*_: Any) -> None:
            raise OSError("cannot read image 17")

        self._data._train_batch = fail
