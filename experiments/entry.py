"""The door of every command: what it says, and how a mistake of the user leaves it.

A mistake becomes one line and exit code 2, be it a `UserError` or the system's refusal of a path
that the user named. Output never decides what a command does: a reader that closed the pipe, a full
disk behind `>` and a terminal without the characters of a text change what is seen, not what is run
or written.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO, cast

from experiments.errors import UserError, one_line

USER_ERROR = 2

Main = Callable[..., int]


def entry(main: Main) -> Main:
    """Make a function the main function of a command.

    Args:
        main: takes the arguments of the command line, or None for those of the process; returns
            the exit code.

    Returns:
        The same function; mistakes of the user are told in one line and give 2.
    """

    @functools.wraps(main)
    def run(arguments: Sequence[str] | None = None, *rest: Any, **named: Any) -> int:
        with steady_output():
            try:
                return main(arguments, *rest, **named)
            except (UserError, OSError) as error:
                tell(error)
                return USER_ERROR

    return run


def tell(error: Exception | str) -> None:
    """Say in one line on standard error what was wrong."""
    print(f"error: {reason(error)}", file=sys.stderr)


def reason(error: Exception | str) -> str:
    """What was wrong, in one line; of an error of the system with the file that it is about."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        name = os.fsdecode(error.filename) if not isinstance(error.filename, int) else ""
        return one_line(f"{name!r} cannot be used ({error.strerror}): name another path")
    return one_line(error) or type(error).__name__


@contextmanager
def steady_output() -> Iterator[None]:
    """Let nothing that happens to standard output or standard error end what runs inside."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _steady(stream)) for stream in before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before


def _steady(stream: Any) -> Any:
    # None where the process was started without the stream.
    return stream if stream is None or isinstance(stream, _SteadyStream) else _SteadyStream(stream)


class _SteadyStream:
    """A text stream whose writes cannot fail.

    Characters that its encoding does not have are written as escapes. After an error of the system
    the rest goes nowhere, that of child processes too.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        shown = text.encode(encoding, "backslashreplace").decode(encoding, "replace")
        try:
            self._stream.write(shown)
        except (OSError, ValueError) as error:  # a closed stream raises the latter
            self._silence(error)
        return len(text)

    def writelines(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._silence(error)

    def _silence(self, error: Exception) -> None:
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(nowhere, self._stream.fileno())
            finally:
                os.close(nowhere)
        except (OSError, ValueError):  # no stream of the system
            return
        if self is sys.stdout and getattr(error, "errno", None) != errno.EPIPE:
            tell(f"standard output cannot be written ({error}): the rest is not shown")
