"""Parquet files and images, changed byte by byte or of columns that nobody expects."""

from __future__ import annotations

import dataclasses
import functools
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from PIL import Image

from experiments.composition import compose_config
from experiments.data import build_data, cifar
from experiments.data.encoded import DecodeError
from experiments.data.imagenet import ImageNetSettings, find
from experiments.data.imagenet.pixels import resized_pixels
from experiments.data.imagenet.source import UnreadableError
from experiments.data.settings import read_dataset
from experiments.entry import entry
from tests.fuzzing.mutations import BYTE_CHANGES, VALUES, changed_bytes

COUNT = 20
KINDS = (
    "JPEG",
    "progressive",
    "CMYK",
    "PNG",
    "palette",
    "deep",
    "WEBP",
    "TIFF",
    "BMP",
    "GIF",
    "PPM",
)
IMAGES = st.tuples(
    st.sampled_from(KINDS), BYTE_CHANGES, st.sampled_from(("square", "shorter")), st.booleans()
)
_TYPES = (
    pa.int8(), pa.int64(), pa.uint64(), pa.float64(), pa.bool_(), pa.string(), pa.large_string(),
    pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(4), pa.null(), pa.date32(),
    pa.timestamp("ns", "UTC"), pa.decimal128(9, 2), pa.list_(pa.int8()),
    pa.dictionary(pa.int8(), pa.int64()),
    pa.struct({"bytes": pa.large_binary(), "path": pa.int8()}),
    pa.struct({"bytes": pa.string()}), pa.struct({"path": pa.string()}), pa.struct({}),
    pa.map_(pa.string(), pa.binary()),
)  # fmt: skip
_COLUMNS = st.dictionaries(
    st.sampled_from(("image", "img", "label", "labels", "fine_label", "image.bytes", "x")),
    st.tuples(st.sampled_from(_TYPES), st.lists(VALUES, max_size=3)),
    max_size=4,
)
PARQUET = st.tuples(st.sampled_from(("cifar10", "imagenet")), st.one_of(BYTE_CHANGES, _COLUMNS))


@functools.cache
def _encoded(kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    image, options = Image.fromarray(pixels), {}
    if kind == "CMYK":
        image, kind = image.convert("CMYK"), "JPEG"
    elif kind == "progressive":
        kind, options = "JPEG", {"progressive": True}
    elif kind == "palette":
        image, kind = image.convert("P"), "PNG"
    elif kind == "deep":
        image, kind = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 256), "PNG"
    elif kind == "TIFF":
        options = {"compression": "tiff_lzw"}
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def read_image(_scratch: Path, example: Any) -> str:
    """Decode and resize an image."""
    kind, changes, resize, behind_header = example
    content = _encoded(kind)
    cut = 24 if behind_header else 0
    try:
        pixels = resized_pixels(content[:cut] + changed_bytes(content[cut:], changes), resize, 64)
    except DecodeError:
        return "unreadable"
    assert pixels.dtype == np.uint8 and pixels.shape[2] == 3
    return "read"


@functools.cache
def _parquet() -> bytes:
    records = [
        {"image": {"bytes": _encoded("PNG"), "path": f"n{i}.png"}, "label": i % 10}
        for i in range(COUNT)
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), buffer, row_group_size=8)
    return buffer.getvalue()


def _table(columns: dict[str, tuple[pa.DataType, list[Any]]]) -> bytes:
    """A file with columns of these types; of the values those that they can hold."""
    rows = max((len(values) for _, values in columns.values()), default=0)
    arrays = []
    for kind, values in columns.values():
        try:
            arrays.append(pa.array(values + [None] * (rows - len(values)), kind))
        except (pa.ArrowException, ValueError, TypeError, OverflowError, AttributeError):
            arrays.append(pa.nulls(rows, kind))
    buffer = io.BytesIO()
    try:
        pq.write_table(pa.table(arrays, names=list(columns)), buffer)
    except pa.ArrowException:  # a type that parquet does not have
        return b""
    return buffer.getvalue()


def read_parquet(scratch: Path, example: Any) -> int:
    """Read a data set whose training images are in a generated file."""
    name, how = example
    root = scratch / "results" / "data"
    shutil.rmtree(root, ignore_errors=True)
    shutil.rmtree(scratch / "results" / "cache", ignore_errors=True)
    root.mkdir()
    content = _table(how) if isinstance(how, dict) else changed_bytes(_parquet(), how)
    (root / "train.parquet").write_bytes(content)
    (root / ("test.parquet" if name == "cifar10" else "validation.parquet")).write_bytes(_parquet())
    return entry(lambda _: _read_all(name, root))()


@functools.cache
def _composed(name: str) -> Any:
    return compose_config([f"dataset={name}"])


def _node(name: str) -> Any:
    return _composed(name).copy().dataset


def _read_all(name: str, root: Path) -> int:
    if name == "cifar10":
        version = cifar.VERSIONS[name]
        small = dataclasses.replace(version, sizes={"train": COUNT, "test": COUNT})
        cifar.VERSIONS[name] = small
        try:
            node = _node("cifar10")
            node.root = str(root)
            build_data(node, batch_size=4, seed=0, device="cpu")
        finally:
            cifar.VERSIONS[name] = version
        return 0
    node = _node("imagenet")
    node.merge_with(
        {"root": str(root), "num_classes": 10, "train_images": None, "test_images": None}
    )
    split = find.find_splits(read_dataset(ImageNetSettings, node))["train"]
    for index in range(len(split.labels)):
        try:
            split.pixels(index)
        except UnreadableError:
            continue
    return 0
