"""From inputs that work to inputs that may not: odd values, changed trees, changed bytes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

WORDS = ("", "null", "true", "nan", ".inf", "-1", "1e400", "~", "~nosuchuser/x", "../../x", "a=b")
MARKS = ("x" * 300, "\x00", "a\nb", "\x1b[2J", "ü", "\u202e", "\udcff", "[", "{", "'", '"', "${x}")
NUMBERS = (0, 1, -1, 3, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"))
TEXTS = st.one_of(st.sampled_from(WORDS + MARKS), st.text(max_size=12))
SCALARS = st.one_of(
    st.none(), st.booleans(), st.sampled_from(NUMBERS), st.integers(), st.floats(), TEXTS
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
# Where, as a share of all places there are: an input does not depend on what it changes.
PLACE = st.floats(0, 1, exclude_max=True)


@dataclass(frozen=True)
class TreeChange:
    """One node replaced, dropped, or joined by another."""

    kind: str
    place: float
    key: str
    value: Any


@dataclass(frozen=True)
class ByteChange:
    """A few bytes replaced, removed, inserted or repeated, or the rest cut off."""

    kind: str
    place: float
    new: bytes
    count: int


TREE_CHANGES = st.lists(
    st.builds(
        TreeChange,
        st.sampled_from(("replace", "replace", "drop", "add")),
        PLACE,
        TEXTS,
        VALUES,
    ),
    min_size=1,
    max_size=3,
)
BYTE_CHANGES = st.lists(
    st.builds(
        ByteChange,
        st.sampled_from(("set", "set", "cut", "insert", "end", "repeat")),
        PLACE,
        st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from((b"\xff" * 4, b"\x7f\xff"))),
        st.integers(1, 50),
    ),
    min_size=1,
    max_size=4,
)


def changed_tree(tree: Any, changes: Sequence[TreeChange]) -> Any:
    """A changed copy of nested mappings and lists."""
    result = copy.deepcopy(tree)
    for change in changes:
        ways = list(_places(result))
        path = ways[int(change.place * len(ways))]
        if not path:
            if change.kind == "drop":
                result = change.value
            continue
        parent = result
        for key in path[:-1]:
            parent = parent[key]
        if change.kind == "drop":
            del parent[path[-1]]
        elif change.kind == "add" and isinstance(parent, dict):
            parent[change.key] = change.value
        else:
            parent[path[-1]] = change.value
    return result


def changed_bytes(content: bytes, changes: Sequence[ByteChange]) -> bytes:
    """A changed copy of bytes."""
    result = bytearray(content)
    for change in changes:
        place, new, count = int(change.place * (len(result) + 1)), change.new, change.count
        if change.kind == "set":
            result[place : place + len(new)] = new
        elif change.kind == "cut":
            del result[place : place + count]
        elif change.kind == "insert":
            result[place:place] = new
        elif change.kind == "end":
            del result[place:]
        else:
            result[place:place] = result[max(0, place - 40) : place] * count
    return bytes(result)


def _places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to every node."""
    yield path
    children: Any = ()
    if isinstance(tree, dict):
        children = tree.items()
    elif isinstance(tree, list):
        children = enumerate(tree)
    for key, child in children:
        yield from _places(child, (*path, key))
