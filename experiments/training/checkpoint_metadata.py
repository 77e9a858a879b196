"""The table of tensors in a sharded checkpoint, read without running what it says.

torch writes `.metadata` as a pickle and reads it with `pickle.load`, which calls whatever a pickle
names. A checkpoint may come from somebody else, so it is read here with the classes alone that
torch's own files consist of, and what it says about files and sizes is checked before it is used.
"""

from __future__ import annotations

import math
import pathlib
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

FILE = ".metadata"
_ALLOWED: dict[tuple[str, str], Any] = {
    **{
        (metadata.__name__, name): getattr(metadata, name)
        for name in (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    },
    (filesystem.__name__, "_StorageInfo"): getattr(filesystem, "_StorageInfo"),  # noqa: B009
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): getattr(torch.serialization, "_get_layout"),  # noqa: B009
    # where the checkpoint was written; Python 3.13 moved the class
    ("pathlib", "PosixPath"): pathlib.PurePosixPath,
    ("pathlib._local", "PosixPath"): pathlib.PurePosixPath,
}


class MetadataReader(FileSystemReader):
    """torch's reader of a folder, with the table of tensors read by `read_metadata` below."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the table; see the function of that name."""
        table = read_metadata(Path(self.path))
        if table.storage_meta is None:
            table.storage_meta = metadata.StorageMeta()
        table.storage_meta.load_id = self.load_id
        return table


def read_metadata(folder: Path) -> Metadata:
    """Read the table of tensors of a checkpoint.

    Args:
        folder: the checkpoint.

    Raises:
        ValueError: it is no such table, names something to be run, files outside of the folder,
            or more numbers than the folder has bytes.
    """
    with open(folder / FILE, "rb") as file:
        try:
            table = _Unpickler(file).load()
        except Exception as error:  # a pickle can make its reader raise anything
            raise ValueError(f"{FILE}: {error}") from error
    if not isinstance(table, Metadata) or not isinstance(table.storage_data, dict):
        raise ValueError(f"{FILE} holds a {type(table).__name__}, no table of tensors")
    for place in table.storage_data.values():
        name = getattr(place, "relative_path", None)
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{FILE} names the file {name!r}, which is not in the folder")
    here = sum(path.stat().st_size for path in folder.iterdir())
    claimed = sum(map(_bytes, table.state_dict_metadata.values()))
    if claimed > here:
        raise ValueError(f"{FILE} speaks of {claimed} bytes of tensors, the folder has {here}")
    return table


def _bytes(entry: Any) -> int:
    """Of one tensor."""
    if not isinstance(entry, TensorStorageMetadata) or any(side < 0 for side in entry.size):
        raise ValueError(f"{FILE} holds {entry!r}, no tensor")
    return math.prod(entry.size) * entry.properties.dtype.itemsize


class _Unpickler(pickle.Unpickler):
    """Knows the classes of such a table, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """The class of this name, if it is one of them."""
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype | torch.memory_format | torch.layout):
            return found
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a table of tensors")
