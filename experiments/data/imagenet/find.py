"""Which layout a folder has: our prepared form, Hugging Face's parquet shards, or class folders."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from experiments.data import synthetic
from experiments.data.imagenet import folders, prepared, shards
from experiments.data.imagenet.settings import ImageNetSettings
from experiments.data.imagenet.source import EncodedSplit, Labels, ResizedSplit, Split
from experiments.errors import UserError
from experiments.given import user_path

LAYOUTS = (
    "train/<class>/*.JPEG and val/<class>/*.JPEG (or a flat val/ and its file of labels), Hugging "
    "Face's train-*.parquet and validation-*.parquet (also in data/), or what "
    "make prepare-imagenet wrote"
)


def find_splits(settings: ImageNetSettings) -> dict[str, Split]:
    """Find both splits and check their size and classes.

    Returns:
        `train` and `test`.

    Raises:
        UserError: the images are absent or incomplete, or others than the settings say.
    """
    root = root_folder(settings)
    found = prepared.find(settings, root)
    splits: dict[str, Split] = {}
    if found is not None:
        splits.update(found)
    else:
        for name, encoded in find_encoded(settings).items():
            splits[name] = ResizedSplit(encoded, settings.resize, settings.resized)
    for name, split in splits.items():
        check(settings, name, split.labels, root)
    return splits


def find_encoded(settings: ImageNetSettings) -> dict[str, EncodedSplit]:
    """Find the original images, and check nothing but their layout.

    Returns:
        `train` and `test`.

    Raises:
        UserError: the images are absent, or a split or class is.
    """
    root = root_folder(settings)
    if settings.synthetic:
        synthetic.make(root, settings.num_classes, settings.synthetic_images)
    parquet_splits = shards.find(settings, root)
    if parquet_splits is not None:
        return dict(parquet_splits)
    folder_splits = folders.find(settings, root)
    if folder_splits is not None:
        return dict(folder_splits)
    raise UserError(
        f"ImageNet was not found: dataset.root = {str(root)!r} {_state(root)}; expected {LAYOUTS}; "
        "set dataset.root, or the environment variable MLBFGS_DATA to the folder that holds "
        "imagenet/"
    )


def root_folder(settings: ImageNetSettings) -> Path:
    """Where the images are, or will be generated."""
    if settings.root is None:
        return synthetic.default_folder(settings.num_classes, settings.synthetic_images)
    return user_path(settings.root, "dataset.root")


def _state(root: Path) -> str:
    if not root.is_dir():
        return "does not exist"
    with os.scandir(root) as entries:
        names = sorted(entry.name for entry in entries)
    return f"holds {', '.join(names[:5])}" if names else "is an empty folder"


def check(settings: ImageNetSettings, split: str, labels: Labels, root: Path) -> None:
    """Check the number of images and that all classes are there, and no other.

    Args:
        settings: what must be there.
        split: `train` or `test`.
        labels: (n,) of the images found.
        root: for the message.

    Raises:
        UserError: there is another number of images, or a class too many or too few.
    """
    expected = settings.train_images if split == "train" else settings.test_images
    if expected is not None and len(labels) != expected:
        raise UserError(
            f"{str(root)!r} has {len(labels)} {split} images, dataset.{split}_images = {expected}: "
            "an incomplete copy or another data set; fetch what is missing, or set the key to what "
            "is there (null for any number)"
        )
    classes = settings.num_classes
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(outside):
        raise UserError(
            f"{str(root)!r}: {len(outside)} {split} images have a label outside 0 to "
            f"{classes - 1}, the first is {labels[outside[0]]} of image number {outside[0]}; "
            "dataset.num_classes must be the number of classes, and a split without labels "
            "(ImageNet's test images, label -1) cannot be used"
        )
    absent = np.setdiff1d(np.arange(classes), labels)
    if len(absent):
        raise UserError(
            f"{str(root)!r} has no {split} image of {len(absent)} of the {classes} classes, the "
            f"first is number {absent[0]}: complete the copy, or correct dataset.num_classes"
        )
