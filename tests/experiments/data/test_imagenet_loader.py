"""Batches from disk: the same whoever loads them, and whole in spite of damaged images."""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

from experiments.data.augment import Normalise
from experiments.data.part import Part
from experiments.errors import UserError
from experiments.faults.processes import descendants, environment, kill, started, wait_for
from experiments.runs.directory import RunDirectory, read_status
from experiments.runs.outcome import freeze
from tests.experiments.data.image_trees import (
    CLASSES,
    all_batches,
    build,
    config,
    copy_tree,
    equal,
    raw,
)
from tests.experiments.run_configs import run_spec

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def tree(image_tree, tmp_path) -> Path:
    return copy_tree(image_tree, tmp_path / "tree")


def children() -> set[int]:
    """The worker processes of this one."""
    return {child.pid for child in multiprocessing.active_children()}


@pytest.mark.parametrize("augmentation", ["paper", "inception"])
@pytest.mark.parametrize("resize", ["square", "shorter"])
def test_the_number_of_workers_changes_no_bit(image_tree, augmentation, resize):
    keys = {"augmentation": augmentation, "resize": resize}
    alone = all_batches(build(image_tree, **keys))
    for workers in (1, 2):
        assert equal(all_batches(build(image_tree, workers=workers, **keys)), alone)


def test_start_gives_the_rest_of_the_same_epoch(image_tree):
    whole = list(build(image_tree).train_batches(2))
    data = build(image_tree, workers=2)
    assert data.batches_per_epoch == len(whole) == 4
    for start in range(5):
        assert equal(list(data.train_batches(2, start)), whole[start:])


def test_streams_may_interleave_and_be_abandoned(image_tree):
    alone = build(image_tree)
    data = build(image_tree, workers=2)
    first, second = data.train_batches(0), data.train_batches(1)
    together = [(next(first), next(second)) for _ in range(2)]
    drawn = list(data.random_batches(0, 12))
    del second
    rest = list(first)
    expected = list(alone.train_batches(0))
    assert equal([pair[0] for pair in together] + rest, expected)
    assert equal([pair[1] for pair in together], list(alone.train_batches(1))[:2])
    assert equal(drawn, list(alone.random_batches(0, 12)))
    assert equal(list(data.train_batches(1)), list(alone.train_batches(1)))


def test_an_epoch_shows_each_image_once_in_a_new_order(image_tree):
    data = raw(image_tree, drop_last=False, batch_size=5)
    labels = [torch.cat([b.labels for b in data.train_batches(epoch)]) for epoch in (0, 1)]
    assert len(labels[0]) == 32 and not torch.equal(*labels)
    assert torch.equal(labels[0].bincount(), torch.full((CLASSES,), 8))
    assert data.batches_per_epoch == 7
    other = torch.cat([b.labels for b in build(image_tree, seed=1).train_batches(0)])
    assert not torch.equal(other, labels[0])


def test_the_augmentation_differs_by_epoch_and_image(image_tree):
    data = raw(image_tree, batch_size=32)
    one, two = (next(data.train_batches(epoch)) for epoch in (0, 1))
    per_image = {image.numpy().tobytes() for batch in (one, two) for image in batch.images}
    assert len(per_image) == 64


def test_random_batches_are_drawn_without_replacement(image_tree):
    data = build(image_tree)
    drawn = list(data.random_batches(0, 32))
    assert [len(batch.labels) for batch in drawn] == [8] * 4
    assert torch.equal(torch.cat([b.labels for b in drawn]).bincount(), torch.full((CLASSES,), 8))
    assert not equal(drawn, list(data.random_batches(1, 32)))
    assert not equal(drawn, list(data.train_batches(0)))
    with pytest.raises(ValueError, match="1 to 32"):
        data.random_batches(0, 33)


@pytest.mark.parametrize(("epoch", "start"), [(-1, 0), (0, 5), (0, -1)])
def test_epochs_and_starts_out_of_range_are_refused(image_tree, epoch, start):
    with pytest.raises(ValueError, match=f"epoch = {epoch}, start = {start}"):
        build(image_tree).train_batches(epoch, start)


