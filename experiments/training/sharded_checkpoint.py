"""A checkpoint that several ranks write together: a folder, with the tensors in torch's format.

    plain.pt              everything but the tensors, which are named in their places
    .metadata, *.distcp   the tensors (torch.distributed.checkpoint): each rank writes what it
                          holds of those that are sharded, and its share of those that are not
    manifest.json         the SHA-256 of each of these files

The tensors belong to names, not to ranks, so any number of ranks reads what any other wrote. No
rank gathers anything.
"""

from __future__ import annotations

import errno
import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from experiments.errors import UserError
from experiments.given import MALFORMED, parse_json, read_text
from experiments.runs.atomic import file_digest, remove, write_durably
from experiments.training.checkpoint_metadata import FILE as METADATA
from experiments.training.checkpoint_metadata import MetadataReader
from experiments.training.ranks import Ranks

MANIFEST = "manifest.json"
PLAIN = "plain.pt"
# A dictionary with this key alone stands in the place of a tensor.
_TENSOR = "@tensor"
_CUT_SHORT = ("unexpected pos", "PytorchStreamWriter failed")


def write(folder: Path, state: dict[str, Any], ranks: Ranks, *, header: dict[str, Any]) -> str:
    """Write a checkpoint, each rank its share, and return once all of it is on the disk.

    Args:
        folder: does not exist yet, or was left half-written.
        state: tensors and plain values, nested in dicts and lists; the plain values of the leader
            are kept.
        ranks: who writes.
        header: plain values to keep beside the state.

    Returns:
        The SHA-256 of the manifest, in hex.

    Raises:
        OSError: a rank could not write its share; on every rank.
    """
    plain, tensors = split(state)

    def make_anew() -> str:
        remove(folder)
        folder.mkdir()
        return ""

    _told(ranks, make_anew)
    writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True)
    try:
        save_tensors(
            tensors,
            storage_writer=writer,
            planner=DefaultSavePlanner(dedup_save_to_lowest_rank=False),
        )
    except CheckpointException as error:
        raise _first_os_error(error) from error

    def finish() -> str:
        payload = {**header, "state": plain}
        write_durably(folder / PLAIN, lambda handle: torch.save(payload, handle))
        return ""

    _told(ranks, finish)
    digests: dict[str, str] = {}
    mine = _share(sorted(p for p in folder.iterdir() if p.name != MANIFEST), ranks)
    for found in ranks.objects({path.name: file_digest(path) for path in mine}):
        digests.update(found)
    text = json.dumps({"files": digests}, indent=1, sort_keys=True) + "\n"

    def seal() -> str:
        write_durably(folder / MANIFEST, lambda handle: handle.write(text.encode()))
        return ""

    _told(ranks, seal)
    return hashlib.sha256(text.encode()).hexdigest()


def intact(folder: Path, digest: str, ranks: Ranks) -> bool:
    """Whether a checkpoint is as it was written; each rank looks at its share of the files.

    Args:
        folder: the checkpoint.
        digest: how the SHA-256 of its manifest begins, in hex.
        ranks: who reads.
    """
    manifest = folder / MANIFEST
    good = manifest.is_file() and file_digest(manifest).startswith(digest)
    files = _digests(manifest) if good else {}
    # what is read without having been compared could be anybody's
    good = good and {PLAIN, METADATA} <= files.keys()
    for name, expected in _share(sorted(files.items()), ranks):
        path = folder / name
        good = good and path.is_file() and file_digest(path) == expected
    return all(ranks.objects(good))


def _digests(manifest: Path) -> dict[str, str]:
    """The SHA-256 of each file; none where it is no manifest."""
    try:
        files = parse_json(read_text(manifest))["files"]
        return {name: str(digest) for name, digest in files.items() if Path(name).name == name}
    except (UserError, *MALFORMED):
        return {}


def read(folder: Path, template: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Read a checkpoint, each rank what it needs.

    Args:
        folder: an intact checkpoint.
        template: a state of the run that reads, such as it is before its first step. A tensor of
            it is overwritten by the one of the same name in the checkpoint, so that a sharded one
            takes its shard alone.
        ranks: who reads.

    Returns:
        The header's values and, under `state`, the state that was written; tensors that the
        template does not have are whole and on the CPU.
    """
    payload: dict[str, Any] = torch.load(folder / PLAIN, map_location="cpu", weights_only=True)
    _, own = split(template)
    reader = MetadataReader(folder)
    tensors: dict[str, Tensor] = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata), name
        target = own.get(name)
        if target is None or target.shape != entry.size or target.dtype != entry.properties.dtype:
            target = torch.empty(entry.size, dtype=entry.properties.dtype)
        tensors[name] = target
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is meant
        try:
            load_tensors(tensors, storage_reader=reader, no_dist=ranks.world_size == 1)
        except CheckpointException as error:
            met = next(iter(error.failures.values()))[0]
            raise ValueError(f"its tensors cannot be loaded: {met}") from error
    payload["state"] = join(payload["state"], tensors)
    return payload


def split(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """Take the tensors out of a nested state.

    Args:
        state: dicts, lists and tuples of tensors and plain values.

    Returns:
        The same with every tensor replaced by its name (tuples become lists), and the tensors by
        name: the keys on the way, joined by slashes.
    """
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensors[path] = value.detach()
            return {_TENSOR: path}
        if isinstance(value, dict):
            return {
                key: walk(child, f"{path}/{key}" if path else str(key))
                for key, child in value.items()
            }
        if isinstance(value, list | tuple):
            return [walk(child, f"{path}/{i}") for i, child in enumerate(value)]
        return value

    return walk(state, ""), tensors


def join(plain: Any, tensors: dict[str, Tensor]) -> Any:
    """Put the tensors back in the places that `split` left."""
    if isinstance(plain, dict):
        if plain.keys() == {_TENSOR}:
            return tensors[plain[_TENSOR]]
        return {key: join(child, tensors) for key, child in plain.items()}
    if isinstance(plain, list):
        return [join(child, tensors) for child in plain]
    return plain


def _share(items: list[Any], ranks: Ranks) -> list[Any]:
    return items[ranks.rank :: ranks.world_size]


def _told(ranks: Ranks, write_it: Any) -> None:
    """Let the leader write, and raise on every rank what it met."""

    def attempt() -> OSError | None:
        try:
            write_it()
        except OSError as error:
            return error
        return None

    error = ranks.from_leader(attempt)
    if error is not None:
        raise error


def _first_os_error(error: CheckpointException) -> Exception:
    """What a rank met while it wrote; a RuntimeError where that was no error of the system.

    torch's writer takes what is left of a write that the system cut short for an error of its own.
    """
    rank, (met, _) = sorted(error.failures.items())[0]
    cause: BaseException | None = met
    while cause is not None:
        if isinstance(cause, OSError):
            return cause
        if any(word in str(cause) for word in _CUT_SHORT):
            return OSError(errno.EIO, "the disk did not take all of it")
        cause = cause.__cause__ or cause.__context__
    return RuntimeError(f"rank {rank} could not write its share of a checkpoint: {met}")
