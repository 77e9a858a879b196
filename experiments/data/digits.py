"""Handwritten digits: 1,797 real images of 8 x 8 pixels, ten classes, embedded.

`digits.npz` holds the test set of "Optical Recognition of Handwritten Digits" (E. Alpaydin, C.
Kaynak, UCI Machine Learning Repository 1998, doi:10.24432/C50P49, CC BY 4.0) in the order of
scikit-learn's `load_digits`: images (1797, 8, 8) uint8 and labels (1797,) uint8.

The split is fixed and independent of any seed: within each class, in the order of the file, every
fifth image is a test image. That gives 1,442 training and 355 test images with equal shares of
the classes. (The 13 writers occur on both sides, so this is an easier test than UCI's own.)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.data.batches import ImageSet, RawData

FILE = Path(__file__).with_suffix(".npz")
TEST_EVERY = 5
PIXEL_MAX = 16


def load() -> RawData:
    """The digits, split.

    Returns:
        Images (n, 1, 8, 8) uint8 with pixels 0 to 16.
    """
    with np.load(FILE) as digits:
        images = digits["images"][:, None]
        labels = digits["labels"].astype(np.int64)
    is_test = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        is_test[np.flatnonzero(labels == label)[TEST_EVERY - 1 :: TEST_EVERY]] = True
    return RawData(
        train=ImageSet(images[~is_test], labels[~is_test]),
        test=ImageSet(images[is_test], labels[is_test]),
        num_classes=10,
        pixel_max=PIXEL_MAX,
    )
