"""From an encoded image to the resized RGB pixels that augmentation starts from.

JPEGs of one or three components are decoded by simplejpeg, whose pixels are those of torchvision's
decoder in three quarters of its time (measured), and resized by torch's uint8 code, which is faster
than Pillow's; whatever else is found under the name of an image (CMYK JPEGs, damaged ones, PNGs,
16-bit images, palettes) is left to Pillow. The resize is bilinear with antialiasing, as
torchvision's on a Pillow image, from which it differs by at most one level of 255 (measured).

Shapes: h, w of the image; images are (h, w, 3) uint8, C-contiguous.
"""

from __future__ import annotations

import contextlib
import io

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from experiments.data.encoded import DecodeError, check_scans, check_size, opened
from experiments.data.imagenet.settings import Resize

Pixels = npt.NDArray[np.uint8]

JPEG_START = b"\xff\xd8"
# Colours of JPEGs that become the same RGB in every decoder; of CMYK each makes its own.
DECODED_SPACES = ("YCbCr", "Gray", "RGB")
# Modes in which Pillow keeps more than 8 bits of a grey image.
DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def decode(content: bytes) -> Tensor:
    """Decode an image to RGB.

    Grey images get three equal channels, CMYK and palettes are converted, transparency is dropped,
    16-bit images keep their upper 8 bits. The orientation that a camera noted is not applied.

    Args:
        content: the bytes of the file.

    Returns:
        (3, h, w) uint8.

    Raises:
        DecodeError: empty, truncated, corrupt or too large, or no image.
    """
    if not content:
        raise DecodeError("the file is empty")
    if content.startswith(JPEG_START):
        # On anything odd in the file it gives up; Pillow says what is truly damaged.
        with contextlib.suppress(ValueError, DecodeError):
            return torch.from_numpy(decode_jpeg(content)).permute(2, 0, 1)
    return torch.from_numpy(_decode_with_pillow(content)).permute(2, 0, 1)


def decode_jpeg(content: bytes) -> Pixels:
    """Decode a JPEG of one or three components to (h, w, 3).

    Raises:
        ValueError: of four components, or not as the standard wants it.
        DecodeError: of too many pixels, or scans.
    """
    height, width, space = simplejpeg.decode_jpeg_header(content)[:3]
    if space not in DECODED_SPACES:
        raise ValueError(f"colours in {space}")
    check_size(height, width)
    check_scans(content)
    pixels: Pixels = simplejpeg.decode_jpeg(content)
    return pixels


def _decode_with_pillow(content: bytes) -> Pixels:
    with opened(content) as image:
        if image.mode in DEEP_MODES:
            deep = np.asarray(image).astype(np.int64)
            grey = np.clip(deep >> 8, 0, 255).astype(np.uint8)
            return np.repeat(grey[:, :, None], 3, axis=2)
        # a copy, because Pillow's own memory may not be written
        return np.array(image.convert("RGB"))


def resized_shape(height: int, width: int, kind: Resize, size: int) -> tuple[int, int]:
    """Height and width after the resize.

    Args:
        height: of the original.
        width: of the original.
        kind: `square`, to size x size whatever the aspect (as both papers print it); `shorter`,
            the shorter side to `size`, the longer one in proportion, rounded down as torchvision
            does.
        size: pixels.
    """
    if kind == "square":
        return size, size
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def resize(image: Tensor, height: int, width: int) -> Pixels:
    """Resize (3, h, w) uint8 to (height, width, 3), bilinear with antialiasing."""
    pixels = image.permute(1, 2, 0).contiguous()
    if tuple(image.shape[1:]) != (height, width):
        # A batch of one whose strides say channels last, which image[None] do not: torch then keeps
        # the three bytes of a pixel together, with the same result in half the time.
        batch = pixels[None].permute(0, 3, 1, 2)
        resized = interpolate(
            batch, size=(height, width), mode="bilinear", antialias=True, align_corners=False
        )
        pixels = resized[0].permute(1, 2, 0).contiguous()
    return pixels.numpy()


def resized_pixels(content: bytes, kind: Resize, size: int) -> Pixels:
    """Decode an image and resize it: what both augmentation and the prepared form start from.

    Raises:
        DecodeError: see `decode`.
    """
    image = decode(content)
    shape = resized_shape(image.shape[1], image.shape[2], kind, size)
    # The longer side of a narrow strip grows with the shorter one.
    check_size(*shape, what="resized, an image")
    return resize(image, *shape)


def encode_jpeg(pixels: Pixels, quality: int) -> bytes:
    """Encode (h, w, 3) as a JPEG with chroma at half resolution (4:2:0), as most originals are."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()
