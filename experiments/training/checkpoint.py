"""Checkpoints: atomic, verified, and everything that a resume needs.

A process that trains alone writes one file `step<step>-<digest>.pt`, a plain `torch.save`; several
ranks write a folder `step<step>-<digest>` together (`experiments.training.sharded_checkpoint`).
Either gets that name only once it is complete and on the disk, so a process killed while writing
leaves nothing half-written under a final name. The name carries the first 16 hex digits of the
SHA-256 of the file, or of the folder's list of digests; what was torn or changed afterwards does
not match its name, and the checkpoint before it is used. Any number of ranks reads both kinds.
"""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from experiments.errors import UserError, one_line
from experiments.given import MALFORMED
from experiments.runs.atomic import (
    TEMPORARY_SUFFIX,
    file_digest,
    publish,
    refuse_links,
    remove,
    write_durably,
)
from experiments.training.ranks import ALONE, Ranks, ToldByLeaderError

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step(\d+)-([0-9a-f]{16})(\.pt)?")


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: where they lie; it exists, and all ranks see it.
        key: run key, stored in each checkpoint and compared when one is loaded.
        keep: how many of the newest to keep, at least 1.
        ranks: who saves and loads; each of them calls every method.
    """

    def __init__(self, folder: Path, *, key: str, keep: int, ranks: Ranks = ALONE):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self._folder = folder
        self._key = key
        self._keep = keep
        self._ranks = ranks

    def paths(self) -> list[Path]:
        """The checkpoints, oldest first."""
        named = [(path, _NAME.fullmatch(path.name)) for path in self._folder.iterdir()]
        return [path for _, path in sorted((int(m[1]), path) for path, m in named if m)]

    def save(self, state: dict[str, Any], *, step: int) -> Path:
        """Write a checkpoint and drop those that are no longer to be kept.

        Args:
            state: tensors and plain values, nested in dicts and lists; the same on all ranks but
                for what is sharded.
            step: finished steps.

        Returns:
            The file or folder.

        Raises:
            UserError: the disk does not take it, or the folder is a link by now; the checkpoints
                before it are as they were.
        """
        self._ranks.from_leader(lambda: refuse_links(self._folder, self._folder.parent))
        try:
            path = self._write(state, step)
        except OSError as error:
            self._ranks.from_leader(lambda: _remove_if_there(self._temporary(step)))
            kind = UserError if self._ranks.leads else ToldByLeaderError
            raise kind(self._refusal(error, step)) from error
        if self._ranks.leads:
            self._drop_all_but(path, step)
        return path

    def _write(self, state: dict[str, Any], step: int) -> Path:
        temporary = self._temporary(step)
        header = {"key": self._key, "step": step}
        if self._ranks.world_size == 1:
            payload = {**header, "state": state}
            write_durably(temporary, lambda handle: torch.save(payload, handle))
            path = self._folder / f"step{step:08d}-{file_digest(temporary)[:16]}.pt"
            publish(temporary, path)
            return path
        digest = _sharded().write(temporary, state, self._ranks, header=header)
        path = self._folder / f"step{step:08d}-{digest[:16]}"

        def name_it() -> None:
            if path.exists():  # the same once more
                remove(temporary)
                return
            try:
                publish(temporary, path)
            except OSError as error:
                _remove_if_there(temporary)
                raise UserError(self._refusal(error, step)) from error

        self._ranks.from_leader(name_it)
        return path

    def _temporary(self, step: int) -> Path:
        return self._folder / f"step{step:08d}{TEMPORARY_SUFFIX}"

    def _refusal(self, error: OSError, step: int) -> str:
        kept = self.paths()
        left = f"step {_step(kept[-1])} is still there" if kept else "there is none before it"
        reason = error.strerror or " ".join(str(error).split())
        return (
            f"the checkpoint at step {step} cannot be written to {self._folder} ({reason}); "
            f"{left}: make room, and the same command goes on from there"
        )

    def _drop_all_but(self, path: Path, step: int) -> None:
        others = [other for other in self.paths() if other != path]
        superseded = [other for other in others if _step(other) == step]
        earlier = [other for other in others if _step(other) != step]
        dropped = max(0, len(earlier) - (self._keep - 1))
        for old in superseded + earlier[:dropped]:
            _delete(old)

    def load_newest(
        self, template: Callable[[], dict[str, Any]] | None = None
    ) -> dict[str, Any] | None:
        """Load the newest checkpoint that is intact.

        One that does not match its name is torn or corrupt: it is named in a warning and deleted,
        and the one before it is tried.

        Args:
            template: gives a state of the run that loads; its tensors are overwritten where
                several ranks wrote the checkpoint, and its shards say what a rank reads.

        Returns:
            The state that was saved, its tensors on the CPU or those of the template; None where
            no checkpoint is intact.

        Raises:
            UserError: the newest intact checkpoint belongs to another run.
        """
        for path in self._ranks.from_leader(lambda: self.paths()[::-1]):
            match = _NAME.fullmatch(path.name)
            assert match is not None
            if not self._is_intact(path, match[2]):
                if self._ranks.leads:
                    logger.warning(
                        "checkpoint %s is torn or corrupt: using the one before it", path
                    )
                    _delete(path)
                continue
            key, state = self._read(path, template)
            if key != self._key:
                raise UserError(
                    f"{path} belongs to run {key}, not to {self._key}: "
                    "delete the checkpoints folder to start over"
                )
            return state
        return None

    def _read(
        self, path: Path, template: Callable[[], dict[str, Any]] | None
    ) -> tuple[str, dict[str, Any]]:
        """The run key and the state in an intact checkpoint.

        Raises:
            UserError: somebody wrote it who does not write checkpoints.
        """
        try:
            if path.is_dir():
                empty = template() if template is not None else {}
                payload = _sharded().read(path, empty, self._ranks)
            else:
                payload = torch.load(path, map_location="cpu", weights_only=True)
            return str(payload["key"]), dict(payload["state"])
        except (pickle.UnpicklingError, *MALFORMED) as error:
            raise UserError(
                f"{path} is no checkpoint of a run ({one_line(error)}): delete it, and the one "
                "before it is used"
            ) from error

    def _is_intact(self, path: Path, digest: str) -> bool:
        if self._ranks.from_leader(path.is_symlink):  # no run wrote it
            return False
        if path.is_dir():
            return bool(_sharded().intact(path, digest, self._ranks))
        found: str = self._ranks.from_leader(lambda: file_digest(path) if path.is_file() else "")
        return found.startswith(digest)


def _sharded() -> ModuleType:
    """The folders of several ranks; torch's part of it takes a second to load."""
    from experiments.training import sharded_checkpoint

    return sharded_checkpoint


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _delete(path: Path) -> None:
    """Delete a checkpoint; a folder loses its name first, so that no half of one is ever seen."""
    if path.is_dir() and not path.is_symlink():
        doomed = path.with_name(path.name + TEMPORARY_SUFFIX)
        path.rename(doomed)
        path = doomed
    remove(path)


def _remove_if_there(path: Path) -> None:
    with suppress(OSError):
        remove(path)
