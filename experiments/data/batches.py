"""Batches of a data set that lives in memory, as a pure function of (seed, epoch, batch index).

The raw pixels stay on the training device as uint8; order, crops and flips of an epoch are drawn
from streams seeded by (seed, epoch), and a batch is a slice of them. So a resume needs two
integers, and the images that a step sees do not depend on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from experiments.data.augment import Draws, Normalise, draw, flip_and_crop
from experiments.data.part import WHOLE, Part
from experiments.data.randomness import stream
from experiments.data.settings import BaseSettings, InputSettings
from experiments.errors import UserError


class Batch(NamedTuple):
    """Images and their classes, on the training device.

    Attributes:
        images: (b, C, H, W) float32, normalised.
        labels: (b,) int64.
    """

    images: Tensor
    labels: Tensor


class Data(Protocol):
    """What the trainer asks of a data set."""

    num_classes: int
    input_shape: tuple[int, int, int]
    train_size: int
    test_size: int
    batches_per_epoch: int

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch (from 0), from batch `start` on; of each this rank's part."""
        ...

    def random_batches(self, number: int, count: int) -> Iterator[Batch]:
        """Batches of `count` training images, drawn for this number without replacement."""
        ...

    def test_batches(self) -> Iterator[Batch]:
        """Every test image of this rank's part once, in order."""
        ...


@dataclass(frozen=True)
class ImageSet:
    """Raw images: `images` (n, C, H, W) uint8, `labels` (n,) int64."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, places: npt.NDArray[np.int64]) -> ImageSet:
        """The images at these places."""
        return ImageSet(self.images[places], self.labels[places])

    def first(self, count: int) -> ImageSet:
        """The first `count` images, class by class in turn, in their old order."""
        return self.at(balanced(self.labels, count))


def balanced(labels: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """The places of the first `count` labels, class by class in turn, in their old order.

    The sizes of the classes differ by at most one (as long as no class is used up).
    """
    by_class = np.argsort(labels, kind="stable")
    _, firsts, sizes = np.unique(labels[by_class], return_index=True, return_counts=True)
    place_in_class = np.empty(len(labels), dtype=np.int64)
    place_in_class[by_class] = np.arange(len(labels)) - np.repeat(firsts, sizes)
    return np.sort(np.lexsort((labels, place_in_class))[:count])


@dataclass(frozen=True)
class RawData:
    """A data set as it was loaded: before limits, normalisation and augmentation.

    Attributes:
        train: the training images.
        test: the test images.
        num_classes: classes; labels are 0 to num_classes - 1.
        pixel_max: the raw value that stands for 1.
    """

    train: ImageSet
    test: ImageSet
    num_classes: int
    pixel_max: int


class InMemoryData:
    """`Data` over raw images held on the training device."""

    def __init__(
        self,
        raw: RawData,
        settings: InputSettings,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        part: Part = WHOLE,
    ) -> None:
        """Move the images to the device and check that the settings fit them.

        Args:
            raw: the loaded data set.
            settings: limits, normalisation, augmentation.
            batch_size: images of a training batch, over all ranks.
            seed: the run's seed; decides order and augmentation.
            device: where the batches shall be.
            part: what of every batch, and of the test images, is asked for.

        Raises:
            UserError: a limit, the batch size or the normalisation does not fit the data.
        """
        train = _limited(raw.train, settings.train_limit, "train")
        test = _limited(raw.test, settings.test_limit, "test")
        channels, height, width = train.images.shape[1:]
        self.num_classes = raw.num_classes
        self.input_shape = (channels, height, width)
        self.train_size, self.test_size = len(train), len(test)
        check_fit(settings, channels, batch_size, self.train_size)
        _check_padding(settings, height, width)
        full, rest = divmod(self.train_size, batch_size)
        self.batches_per_epoch = full + (1 if rest and not settings.drop_last else 0)
        check_parts(part.count, self.train_size, self.batches_per_epoch, batch_size)

        self._seed, self._device, self._settings = seed, device, settings
        self._batch_size, self._part = batch_size, part
        self._train_images = torch.from_numpy(train.images).to(device)
        self._train_labels = torch.from_numpy(train.labels).to(device)
        self._test_images = torch.from_numpy(test.images).to(device)
        self._test_labels = torch.from_numpy(test.labels).to(device)
        self._normalise = Normalise(
            settings.mean, settings.std, pixel_max=raw.pixel_max, device=device
        )

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch.

        Args:
            epoch: from 0.
            start: the first batch wanted; those before it cost nothing.

        Raises:
            ValueError: epoch or start is out of range.
        """
        if epoch < 0 or not 0 <= start <= self.batches_per_epoch:
            raise ValueError(
                f"epoch = {epoch}, start = {start}: need epoch >= 0 and 0 <= start <= "
                f"{self.batches_per_epoch} batches"
            )
        return self._train_batches(epoch, start)

    def _train_batches(self, epoch: int, start: int) -> Iterator[Batch]:
        order = self._order(epoch, "order")
        draws = self._draws(epoch, self.train_size, "augmentation")
        for index in range(start, self.batches_per_epoch):
            first = index * self._batch_size
            places = self._part.of(first, min(first + self._batch_size, self.train_size))
            yield self._train_batch(order[places], draws[places])

    def random_batches(self, number: int, count: int) -> Iterator[Batch]:
        """Training images drawn without replacement, augmented, whatever the epochs' order is.

        Args:
            number: of the draw, from 0; equal numbers give equal images.
            count: images; in batches of the training's size, the last may be smaller.

        Raises:
            ValueError: there are not so many training images.
        """
        if not 1 <= count <= self.train_size:
            raise ValueError(f"count = {count}: need 1 to {self.train_size} training images")
        return self._random_batches(number, count)

    def _random_batches(self, number: int, count: int) -> Iterator[Batch]:
        chosen = self._order(number, "random batches")[:count]
        draws = self._draws(number, count, "random batches")
        for first in range(0, count, self._batch_size):
            places = self._part.of(first, min(first + self._batch_size, count))
            if places.start < places.stop:  # of a few images some ranks have none
                yield self._train_batch(chosen[places], draws[places])

    def _order(self, number: int, purpose: str) -> Tensor:
        generator = stream(self._seed, number, purpose)
        return torch.randperm(self.train_size, generator=generator).to(self._device)

    def _draws(self, number: int, count: int, purpose: str) -> Draws:
        settings = self._settings
        padding, flip = settings.crop_padding, settings.horizontal_flip
        draws = draw(self._seed, number, count, padding=padding, flip=flip, purpose=purpose)
        return draws.to(self._device)

    def _train_batch(self, chosen: Tensor, draws: Draws) -> Batch:
        settings = self._settings
        # index_select copies whole images at a time; plain indexing is 20 times as slow on uint8.
        images = self._train_images.index_select(0, chosen)
        images = flip_and_crop(images, draws, settings.crop_padding)
        return Batch(self._normalise(images), self._train_labels.index_select(0, chosen))

    def test_batches(self) -> Iterator[Batch]:
        """Every test image once, in order, unaugmented; the last batch may be smaller."""
        mine = self._part.of(0, self.test_size)
        for first in range(mine.start, mine.stop, self._settings.test_batch_size):
            places = slice(first, min(first + self._settings.test_batch_size, mine.stop))
            yield Batch(self._normalise(self._test_images[places]), self._test_labels[places])


