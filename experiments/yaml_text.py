"""YAML that somebody gives: plain values, no key twice, and no more of them than a machine holds.

`a: &a [1, 1]`, `b: &b [*a, *a]`, `c: [*b, *b]`, ... doubles with every line: some hundred bytes
become billions of nodes as soon as something walks through them. Brackets in brackets end the stack
of whatever builds them. Both are told from the parser's events, before anything is built.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from experiments.errors import UserError, one_line
from experiments.given import read_text, visible

#: A run's config has some hundred.
LIMIT_NODES = 1_000_000
#: Of lists and mappings in each other.
MOST_LEVELS = 500
# The C loader is ten times as fast and builds the same plain objects.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(path: Path) -> Any:
    """Read a YAML file of plain values, in which no key stands twice.

    Raises:
        FileNotFoundError: there is none.
        UserError: it cannot be read.
    """
    text = read_text(path)
    refuse_bomb(text, path)
    try:
        return yaml.load(text, Loader=_Strict if _takes(text) else _SlowStrict)
    # What stands in a scalar decides which constructor meets it: dates alone raise three kinds.
    except Exception as error:
        reason = one_line(error) or type(error).__name__
        raise UserError(f"{path} is not valid YAML ({reason})") from error


def refuse_bomb(text: str, source: Path | str) -> None:
    """Check how deep a text is nested, and how much its aliases stand for.

    Args:
        text: YAML, or what is taken for it; errors are left to whoever reads it.
        source: what to call it in a message.

    Raises:
        UserError: it is nested more than `MOST_LEVELS` deep, would become more than `LIMIT_NODES`
            nodes, or contains itself.
    """
    # Each level opens a bracket or begins further to the right: where there are few, none is deep.
    widest = max(map(len, text.splitlines()), default=0)
    shallow = text.count("[") + text.count("{") + widest <= MOST_LEVELS
    if shallow and ("&" not in text or "*" not in text):
        return
    try:
        nodes = _expanded(yaml.parse(text, Loader=_Loader if _takes(text) else yaml.SafeLoader))
    except yaml.YAMLError:
        return
    except RecursionError as error:
        raise UserError(
            f"{source} is nested more than {MOST_LEVELS} levels deep: write it flatter"
        ) from error
    if nodes > LIMIT_NODES:
        raise UserError(
            f"{source} has aliases (*name) that contain themselves or stand for more than "
            f"{LIMIT_NODES:,} values: write out what is meant"
        )


@cache
def refuse_bombs_once(folder: Path) -> None:
    """Check every YAML file under a folder, the first time: a campaign composes many configs.

    Raises:
        UserError: see `refuse_bomb`.
    """
    for path in visible(folder, "**/*.yaml"):
        try:
            text = read_text(path)
        except (OSError, UserError):
            continue  # told by whoever reads it
        refuse_bomb(text, path)


def _takes(text: str) -> bool:
    """Whether the C loader takes a text: not one with bytes of a path that are no UTF-8."""
    return "\\ud" not in text.lower()


def _expanded(events: Iterable[yaml.Event]) -> int:
    """Nodes of the documents with every alias written out; beyond the limit where one is open.

    Raises:
        RecursionError: one is nested too deeply.
    """
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
            if len(inside) > MOST_LEVELS + 1:
                raise RecursionError
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, nodes = inside.pop()
            if anchor is not None:
                sizes[anchor] = nodes
            add(nodes)
    return inside[0][1]


class _UniqueKeys:
    """Refuses a key that stands twice: the first one would be lost without a word."""

    def construct_mapping(self: Any, node: yaml.MappingNode, deep: bool = False) -> Any:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    line = key_node.start_mark.line + 1
                    raise yaml.constructor.ConstructorError(
                        None, None, f"line {line}: the key {key!r} stands twice"
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)  # type: ignore[misc]


class _Strict(_UniqueKeys, _Loader):  # type: ignore[misc]
    pass


class _SlowStrict(_UniqueKeys, yaml.SafeLoader):
    pass
