"""Every way in which a copy of CIFAR can be broken is told in one line."""

import numpy as np
import pytest

from experiments.data import build_data, parquet
from experiments.errors import UserError
from tests.experiments.data.cifar_copies import (
    SIZES,
    config,
    encode,
    error,
    rename,
    rows,
    write,
    write_both,
    write_torchvision,
)


def test_missing_root_says_what_is_expected_and_how_to_get_it(tmp_path):
    message = error(tmp_path / "nowhere")
    for part in (
        "does not exist",
        str(tmp_path / "nowhere"),
        "train.parquet and test.parquet",
        "cifar-10-batches-py",
        "MLBFGS_DATA",
        "dataset.download=true",
    ):
        assert part in message


def test_empty_root_says_so(tmp_path):
    (tmp_path / "c").mkdir()
    assert "has no such files" in error(tmp_path / "c")


def test_one_split_only(tmp_path, tiny):
    write(tmp_path / "c" / "train.parquet", rows("train"))
    assert "has no test.parquet" in error(tmp_path / "c")


def test_missing_shard_is_named(tmp_path, tiny):
    write(tmp_path / "c" / "train-00000-of-00003.parquet", rows("train")[:20])
    write(tmp_path / "c" / "train-00002-of-00003.parquet", rows("train")[20:])
    write(tmp_path / "c" / "test.parquet", rows("test"))
    assert "2 of 3 shards" in (message := error(tmp_path / "c"))
    assert "number 00001 is missing" in message


def test_half_a_file(tmp_path, tiny):
    write_both(tmp_path / "c")
    path = tmp_path / "c" / "train.parquet"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    message = error(tmp_path / "c")
    assert "train.parquet" in message and "is not a complete parquet file" in message


def test_empty_file(tmp_path, tiny):
    write_both(tmp_path / "c")
    (tmp_path / "c" / "test.parquet").write_bytes(b"")
    message = error(tmp_path / "c")
    assert "test.parquet' (0 bytes) is not a complete parquet file" in message


def test_damage_inside_a_file(tmp_path, tiny):
    write_both(tmp_path / "c")
    path = tmp_path / "c" / "train.parquet"
    content = bytearray(path.read_bytes())
    # The page header at the start of the first column; the footer stays whole.
    content[4:64] = b"\xff" * 60
    path.write_bytes(content)
    message = error(tmp_path / "c")
    assert "train.parquet" in message and "cannot be read" in message


def test_too_few_rows(tmp_path, tiny):
    write(tmp_path / "c" / "train.parquet", rows("train")[:30])
    write(tmp_path / "c" / "test.parquet", rows("test"))
    assert "has 30 train images, cifar10 has 40" in error(tmp_path / "c")


@pytest.mark.parametrize("row", [0, 17, 39])
@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[: len(b) // 2],
        lambda b: b[:4],
        lambda b: b"",
        lambda b: b"\0" * len(b),
        lambda b: None,
    ],
    ids=["half", "start", "empty", "zeros", "null"],
)
def test_corrupt_record_is_named_by_its_row(tmp_path, tiny, row, damage):
    records = rows("train")
    records[row]["image"]["bytes"] = damage(records[row]["image"]["bytes"])
    write(tmp_path / "c" / "train.parquet", records)
    write(tmp_path / "c" / "test.parquet", rows("test"))
    message = error(tmp_path / "c")
    assert f"row {row} of " in message and "train.parquet" in message


def test_corrupt_png_is_named_too(tmp_path, tiny):
    records = rows("test", kind="PNG")
    png = records[3]["image"]["bytes"]
    records[3]["image"]["bytes"] = png[:100] + b"\0" * (len(png) - 100)
    write(tmp_path / "c" / "train.parquet", rows("train"))
    write(tmp_path / "c" / "test.parquet", records)
    assert "row 3 of " in error(tmp_path / "c")


