"""One optimizer, one colour, one marker, in every figure of the project; one look per arm too.

The colours are those of Okabe and Ito, which readers with any common colour blindness can tell
apart; for their yellow, too faint as a line on white, stands the wine of Tol's muted scheme. The
markers say the same thing again for a black-and-white print.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from experiments.analysis.measuring.groups import Group
from experiments.contestants import CONFIG_DIR, arms
from experiments.yaml_text import read_yaml


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
_GREY = "#999999"
_OTHERS = (
    Look(_GREY, "<"),
    Look("#882255", ">"),
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

    An arm's look follows from `configs/` alone: the arms of its experiment, and the figures that
    its config names (all arms together where it names none), in each of which every contestant has
    a colour and a marker of its own as long as there are enough. An arm that is named like an
    optimizer looks like it. An unknown name gets a fixed look by its spelling.

    Args:
        contestant: name of the arm, or of the optimizer.
        experiment: name of the experiment, for an arm.
    """
    if contestant in LOOKS:
        return LOOKS[contestant]
    if contestant in arms(experiment):
        return _looks_of_arms(experiment)[contestant]
    return _OTHERS[zlib.crc32(contestant.encode()) % len(_OTHERS)]


def figures(experiment: str) -> dict[str, list[str]]:
    """Contestants of each figure that the config of an experiment names; empty where none is."""
    path = CONFIG_DIR / "experiment" / f"{experiment}.yaml"
    if not path.is_file():
        return {}
    content = read_yaml(path)
    return dict(content["experiment"].get("figures") or {})


@cache
def _looks_of_arms(experiment: str) -> dict[str, Look]:
    """A look for each arm that is not named like an optimizer; no two are equal."""
    names = arms(experiment)
    shown = figures(experiment) or {"all": list(names)}
    # Not the colour of an optimizer that takes part itself, as long as enough are left.
    free = [look.colour for name, look in LOOKS.items() if name not in names]
    colours = [*free, _GREY] if len(free) >= 4 else [look.colour for look in LOOKS.values()]
    looks: dict[str, Look] = {}
    drawn = [name for members in shown.values() for name in members if name in names]
    for arm in dict.fromkeys((*drawn, *names)):
        if arm in LOOKS:
            continue
        together = {name for members in shown.values() if arm in members for name in members}
        known = {**LOOKS, **looks}
        beside = [known[name] for name in together if name in known]
        taken, used = [each.colour for each in beside], [each.colour for each in looks.values()]
        rare = min(map(taken.count, colours))
        colour = _rarest([c for c in colours if taken.count(c) == rare], used)
        free_markers = [m for m in _ARM_MARKERS if Look(colour, m) not in looks.values()]
        looks[arm] = Look(colour, _rarest(free_markers, [each.marker for each in beside]))
    return looks


def _rarest(candidates: Sequence[str], used: Sequence[str]) -> str:
    """The first of those that were used least."""
    return min(candidates, key=used.count)


def look_of(group: Group) -> Look:
    """Colour and marker of a group."""
    return look(group.contestant, group.experiment)
