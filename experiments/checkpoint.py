"""Checkpoints: atomic, verified files that hold everything a resume needs.

A checkpoint is one file `step<step>-<digest>.pt`, a plain `torch.save` whose name carries the
first 16 hex digits of the SHA-256 of its bytes. It gets that name only once it is complete and on
the disk, so a process killed while writing leaves no half-written file under a final name; a file
torn or changed afterwards does not match its name, and the one before it is used.
"""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from typing import Any

import torch

from experiments.atomic import TEMPORARY_SUFFIX, publish, write_durably
from experiments.errors import UserError

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step(\d+)-([0-9a-f]{16})\.pt")
_CHUNK_BYTES = 1 << 22


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: where they lie; it exists.
        key: run key, stored in each file and compared when one is loaded.
        keep: how many of the newest to keep, at least 1.
    """

    def __init__(self, folder: Path, *, key: str, keep: int):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self._folder = folder
        self._key = key
        self._keep = keep

    def paths(self) -> list[Path]:
        """The checkpoints, oldest first."""
        named = [(path, _NAME.fullmatch(path.name)) for path in self._folder.iterdir()]
        return [path for _, path in sorted((int(m[1]), path) for path, m in named if m)]

    def save(self, state: dict[str, Any], *, step: int) -> Path:
        """Write a checkpoint and drop those that are no longer to be kept.

        Args:
            state: tensors and plain values, nested in dicts and lists.
            step: finished steps.

        Returns:
            The file.
        """
        temporary = self._folder / f"step{step:08d}{TEMPORARY_SUFFIX}"
        payload = {"key": self._key, "step": step, "state": state}
        write_durably(temporary, lambda handle: torch.save(payload, handle))
        path = self._folder / f"step{step:08d}-{_digest(temporary)}.pt"
        publish(temporary, path)
        others = [other for other in self.paths() if other != path]
        superseded = [other for other in others if _step(other) == step]
        earlier = [other for other in others if _step(other) != step]
        dropped = max(0, len(earlier) - (self._keep - 1))
        for old in superseded + earlier[:dropped]:
            old.unlink()
        return path

    def load_newest(self) -> dict[str, Any] | None:
        """Load the newest checkpoint that is intact.

        A file that does not match its name is torn or corrupt: it is named in a warning and
        deleted, and the one before it is tried.

        Returns:
            The state that was saved, its tensors on the CPU; None where no checkpoint is intact.

        Raises:
            UserError: the newest intact checkpoint belongs to another run.
        """
        for path in reversed(self.paths()):
            match = _NAME.fullmatch(path.name)
            assert match is not None
            if _digest(path) != match[2]:
                logger.warning("checkpoint %s is torn or corrupt: using the one before it", path)
                path.unlink()
                continue
            payload = torch.load(path, map_location="cpu", weights_only=True)
            if payload["key"] != self._key:
                raise UserError(
                    f"{path} belongs to run {payload['key']}, not to {self._key}: "
                    "delete the checkpoints folder to start over"
                )
            state: dict[str, Any] = payload["state"]
            return state
        return None


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _digest(path: Path) -> str:
    sha = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            sha.update(chunk)
    return sha.hexdigest()[:16]
