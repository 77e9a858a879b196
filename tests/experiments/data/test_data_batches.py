"""Batches: every image once, a pure function of (seed, epoch, index), limits and bad settings."""

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from experiments.data import Batch, ImageSet, InMemoryData, Part, RawData, build_data, digits
from experiments.data.holdout import hold_out
from experiments.data.part import WHOLE
from experiments.data.settings import CifarSettings, InputSettings, read_dataset
from experiments.errors import UserError

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "dataset"
DIGITS = OmegaConf.load(CONFIGS / "digits.yaml")


def numbered(train: int = 50, test: int = 23, size: int = 8) -> RawData:
    """Images whose pixels all hold the image's number, of class number % 5."""

    def images(count: int) -> ImageSet:
        numbers = np.arange(count)
        pixels = np.broadcast_to(numbers[:, None, None, None], (count, 1, size, size))
        return ImageSet(pixels.astype(np.uint8), (numbers % 5).astype(np.int64))

    return RawData(train=images(train), test=images(test), num_classes=5, pixel_max=1)


def make(
    raw: RawData | None = None,
    *,
    batch_size: int = 8,
    seed: int = 0,
    part: Part = WHOLE,
    **keys,
) -> InMemoryData:
    # mean 0 and std 1 with pixel_max 1: a batch shows the raw pixels.
    values = {"mean": (0.0,), "std": (1.0,), "crop_padding": 0, "horizontal_flip": False} | keys
    settings = InputSettings(name="numbered", **values)
    device = torch.device("cpu")
    return InMemoryData(
        raw or numbered(), settings, batch_size=batch_size, seed=seed, device=device, part=part
    )


def numbers(batches) -> list[int]:
    return [int(n) for batch in batches for n in batch.images[:, 0, 0, 0]]


def equal(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.images, y.images) and torch.equal(x.labels, y.labels)
        for x, y in zip(a, b, strict=True)
    )


def test_an_epoch_shows_each_image_once():
    data = make(drop_last=False)
    batches = list(data.train_batches(0))
    assert [len(b.labels) for b in batches] == [8] * 6 + [2]
    assert data.batches_per_epoch == 7
    assert sorted(numbers(batches)) == list(range(50))


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_parts_of_all_ranks_are_the_batches_of_one(ranks):
    keys = {"crop_padding": 1, "horizontal_flip": True, "drop_last": False, "batch_size": 11}
    whole = make(**keys)
    parts = [make(part=Part(rank, ranks), **keys) for rank in range(ranks)]
    for one, many in (
        (whole.train_batches(1, 2), [part.train_batches(1, 2) for part in parts]),
        (whole.random_batches(4, 27), [part.random_batches(4, 27) for part in parts]),
    ):
        for batch, shares in zip(one, zip(*many, strict=True), strict=True):
            assert torch.equal(torch.cat([share.images for share in shares]), batch.images)
            assert torch.equal(torch.cat([share.labels for share in shares]), batch.labels)
            sizes = [len(share.labels) for share in shares]
            assert max(sizes) - min(sizes) <= 1
    tested = [numbers(part.test_batches()) for part in parts]
    assert list(itertools.chain(*tested)) == list(range(23)) and all(tested)
    assert parts[0].train_size == 50 and parts[0].test_size == 23
    assert parts[0].batches_per_epoch == whole.batches_per_epoch


def test_a_rank_without_images_is_refused_or_has_no_batch():
    with pytest.raises(UserError, match=r"9 ranks, but a batch of 8 images: use at most 8 ranks$"):
        make(part=Part(0, 9))
    with pytest.raises(UserError, match=r"use at most 2 ranks, or dataset\.drop_last=true"):
        make(part=Part(0, 3), drop_last=False)
    lists = [list(make(part=Part(rank, 4)).random_batches(0, 10)) for rank in range(4)]
    assert [len(batches) for batches in lists] == [2, 2, 1, 1]


def test_random_batches_are_drawn_without_replacement_for_their_number_alone():
    data = make(crop_padding=1, horizontal_flip=True)
    drawn = list(data.random_batches(3, 21))
    assert [len(b.labels) for b in drawn] == [8, 8, 5]
    plain = numbers(make().random_batches(3, 21))
    assert len(set(plain)) == 21
    next(iter(data.train_batches(3)))
    assert equal(drawn, list(data.random_batches(3, 21)))
    assert sorted(numbers(make().random_batches(0, 50))) == list(range(50))
    others = (
        make().random_batches(4, 21),
        make().train_batches(3),
        make(seed=1).random_batches(3, 21),
    )
    assert all(numbers(other)[:21] != plain for other in others)
    with pytest.raises(ValueError, match="1 to 50"):
        data.random_batches(0, 51)


def test_drop_last_leaves_out_the_small_batch_only():
    data = make()
    batches = list(data.train_batches(0))
    assert [len(b.labels) for b in batches] == [8] * 6
    assert data.batches_per_epoch == 6
    assert len(set(numbers(batches))) == 48
    assert make(batch_size=50).batches_per_epoch == 1
    assert make(batch_size=50, drop_last=False).batches_per_epoch == 1


