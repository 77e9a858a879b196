"""Encoded images that may come from anywhere: looked at before memory is spent on them.

A few hundred bytes can claim a hundred thousand pixels a side, a hundred passes over them, or a
format whose decoder is a program of its own (PostScript). So the header is read first, and only
formats that photographs come in are opened. Whatever a decoder raises is a damaged image.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, UnidentifiedImageError

from experiments.errors import UserError, one_line

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
#: Height times width; 400 MB of decoded pixels.
MOST_PIXELS = 1 << 27
#: Passes of a progressive JPEG over its pixels; encoders make about ten.
MOST_SCANS = 100
_SCAN = b"\xff\xda"


class DecodeError(Exception):
    """Bytes that are no image; the text says why, in one line."""


def check_size(height: int, width: int, what: str = "an image") -> None:
    """Refuse more pixels than any photograph has, before they are decoded.

    Raises:
        DecodeError: there are more than `MOST_PIXELS`.
    """
    if height < 1 or width < 1 or height * width > MOST_PIXELS:
        raise DecodeError(
            f"{what} of {height} x {width} pixels; from 1 x 1 to {MOST_PIXELS} pixels are decoded"
        )


def check_scans(content: bytes) -> None:
    """Refuse a JPEG that passes over its pixels again and again.

    Raises:
        DecodeError: it has more than `MOST_SCANS` scans.
    """
    scans = content.count(_SCAN)
    if scans > MOST_SCANS:
        raise DecodeError(f"a JPEG of {scans} scans; up to {MOST_SCANS} are decoded")


@contextmanager
def opened(content: bytes) -> Iterator[Image.Image]:
    """Open an image with Pillow; its pixels are decoded where they are asked for, inside.

    Raises:
        DecodeError: it is none, too large, or anything that decoding raised inside.
    """
    try:
        check_scans(content)
        with warnings.catch_warnings():
            # of large images, odd EXIF data and dropped transparency
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                check_size(image.height, image.width)
                yield image
    except (DecodeError, UserError):
        raise
    except UnidentifiedImageError as error:
        # its own text has an address in memory
        raise DecodeError(f"no image in a format of {', '.join(FORMATS)}") from error
    except Exception as error:  # of any of Pillow's decoders, none of which says which it raises
        raise DecodeError(one_line(error) or type(error).__name__) from error
