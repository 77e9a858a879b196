"""ImageNet as folders: one for each class, or a flat validation folder with a file of classes.

    root/train/n01440764/n01440764_10026.JPEG
    root/val/n01440764/ILSVRC2012_val_00000293.JPEG
    root/val/ILSVRC2012_val_00000001.JPEG          flat, see validation_labels.py

The classes are the folders of `train` in the order of their names, as for torchvision.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.data.encoded import DecodeError
from experiments.data.imagenet.settings import ImageNetSettings
from experiments.data.imagenet.source import Keys, Labels, as_key
from experiments.data.imagenet.validation_labels import read_labels
from experiments.errors import UserError
from experiments.given import open_plain

logger = logging.getLogger(__name__)

TRAIN_FOLDERS = ("train",)
TEST_FOLDERS = ("val", "validation", "valid")
ENDINGS = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
#: So many names are written out in a message.
NAMES_SHOWN = 3


class FolderSplit:
    """Image files in folders.

    Attributes:
        labels: (n,) int64.
        keys: (n,) names without folder and ending.
    """

    def __init__(self, root: Path, folders: Sequence[str], files: list[list[str]], labels: Labels):
        """Store the names compactly.

        Args:
            root: the split's folder.
            folders: names of folders in it; `.` for itself.
            files: for each folder the names of its images.
            labels: (n,) int64, of the images of all folders one after the other.
        """
        self._root = root
        self._folders = list(folders)
        self._folder_of = np.repeat(np.arange(len(files)), [len(names) for names in files])
        names = [name for of_folder in files for name in of_folder]
        self._files = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
        self.keys: Keys = np.array([as_key(name) for name in names], dtype=np.bytes_)
        self.labels: Labels = labels

    def _path(self, index: int) -> str:
        folder = self._folders[self._folder_of[index]]
        return os.path.join(self._root, folder, os.fsdecode(bytes(self._files[index])))

    def name(self, index: int) -> str:
        """The path of an image."""
        return self._path(index)

    def read(self, index: int) -> bytes:
        """The content of an image's file."""
        try:
            with open_plain(Path(self._path(index))) as file:
                return file.read()
        except UserError as error:
            raise DecodeError(str(error)) from error


def find(settings: ImageNetSettings, root: Path) -> dict[str, FolderSplit] | None:
    """Both splits, where the layout is one of folders.

    Returns:
        `train` and `test`, or None where neither folder is there.

    Raises:
        UserError: one of them is missing, or has other classes than it must.
    """
    train, test = _first(root, TRAIN_FOLDERS), _first(root, TEST_FOLDERS)
    if train is None and test is None:
        return None
    if train is None or test is None:
        missing, there = ("train", test) if train is None else ("val", train)
        raise UserError(
            f"{str(root)!r} has {there.name if there else ''}/ but no {missing}/: put the "
            f"{missing} images there"
        )
    classes = class_folders(train)
    check_number_of_classes(train, classes, settings.num_classes)
    return {
        "train": _from_class_folders(train, classes),
        "test": _test_split(settings, test, classes),
    }


def _first(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def class_folders(folder: Path) -> list[str]:
    """The names of the class folders, sorted; hidden ones are none."""
    return _listed(folder).folders


def check_number_of_classes(folder: Path, classes: Sequence[str], expected: int) -> None:
    """Refuse a split with too many or too few classes.

    Raises:
        UserError: the numbers differ.
    """
    if len(classes) != expected:
        difference = "too many" if len(classes) > expected else "too few"
        raise UserError(
            f"{str(folder)!r} has {len(classes)} class folders, {difference}: "
            f"dataset.num_classes = {expected}; {_shown(classes)}; complete the data set, or set "
            "dataset.num_classes to what is there"
        )


def _shown(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN])
    return f"the first are {shown}" if names else "there is none"


def _test_split(settings: ImageNetSettings, folder: Path, classes: list[str]) -> FolderSplit:
    found = class_folders(folder)
    if not found:
        files = _images(folder)
        if not files:
            raise UserError(f"{str(folder)!r} is empty: put the validation images there")
        labels = read_labels(settings.val_labels, folder, files, classes)
        return FolderSplit(folder, ["."], [files], labels)
    if settings.val_labels is not None:
        raise UserError(
            f"dataset.val_labels = {settings.val_labels!r} has no effect: {str(folder)!r} has a "
            "folder for each class; leave it null"
        )
    if found != classes:
        extra, missing = sorted(set(found) - set(classes)), sorted(set(classes) - set(found))
        parts = [
            f"{what} {len(names)} ({', '.join(names[:NAMES_SHOWN])})"
            for what, names in (("has too many:", extra), ("lacks", missing))
            if names
        ]
        raise UserError(
            f"{str(folder)!r} has other class folders than the training images: it "
            f"{' and '.join(parts)}; complete it, or remove what does not belong there"
        )
    return _from_class_folders(folder, classes)


def _from_class_folders(folder: Path, classes: list[str]) -> FolderSplit:
    loose = [name for name in _listed(folder).files if name.lower().endswith(ENDINGS)]
    if loose:
        logger.warning(
            "%d images lie in %s beside the class folders, the first is %s: they are left out",
            len(loose), folder, loose[0],
        )  # fmt: skip
    files = [_images(folder / name) for name in classes]
    empty = [name for name, found in zip(classes, files, strict=True) if not found]
    if empty:
        raise UserError(
            f"{len(empty)} class folders of {str(folder)!r} hold no image, the first is "
            f"{empty[0]}/: half a copy? Fetch the missing images or remove the folders"
        )
    labels = np.repeat(np.arange(len(classes)), [len(found) for found in files])
    return FolderSplit(folder, classes, files, labels.astype(np.int64))


def _images(folder: Path) -> list[str]:
    """The names of the images in a folder, sorted; what else is there is counted in warnings.

    A link that leads nowhere is an image: one that cannot be read, and is named and counted.
    """
    listed = _listed(folder)
    images = [name for name in listed.files if name.lower().endswith(ENDINGS)]
    others = [name for name in listed.files if not name.lower().endswith(ENDINGS)]
    if others:
        logger.warning(
            "%d files in %s are no images, the first is %s", len(others), folder, others[0]
        )
    for name in listed.folders:
        deeper = [n for n in _listed(folder / name).files if n.lower().endswith(ENDINGS)]
        if deeper:
            logger.warning(
                "%d images lie one folder deeper, in %s, the first is %s: they are left out; move "
                "them up",
                len(deeper), folder / name, deeper[0],
            )  # fmt: skip
    return images


@dataclass(frozen=True)
class _Listed:
    """What a folder holds, hidden names left out, sorted.

    Attributes:
        folders: names of folders, and of links to folders.
        files: all other names: files, and links that lead to files or nowhere.
    """

    folders: list[str]
    files: list[str]


def _listed(folder: Path) -> _Listed:
    folders: list[str] = []
    files: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                (folders if _is_folder(entry) else files).append(entry.name)
    return _Listed(sorted(folders), sorted(files))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself, or where one may not look
        return False