def test_corrupt_record_in_a_late_chunk_counts_rows_of_its_file(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(parquet, "ROWS_PER_CHUNK", 7)
    records = rows("train")
    records[37]["image"]["bytes"] = b"no image"
    write(tmp_path / "c" / "train-00000-of-00002.parquet", records[:20])
    write(tmp_path / "c" / "train-00001-of-00002.parquet", records[20:])
    write(tmp_path / "c" / "test.parquet", rows("test"))
    message = error(tmp_path / "c")
    assert "row 17 of " in message and "train-00001-of-00002.parquet" in message


@pytest.mark.parametrize(
    ("image", "shape"),
    [
        (np.zeros((33, 32, 3), np.uint8), r"(33, 32, 3)"),
        (np.zeros((32, 32), np.uint8), r"(32, 32, 1)"),
        (np.zeros((32, 32, 4), np.uint8), r"(32, 32, 4)"),
    ],
)
def test_other_image_shape_is_named(tmp_path, tiny, image, shape):
    records = rows("train")
    records[5]["image"]["bytes"] = encode(image, "PNG")
    write(tmp_path / "c" / "train.parquet", records)
    write(tmp_path / "c" / "test.parquet", rows("test"))
    message = error(tmp_path / "c")
    assert "row 5 of " in message and f"an image of shape {shape}" in message


def test_cifar100_config_on_cifar10_data(tmp_path, tiny):
    write_both(tmp_path / "c")
    message = error(tmp_path / "c", "cifar100")
    assert "has 10 classes (0 to 9)" in message and "cifar100 has 20" in message


def test_cifar10_config_on_more_classes(tmp_path, tiny):
    write_both(tmp_path / "c", classes=20)
    message = error(tmp_path / "c")
    assert "has 20 classes (0 to 19)" in message and "cifar10 has 10" in message


def test_cifar10_config_on_cifar100_columns(tmp_path, tiny):
    for split in SIZES:
        records = rename(rows(split, classes=20), label="fine_label")
        write(tmp_path / "c" / f"{split}.parquet", records)
    message = error(tmp_path / "c")
    assert "has no column 'label'; its columns: image, fine_label" in message


@pytest.mark.parametrize(
    ("column", "message"),
    [("image", "has no column 'image' or 'img'"), ("label", "has no column 'label'")],
)
def test_missing_column(tmp_path, tiny, column, message):
    write(tmp_path / "c" / "train.parquet", rename(rows("train"), **{column: "other"}))
    write(tmp_path / "c" / "test.parquet", rows("test"))
    assert message in error(tmp_path / "c")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (10, "(0 to 10)"),
        (-1, "(-1 to 9)"),
        (None, "row 7 of "),
        (3, "has 5 train images of class 3, cifar10 has 4"),
    ],
)
def test_bad_label(tmp_path, tiny, label, message):
    records = rows("train")
    records[7]["label"] = label
    write(tmp_path / "c" / "train.parquet", records)
    write(tmp_path / "c" / "test.parquet", rows("test"))
    assert message in error(tmp_path / "c")


def test_labels_that_are_words(tmp_path, tiny):
    records = [record | {"label": "cat"} for record in rows("train")]
    write(tmp_path / "c" / "train.parquet", records)
    write(tmp_path / "c" / "test.parquet", rows("test"))
    assert "holds string, not integers" in error(tmp_path / "c")


def test_image_column_without_bytes(tmp_path, tiny):
    records = [record | {"image": {"path": "x.png"}} for record in rows("train")]
    write(tmp_path / "c" / "train.parquet", records)
    write(tmp_path / "c" / "test.parquet", rows("test"))
    assert "without 'bytes'" in error(tmp_path / "c")


def test_image_column_of_another_type(tmp_path, tiny):
    records = [record | {"image": 3} for record in rows("train")]
    write(tmp_path / "c" / "train.parquet", records)
    write(tmp_path / "c" / "test.parquet", rows("test"))
    assert "holds int64, not encoded images" in error(tmp_path / "c")


@pytest.mark.parametrize("damage", ["absent", "changed"])
@pytest.mark.parametrize("file", ["b3", "t", "meta"])
def test_torchvision_folder_with_a_bad_file(tmp_path, tiny, monkeypatch, file, damage):
    folder = write_torchvision(tmp_path / "tv", monkeypatch)
    if damage == "absent":
        (folder / file).unlink()
    else:
        (folder / file).write_bytes((folder / file).read_bytes()[:-1])
    message = error(tmp_path / "tv")
    assert "is not a complete copy of cifar10" in message and "dataset.download=true" in message


def test_batch_larger_than_the_training_set(tmp_path, tiny):
    write_both(tmp_path / "c")
    with pytest.raises(UserError, match=r"batch size 41 is larger .* \(40 images"):
        build_data(config(tmp_path / "c"), batch_size=41, seed=0, device="cpu")
