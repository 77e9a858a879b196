"""Checkpoints of somebody else: none of what they say is run."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

from experiments.errors import UserError
from experiments.runs.atomic import file_digest
from experiments.training import sharded_checkpoint
from experiments.training.checkpoint import CheckpointStore
from experiments.training.ranks import ALONE

STATE = {"a": torch.arange(6.0).reshape(2, 3), "b": {"c": torch.ones(2, dtype=torch.bfloat16)}}


class Call:
    """Unpickles by making a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def sealed(folder: Path) -> Path:
    """Give a changed checkpoint the manifest and the name that fit it, as its author would."""
    files = {p.name: file_digest(p) for p in folder.iterdir() if p.name != "manifest.json"}
    text = json.dumps({"files": files})
    (folder / "manifest.json").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return folder.rename(folder.with_name(f"step00000003-{digest}"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints" / "step00000003.new"
    path.parent.mkdir()
    sharded_checkpoint.write(path, STATE, ALONE, header={"key": "k", "step": 3})
    return path


def load(folder: Path) -> dict[str, Any] | None:
    return CheckpointStore(folder.parent, key="k", keep=2).load_newest(lambda: {})


def test_an_honest_checkpoint_is_read(folder: Path) -> None:
    state = load(sealed(folder))
    assert state is not None
    assert torch.equal(state["a"], STATE["a"])


def hostile(metadata: Any, tmp_path: Path, kind: str) -> Any:
    marker = tmp_path / "executed"
    if kind == "call":
        return Call(marker)
    if kind == "call in the table":
        metadata.planner_data = Call(marker)
    elif kind == "another file":
        for place in metadata.storage_data.values():
            place.relative_path = "../../outside.distcp"
    elif kind == "huge":
        metadata.state_dict_metadata["a"].size = torch.Size([10**7, 10**7])
    elif kind == "no table":
        return [1, 2]
    return metadata


@pytest.mark.parametrize(
    "kind", ["call", "call in the table", "another file", "huge", "no table", "no pickle"]
)
def test_a_hostile_table_of_tensors_is_refused(folder: Path, tmp_path: Path, kind: str) -> None:
    table = hostile(FileSystemReader(folder).read_metadata(), tmp_path, kind)
    content = b"no pickle" if kind == "no pickle" else pickle.dumps(table)
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match="is no checkpoint of a run"):
        load(sealed(folder))
    assert not (tmp_path / "executed").exists()


def test_a_table_that_no_digest_covers_is_not_read(folder: Path, tmp_path: Path) -> None:
    path = sealed(folder)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"][".metadata"]
    text = json.dumps(manifest)
    (path / "manifest.json").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = path.rename(path.with_name(f"step00000003-{digest}"))
    (path / ".metadata").write_bytes(pickle.dumps(Call(tmp_path / "executed")))
    assert load(path) is None
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [{"state": {}}, {"key": "k"}, [1], "text", "call"])
def test_a_file_that_is_no_checkpoint_is_one_line(tmp_path: Path, content: Any) -> None:
    store = CheckpointStore(tmp_path, key="k", keep=2)
    path = tmp_path / "x"
    torch.save(Call(tmp_path / "executed") if content == "call" else content, path)
    path.rename(tmp_path / f"step00000001-{file_digest(path)[:16]}.pt")
    with pytest.raises(UserError, match="is no checkpoint of a run"):
        store.load_newest()
    assert not (tmp_path / "executed").exists()
