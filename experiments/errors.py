"""The one exception for mistakes that the user can repair, and the texts of such mistakes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the user: shown as one line, never as a traceback.

    The message names the offending value, the file or key it stands in, and what would do.
    """


def nearest(name: str, valid: Iterable[str]) -> str:
    """Say which valid names there are, the closest one first, for the end of a message.

    Args:
        name: what the user wrote.
        valid: what would have done.

    Returns:
        "did you mean 'x'? (valid: ...)", or only the list where nothing is close.
    """
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    listing = f"valid: {', '.join(names)}"
    return f"did you mean {close[0]!r}? ({listing})" if close else listing


def one_line(text: object) -> str:
    """A text, or what an error says, in one line that a terminal shows as it is.

    Args:
        text: it may hold names of files, and so line ends, escape sequences and bytes that are no
            UTF-8; these are written as escapes.
    """
    words = " ".join(str(text).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
