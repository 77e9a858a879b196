"""Files and folders that this project writes: whole or not at all, and never through a link.

New content goes to a temporary file in the same folder, reaches the disk (`fsync`), takes the final
name (`rename`, atomic within a file system), and the folder's entry reaches the disk too. A writer
that fails removes its temporary file; what a killed one left is removed by the next.

A link in the place of a file is replaced, or refused where the file is written in place; a link in
the place of a folder is refused. Modes are those that the user's umask asks for.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from experiments.errors import UserError, one_line

TEMPORARY_SUFFIX = ".tmp"
#: How a full disk, a full quota and a limit of file sizes are told.
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
# Something else than a file, or than a folder, has the name.
_ODD = (errno.ELOOP, errno.EINVAL, errno.EISDIR, errno.ENOTDIR, errno.EEXIST)
# What file systems say (CIFS, FUSE) that cannot write out a folder, or need not.
_NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
_TOKEN = r"(\.[0-9a-f]{8})?"
_CHUNK_BYTES = 1 << 22


class UnwritableError(UserError):
    """A file or folder cannot be written.

    Args:
        path: what was to be written.
        error: what the system said.

    Attributes:
        forbidden: whether this user may not write there at all.
        reason: what the system said, in words.
    """

    def __init__(self, path: Path, error: OSError):
        self.forbidden = error.errno in _FORBIDDEN
        ways = {**dict.fromkeys(NO_SPACE, "make room"), **dict.fromkeys(_ODD, "move it away")}
        way = f"{ways[error.errno]}, or " if error.errno in ways else ""
        self.reason = error.strerror or one_line(error)
        self._arguments = path, error
        super().__init__(f"cannot write {path}: {self.reason}; {way}name another folder")

    def __reduce__(self) -> tuple[type[UnwritableError], tuple[Path, OSError]]:
        """What makes the same error again in the process that waits for this one."""
        return UnwritableError, self._arguments


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file by new content.

    Args:
        path: the file; its folder exists.
        content: the whole new content; text is encoded as UTF-8.

    Raises:
        UnwritableError: the disk is full, or the folder cannot be written; nothing is changed.
    """
    # A name of a file may hold bytes that are no UTF-8.
    encoded = content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")
    try:
        replace_file(path, lambda handle: handle.write(encoded))
    except OSError as error:
        raise UnwritableError(path, error) from error


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace a file by what a function writes.

    Several processes may do so at once: each has a temporary file of its own, held by a lock, so
    that the next writer knows which of them nobody works on any more.

    Args:
        path: the file; its folder exists.
        write: writes the content into the open file.

    Raises:
        OSError: the old content is still there, and no temporary file.
    """
    _remove_abandoned(path)
    temporary, descriptor = _temporary(path)
    guard = os.dup(descriptor)  # holds the lock until the file has its name
    try:
        _fill(descriptor, write)
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(guard)


def write_durably(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a new file and return only once its bytes are on the disk.

    Args:
        path: the file; a file or link that is there is removed first.
        write: writes the content into the open file.

    Raises:
        OSError: the file is then gone.
    """
    path.unlink(missing_ok=True)
    descriptor = _create(path)
    try:
        _fill(descriptor, write)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


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


def make_folder(path: Path, *, below: Path | None = None) -> Path:
    """Make a folder, and those above it, unless they are there.

    Args:
        path: the folder.
        below: a folder above it; none of those in between may be a link, nor may `path`. None:
            all of them may be, because the user named them.

    Returns:
        The folder.

    Raises:
        UserError: a link is among them, or the folder cannot be made.
    """
    if below is not None:
        refuse_links(path, below)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnwritableError(path, error) from error
    return path


def refuse_links(path: Path, below: Path) -> None:
    """Refuse to write into a folder that is reached through a link.

    Args:
        path: the folder; it may not exist.
        below: a folder above it, which itself may be a link.

    Raises:
        UserError: `path` or a folder between the two is a link.
    """
    for folder in (path, *path.parents):
        if folder == below:
            return
        if folder.is_symlink():
            raise UserError(
                f"{folder} is a link, and nothing is written through links below {below}: put a "
                f"folder in its place, or name the folder that it leads to in place of {below}"
            )


def open_own(path: Path, flags: int) -> int:
    """Open a file that is written in place, but for links, pipes and devices.

    Args:
        path: the file; one that is made has the mode that the umask asks for.
        flags: of `os.open`.

    Returns:
        A file descriptor.

    Raises:
        OSError: the file cannot be opened, or is no plain file with one name.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(errno.ELOOP, "it is a link", str(path)) from error
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and found.st_nlink <= 1:
        return descriptor
    os.close(descriptor)
    what = "has other names (hard links)" if stat.S_ISREG(found.st_mode) else "is no plain file"
    raise OSError(errno.EINVAL, f"it {what}", str(path))


def remove(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link but not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path, names: str) -> None:
    """Remove the temporary files and folders that a killed process left in a folder.

    Args:
        folder: one that this process holds the lock of.
        names: a regular expression for the final names; temporary files of others stay.
    """
    pattern = re.compile(f"(?:{names}){_TOKEN}{re.escape(TEMPORARY_SUFFIX)}")
    for path in list(folder.iterdir()):
        if pattern.fullmatch(path.name):
            remove(path)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    sha = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            sha.update(chunk)
    return sha.hexdigest()


class _Remembering(io.FileIO):
    """A file that keeps what the system said; libraries raise errors of their own after it."""

    failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise


def _fill(descriptor: int, write: Callable[[BinaryIO], object]) -> None:
    """Write into a new file, bring it to the disk and close it."""
    raw = _Remembering(descriptor, "wb")
    handle = io.BufferedWriter(raw)
    try:
        write(handle)
        handle.flush()
        os.fsync(raw.fileno())
    except Exception as error:
        if raw.failure is None or raw.failure is error:
            raise
        raise raw.failure from None
    finally:
        with suppress(OSError):  # what could not be written is still in its buffer
            handle.close()


def _create(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def _temporary(path: Path) -> tuple[Path, int]:
    """A new temporary file for `path`, and its descriptor, which holds its lock."""
    while True:
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
        descriptor = _create(temporary)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = os.fstat(descriptor).st_nlink == 0
        except BlockingIOError:
            taken = True
        except OSError:  # a file system without locks
            taken = False
        if not taken:
            return temporary, descriptor
        os.close(descriptor)  # another writer took it for abandoned before it was locked


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary files of this file whose writers are gone: nobody holds their lock."""
    pattern = re.compile(f"{re.escape(path.name)}{_TOKEN}{re.escape(TEMPORARY_SUFFIX)}")
    for entry in list(path.parent.iterdir()):
        if not pattern.fullmatch(entry.name):
            continue
        with suppress(OSError):
            descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                entry.unlink()
            finally:
                os.close(descriptor)
