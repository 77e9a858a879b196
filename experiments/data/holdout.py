"""A part of the training images held out, to select settings on: it takes the test set's place."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from experiments.data.batches import RawData, balanced
from experiments.data.randomness import stream
from experiments.errors import UserError

Places = npt.NDArray[np.int64]


def hold_out(raw: RawData, count: int) -> RawData:
    """Move training images into the place of the test images, which are dropped.

    Which ones depends on the data set and `count` alone, not on the run's seed: all runs of a
    search are judged on the same images. The classes have equal shares, up to one image.

    Args:
        raw: the data set as it was loaded.
        count: images to hold out.

    Returns:
        The data set with the other training images, in their old order, and the held-out ones.

    Raises:
        UserError: there are not so many training images.
    """
    kept, held = hold_out_places(raw.train.labels, count)
    return replace(raw, train=raw.train.at(kept), test=raw.train.at(held))


def hold_out_places(labels: Places, count: int) -> tuple[Places, Places]:
    """Choose the images to hold out.

    Args:
        labels: (n,) int64, of the training images.
        count: images to hold out.

    Returns:
        The places of the images that are kept and of those that are held out, both sorted.

    Raises:
        UserError: there are not so many training images.
    """
    total = len(labels)
    if not 1 <= count < total:
        raise UserError(
            f"dataset.holdout = {count} must be 1 to {total - 1}: there are {total} training images"
        )
    order = torch.randperm(total, generator=stream(0, 0, "holdout")).numpy()
    held = np.sort(order[balanced(labels[order], count)])
    return np.setdiff1d(np.arange(total), held), held
