"""What a user gives: paths, folders and text files, whose faults become one line that names them.

A file that somebody gives may be a folder, a pipe, a device, of another encoding, nested without
end, or carry a key twice. All of that is told here, so that nobody who reads a file has to keep a
list of what can go wrong. An absent file remains a `FileNotFoundError`, because most readers have
something better to say.
"""

from __future__ import annotations

import io
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, cast

from experiments.errors import UserError, one_line

#: What is met by code that takes values out of a file whose content has another shape.
MALFORMED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
#: Larger than the records of the longest run, and far smaller than a machine's memory.
MOST_BYTES = 1 << 30


def user_path(text: str | Path, where: str = "") -> Path:
    """A path as a user writes it, with `~` and `~name` expanded.

    Args:
        text: the path.
        where: the key or option it stands in, for the message.

    Raises:
        UserError: there is no such user, or the text can be no path.
    """
    named = f"{where} = " if where else ""
    if "\0" in str(text):
        raise UserError(f"{named}{str(text)!r} is no path: it holds a NUL character")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{named}{str(text)!r} begins with the home of a user who does not exist: write the "
            "whole path, or ./~... for a folder of that name"
        ) from error


def visible(folder: Path, pattern: str) -> list[Path]:
    """Files and folders that a pattern matches, sorted, without those whose name begins with a dot.

    Copies made on a Mac carry a `._name` beside every `name`.
    """
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def is_number(value: object) -> bool:
    """Whether a value that was read is a finite number, and no truth value."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -1e300 < value < 1e300  # nor an integer that no float holds


def read_text(path: Path) -> str:
    """Read a UTF-8 file, with or without a byte order mark.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is no plain file, too large, or no UTF-8 text; the message names it.
    """
    try:
        with open_plain(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig") as text:
            return text.read()
    except FileNotFoundError:
        raise
    except NotADirectoryError as error:  # a part of the path is a file: no less absent
        raise FileNotFoundError(error.errno, error.strerror, str(path)) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or one_line(error)})") from error
    except ValueError as error:  # a NUL in the name, too, is one
        raise UserError(f"{path} is no UTF-8 text ({one_line(error)})") from error


def open_plain(path: Path) -> BinaryIO:
    """Open a file to read its bytes; a pipe or device is refused instead of waited for.

    Raises:
        OSError: it cannot be opened.
        UserError: it is no plain file, or larger than `MOST_BYTES`.
    """
    # Without O_NONBLOCK, a pipe that nobody writes to would be waited for.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(handle)
        if stat.S_ISDIR(status.st_mode):
            raise UserError(f"{path} is a folder, a file is needed")
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path} is no plain file but a pipe, a socket or a device")
        if status.st_size > MOST_BYTES:
            raise UserError(
                f"{path} has {status.st_size} bytes, more than the {MOST_BYTES} that a file of "
                "this kind can have"
            )
        return cast(BinaryIO, os.fdopen(handle, "rb"))
    except BaseException:
        os.close(handle)
        raise


def parse_json(text: str | bytes) -> Any:
    """Read JSON, without its two traps: a key that stands twice, and numbers that are none.

    Raises:
        ValueError: it is no JSON, or one of the two.
    """
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(path: Path) -> Any:
    """Read a JSON file; see `parse_json`.

    Raises:
        FileNotFoundError: there is none.
        UserError: it cannot be read.
    """
    try:
        return parse_json(read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({one_line(error)})") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number in JSON")