def test_batches_have_the_promised_types(image_tree):
    data = build(image_tree, workers=1)
    assert data.input_shape == (3, 32, 32)
    batch = next(data.train_batches(0))
    assert batch.images.shape == (8, 3, 32, 32) and batch.images.dtype == torch.float32
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.shape == (8,) and batch.labels.dtype == torch.int64


def test_limits_take_the_first_images_of_each_class_in_turn(image_tree):
    data = build(image_tree, train_limit=10, test_limit=6, batch_size=5)
    assert (data.train_size, data.test_size, data.batches_per_epoch) == (10, 6, 2)
    labels = torch.cat([batch.labels for batch in data.train_batches(0)])
    assert sorted(labels.bincount().tolist()) == [2, 2, 3, 3]


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_parts_of_all_ranks_are_the_whole(image_tree, ranks):
    whole = build(image_tree)
    parts = [build(image_tree, part=Part(rank, ranks)) for rank in range(ranks)]
    for name, arguments in (
        ("train_batches", (1, 2)),
        ("random_batches", (0, 12)),
        ("random_batches", (0, 2)),
        ("test_batches", ()),
    ):
        expected = list(getattr(whole, name)(*arguments))
        mine = [list(getattr(part, name)(*arguments)) for part in parts]
        if name == "train_batches":  # each rank's slice of every batch
            assert {len(batches) for batches in mine} == {len(expected)}
            together = [batch for batches in zip(*mine, strict=True) for batch in batches]
        else:
            together = [batch for batches in mine for batch in batches]
        labels = [torch.cat([b.labels for b in batches]) for batches in (together, expected)]
        if name == "random_batches":
            assert torch.equal(*(one.sort().values for one in labels))
        else:
            images = [torch.cat([b.images for b in batches]) for batches in (together, expected)]
            assert torch.equal(*labels) and torch.equal(*images)


def test_ranks_without_an_image_are_refused(image_tree):
    with pytest.raises(UserError, match="9 ranks, but a batch of 8 images"):
        build(image_tree, part=Part(0, 9))


def test_held_out_images_take_the_place_of_the_test(image_tree):
    data = [raw(image_tree, holdout=8, batch_size=24, seed=seed) for seed in (0, 1)]
    assert [(d.train_size, d.test_size) for d in data] == [(24, 8)] * 2
    held, again = (torch.cat([b.images for b in d.test_batches()]) for d in data)
    assert torch.equal(held, again)
    labels = torch.cat([batch.labels for batch in data[0].test_batches()])
    assert labels.bincount().tolist() == [2] * 4
    rest = next(data[0].train_batches(0)).labels
    assert rest.bincount().tolist() == [6] * 4
    with pytest.raises(UserError, match=r"dataset\.holdout = 32 must be 1 to 31"):
        build(image_tree, holdout=32)


def test_the_test_is_torchvisions_up_to_one_level(image_tree):
    """Resize, CenterCrop, ToTensor and Normalize over torchvision's own ImageFolder."""
    normalise = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    theirs = ImageFolder(
        str(image_tree / "val"),
        transforms.Compose(
            [
                transforms.Resize((40, 40)),
                transforms.CenterCrop(32),
                transforms.ToTensor(),
                normalise,
            ]
        ),
    )
    ours = list(build(image_tree).test_batches())
    images = torch.cat([batch.images for batch in ours])
    assert torch.cat([batch.labels for batch in ours]).tolist() == theirs.targets
    apart = (images - torch.stack([image for image, _ in theirs])).abs()
    # one level of 255 over the smallest standard deviation, and float32's rounding
    assert apart.max() < 1 / 255 / 0.224 + 1e-5
    assert apart.mean() < 2e-3


