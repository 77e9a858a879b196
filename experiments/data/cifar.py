"""CIFAR-10 and CIFAR-100, from the layouts in which people have them.

In the folder `dataset.root`:

- Hugging Face's parquet: `train.parquet` and `test.parquet`, or shards
  `train-00000-of-00002.parquet`, or `train/0000.parquet`; here or in the subfolder `data`,
  `plain_text`, `cifar10` or `cifar100`;
- torchvision's: `cifar-10-batches-py` or `cifar-100-python` (or `root` is that folder), which
  `dataset.download` fetches.

`dataset.synthetic` generates images of the same shape instead, for tests and smoke runs.

The images are checked (counts, classes, sizes) and put into one order that depends on their pixels
alone, so that a run does not depend on the layout or row order of the copy at hand.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.data import decoded_cache, parquet, synthetic
from experiments.data.batches import ImageSet, RawData
from experiments.data.settings import CifarSettings
from experiments.errors import UserError
from experiments.given import user_path

logger = logging.getLogger(__name__)

SPLITS = ("train", "test")
PIXEL_MAX = 255
SIDE = 32


@dataclass(frozen=True)
class CifarVersion:
    """What is known about a data set before any of it is read.

    Attributes:
        name: as in the config.
        num_classes: classes, all of the same size.
        sizes: images of each split.
        folder: torchvision's folder.
        torchvision_class: torchvision's name for it.
        label_columns: names of the label column in parquet files, the first present one counts.
    """

    name: str
    num_classes: int
    sizes: dict[str, int]
    folder: str
    torchvision_class: str
    label_columns: tuple[str, ...]


VERSIONS = {
    "cifar10": CifarVersion(
        name="cifar10",
        num_classes=10,
        sizes={"train": 50_000, "test": 10_000},
        folder="cifar-10-batches-py",
        torchvision_class="CIFAR10",
        label_columns=("label",),
    ),
    "cifar100": CifarVersion(
        name="cifar100",
        num_classes=100,
        sizes={"train": 50_000, "test": 10_000},
        folder="cifar-100-python",
        torchvision_class="CIFAR100",
        label_columns=("fine_label", "label"),
    ),
}


def load(settings: CifarSettings) -> RawData:
    """Read, check and order both splits.

    Returns:
        Images (n, 3, 32, 32) uint8.

    Raises:
        UserError: the data set is absent, incomplete, corrupt or another one.
    """
    version = VERSIONS[settings.name]
    if settings.synthetic:
        return _generated(settings, version)
    files, torchvision_root = find(settings)
    if files is not None:
        cache_dir = decoded_cache.folder(settings.cache_dir)
        sets = {name: _from_parquet(files[name], name, version, cache_dir) for name in SPLITS}
    else:
        assert torchvision_root is not None
        sets = {
            name: _from_torchvision(torchvision_root, name, version, settings.download)
            for name in SPLITS
        }
    return RawData(
        train=sets["train"],
        test=sets["test"],
        num_classes=version.num_classes,
        pixel_max=PIXEL_MAX,
    )


def find(settings: CifarSettings) -> tuple[dict[str, list[Path]] | None, Path | None]:
    """Look for the data set, without reading it.

    Returns:
        Parquet files by split, or the folder that torchvision wants to be told; one of the two.

    Raises:
        UserError: there is neither, and nothing may be downloaded.
    """
    version = VERSIONS[settings.name]
    root = user_path(settings.root, "dataset.root")
    files = parquet.find_splits(root, version.name)
    if files is not None:
        return files, None
    torchvision_root = _torchvision_root(root, version)
    if torchvision_root is None and not settings.download:
        raise UserError(_not_found(root, version))
    return None, torchvision_root or root


def _not_found(root: Path, version: CifarVersion) -> str:
    state = "has no such files" if root.is_dir() else "does not exist"
    return (
        f"{version.name} was not found: dataset.root = {str(root)!r} {state}; expected "
        "train.parquet and test.parquet (or shards train-*.parquet; also in data/ or plain_text/) "
        f"or torchvision's folder {version.folder}/; set dataset.root, or the environment variable "
        f"MLBFGS_DATA to the folder that holds {version.name}/, or fetch it with "
        "dataset.download=true"
    )


def _generated(settings: CifarSettings, version: CifarVersion) -> RawData:
    """Striped images of the classes (`synthetic.picture`), the same for every seed.

    Raises:
        UserError: the settings do not say how many.
    """
    if settings.train_limit is None or settings.test_limit is None:
        raise UserError(
            "dataset.synthetic=true: set dataset.train_limit and dataset.test_limit to the numbers "
            "of images to generate"
        )
    counts = (settings.train_limit + (settings.holdout or 0), settings.test_limit)
    for split, count in zip(SPLITS, counts, strict=True):
        if count > version.sizes[split]:
            raise UserError(
                f"dataset.synthetic=true: {count} {split} images, more than the "
                f"{version.sizes[split]} of {version.name}: generate at most so many"
            )
    train, test = (
        ImageSet(*synthetic.small_pictures(split, version.num_classes, count, side=SIDE))
        for split, count in zip(SPLITS, counts, strict=True)
    )
    return RawData(train=train, test=test, num_classes=version.num_classes, pixel_max=PIXEL_MAX)


def _from_parquet(
    files: list[Path], split: str, version: CifarVersion, cache_dir: Path
) -> ImageSet:
    """One split out of parquet files, decoded once and then kept in the cache."""

    def decode() -> ImageSet:
        labels = parquet.read_labels(files, version.label_columns)
        _check_labels(labels, split, version, str(files[0].parent))
        logger.info("decoding the %d %s images of %s", len(labels), split, version.name)
        images = parquet.read_images(files, len(labels))
        return canonical(ImageSet(images, labels))

    images = decoded_cache.load_or_make(cache_dir, f"{version.name}-{split}", files, decode)
    # What comes from the cache was checked when it was made, but perhaps as another version's.
    _check_labels(images.labels, split, version, str(files[0].parent))
    return images


def _torchvision_root(root: Path, version: CifarVersion) -> Path | None:
    """The folder that torchvision wants to be told, if its layout is there."""
    if root.name == version.folder and root.is_dir():
        return root.parent
    return root if (root / version.folder).is_dir() else None


def _from_torchvision(root: Path, split: str, version: CifarVersion, download: bool) -> ImageSet:
    """One split out of torchvision's files, which torchvision checks by their MD5 sums."""
    import torchvision  # only here: it takes seconds to import

    kind: Any = getattr(torchvision.datasets, version.torchvision_class)
    try:
        # torchvision prints about its downloads; a library has no business on the terminal.
        with contextlib.redirect_stdout(io.StringIO()):
            dataset = kind(root=str(root), train=split == "train", download=download)
    except (RuntimeError, OSError, http.client.HTTPException) as error:
        if download:
            reason = " ".join(str(error).split())
            raise UserError(
                f"dataset.download: {version.name} could not be fetched into {str(root)!r}: "
                f"{reason}; copy it there by hand or set dataset.root to where it is"
            ) from error
        raise UserError(
            f"{str(root / version.folder)!r} is not a complete copy of {version.name} (a file is "
            "absent or its MD5 sum differs); delete it and fetch it again with "
            "dataset.download=true"
        ) from error
    labels = np.asarray(dataset.targets, dtype=np.int64)
    _check_labels(labels, split, version, str(root / version.folder))
    images = np.ascontiguousarray(dataset.data.transpose(0, 3, 1, 2))
    return canonical(ImageSet(images, labels))


