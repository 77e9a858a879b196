"""Decoded images kept between runs, because decoding 60,000 of them takes many seconds.

One uncompressed .npz (a zip of .npy arrays, so that every entry has a CRC) per split, named after
the data set and a digest of the source files' names, sizes and modification times. The cache can
be deleted at any time; a cache that cannot be read or written costs time and a warning, no more.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from experiments.data.arrays import read_arrays
from experiments.data.batches import ImageSet
from experiments.given import MALFORMED, user_path
from experiments.runs.atomic import replace_file

logger = logging.getLogger(__name__)

# Raised when the content of a cache file changes its meaning.
FORMAT = 1


def folder(configured: str | None) -> Path:
    """Where decoded images are kept.

    Args:
        configured: `dataset.cache_dir`; None for `mlbfgs` in the user's cache folder
            (XDG_CACHE_HOME, or ~/.cache).
    """
    if configured is not None:
        return user_path(configured, "dataset.cache_dir")
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "mlbfgs"


def load_or_make(
    cache_dir: Path, name: str, sources: Sequence[Path], make: Callable[[], ImageSet]
) -> ImageSet:
    """Take the images from the cache, or make them and put them there.

    Args:
        cache_dir: the cache's folder, made where it is absent.
        name: the first part of the file's name.
        sources: the files that `make` reads.
        make: decodes them.
    """
    path = cache_dir / f"{name}-{_digest(sources)}.npz"
    cached = _read(path)
    if cached is not None:
        return cached
    images = make()
    _write(path, images)
    return images


def _digest(sources: Sequence[Path]) -> str:
    lines = [f"format {FORMAT}"]
    for source in sources:
        status = source.stat()
        lines.append(f"{source.name} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _read(path: Path) -> ImageSet | None:
    """The cached images, or None where there are none that can be read."""
    try:
        arrays = read_arrays(path)
        images, labels = arrays["images"], arrays["labels"]
        if (images.dtype, labels.dtype) != (np.uint8, np.int64) or images.ndim != 4:
            raise ValueError("other arrays than images and labels")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"{len(images)} images, labels of shape {labels.shape}")
        return ImageSet(images, labels)
    except FileNotFoundError:
        return None
    except MALFORMED as error:
        logger.warning("cache file %s cannot be read (%s); decoding again", path, error)
        return None


def _write(path: Path, images: ImageSet) -> None:
    """Keep the images; no reader ever sees half a file, and a full disk costs a warning."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda file: np.savez(file, images=images.images, labels=images.labels))
    except OSError as error:
        logger.warning("decoded images cannot be kept in %s (%s)", path.parent, error)
