"""CIFAR in every layout, every way in which a copy can be broken, and the real one."""

import dataclasses
import functools
import hashlib
import http.server
import io
import json
import logging
import os
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from omegaconf import OmegaConf
from PIL import Image

from experiments.data import ImageSet, build_data, cifar, decoded_cache, parquet
from experiments.errors import UserError

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "dataset"
SIZES = {"train": 40, "test": 20}


@pytest.fixture
def tiny(monkeypatch) -> None:
    """CIFAR with 40 + 20 images of 10 classes, and CIFAR-100 with as many of 20 classes."""
    for name, classes in (("cifar10", 10), ("cifar100", 20)):
        version = dataclasses.replace(cifar.VERSIONS[name], sizes=SIZES, num_classes=classes)
        monkeypatch.setitem(cifar.VERSIONS, name, version)


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


# Layouts


def test_parquet_holds_the_pixels_that_were_written(tmp_path, tiny):
    write_both(tmp_path / "c")
    data = build(tmp_path / "c", mean=[0.0] * 3, std=[1.0] * 3)
    (batch,) = data.test_batches()
    shown = (batch.images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    labels = {image.tobytes(): label for image, label in zip(shown, batch.labels, strict=True)}
    assert labels == {image.tobytes(): i % 10 for i, image in enumerate(pixels("test"))}
    assert (data.train_size, data.test_size, data.num_classes) == (40, 20, 10)
    assert data.input_shape == (3, 32, 32)


@pytest.mark.parametrize("folder", ["data", "plain_text", "cifar10"])
def test_parquet_in_subfolders(tmp_path, tiny, folder):
    write_both(tmp_path / "plain")
    write_both(tmp_path / "nested" / folder)
    assert same(build(tmp_path / "plain"), build(tmp_path / "nested"))


def test_row_order_shards_encoding_and_column_names_do_not_matter(tmp_path, tiny):
    write_both(tmp_path / "plain")
    other = tmp_path / "other" / "plain_text"
    shuffled = rename(rows("train", kind="PNG"), image="img")[::-1]
    write(other / "train-00000-of-00002.parquet", shuffled[:17])
    write(other / "train-00001-of-00002.parquet", shuffled[17:])
    write(other / "test-00000-of-00001.parquet", rename(rows("test"), image="img"))
    assert same(build(tmp_path / "plain"), build(tmp_path / "other"))


def test_converted_branch_layout_and_bare_bytes(tmp_path, tiny):
    write_both(tmp_path / "plain")
    for split in SIZES:
        bare = [{"image": r["image"]["bytes"], "label": r["label"]} for r in rows(split)]
        write(tmp_path / "other" / split / "0000.parquet", bare)
    assert same(build(tmp_path / "plain"), build(tmp_path / "other"))


def test_cifar100_reads_fine_labels(tmp_path, tiny):
    for split in SIZES:
        records = [
            {"img": r["image"], "fine_label": r["label"], "coarse_label": 0}
            for r in rows(split, classes=20)
        ]
        write(tmp_path / "c" / f"{split}.parquet", records)
    data = build(tmp_path / "c", "cifar100")
    (batch,) = data.test_batches()
    assert data.num_classes == 20 and sorted(batch.labels.tolist()) == list(range(20))


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


def test_torchvisions_layout_gives_the_same_batches_as_parquet(tmp_path, tiny, monkeypatch):
    write_both(tmp_path / "parquet")
    folder = write_torchvision(tmp_path / "tv", monkeypatch)
    expected = build(tmp_path / "parquet")
    assert same(expected, build(tmp_path / "tv"))
    assert same(expected, build(folder)), "the root may be torchvision's folder itself"
    assert same(expected, build(tmp_path / "tv", download=True)), "complete: nothing to fetch"


def test_torchvisions_cifar100(tmp_path, tiny, monkeypatch):
    write_torchvision(tmp_path / "tv", monkeypatch, "cifar100")
    data = build(tmp_path / "tv", "cifar100")
    (batch,) = data.test_batches()
    assert data.num_classes == 20 and sorted(batch.labels.tolist()) == list(range(20))


@pytest.fixture
def server(tmp_path):
    """The address of a web server on this machine that serves `tmp_path`."""
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


def archived(source: Path, monkeypatch, server: str) -> Path:
    """Pack torchvision's folder as it is fetched, and tell torchvision where it lies."""
    kind = torchvision.datasets.CIFAR10
    archive = Path(shutil.make_archive(str(source), "gztar", source))
    monkeypatch.setattr(kind, "url", f"{server}/{archive.name}")
    monkeypatch.setattr(kind, "filename", archive.name)
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    return archive


def test_download_fetches_into_the_root(tmp_path, tiny, monkeypatch, server, capsys):
    write_torchvision(tmp_path / "source", monkeypatch)
    archived(tmp_path / "source", monkeypatch, server)
    data = build(tmp_path / "new" / "root", download=True)
    assert same(data, build(tmp_path / "source"))
    assert (tmp_path / "new" / "root" / "cifar-10-batches-py" / "b0").is_file()
    assert capsys.readouterr().out == ""


def test_download_completes_half_a_copy(tmp_path, tiny, monkeypatch, server):
    folder = write_torchvision(tmp_path / "source", monkeypatch)
    archived(tmp_path / "source", monkeypatch, server)
    whole = build(tmp_path / "source")
    (folder / "b3").unlink()
    assert same(build(tmp_path / "source", download=True), whole)


@pytest.mark.parametrize("damage", ["absent", "half"])
def test_download_that_fails_is_one_line(tmp_path, tiny, monkeypatch, server, damage):
    write_torchvision(tmp_path / "source", monkeypatch)
    archive = archived(tmp_path / "source", monkeypatch, server)
    if damage == "absent":
        archive.unlink()
    else:
        archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    message = error(tmp_path / "c", download=True)
    assert "could not be fetched into" in message and "dataset.root" in message


# Broken copies


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
        (np.zeros((32, 32), np.uint8), r"(32, 32)"),
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


# The cache


@pytest.fixture
def decodes(monkeypatch) -> list[int]:
    """One entry for every split that was decoded."""
    counted: list[int] = []
    original = parquet.read_images

    def read_images(files, count):
        counted.append(count)
        return original(files, count)

    monkeypatch.setattr(parquet, "read_images", read_images)
    return counted


def test_second_load_comes_from_the_cache(tmp_path, tiny, decodes):
    write_both(tmp_path / "c")
    first = build(tmp_path / "c")
    assert decodes == [40, 20]
    assert same(first, build(tmp_path / "c"))
    assert decodes == [40, 20]
    names = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert len(names) == 2 and names[0].startswith("cifar10-test-"), "and no temporary file"


def test_changed_source_is_decoded_again(tmp_path, tiny, decodes):
    write_both(tmp_path / "c")
    build(tmp_path / "c")
    status = (tmp_path / "c" / "test.parquet").stat()
    os.utime(tmp_path / "c" / "test.parquet", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    build(tmp_path / "c")
    assert decodes == [40, 20, 20]


@pytest.mark.parametrize("damage", ["half", "flipped", "empty", "other"])
def test_broken_cache_file_is_a_warning_and_is_replaced(tmp_path, tiny, decodes, caplog, damage):
    write_both(tmp_path / "c")
    first = build(tmp_path / "c")
    (path,) = (tmp_path / "cache").glob("cifar10-train-*")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    replacement = {"half": content[: len(content) // 2], "flipped": content, "empty": b""}
    path.write_bytes(replacement.get(damage, b"something else"))
    with caplog.at_level(logging.WARNING):
        assert same(first, build(tmp_path / "c"))
    assert "cannot be read" in caplog.text and decodes == [40, 20, 40]
    build(tmp_path / "c")
    assert decodes == [40, 20, 40]


def test_unwritable_cache_is_a_warning(tmp_path, tiny, caplog):
    write_both(tmp_path / "c")
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        build(tmp_path / "c", cache_dir=str(tmp_path / "file" / "cache"))
    assert "decoded images cannot be kept" in caplog.text


def test_disk_that_fills_up_leaves_no_half_file(tmp_path, tiny, caplog, monkeypatch):
    def full_disk(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    write_both(tmp_path / "c")
    with caplog.at_level(logging.WARNING):
        build(tmp_path / "c")
    assert "No space left" in caplog.text
    assert not list((tmp_path / "cache").iterdir())


def test_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert decoded_cache.folder(None) == Path("/x/mlbfgs")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert decoded_cache.folder(None) == Path.home() / ".cache" / "mlbfgs"
    assert decoded_cache.folder("~/y") == Path.home() / "y"


# Order


def test_canonical_order_is_that_of_the_pixels_and_keeps_labels():
    images = pixels("train").transpose(0, 3, 1, 2)
    labels = np.arange(40).astype(np.int64)
    # Two equal images with different labels: their order must not depend on the copy either.
    images[7] = images[21]
    a = cifar.canonical(ImageSet(images, labels))
    b = cifar.canonical(ImageSet(images[::-1], labels[::-1]))
    assert np.array_equal(a.images, b.images) and np.array_equal(a.labels, b.labels)
    assert sorted(a.labels) == list(range(40))
    assert all(
        np.array_equal(images[label], image)
        for image, label in zip(a.images, a.labels, strict=True)
    )


# The real one


@pytest.mark.parametrize("split", ["test", pytest.param("train", marks=pytest.mark.slow)])
def test_real_pixels_have_the_documented_checksums(real_data, split):
    folder = real_data / "cifar10"
    if not (folder / "info.json").is_file():
        pytest.skip(f"no checksums in {folder}/info.json")
    expected = json.loads((folder / "info.json").read_text())[split]
    files = parquet.find_splits(folder, "cifar10")[split]
    labels = parquet.read_labels(files, ("label",))
    images = parquet.read_images(files, len(labels))
    assert len(labels) == expected["rows"]
    assert hashlib.sha256(labels.tobytes()).hexdigest() == expected["labels_sha256"]
    in_order = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    assert hashlib.sha256(in_order.tobytes()).hexdigest() == expected["pixels_sha256"]


@pytest.mark.slow
def test_real_cifar10_is_complete_and_normalised(real_data):
    cfg = OmegaConf.load(CONFIGS / "cifar10.yaml")
    cfg.root = str(real_data / "cifar10")
    data = build_data(cfg, batch_size=256, seed=0, device="cpu")
    assert (data.train_size, data.test_size, data.batches_per_epoch) == (50_000, 10_000, 195)
    labels = torch.cat([batch.labels for batch in data.test_batches()])
    assert torch.bincount(labels).tolist() == [1000] * 10
    cfg.crop_padding = 0
    plain = build_data(cfg, batch_size=10_000, seed=0, device="cpu")
    images = torch.cat([batch.images for batch in plain.train_batches(0)])
    # The constants in the config have four digits.
    assert images.mean((0, 2, 3)).abs().max() < 1e-3
    assert (images.std((0, 2, 3)) - 1).abs().max() < 1e-3
