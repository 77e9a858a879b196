"""The prepared form: the same batches as the originals, resumable, and never half written."""

import fcntl
import multiprocessing
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.data import prepare
from experiments.data.imagenet import prepared
from experiments.errors import UserError
from tests.experiments.data.image_trees import all_batches, build, copy_tree, equal, raw, settings

FILES = {"train": 4, "test": 2}  # shards of 8 images


def run(tree: Path, target: Path, **options) -> prepare.Summary:
    keys = {key: options.pop(key) for key in ("max_unreadable", "resize") if key in options}
    options = {"form": "raw", "shard_size": 8, "workers": 1, **options}
    return prepare.prepare(settings(tree, **keys), target, **options)


def content(folder: Path) -> dict[str, bytes]:
    """Every file but the lock."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture
def tree(image_tree, tmp_path) -> Path:
    return copy_tree(image_tree, tmp_path / "tree")


@pytest.fixture(scope="session")
def prepared_raw(image_tree, tmp_path_factory) -> Path:
    """Not to be changed."""
    target = tmp_path_factory.mktemp("prepared") / "raw"
    summary = run(image_tree, target)
    assert (summary.made, summary.found, summary.unreadable) == (6, 0, [])
    return target


@pytest.mark.parametrize("workers", [0, 2])
def test_raw_pixels_give_the_batches_of_the_originals_bit_by_bit(image_tree, prepared_raw, workers):
    expected = all_batches(build(image_tree))
    assert equal(all_batches(build(prepared_raw, workers=workers)), expected)


def test_the_shorter_side_too(image_tree, tmp_path):
    run(image_tree, tmp_path / "raw", resize="shorter")
    keys = {"resize": "shorter", "augmentation": "inception"}
    assert equal(
        all_batches(build(tmp_path / "raw", **keys)), all_batches(build(image_tree, **keys))
    )


def apart(originals: Path, small: Path, **keys) -> tuple[float, float]:
    """Mean and 99th percentile of the difference of all test pixels, in levels of 255."""
    pair = (raw(folder, **keys).test_batches() for folder in (originals, small))
    images = [255 * torch.cat([batch.images for batch in batches]) for batches in pair]
    levels = (images[0] - images[1]).abs().flatten().numpy()
    return float(levels.mean()), float(np.percentile(levels, 99))


def test_jpegs_give_the_same_batches_within_their_tolerance(image_tree, tmp_path):
    run(image_tree, tmp_path / "jpeg", form="jpeg")
    originals, small = build(image_tree), build(tmp_path / "jpeg")
    for ours, theirs in zip(all_batches(originals), all_batches(small), strict=True):
        assert torch.equal(ours.labels, theirs.labels)
    # noise of 15 levels in every pixel and no smooth part: harder than any photograph
    mean, high = apart(image_tree, tmp_path / "jpeg")
    assert 0 < mean < 7 and high < 30


def test_photographs_survive_the_second_jpeg_within_the_stated_tolerance(real_images, tmp_path):
    """docs/data.md: 2.1 levels of 255 on average, 13 at the 99th percentile."""
    chosen = sorted(real_images.iterdir())[:24]
    for split in ("train", "val"):
        (tmp_path / "tree" / split).mkdir(parents=True)
        for folder in chosen:
            (tmp_path / "tree" / split / folder.name).symlink_to(folder)
    keys = {"num_classes": 24, "train_images": 24, "test_images": 24, "resized": 256, "crop": 224}
    target = tmp_path / "jpeg"
    prepare.prepare(settings(tmp_path / "tree", **keys), target, workers=1)
    mean, high = apart(tmp_path / "tree", target, **keys)
    assert 0 < mean < 3 and high < 15


def test_a_second_call_makes_nothing(image_tree, prepared_raw, tmp_path):
    shutil.copytree(prepared_raw, tmp_path / "copy")
    before = content(tmp_path / "copy")
    summary = run(image_tree, tmp_path / "copy", workers=3)
    assert (summary.made, summary.found) == (0, 6)
    assert content(tmp_path / "copy") == before


def test_a_killed_preparation_goes_on_to_the_same_files(image_tree, prepared_raw, tmp_path):
    target = tmp_path / "killed"
    fork = multiprocessing.get_context("fork")

    def slow() -> None:
        os.setsid()
        original = prepared.write_shard

        def write(*arguments, **keys):
            if arguments[2] == 2:
                # half a shard, as a process leaves it that is killed while it writes
                half = prepared.shard_path(target, "train", 2, "bin.tmp")
                half.write_bytes(b"half")
                time.sleep(60)
            return original(*arguments, **keys)

        prepared.write_shard = write
        run(image_tree, target)

    process = fork.Process(target=slow)
    process.start()
    half = prepared.shard_path(target, "train", 2, "bin.tmp")
    deadline = time.monotonic() + 60
    while not half.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(UserError, match=r"is unfinished, 2 of 6 shards: run make prepare-imagenet"):
        build(target)
    summary = run(image_tree, target)
    assert (summary.made, summary.found) == (4, 2)
    assert content(target) == content(prepared_raw)


def test_two_preparations_at_once_are_refused(image_tree, tmp_path):
    target = tmp_path / "busy"
    with prepare.locked(target):
        before = content(target)
        with pytest.raises(UserError, match=r"another preparation is writing .*busy"):
            run(image_tree, target)
        assert content(target) == before
    assert run(image_tree, target).made == 6


def test_the_lock_of_a_process_that_died_is_free(image_tree, tmp_path):
    target = tmp_path / "died"
    fork = multiprocessing.get_context("fork")

    def hold() -> None:
        with prepare.locked(target):
            os._exit(0)

    process = fork.Process(target=hold)
    process.start()
    process.join(30)
    with open(target / prepare.LOCK_FILE) as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(handle, fcntl.LOCK_UN)
    assert run(image_tree, target).made == 6


def test_no_space_is_one_line_and_the_rest_is_made_later(image_tree, prepared_raw, tmp_path):
    """The system itself refuses files above 20,000 bytes; a raw shard has 38,400."""
    target = tmp_path / "full"
    fork = multiprocessing.get_context("fork")
    said = fork.SimpleQueue()

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            run(image_tree, target)
        except UserError as error:
            said.put(str(error))

    process = fork.Process(target=limited)
    process.start()
    process.join(60)
    assert process.exitcode == 0 and not said.empty()
    message = said.get()
    assert "no space for" in message and "File too large" in message
    assert "run make prepare-imagenet again" in message and "\n" not in message
    assert not list(target.rglob("*.tmp")) and not list(target.rglob("*.bin"))
    assert run(image_tree, target).made == 6
    assert content(target) == content(prepared_raw)


def test_too_little_space_is_refused_before_the_first_image(image_tree, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"form raw needs about 0\.0 GB more: .* --form jpeg"):
        run(image_tree, tmp_path / "full")
    assert not list(tmp_path.rglob("*.bin"))


def test_damaged_images_are_listed_counted_and_keep_their_numbers(tree, tmp_path, caplog):
    lost = [next((tree / split / "n00000001").iterdir()) for split in ("train", "val")]
    for path in lost:
        path.write_bytes(path.read_bytes()[:400])
    summary = run(tree, tmp_path / "raw", workers=2)
    assert [(split, error.name) for split, error in summary.unreadable] == [
        ("test", str(lost[1])),
        ("train", str(lost[0])),
    ]
    lines = (tmp_path / "raw" / "unreadable.tsv").read_text().splitlines()
    assert [line.split("\t")[:2] for line in lines] == [
        ["test", str(lost[1])],
        ["train", str(lost[0])],
    ]
    assert all(str(path) in caplog.text for path in lost)
    from_tree, from_prepared = build(tree), build(tmp_path / "raw")
    assert equal(all_batches(from_tree), all_batches(from_prepared))
    assert from_prepared.unreadable == from_tree.unreadable
    assert set(from_tree.unreadable) == {str(path) for path in lost}


def test_too_many_damaged_images_end_the_preparation(tree, tmp_path):
    for path in (tree / "train" / "n00000001").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"dataset\.max_unreadable = 2; the last is .*is empty"):
        run(tree, tmp_path / "raw", max_unreadable=2)
    assert run(tree, tmp_path / "raw", max_unreadable=8).unreadable
    with pytest.raises(UserError, match="8 images cannot be read"):
        build(tmp_path / "raw", max_unreadable=2)


def test_a_preparation_of_something_else_is_not_overwritten(image_tree, tree, prepared_raw):
    before = content(prepared_raw)
    with pytest.raises(UserError, match=r"form = raw, this one has jpeg: name another folder"):
        run(image_tree, prepared_raw, form="jpeg")
    next((tree / "train" / "n00000000").iterdir()).rename(tree / "train" / "n00000000" / "new.JPEG")
    with pytest.raises(UserError, match="holds a preparation with source = "):
        run(tree, prepared_raw)
    assert content(prepared_raw) == before


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"resized": 48}, r"resized = 40, dataset\.resized = 48"),
        ({"resize": "shorter"}, r"resize = square, dataset\.resize = shorter"),
        ({"num_classes": 5}, r"num_classes = 4, dataset\.num_classes = 5"),
        ({"val_labels": "x"}, "has no effect"),
        ({"train_images": 31}, r"32 train images, dataset\.train_images = 31"),
    ],
)
def test_settings_that_are_not_the_preparations_are_refused(prepared_raw, keys, message):
    with pytest.raises(UserError, match=message):
        build(prepared_raw, **keys)


def test_shards_that_are_cut_off_or_missing_are_refused_before_the_first_step(
    image_tree, prepared_raw, tmp_path
):
    target = tmp_path / "cut"
    shutil.copytree(prepared_raw, target)
    shard = prepared.shard_path(target, "train", 1, "bin")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"train/00001\.bin.* is missing or incomplete"):
        build(target)
    assert run(image_tree, target).made == 1
    prepared.shard_path(target, "test", 0, "npz").unlink()
    with pytest.raises(UserError, match=r"test/00000\.bin"):
        build(target)
    assert run(image_tree, target).made == 1
    assert content(target) == content(prepared_raw)


def test_a_shard_that_is_cut_off_while_it_is_read_is_survived(prepared_raw, tmp_path):
    target = tmp_path / "cut"
    shutil.copytree(prepared_raw, target)
    data = build(target, batch_size=2)
    batches = data.train_batches(0)
    next(batches)
    os.truncate(prepared.shard_path(target, "train", 1, "bin"), 100)
    assert sum(len(batch.labels) for batch in batches) == 30
    assert data.unreadable
    assert all("the file was cut off" in reason for reason in data.unreadable.values())


def test_verify_finds_and_repairs_a_flipped_bit(image_tree, prepared_raw, tmp_path, caplog):
    target = tmp_path / "flipped"
    shutil.copytree(prepared_raw, target)
    shard = prepared.shard_path(target, "test", 1, "bin")
    damaged = bytearray(shard.read_bytes())
    damaged[100] ^= 1
    shard.write_bytes(damaged)
    assert run(image_tree, target).made == 0
    assert run(image_tree, target, verify=True).made == 1
    assert "shard test/00001 is damaged" in caplog.text
    assert content(target) == content(prepared_raw)


def test_an_unusable_plan_is_refused(prepared_raw, tmp_path):
    target = tmp_path / "plan"
    shutil.copytree(prepared_raw, target)
    plan = target / prepared.PLAN_FILE
    plan.write_text(plan.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match="has format 2, this version reads 1"):
        build(target)
    plan.write_text("{")
    with pytest.raises(UserError, match=r"plan\.json.* cannot be read"):
        build(target)


def test_the_command_prepares_and_says_what_it_did(image_tree, tmp_path, capsys):
    keys = ["num_classes=4", "train_images=32", "test_images=13", "resized=40", "crop=32"]
    overrides = [f"dataset.{key}" for key in keys]
    target = str(tmp_path / "made")
    assert prepare.main([str(image_tree), target, "--workers", "1", *overrides]) == 0
    assert "32 training and 13 test images, 0 unreadable" in capsys.readouterr().out
    assert prepare.main([str(image_tree), target, "--workers", "0", *overrides]) == 2
    assert "--workers = 0 must be 1 or more" in capsys.readouterr().err
    assert prepare.main([str(image_tree), target]) == 2
    error = capsys.readouterr().err
    assert "4 class folders, too few" in error and error.count("\n") == 1
