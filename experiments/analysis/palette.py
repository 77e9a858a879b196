"""One optimizer, one colour, one marker, in every figure of the project; one look per arm too.

The colours are those of Okabe and Ito, which readers with any common colour blindness can tell
apart; the markers say the same thing again for a black-and-white print.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from experiments.analysis.groups import Group
from experiments.contestants import arms


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
# No marker of a named optimizer.
_ARM_MARKERS = ("<", ">", "h", "p", "*", "8", "d", "H")
# Several configs of one contestant share its colour and differ in the line.
LINES: tuple[str | tuple[int, tuple[int, ...]], ...] = (
    "-",
    (0, (5, 2)),
    (0, (1, 1)),
    (0, (4, 1, 1, 1)),
)


def look(contestant: str, experiment: str = "") -> Look:
    """Colour and marker of an optimizer or an arm, whichever others are drawn.

    An arm's look follows from its place among the arms of its experiment in `configs/`; an arm that
    is named like an optimizer looks like it. An unknown name gets a fixed look by its spelling.

    Args:
        contestant: name of the arm, or of the optimizer.
        experiment: name of the experiment, for an arm.
    """
    if contestant in LOOKS:
        return LOOKS[contestant]
    own = [name for name in arms(experiment) if name not in LOOKS]
    if contestant in own:
        # Not the colour of an optimizer that takes part itself, as long as enough are left.
        free = [entry.colour for name, entry in LOOKS.items() if name not in arms(experiment)]
        colours = free if len(free) >= 4 else [entry.colour for entry in LOOKS.values()]
        round_, place = divmod(own.index(contestant), len(colours))
        return Look(colours[place], _ARM_MARKERS[(round_ + place) % len(_ARM_MARKERS)])
    return _OTHERS[zlib.crc32(contestant.encode()) % len(_OTHERS)]


def look_of(group: Group) -> Look:
    """Colour and marker of a group."""
    return look(group.contestant, group.experiment)