def test_lines_are_normalised_as_pixels_are():
    images = torch.randint(0, 256, (3, 5, 7, 3), dtype=torch.uint8)
    normalise = Normalise(
        [0.1, 0.2, 0.3], [0.4, 0.5, 0.6], pixel_max=255, device=torch.device("cpu")
    )
    assert torch.equal(normalise.channels_last(images), normalise(images.permute(0, 3, 1, 2)))


def test_loading_leaves_torchs_random_numbers_alone(image_tree):
    before = torch.get_rng_state()
    for workers in (0, 2):
        all_batches(build(image_tree, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


def damage(tree: Path, split: str, count: int) -> list[Path]:
    """Cut the first images of a split, one of each class in turn, in half."""
    paths = sorted((tree / split).glob("*/*"), key=lambda path: path.name)[:count]
    for path in paths:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return paths


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_training_images_are_named_counted_and_replaced(tree, caplog, workers):
    lost = damage(tree, "train", 3)
    data = build(tree, workers=workers)
    batches = list(data.train_batches(0))
    assert [len(batch.labels) for batch in batches] == [8] * 4
    assert set(data.unreadable) == {str(path) for path in lost}
    for path in lost:
        assert caplog.text.count(str(path)) == 1
    list(data.train_batches(1))
    assert len(data.unreadable) == 3 and caplog.text.count("unreadable image") == 3
    # the next image of the class stands in, so that the classes keep their sizes
    assert torch.equal(torch.cat([b.labels for b in batches]).bincount(), torch.full((4,), 8))
    assert equal(batches, list(build(tree).train_batches(0)))


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_test_images_are_left_out(tree, image_tree, workers):
    lost = damage(tree, "val", 2)
    data = build(tree, workers=workers)
    assert sum(len(batch.labels) for batch in data.test_batches()) == 11
    assert set(data.unreadable) == {str(path) for path in lost}


def test_too_many_damaged_images_end_the_run_by_name(tree):
    lost = damage(tree, "train", 4)
    assert len(list(build(tree, max_unreadable=4).train_batches(0))) == 4
    for workers in (0, 2):
        with pytest.raises(UserError, match=r"dataset\.max_unreadable = 3") as raised:
            list(build(tree, max_unreadable=3, workers=workers).train_batches(0))
        assert any(str(path) in str(raised.value) for path in lost)


def test_a_split_without_a_readable_image_ends_the_run(tree):
    damage(tree, "train", 32)
    with pytest.raises(UserError, match="0 of the last batch could"):
        list(build(tree, max_unreadable=1000).train_batches(0))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_read_error_half_way_through_an_epoch_is_survived(tree, workers):
    data = build(tree, batch_size=2, workers=workers)
    batches = data.train_batches(0)
    next(batches)
    for path in (tree / "train" / "n00000002").iterdir():
        path.unlink()
    rest = list(batches)
    assert len(rest) == 15 and all(len(batch.labels) == 2 for batch in rest)
    assert 1 <= len(data.unreadable) <= 8
    assert all("No such file" in reason for reason in data.unreadable.values())


def test_a_file_that_comes_back_is_read_again(tree, monkeypatch):
    from experiments.data.imagenet import source

    failures = iter([OSError(5, "Input/output error"), None])
    waited = []
    monkeypatch.setattr(source.time, "sleep", waited.append)

    def read():
        error = next(failures)
        if error is not None:
            raise error
        return b"content"

    assert source.with_retries(read) == b"content"
    assert waited == [0.1]

    def broken():
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        source.with_retries(broken)


def test_signals_to_the_group_leave_the_workers_at_work(image_tree):
    before = children()
    data = build(image_tree, workers=2, batch_size=2)
    batches = data.train_batches(0)
    got = [next(batches), next(batches)]  # one of each worker, so that both are at work
    workers = children() - before
    assert len(workers) == 2
    for pid in workers:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    got.extend(batches)
    assert equal(got, list(build(image_tree, batch_size=2).train_batches(0)))
    assert children() - before == workers


def test_workers_end_with_the_data(image_tree):
    before = children()
    data = build(image_tree, workers=2)
    list(data.train_batches(0))
    workers = children() - before
    list(data.train_batches(1))
    assert len(workers) == 2 and children() - before == workers  # they persist
    del data
    assert not (children() - before)


@pytest.mark.slow
def test_python_ends_at_once_with_workers_in_the_middle_of_an_epoch(image_tree):
    code = (
        "import sys, time; from pathlib import Path\n"
        "from tests.experiments.data.image_trees import build\n"
        "batches = build(Path(sys.argv[1]), workers=2, batch_size=2).train_batches(0)\n"
        "assert len(next(batches).labels) == 2\n"
        "print(time.time())"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(image_tree)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    # torch alone would wait five seconds for each worker
    assert time.time() - float(ended.stdout) < 8


def test_odd_images_are_used_like_any_other(tree, caplog):
    path = next((tree / "train" / "n00000000").iterdir())
    with Image.open(path) as image:
        picture = image.convert("RGB")
    picture.convert("CMYK").save(path, "JPEG")
    deep = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    other = path.with_name("deep.png")
    Image.fromarray(deep).save(other)
    with caplog.at_level(logging.WARNING):
        data = build(tree, train_images=33, drop_last=False)
        assert sum(len(batch.labels) for batch in data.train_batches(0)) == 33
    assert data.unreadable == {} and caplog.text == ""


def small_shared_memory(kilobytes: int) -> list[str]:
    """What starts a command with so little shared memory, as a container does."""
    mount = f"mount -t tmpfs -o size={kilobytes}k tmpfs /dev/shm"
    private = ["unshare", "--mount", "sh", "-c"] if os.getuid() == 0 else [
        *("unshare", "--map-root-user", "--mount", "sh", "-c"),
    ]  # fmt: skip
    if subprocess.run([*private, mount], capture_output=True, check=False).returncode != 0:
        pytest.skip("no small /dev/shm can be mounted here")
    return [*private, f'{mount} && exec "$@"', "sh"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kilobytes", "told"),
    [(64, "no shared memory for a batch of 0.1 MB"), (4, "processes that load images cannot be")],
)
def test_little_shared_memory_ends_the_run_with_a_line(kilobytes, told, image_tree, tmp_path):
    """A batch has 96 kB; what the queue of torch's loader cannot send, it drops in silence."""
    changes = {"train.batch_size": 32, "train.epochs": 50}
    spec = run_spec(tmp_path, dataset=config(image_tree, workers=2), **changes)
    freeze(spec)
    command = [sys.executable, "-m", "experiments.worker", str(spec.directory)]
    ended = subprocess.run(
        [*small_shared_memory(kilobytes), *command],
        cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert told in line and "; /dev/shm has 0.0" in line and "dataset.workers; 0 needs" in line
    status = read_status(spec.directory)
    assert status is not None and status.status == "refused" and told in status.message
    # as it says, and it is the same run
    without = run_spec(tmp_path, dataset=config(image_tree, workers=0), **changes)
    assert without.directory == spec.directory
    RunDirectory.open(without).close()


@pytest.mark.slow
def test_killed_loader_ends_the_run_with_a_line(image_tree, tmp_path):
    changes = {"train.batch_size": 2, "train.epochs": 6000, "train.log_interval": 2}
    spec = run_spec(tmp_path, dataset=config(image_tree, workers=2), **changes)
    freeze(spec)
    command = ["-m", "experiments.worker", str(spec.directory)]
    with started(command, tmp_path / "log") as training:
        assert wait_for(lambda: spec.directory.joinpath("metrics.jsonl").exists())
        assert wait_for(lambda: len(descendants(training.pid)) == 2)
        kill(descendants(training.pid)[:1])
        training.wait(60)
    status = read_status(spec.directory)
    assert status is not None and status.status in ("refused", "crashed")
    assert "DataLoader worker" in status.message and "\n" not in status.message