def _limited(images: ImageSet, limit: int | None, split: str) -> ImageSet:
    """At most `limit` images."""
    if limit is None:
        return images
    check_limit(limit, len(images), split)
    return images.first(limit)


def check_limit(limit: int, count: int, split: str) -> None:
    """Refuse `train_limit` or `test_limit` above the number of images."""
    if limit > count:
        raise UserError(
            f"dataset.{split}_limit = {limit} is more than the {count} {split} images; "
            "null takes all"
        )


def check_parts(ranks: int, train_size: int, batches: int, batch_size: int) -> None:
    """Check that no rank is left without an image in any batch."""
    smallest = min(batch_size, train_size - (batches - 1) * batch_size)
    if smallest < ranks:
        raise UserError(
            f"{ranks} ranks, but a batch of {smallest} images: use at most {smallest} ranks"
            + (", or dataset.drop_last=true" if smallest < batch_size else "")
        )


def check_fit(settings: BaseSettings, channels: int, batch_size: int, train_size: int) -> None:
    """Check what can only be judged once the data set is known.

    Args:
        settings: of the data set.
        channels: of its images.
        batch_size: images of a training batch.
        train_size: training images.

    Raises:
        UserError: the batch size or the normalisation does not fit the data.
    """
    if batch_size < 1:
        raise UserError(f"batch size {batch_size} must be 1 or more")
    if batch_size > train_size:
        raise UserError(
            f"batch size {batch_size} is larger than the training set ({train_size} images, "
            f"dataset.name = {settings.name}); it must be {train_size} or less"
        )
    for key in ("mean", "std"):
        values = getattr(settings, key)
        if len(values) != channels:
            raise UserError(
                f"dataset.{key} = {list(values)} has {len(values)} numbers for images of "
                f"{channels} channels (dataset.name = {settings.name})"
            )


def _check_padding(settings: InputSettings, height: int, width: int) -> None:
    if settings.crop_padding > min(height, width) // 2:
        raise UserError(
            f"dataset.crop_padding = {settings.crop_padding} is more than half of an image of "
            f"{height}x{width} pixels"
        )
