"""CIFAR with few images, in every layout."""

import functools
import hashlib
import io
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from omegaconf import OmegaConf
from PIL import Image

from experiments.data import build_data, cifar
from experiments.errors import UserError

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "dataset"
SIZES = {"train": 40, "test": 20}


def pixels(split: str) -> np.ndarray:
    """(n, 32, 32, 3) uint8, different in every image."""
    seed = {"train": 1, "test": 2}[split]
    shape = (SIZES[split], 32, 32, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encode(image: np.ndarray, kind: str = "WEBP") -> bytes:
    buffer = io.BytesIO()
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


@functools.cache
def encoded(split: str, kind: str) -> list[bytes]:
    return [encode(image, kind) for image in pixels(split)]


def rows(split: str, classes: int = 10, kind: str = "WEBP") -> list[dict]:
    return [
        {"image": {"bytes": content, "path": None}, "label": index % classes}
        for index, content in enumerate(encoded(split, kind))
    ]


def write(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(records), path, row_group_size=16)


def write_both(folder: Path, **options) -> None:
    for split in SIZES:
        write(folder / f"{split}.parquet", rows(split, **options))


def rename(records: list[dict], **names: str) -> list[dict]:
    return [{names.get(key, key): value for key, value in record.items()} for record in records]


def config(root: Path, name: str = "cifar10", **keys):
    cfg = OmegaConf.load(CONFIGS / f"{name}.yaml")
    overrides = {"root": str(root), "cache_dir": str(root.parent / "cache"), **keys}
    return OmegaConf.merge(cfg, OmegaConf.create(overrides))


def build(root: Path, name: str = "cifar10", **keys):
    return build_data(config(root, name, **keys), batch_size=8, seed=0, device="cpu")


def error(root: Path, name: str = "cifar10", **keys) -> str:
    with pytest.raises(UserError) as caught:
        build(root, name, **keys)
    message = str(caught.value)
    assert "\n" not in message
    return message


def first_batches(data) -> list[torch.Tensor]:
    batches = [next(data.train_batches(0)), next(data.test_batches())]
    return [tensor for batch in batches for tensor in batch]


def same(a, b) -> bool:
    pairs = zip(first_batches(a), first_batches(b), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def write_torchvision(root: Path, monkeypatch, name: str = "cifar10") -> Path:
    """Write torchvision's own files, and tell torchvision their MD5 sums."""
    folder = root / cifar.VERSIONS[name].folder
    folder.mkdir(parents=True)
    kind = getattr(torchvision.datasets, cifar.VERSIONS[name].torchvision_class)

    def dump(file: str, content: dict) -> list[str]:
        (folder / file).write_bytes(pickle.dumps(content))
        return [file, hashlib.md5((folder / file).read_bytes()).hexdigest()]

    label_key = "labels" if name == "cifar10" else "fine_labels"
    classes = cifar.VERSIONS[name].num_classes

    def batch(split: str, file: str, part: slice) -> list[str]:
        flat = pixels(split).transpose(0, 3, 1, 2).reshape(SIZES[split], -1)
        labels = [i % classes for i in range(SIZES[split])]
        return dump(file, {"data": flat[part], label_key: labels[part]})

    monkeypatch.setattr(
        kind, "train_list", [batch("train", f"b{i}", slice(8 * i, 8 * i + 8)) for i in range(5)]
    )
    monkeypatch.setattr(kind, "test_list", [batch("test", "t", slice(None))])
    key = kind.meta["key"]
    file, md5 = dump("meta", {key: [str(i) for i in range(classes)]})
    monkeypatch.setattr(kind, "meta", {"filename": file, "key": key, "md5": md5})
    return folder
