"""What a split of a data set is to the loader and to the preparation, whatever its layout.

Images are numbered as they are stored. The order that runs use is another one (`canonical_order`):
by class, then by name, so that every layout of one data set gives the same batches.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from experiments.data.encoded import DecodeError
from experiments.data.imagenet.pixels import Pixels, resized_pixels
from experiments.data.imagenet.settings import Resize

Labels = npt.NDArray[np.int64]
#: Names without folder and ending, as bytes (dtype S): a million Python strings would be copied
#: into every worker as soon as it counts its references to them.
Keys = npt.NDArray[np.bytes_]

#: Hugging Face appends the class to the original name: n01440764_10026_n01440764.JPEG
CLASS_SUFFIX = re.compile(rb"_n\d{8}$")
#: Seconds to wait before a file that could not be read is tried again.
RETRY_DELAYS_S = (0.1, 1.0)


class UnreadableError(Exception):
    """An image that cannot be used.

    Attributes:
        name: the file, or the row of a file.
        reason: in one line.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


class Split(Protocol):
    """The images of one split, ready for augmentation."""

    @property
    def labels(self) -> Labels:
        """(n,) int64, of the images as they are stored."""
        ...

    @property
    def keys(self) -> Keys:
        """(n,) what the images are called, whatever the layout."""
        ...

    def pixels(self, index: int) -> Pixels:
        """The resized image number `index`: (h, w, 3) uint8.

        Raises:
            UnreadableError: the image is damaged or cannot be read.
        """
        ...


class EncodedSplit(Protocol):
    """The images of one split as they came: JPEGs, mostly."""

    @property
    def labels(self) -> Labels:
        """(n,) int64, of the images as they are stored."""
        ...

    @property
    def keys(self) -> Keys:
        """(n,) what the images are called, whatever the layout."""
        ...

    def name(self, index: int) -> str:
        """The file (and row) of image number `index`, for people."""
        ...

    def read(self, index: int) -> bytes:
        """The encoded image number `index`.

        Raises:
            OSError: it cannot be read.
            DecodeError: there is nothing to read.
        """
        ...


class ResizedSplit:
    """`Split` over encoded images, each decoded and resized whenever it is asked for."""

    def __init__(self, encoded: EncodedSplit, kind: Resize, size: int) -> None:
        """Say how to resize; see `pixels.resized_shape`."""
        self.encoded = encoded
        self.labels, self.keys = encoded.labels, encoded.keys
        self._kind: Resize = kind
        self._size = size

    def pixels(self, index: int) -> Pixels:
        """See `Split.pixels`."""
        try:
            content = with_retries(lambda: self.encoded.read(index))
            return resized_pixels(content, self._kind, self._size)
        except (OSError, DecodeError) as error:
            raise UnreadableError(self.encoded.name(index), str(error)) from error


def with_retries(read: Callable[[], bytes]) -> bytes:
    """Read; where that fails, as a network's file system may for a moment, try again.

    Raises:
        OSError: of the last attempt.
    """
    for delay_s in RETRY_DELAYS_S:
        try:
            return read()
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(delay_s)
    return read()


def as_key(file_name: str) -> bytes:
    """What an image is called in every layout: its name without folder, ending and class."""
    stem = file_name.rsplit("/", 1)[-1].rsplit(".", 1)[0]
    return CLASS_SUFFIX.sub(b"", stem.encode("utf-8", "surrogateescape"))


def canonical_order(split: Split) -> Labels:
    """Storage numbers (n,) in the order that runs use: by class, then by name."""
    order: Labels = np.lexsort((split.keys, split.labels)).astype(np.int64)
    return order
