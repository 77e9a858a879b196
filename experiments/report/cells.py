"""Tables of a page: cells that know how they sort and which runs they come from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from experiments.analysis.measuring.quantities import MINUS, NOTHING

_NUMBER = re.compile(r"^(?:median )?([+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?)")
_NEVER = ("miss", "never", "diverged", "none", "not computable", "∞")


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: what stands in it.
        sort: what it sorts by; "" sorts last, whichever way.
        sources: ids of the blocks on the page that list its runs; () for what is no number.
        swatch: a line and marker in front of the text.
        href: a link on the text.
        note: a second, smaller line.
        code: whether the text is a command.
    """

    text: str | Markup
    sort: str = ""
    sources: tuple[str, ...] = ()
    swatch: str = ""
    href: str = ""
    note: str | Markup = ""
    code: bool = False


@dataclass(frozen=True)
class HtmlTable:
    """A table.

    Attributes:
        caption: what it shows.
        columns: headers.
        rows: one tuple of cells a row; the first cell is the row's header.
        name: id on the page.
        numeric: indices of the columns that are set right-aligned.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    name: str = ""
    numeric: frozenset[int] = field(default_factory=frozenset)


def number_cell(text: str, sources: Sequence[str], note: str | Markup = "") -> Cell:
    """A cell with a number, as `analysis.quantities` prints it.

    Args:
        text: such as "67.80 ± 0.31", "miss 1/3" or "–".
        sources: ids of the blocks that list its runs.
        note: a second line.
    """
    return Cell(text, sort_key(text), () if text == NOTHING else tuple(sources), note=note)


def sort_key(text: str) -> str:
    """What a cell sorts by: its first number; a miss is infinite; "" where there is none."""
    plain = text.replace(MINUS, "-")
    found = _NUMBER.match(plain)
    if found:
        return found[1].replace(",", "").lstrip("+")
    if plain.startswith("-∞"):
        return "-Infinity"
    return "Infinity" if plain.startswith(_NEVER) else ""