def test_labels_stay_with_their_images():
    for batch in make().train_batches(0):
        assert torch.equal(batch.images[:, 0, 0, 0].long() % 5, batch.labels)


def test_batches_have_the_promised_types():
    batch = next(make().train_batches(0))
    assert batch.images.dtype == torch.float32 and batch.images.shape == (8, 1, 8, 8)
    assert batch.images.is_contiguous()
    assert batch.labels.dtype == torch.int64 and batch.labels.shape == (8,)


def test_order_depends_on_seed_and_epoch():
    orders = [
        tuple(numbers(make(seed=seed).train_batches(epoch)))
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    assert len(set(orders)) == 4
    assert tuple(numbers(make(seed=1).train_batches(1))) == orders[3]


AUGMENTED = {"crop_padding": 2, "horizontal_flip": True}


def test_start_gives_the_rest_of_the_same_epoch():
    data = make(**AUGMENTED)
    whole = list(data.train_batches(2))
    for start in range(data.batches_per_epoch + 1):
        assert equal(list(make(**AUGMENTED).train_batches(2, start)), whole[start:])


def test_epochs_interleaved_or_abandoned_are_the_same():
    data = make(**AUGMENTED)
    first, second = data.train_batches(0), data.train_batches(1)
    mixed = [next(first), next(second), next(first), next(second)]
    assert equal([mixed[0], mixed[2]], list(data.train_batches(0))[:2])
    assert equal([mixed[1], mixed[3]], list(data.train_batches(1))[:2])


def test_augmentation_does_not_depend_on_the_batch_size():
    small = list(make(batch_size=5, **AUGMENTED).train_batches(0))
    large = list(make(batch_size=10, **AUGMENTED).train_batches(0))
    assert torch.equal(torch.cat([b.images for b in small]), torch.cat([b.images for b in large]))


def test_global_random_state_is_neither_read_nor_moved():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = list(make(**AUGMENTED).train_batches(0))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert equal(first, list(make(**AUGMENTED).train_batches(0)))


def test_test_pass_shows_each_image_once_in_order_and_plain():
    data = make(test_batch_size=10, **AUGMENTED)
    batches = list(data.test_batches())
    assert [len(b.labels) for b in batches] == [10, 10, 3]
    assert numbers(batches) == list(range(23))
    assert all((b.images == b.images[:, :, :1, :1]).all() for b in batches)
    assert equal(batches, list(data.test_batches()))


def test_augmentation_reaches_training_batches_only():
    plain, cropped = make(), make(crop_padding=2)
    assert not equal(list(plain.train_batches(0)), list(cropped.train_batches(0)))
    assert equal(list(plain.test_batches()), list(cropped.test_batches()))


def test_limits_take_the_first_images_of_every_class():
    data = make(train_limit=12, test_limit=7, batch_size=12)
    assert (data.train_size, data.test_size) == (12, 7)
    batch = next(data.train_batches(0))
    assert sorted(numbers([batch])) == list(range(12))
    assert sorted(torch.bincount(batch.labels).tolist()) == [2, 2, 2, 3, 3]
    assert numbers(data.test_batches()) == list(range(7))


def test_limit_is_balanced_where_the_classes_come_in_blocks():
    labels = np.repeat(np.arange(5), 10).astype(np.int64)
    chosen = ImageSet(numbered(50).train.images, labels).first(10)
    assert np.bincount(chosen.labels).tolist() == [2] * 5
    assert chosen.images[:, 0, 0, 0].tolist() == [0, 1, 10, 11, 20, 21, 30, 31, 40, 41]


def test_digits_split_is_fixed_stratified_and_complete():
    raw = digits.load()
    assert (len(raw.train), len(raw.test)) == (1442, 355)
    shares = np.bincount(raw.test.labels) / (
        np.bincount(raw.train.labels) + np.bincount(raw.test.labels)
    )
    # Every fifth of 174 to 183 images.
    assert (abs(shares - 0.2) < 0.006).all()
    everything = np.concatenate([raw.train.images, raw.test.images])
    with np.load(digits.FILE) as file:
        images, labels = file["images"], file["labels"]
    assert sorted(image.tobytes() for image in everything) == sorted(map(bytes, images))
    # of scikit-learn 1.7.2: load_digits().images and .target, as uint8
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    assert digest == "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"


def test_digits_config_normalises_and_ignores_the_seed_in_the_split():
    a = build_data(DIGITS, batch_size=64, seed=0, device="cpu")
    b = build_data(DIGITS, batch_size=64, seed=1, device="cpu")
    assert a.input_shape == (1, 8, 8) and a.num_classes == 10 and a.batches_per_epoch == 22
    assert equal(list(a.test_batches()), list(b.test_batches()))
    whole = build_data(DIGITS, batch_size=1442, seed=0, device="cpu")
    images = next(whole.train_batches(0)).images
    # The constants in the config have four digits.
    assert abs(images.mean().item()) < 1e-3 and abs(images.std().item() - 1) < 1e-3


@pytest.mark.parametrize(("epoch", "start"), [(-1, 0), (0, -1), (0, 7)])
def test_positions_out_of_range_are_refused_at_once(epoch, start):
    with pytest.raises(ValueError, match="0 <= start <= 6"):
        make().train_batches(epoch, start)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"batch_size": 51}, r"batch size 51 is larger than the training set \(50 images"),
        ({"batch_size": 0}, "batch size 0 must be 1 or more"),
        ({"batch_size": 20, "train_limit": 10}, "batch size 20 is larger .* 10 or less"),
        ({"train_limit": 51}, "dataset.train_limit = 51 is more than the 50 train images"),
        ({"test_limit": 24}, "dataset.test_limit = 24 is more than the 23 test images"),
        ({"mean": (0.0, 0.0, 0.0)}, r"dataset.mean = .* 3 numbers for images of 1 channels"),
        ({"std": (1.0, 1.0)}, r"dataset.std = .* 2 numbers for images of 1 channels"),
        ({"crop_padding": 5}, "dataset.crop_padding = 5 is more than half of an image of 8x8"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_refused(keys, message):
    with pytest.raises(UserError, match=message) as caught:
        make(**keys)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "cifra10"}, "unknown dataset.name = 'cifra10'; did you mean 'cifar10'"),
        ({"name": None}, "dataset.name is missing"),
        ({"horizontal_flp": True}, "unknown key dataset.horizontal_flp; did you mean 'horizontal_"),
        ({"root": "data"}, "unknown key dataset.root"),
        ({"crop_padding": -1}, "dataset.crop_padding = -1 must be 0 or more"),
        ({"crop_padding": 1.5}, "dataset.crop_padding = 1.5 must be a whole number"),
        ({"train_limit": 0}, "dataset.train_limit = 0 must be 1 or more"),
        ({"test_limit": -3}, "dataset.test_limit = -3 must be 1 or more"),
        ({"test_batch_size": 0}, "dataset.test_batch_size = 0 must be 1 or more"),
        ({"std": [0.0]}, r"dataset.std = \[0.0\] must be positive"),
        ({"std": [float("inf")]}, r"dataset.std = \[inf\] must be positive"),
        ({"mean": [float("nan")]}, r"dataset.mean = \[nan\] must be finite"),
        ({"mean": 0.5}, r"dataset.mean = 0.5 must be a list"),
    ],
)
def test_bad_dataset_settings_are_one_line(change, message):
    cfg = OmegaConf.merge(DIGITS, OmegaConf.create(change))
    with pytest.raises(UserError, match=message) as caught:
        build_data(cfg, batch_size=8, seed=0, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_config_files_are_valid_and_follow_the_environment(name, monkeypatch):
    monkeypatch.setenv("MLBFGS_DATA", "somewhere")
    settings = read_dataset(CifarSettings, OmegaConf.load(CONFIGS / f"{name}.yaml"))
    assert settings.name == name and settings.root == f"somewhere/{name}"
    monkeypatch.delenv("MLBFGS_DATA")
    settings = read_dataset(CifarSettings, OmegaConf.load(CONFIGS / f"{name}.yaml"))
    assert settings.root == f"data/{name}"


def make_digits(seed: int = 0, **keys):
    return build_data(OmegaConf.merge(DIGITS, keys), batch_size=100, seed=seed, device="cpu")


def test_holdout_takes_training_images_and_leaves_the_test_set_untouched():
    raw = digits.load()
    held = hold_out(raw, 137)
    everything = np.concatenate([held.train.images, held.test.images])
    assert len(held.train) == 1442 - 137 and len(held.test) == 137

    def sorted_rows(images):
        return sorted(image.tobytes() for image in images)

    assert sorted_rows(everything) == sorted_rows(raw.train.images)  # a split, nothing else
    counts = np.bincount(held.test.labels, minlength=10)
    assert counts.max() - counts.min() == 1 and counts.sum() == 137
    label_of = {i.tobytes(): n for i, n in zip(raw.train.images, raw.train.labels, strict=True)}
    for part in (held.train, held.test):
        assert [label_of[image.tobytes()] for image in part.images] == part.labels.tolist()


def test_holdout_is_the_same_for_every_seed_and_composes_with_limits():
    plain = make_digits(holdout=100)
    assert (plain.train_size, plain.test_size) == (1342, 100)
    limited = make_digits(holdout=100, train_limit=400, test_limit=20)
    assert (limited.train_size, limited.test_size) == (400, 100)
    seeded = make_digits(seed=5, holdout=100)
    assert equal(list(plain.test_batches()), list(seeded.test_batches()))
    assert not equal(list(plain.test_batches()), list(make_digits().test_batches()))
    assert not equal(list(plain.train_batches(0)), list(seeded.train_batches(0)))


@pytest.mark.parametrize("holdout", [0, 1442, -3])
def test_holdout_of_nothing_or_of_everything_is_refused(holdout):
    with pytest.raises(UserError, match=rf"dataset.holdout = {holdout} must be 1 to 1441"):
        make_digits(holdout=holdout)
    with pytest.raises(UserError, match="train_limit = 1400 is more than the 1342"):
        make_digits(holdout=100, train_limit=1400)
