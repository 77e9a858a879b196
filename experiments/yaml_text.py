"""YAML whose aliases stand for more than a machine can hold, refused before it is built.

`a: &a [1, 1]`, `b: &b [*a, *a]`, `c: [*b, *b]`, ... doubles with every line: some hundred bytes
become billions of nodes as soon as something walks through them.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import yaml

from experiments.errors import UserError

#: A run's config has some hundred.
LIMIT_NODES = 1_000_000
# The C parser is ten times as fast and gives the same events.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def refuse_bomb(text: str, source: Path | str) -> None:
    """Check how much the aliases of a text stand for.

    Args:
        text: YAML, or what is taken for it; errors are left to whoever reads it.
        source: what to call it in a message.

    Raises:
        UserError: it would become more than `LIMIT_NODES` nodes, or contains itself.
    """
    if "&" not in text or "*" not in text:
        return
    try:
        nodes = _expanded(yaml.parse(text, Loader=_LOADER))
    except yaml.YAMLError:
        return
    if nodes > LIMIT_NODES:
        raise UserError(
            f"{source} has aliases (*name) that contain themselves or stand for more than "
            f"{LIMIT_NODES:,} values: write out what is meant"
        )


def refuse_bombs(folder: Path) -> None:
    """Check every YAML file under a folder; see `refuse_bomb`."""
    for path in sorted(folder.rglob("*.yaml")):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # told by whoever reads it
        refuse_bomb(text, path)


@cache
def refuse_bombs_once(folder: Path) -> None:
    """Check a folder, the first time only: a campaign composes hundreds of configs."""
    refuse_bombs(folder)


def _expanded(events: Iterable[yaml.Event]) -> int:
    """Nodes of the documents with every alias written out; beyond the limit where one is open."""
    sizes: dict[str | None, int] = {}
    # anchor and nodes so far of each collection that is open; the first is the whole
    inside: list[tuple[str | None, int]] = [(None, 0)]

    def add(nodes: int) -> None:
        anchor, before = inside[-1]
        inside[-1] = (anchor, before + nodes)

    for event in events:
        if isinstance(event, yaml.AliasEvent):
            add(sizes.get(event.anchor, LIMIT_NODES + 1))
        elif isinstance(event, yaml.ScalarEvent):
            add(1)
            if event.anchor is not None:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            sizes.pop(event.anchor, None)
            inside.append((event.anchor, 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, nodes = inside.pop()
            if anchor is not None:
                sizes[anchor] = nodes
            add(nodes)
    return inside[0][1]
