"""Files that hold either the old or the new content, whatever happens while they are written.

The new content goes to a temporary file in the same folder, reaches the disk (`fsync`), takes the
final name (`rename`, atomic within a file system), and the folder's entry reaches the disk too.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

TEMPORARY_SUFFIX = ".tmp"
# What file systems say (CIFS, FUSE) that cannot write out a folder, or need not.
_NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
_CHUNK_BYTES = 1 << 22


def write_atomically(path: Path, content: str) -> None:
    """Replace a text file by new content, UTF-8 encoded.

    Args:
        path: the file; its folder exists.
        content: the whole new content.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    # A name of a file may hold bytes that are no UTF-8.
    encoded = content.encode("utf-8", "backslashreplace")
    write_durably(temporary, lambda handle: handle.write(encoded))
    publish(temporary, path)


def write_durably(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file and return only once its bytes are on the disk.

    Args:
        path: the file; what was in it is lost.
        write: writes the content into the open file.
    """
    with open(path, "wb") as handle:
        write(handle)
        handle.flush()
        os.fsync(handle.fileno())


def publish(temporary: Path, final: Path) -> None:
    """Give a finished file its final name, in one step that survives a power cut.

    Args:
        temporary: a file that is complete and on the disk.
        final: its name from now on, in the same folder.
    """
    os.replace(temporary, final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise
    finally:
        os.close(folder)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files and folders that a killed process left in a folder."""
    for leftover in folder.glob(f"*{TEMPORARY_SUFFIX}"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    sha = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            sha.update(chunk)
    return sha.hexdigest()
