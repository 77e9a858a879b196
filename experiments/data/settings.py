"""The keys of the config node `dataset`, and which values make sense."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

from experiments.errors import UserError
from experiments.settings import Node, read_settings


@dataclass(frozen=True, kw_only=True)
class BaseSettings:
    """Keys of every data set.

    Attributes:
        name: the data set.
        mean: per channel, of pixels scaled to [0, 1].
        std: per channel, of the same.
        drop_last: leave out an epoch's last batch where it would be smaller.
        train_limit: train on so many images only, balanced over the classes; null for all.
        test_limit: test on so many images only; null for all. Held-out images are all used.
        holdout: hold out so many training images (balanced over the classes, the same for every
            seed, before `train_limit`) and test on them; the test set is then not used. Null for
            none.
        test_batch_size: images of a test batch.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    drop_last: bool = True
    train_limit: int | None = None
    test_limit: int | None = None
    holdout: int | None = None
    test_batch_size: int = 500


@dataclass(frozen=True, kw_only=True)
class InputSettings(BaseSettings):
    """Keys of the data sets that are held in memory.

    Attributes:
        crop_padding: pixels of zero padding around the image before a random crop; 0 for no crop.
        horizontal_flip: mirror training images with probability 1/2.
    """

    crop_padding: int
    horizontal_flip: bool


@dataclass(frozen=True, kw_only=True)
class CifarSettings(InputSettings):
    """Keys of CIFAR-10 and CIFAR-100.

    Attributes:
        root: the folder that holds the data set, in one of the layouts of `cifar.py`.
        synthetic: generate `train_limit` and `test_limit` images instead of reading the data set.
        download: fetch the data set into `root` (torchvision's layout) where it is absent.
        cache_dir: where decoded images are kept; null for the user's cache folder.
    """

    root: str
    synthetic: bool = False
    download: bool = False
    cache_dir: str | None = None


Input = TypeVar("Input", bound=BaseSettings)


def read_dataset(kind: type[Input], node: Node) -> Input:
    """Read and check the node `dataset`.

    Raises:
        UserError: a key or value that no data set of this kind has.
    """
    settings = read_settings(kind, node, "dataset")
    for key in ("train_limit", "test_limit", "test_batch_size"):
        value = getattr(settings, key)
        if value is not None and value < 1:
            raise UserError(f"dataset.{key} = {value} must be 1 or more")
    if isinstance(settings, InputSettings) and settings.crop_padding < 0:
        raise UserError(f"dataset.crop_padding = {settings.crop_padding} must be 0 or more")
    if not all(math.isfinite(value) for value in settings.mean):
        raise UserError(f"dataset.mean = {list(settings.mean)} must be finite numbers")
    if not all(math.isfinite(value) and value > 0 for value in settings.std):
        raise UserError(f"dataset.std = {list(settings.std)} must be positive numbers")
    return settings
