"""Data from anywhere: what claims to be huge, hidden, linked, nested or of another kind."""

import io
import logging
import os
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import EpsImagePlugin, Image

from experiments.composition import compose_config
from experiments.data import prepare
from experiments.data.decoded_cache import load_or_make
from experiments.data.imagenet import find, prepared
from experiments.data.imagenet.pixels import decode, resized_pixels
from experiments.errors import UserError
from tests.experiments.data.cifar_copies import build as build_cifar
from tests.experiments.data.cifar_copies import encode, error, rows, same, write, write_both
from tests.experiments.data.image_trees import build, copy_tree, settings


def png_header(side: int) -> bytes:
    """A PNG that claims side x side pixels and has none of them."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


def jpeg_header(height: int, width: int, **options) -> bytes:
    """A JPEG of 8 x 8 pixels that claims others."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(buffer, "JPEG", **options)
    content = buffer.getvalue()
    for marker in (b"\xff\xc0", b"\xff\xc2"):
        place = content.find(marker)
        if place >= 0:
            size = struct.pack(">HH", height, width)
            content = content[: place + 5] + size + content[place + 9 :]
    return content


def many_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan is there so many times more."""
    content = jpeg_header(9000, 9000, progressive=True)
    last = content.rfind(b"\xff\xda")
    scan = content[last:-2]
    return content[:-2] + scan * count + content[-2:]


def dds_header() -> bytes:
    """A texture file whose pixel format nobody knows."""
    return b"DDS " + struct.pack("<31I", 124, 0x1007, 4, 4, 0, 0, 0, *[0] * 11, 32, 0, *[0] * 11)


@pytest.mark.parametrize(
    "content",
    [
        png_header(100_000),
        png_header(0),
        jpeg_header(65_500, 65_500),
        dds_header(),
        b"II*\x00\x08\x00\x00\x00",  # a TIFF without a directory
        b"P6 99999 99999 255\n",
        b"GIF89a\xff\xff\xff\xff\x00\x00\x00,",
        b"BM" + b"\xff" * 60,
        b"RIFF\xff\xff\xff\x7fWEBPVP8X" + b"\xff" * 30,
        b"8BPS" + b"\x00" * 50,
        b"\x00\x00\x01\x00" + b"\xff" * 60,
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        many_scans(2000),
    ],
    ids=lambda content: content[:4].hex(),
)
def test_what_an_image_claims_is_checked_before_it_is_decoded(content):
    start = time.perf_counter()
    with pytest.raises(decode_error()):
        decode(content)
    assert time.perf_counter() - start < 2


def decode_error() -> type[Exception]:
    from experiments.data.imagenet.source import DecodeError

    return DecodeError


def test_no_program_is_started_for_an_image(monkeypatch):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: started.append(a))
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n"
    with pytest.raises(decode_error()):
        decode(content)
    assert not started


def test_a_strip_is_not_resized_to_billions_of_pixels():
    strip = encode(np.zeros((1, 60_000, 3), np.uint8), "PNG")
    with pytest.raises(decode_error(), match="256 x 15360000"):
        resized_pixels(strip, "shorter", 256)
    assert resized_pixels(strip, "square", 256).shape == (256, 256, 3)


@pytest.mark.parametrize(
    "content", [png_header(100_000), dds_header(), jpeg_header(65_500, 65_500)]
)
def test_cifar_names_the_row_of_a_huge_or_odd_image(tmp_path, tiny, content):
    write_both(tmp_path / "c")
    records = rows("train")
    records[7]["image"]["bytes"] = content
    write(tmp_path / "c" / "train.parquet", records)
    message = error(tmp_path / "c")
    assert "row 7 of " in message and "train.parquet" in message


@pytest.mark.parametrize("kind", [pa.large_binary(), pa.binary_view()], ids=str)
def test_bytes_are_read_in_every_way_of_writing_them(tmp_path, tiny, kind):
    write_both(tmp_path / "a")
    write_both(tmp_path / "b")
    records = rows("train")
    image = pa.StructArray.from_arrays(
        [
            pa.array([record["image"]["bytes"] for record in records], kind),
            pa.array([None] * len(records), pa.large_string()),
        ],
        ["bytes", "path"],
    )
    label = pa.array([record["label"] for record in records], pa.uint8())
    table = pa.Table.from_arrays([image, label], ["image", "label"])
    pq.write_table(table, tmp_path / "b" / "train.parquet")
    assert same(build_cifar(tmp_path / "a"), build_cifar(tmp_path / "b"))


def test_files_that_a_mac_leaves_beside_others_are_passed_over(tmp_path, tiny):
    write_both(tmp_path / "c" / "x")
    for split in ("train", "test"):
        (tmp_path / "c" / split).mkdir()
        os.rename(tmp_path / "c/x" / f"{split}.parquet", tmp_path / "c" / split / "0000.parquet")
        (tmp_path / "c" / split / "._0000.parquet").write_bytes(b"\x00\x05\x16\x07")
    assert build_cifar(tmp_path / "c").train_size == 40


def test_home_of_nobody_is_one_line(monkeypatch):
    monkeypatch.setenv("MLBFGS_DATA", "~nosuchuser")
    from experiments.data import build_data

    for name in ("cifar10", "imagenet"):
        with pytest.raises(UserError, match=r"~nosuchuser.*does not exist"):
            build_data(
                compose_config([f"dataset={name}"]).dataset, batch_size=4, seed=0, device="cpu"
            )


@pytest.fixture
def tree(image_tree, tmp_path) -> Path:
    return copy_tree(image_tree, tmp_path / "tree")


def images_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.JPEG"))


def flat(tree: Path) -> list[str]:
    """Turn the validation images into a flat folder; their names."""
    for path in sorted((tree / "val").glob("*/*")):
        os.rename(path, tree / "val" / path.name)
    for folder in [path for path in (tree / "val").iterdir() if path.is_dir()]:
        folder.rmdir()
    return sorted(path.name for path in (tree / "val").iterdir())


def labels_of(tree: Path, text: str) -> list[int]:
    (tree / "val.txt").write_bytes(text.encode("utf-8-sig"))
    return list(find.find_splits(settings(tree))["test"].labels)


def test_a_label_file_begins_with_a_byte_order_mark(tree):
    names = flat(tree)
    text = "".join(f"{name} {number % 4}\n" for number, name in enumerate(names))
    assert labels_of(tree, text) == [number % 4 for number in range(len(names))]


def test_two_files_of_one_stem_are_told_apart_or_refused(tree):
    names = flat(tree)
    first = tree / "val" / names[0]
    os.rename(tree / "val" / names[1], first.with_suffix(".png"))
    names = sorted(path.name for path in (tree / "val").iterdir())
    exact = "".join(f"{name} {number % 4}\n" for number, name in enumerate(names))
    assert labels_of(tree, exact) == [number % 4 for number in range(len(names))]
    renamed = exact.replace(".JPEG ", ".jpg ").replace(".png ", ".gif ")
    with pytest.raises(UserError, match="several files like"):
        labels_of(tree, renamed)
    with pytest.raises(UserError, match=rf"gives {names[0]} another class"):
        labels_of(tree, exact + f"{names[0]} 3\n")


@pytest.mark.parametrize("word", ["²", "9" * 5000, "-1", "1.0", "٣"])
def test_words_that_are_no_class_are_named(tree, word):
    names = flat(tree)
    with pytest.raises(UserError, match="line 1 of"):
        labels_of(tree, "".join(f"{name} {word}\n" for name in names))


def test_links_that_lead_nowhere_are_unreadable_images(tree):
    folder = sorted((tree / "train").iterdir())[0]
    dangling, loop = images_of(folder)[:2]
    for path, target in ((dangling, "/nowhere"), (loop, loop)):
        path.unlink()
        path.symlink_to(target)
    data = build(tree)
    seen = sum(len(batch.labels) for batch in data.train_batches(0))
    assert seen == 32  # others take their places, as of any damaged image
    assert sorted(Path(lost.name).name for lost in lost_of(tree)) == sorted(
        [dangling.name, loop.name]
    )


def lost_of(tree: Path) -> list[prepared.UnreadableError]:
    target = tree.parent / "prepared"
    summary = prepare.prepare(settings(tree), target, form="raw", workers=1)
    return [error for _, error in summary.unreadable]


def test_images_that_are_left_out_are_counted(tree, caplog):
    folder = sorted((tree / "train").iterdir())[0]
    content = images_of(folder)[0].read_bytes()
    (folder / "more").mkdir()
    for number in range(3):
        (folder / "more" / f"x{number}.JPEG").write_bytes(content)
    (tree / "train" / "loose.JPEG").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert len(find.find_splits(settings(tree))["train"].labels) == 32
    assert "3 images lie one folder deeper" in caplog.text
    assert "1 images lie in" in caplog.text and "loose.JPEG" in caplog.text


def test_a_damaged_image_whose_name_is_no_text_is_listed(tree):
    folder = sorted((tree / "train").iterdir())[0]
    odd = os.fsencode(folder) + b"/caf\xe9\t\nx.JPEG"
    os.rename(os.fsencode(images_of(folder)[0]), odd)
    with open(odd, "wb") as file:
        file.write(b"damaged")
    assert len(lost_of(tree)) == 1
    table = (tree.parent / "prepared" / "unreadable.tsv").read_text(encoding="utf-8")
    (line,) = table.splitlines()
    assert line.count("\t") == 2 and r"caf\udce9" in line


def test_an_index_that_speaks_of_more_than_there_is_is_no_shard(tree):
    target = tree.parent / "prepared"
    prepare.prepare(settings(tree), target, form="raw", workers=1)
    index = target / "train" / "00000.npz"
    with np.load(index) as arrays:
        values = dict(arrays)
    assert prepared.read_shard(target, "train", 0) is not None
    for starts in (values["starts"] * 0 + 10**15, values["starts"][::-1], values["starts"] - 5):
        changed = {**values, "starts": starts}
        changed["starts"][-1] = values["starts"][-1]
        np.savez(index, **changed)
        assert prepared.read_shard(target, "train", 0) is None
    np.savez_compressed(index, **values, more=np.zeros(10**8, np.uint8))
    assert prepared.read_shard(target, "train", 0) is None


def test_a_plan_without_end_is_refused(tree):
    target = tree.parent / "prepared"
    prepare.prepare(settings(tree), target, form="raw", workers=1)
    plan = target / prepared.PLAN_FILE
    text = plan.read_text()
    for before, after in (
        ('"shard_size": 8192', '"shard_size": 0'),
        ('"train": 32', '"train": 2000000000000'),
        ('"train": 32', '"train": null'),
        ('"form": "raw"', '"form": ["raw"]'),
    ):
        assert before in text
        plan.write_text(text.replace(before, after))
        with pytest.raises(UserError, match="cannot be read"):
            find.find_splits(settings(target))


def test_a_cache_that_would_unpack_to_more_than_it_is_is_made_again(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"x")
    made = []

    def make():
        made.append(1)
        from experiments.data.batches import ImageSet

        return ImageSet(np.zeros((2, 3, 4, 4), np.uint8), np.arange(2))

    load_or_make(tmp_path / "cache", "c", [source], make)
    (file,) = (tmp_path / "cache").iterdir()
    zeros = np.zeros((10**6, 3, 4, 4), np.uint8)
    np.savez_compressed(file, images=zeros, labels=np.zeros(10**6, np.int64))
    assert len(load_or_make(tmp_path / "cache", "c", [source], make)) == 2 and len(made) == 2


def test_rows_that_a_file_cannot_hold_are_not_read(tmp_path, tiny):
    write_both(tmp_path / "c")
    nulls = pa.nulls(10**6, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    labels = pa.array(np.zeros(10**6, np.int64))
    table = pa.Table.from_arrays([nulls, labels], ["image", "label"])
    pq.write_table(table, tmp_path / "c" / "train.parquet")
    assert "claims 1000000 rows" in error(tmp_path / "c")