def _check_labels(
    labels: npt.NDArray[np.int64], split: str, version: CifarVersion, where: str
) -> None:
    """Check the number of images and that all classes are there, equally often."""
    expected = version.sizes[split]
    if len(labels) != expected:
        raise UserError(
            f"{where!r} has {len(labels)} {split} images, {version.name} has {expected}: an "
            "incomplete copy or another data set; fetch it again or change dataset.name"
        )
    found = len(np.unique(labels))
    in_range = labels.min() >= 0 and labels.max() < version.num_classes
    if found != version.num_classes or not in_range:
        raise UserError(
            f"{where!r} has {found} classes ({labels.min()} to {labels.max()}) in its {split} "
            f"images, {version.name} has {version.num_classes} (0 to {version.num_classes - 1}); "
            "change dataset.name or dataset.root"
        )
    counts = np.bincount(labels, minlength=version.num_classes)
    if counts.min() != counts.max():
        worst = int(np.abs(counts - expected / version.num_classes).argmax())
        raise UserError(
            f"{where!r} has {counts[worst]} {split} images of class {worst}, {version.name} has "
            f"{expected // version.num_classes}: not the original data set; fetch it again"
        )


def canonical(images: ImageSet) -> ImageSet:
    """Put images into the order of the SHA-256 of their pixels (and of labels among equals).

    The order is as good as random, and the same for every copy of the data set.
    """
    digests = [hashlib.sha256(image.tobytes()).digest() for image in images.images]
    order = sorted(range(len(images)), key=lambda i: (digests[i], int(images.labels[i])))
    return ImageSet(images.images[order], images.labels[order])
