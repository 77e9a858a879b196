"""The decoded pixels, kept between runs."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest

from experiments.data import decoded_cache, parquet
from tests.experiments.data.cifar_copies import (
    build,
    same,
    write_both,
)


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
