"""Generated images for tests and smoke runs: a tree of JPEGs in ImageNet's layout, or arrays.

    root/train/n00000003/n00000003_12.JPEG
    root/val/n00000003/ILSVRC2012_val_00000007.JPEG

Each class has a colour and the direction and width of its stripes, with noise on top, so that a
network can learn them in a few steps. Sizes and aspects vary; every eighth image is grey. The same
numbers give the same pixels. It says nothing about ImageNet.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from experiments.data import decoded_cache
from experiments.data.imagenet.pixels import Pixels
from experiments.errors import UserError
from experiments.given import read_json

#: Sides in pixels, the smallest and the largest.
SIDES = (48, 96)
GREY_EVERY = 8
JPEG_QUALITY = 90
MARK_FILE = "synthetic.json"
#: Raised when the same numbers give other pixels.
FORMAT = 1


def default_folder(num_classes: int, images: dict[str, int]) -> Path:
    """Where a tree of this size is kept: in the user's cache folder.

    Args:
        num_classes: classes.
        images: of `train` and `val`.
    """
    name = f"synthetic-{num_classes}-{images['train']}-{images['val']}"
    return decoded_cache.folder(None) / name


def make(root: Path, num_classes: int, images: dict[str, int]) -> None:
    """Generate the tree, unless it is there.

    Written under another name and renamed, so that several processes may ask for it at once.

    Args:
        root: the folder of the tree; absent or empty, or this very tree.
        num_classes: classes.
        images: of `train` and `val`, spread evenly over the classes.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    mark = {"format": FORMAT, "num_classes": num_classes, "images": images}
    if _mark_of(root) == mark:
        return
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent, prefix=f"{root.name}.") as temporary:
            folder = Path(temporary) / "tree"
            for split, count in images.items():
                _make_split(folder, split, num_classes, count)
            (folder / MARK_FILE).write_text(json.dumps(mark) + "\n", encoding="utf-8")
            os.replace(folder, root)
    except OSError as error:
        # another process may have been faster
        if _mark_of(root) == mark:
            return
        raise UserError(
            f"synthetic images cannot be put into {str(root)!r} ({error}): set dataset.root to a "
            "folder that is empty or absent"
        ) from error


def _mark_of(root: Path) -> object:
    try:
        return read_json(root / MARK_FILE)
    except (OSError, UserError):
        return None


def _make_split(folder: Path, split: str, num_classes: int, count: int) -> None:
    for number in range(count):
        label = number % num_classes
        name = f"n{label:08d}"
        image_name = f"{name}_{number}" if split == "train" else f"ILSVRC2012_val_{number + 1:08d}"
        path = folder / split / name / f"{image_name}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(picture(split, label, number))
        if number % GREY_EVERY == GREY_EVERY - 1:
            image = image.convert("L")
        image.save(path, "JPEG", quality=JPEG_QUALITY)


def small_pictures(
    split: str, num_classes: int, count: int, *, side: int
) -> tuple[Pixels, npt.NDArray[np.int64]]:
    """Square images of all classes in turn, for data sets that are held in memory.

    Args:
        split: `train` or `test`.
        num_classes: classes.
        count: images.
        side: height and width, pixels.

    Returns:
        (count, 3, side, side) uint8, and their labels.
    """
    labels = np.arange(count, dtype=np.int64) % num_classes
    images = np.stack(
        [
            picture(split, int(label), number, (side, side)).transpose(2, 0, 1)
            for number, label in enumerate(labels)
        ]
    )
    return images, labels


def picture(split: str, label: int, number: int, size: tuple[int, int] | None = None) -> Pixels:
    """One image: stripes in the class's colour and direction, with noise.

    Args:
        split: `train` or `val`.
        label: the class.
        number: of the image in its split.
        size: height and width, pixels; None: drawn within `SIDES`.

    Returns:
        (h, w, 3) uint8.
    """
    of_class = np.random.default_rng([label, 0])
    colour = of_class.uniform(40, 215, 3)
    angle, wavelength = of_class.uniform(0, math.pi), of_class.uniform(6, 20)
    of_image = np.random.default_rng([label, 1 if split == "train" else 2, number])
    height, width = of_image.integers(SIDES[0], SIDES[1], 2, endpoint=True)
    if size is not None:
        height, width = size
    y, x = np.mgrid[:height, :width]
    phase = of_image.uniform(0, 2 * math.pi)
    along = x * math.cos(angle) + y * math.sin(angle)
    stripes = 40 * np.sin(2 * math.pi * along / wavelength + phase)
    noise = of_image.normal(0, 15, (height, width, 3))
    pixels: Pixels = np.clip(colour + stripes[:, :, None] + noise, 0, 255).astype(np.uint8)
    return pixels
