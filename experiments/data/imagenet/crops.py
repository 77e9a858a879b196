"""Augmentation of one image, from a random stream of its own.

What is drawn for an image depends on the seed, the epoch, what the image is for and its place in
the epoch's order, and on nothing else: neither a resume nor the number of workers changes it. The
numbers come from `random.Random.random`, whose sequence Python promises not to change.

Shapes: images are (h, w, 3) uint8; the crop is (c, c, 3).
"""

from __future__ import annotations

import hashlib
import math
from random import Random

import torch

from experiments.data.imagenet.pixels import Pixels, resize
from experiments.data.imagenet.settings import Augmentation

# Szegedy et al. 2015 ("Going deeper with convolutions", section 6): the part's share of the area
# and its aspect ratio. Ten attempts, then the largest part in the middle, as torchvision does.
PART_AREA = (0.08, 1.0)
PART_ASPECT = (3 / 4, 4 / 3)
PART_ATTEMPTS = 10


def sample_stream(seed: int, epoch: int, place: int, purpose: str) -> Random:
    """The random numbers of one image.

    Args:
        seed: the run's seed.
        epoch: from 0.
        place: of the image in the epoch's order, over all ranks.
        purpose: what the image is for; each purpose has draws of its own.
    """
    digest = hashlib.sha256(f"{purpose}/{seed}/{epoch}/{place}".encode()).digest()
    return Random(int.from_bytes(digest[:8], "little"))


def augment(pixels: Pixels, kind: Augmentation, stream: Random, out: Pixels) -> None:
    """Write an augmented image into `out` (c, c, 3).

    Args:
        pixels: the resized image, no smaller than the crop.
        kind: see `ImageNetSettings.augmentation`.
        stream: of this image.
        out: where to write.
    """
    height, width = pixels.shape[:2]
    size = len(out)
    if kind == "paper":
        top, left = _below(stream, height - size + 1), _below(stream, width - size + 1)
        part = pixels[top : top + size, left : left + size]
    else:
        top, left, part_height, part_width = random_part(height, width, stream)
        chosen = torch.from_numpy(pixels[top : top + part_height, left : left + part_width])
        part = resize(chosen.permute(2, 0, 1), size, size)
    if stream.random() < 0.5:
        # torch mirrors pixels of three bytes eight times as fast as numpy
        torch.from_numpy(out).copy_(torch.from_numpy(part).flip(1))
    else:
        out[...] = part


def centre(pixels: Pixels, out: Pixels) -> None:
    """Write the middle of an image into `out` (c, c, 3): what a network is tested on."""
    size = len(out)
    # rounded as torchvision's CenterCrop does
    top, left = (round((side - size) / 2) for side in pixels.shape[:2])
    out[...] = pixels[top : top + size, left : left + size]


def random_part(height: int, width: int, stream: Random) -> tuple[int, int, int, int]:
    """Choose a part of an image, with the distribution of torchvision's RandomResizedCrop.

    Returns:
        Top, left, height and width of the part.
    """
    low, high = (math.log(aspect) for aspect in PART_ASPECT)
    for _ in range(PART_ATTEMPTS):
        area = height * width * _uniform(stream, *PART_AREA)
        aspect = math.exp(_uniform(stream, low, high))
        part_width, part_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < part_width <= width and 0 < part_height <= height:
            top = _below(stream, height - part_height + 1)
            left = _below(stream, width - part_width + 1)
            return top, left, part_height, part_width
    part_width, part_height = width, height
    if width / height < PART_ASPECT[0]:
        part_height = round(width / PART_ASPECT[0])
    elif width / height > PART_ASPECT[1]:
        part_width = round(height * PART_ASPECT[1])
    return (height - part_height) // 2, (width - part_width) // 2, part_height, part_width


def _uniform(stream: Random, low: float, high: float) -> float:
    return low + (high - low) * stream.random()


def _below(stream: Random, count: int) -> int:
    """A whole number from 0 to count - 1."""
    return int(stream.random() * count)
