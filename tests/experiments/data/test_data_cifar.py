"""CIFAR in every layout, and the real one."""

import functools
import hashlib
import http.server
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from omegaconf import OmegaConf

from experiments.data import ImageSet, build_data, cifar, parquet
from tests.experiments.data.cifar_copies import (
    CONFIGS,
    SIZES,
    build,
    error,
    pixels,
    rename,
    rows,
    same,
    write,
    write_both,
    write_torchvision,
)


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
