"""Scikit-learn's handwritten digits: 1,797 real images of 8 x 8 pixels, ten classes, embedded.

The split is fixed and independent of any seed: within each class, in the order of the file, every
fifth image is a test image. That gives 1,442 training and 355 test images with equal shares of
the classes. (The 13 writers occur on both sides, so this is an easier test than UCI's own.)
"""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

from experiments.data.batches import ImageSet, RawData

TEST_EVERY = 5
PIXEL_MAX = 16


def load() -> RawData:
    """The digits, split.

    Returns:
        Images (n, 1, 8, 8) uint8 with pixels 0 to 16.
    """
    digits = load_digits()
    images = digits.images.astype(np.uint8)[:, None]
    labels = digits.target.astype(np.int64)
    is_test = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        is_test[np.flatnonzero(labels == label)[TEST_EVERY - 1 :: TEST_EVERY]] = True
    return RawData(
        train=ImageSet(images[~is_test], labels[~is_test]),
        test=ImageSet(images[is_test], labels[is_test]),
        num_classes=10,
        pixel_max=PIXEL_MAX,
    )
