"""One optimizer, one colour, one marker, in every figure of the project.

The colours are those of Okabe and Ito, which readers with any common colour blindness can tell
apart; the markers say the same thing again for a black-and-white print.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    """How an optimizer is drawn."""

    colour: str
    marker: str


LOOKS = {
    "sgd": Look("#0072B2", "o"),  # blue
    "adam": Look("#E69F00", "s"),  # orange
    "slimqn": Look("#009E73", "^"),  # bluish green
    "mlbfgs": Look("#D55E00", "D"),  # vermilion
    "kfac": Look("#CC79A7", "v"),  # reddish purple
    "slbfgs": Look("#56B4E9", "P"),  # sky blue
    "adamw": Look("#000000", "X"),
}
_OTHERS = (
    Look("#999999", "<"),
    Look("#F0E442", ">"),
    Look("#56B4E9", "h"),
    Look("#CC79A7", "p"),
    Look("#000000", "*"),
)
# Several configs of one optimizer share its colour and differ in the line.
LINES: tuple[str | tuple[int, tuple[int, ...]], ...] = (
    "-",
    (0, (5, 2)),
    (0, (1, 1)),
    (0, (4, 1, 1, 1)),
)


def look(optimizer: str) -> Look:
    """Colour and marker of an optimizer; an unknown one gets a fixed one by its name."""
    if optimizer in LOOKS:
        return LOOKS[optimizer]
    return _OTHERS[zlib.crc32(optimizer.encode()) % len(_OTHERS)]
