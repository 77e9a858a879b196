"""Which numbers of the flat vector each rank keeps: pure Python on sizes.

Three ways, one mechanism (a rank keeps one contiguous range of the flat vector):

- `"replicated"`: every rank keeps everything and nothing is communicated (S);
- `"blocks"`: a rank keeps whole blocks; the flat vector is ordered by owner, so that the blocks of
  a rank are neighbours (M Section 4.2, Algorithm 1 with one worker a block);
- `"sharded"`: even ranges; a block may span ranks, and one block over the whole model does.

A tensor's stretch in memory order is not a box of its shape; `boxes` cuts it into such, which is
what checkpoints know.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

#: The values of `distribution`.
#: Where blocks and rows begin: at multiples of this, a cache line, and the widest vector register.
ALIGNMENT_BYTES = 64
DISTRIBUTIONS = ("replicated", "blocks", "sharded")


def owners_of_blocks(sizes: Sequence[int], world_size: int) -> list[int]:
    """The rank that keeps each block: the longest first, to the rank that has least so far.

    Args:
        sizes: numbers in each block.
        world_size: ranks; those that get no block keep nothing.

    Returns:
        One rank for each block. No rank keeps more than 4/3 of the least possible maximum (Graham,
        "Bounds on multiprocessing timing anomalies", 1969).
    """
    loads = [0] * world_size
    owners = [0] * len(sizes)
    for block in sorted(range(len(sizes)), key=lambda b: (-sizes[b], b)):
        owner = loads.index(min(loads))
        owners[block] = owner
        loads[owner] += sizes[block]
    return owners


def ranges_of_owners(sizes: Sequence[int], owners: Sequence[int], world_size: int) -> list[range]:
    """The range of each rank in a flat vector that is ordered by owner."""
    ranges: list[range] = []
    start = 0
    for rank in range(world_size):
        kept = sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank)
        ranges.append(range(start, start + kept))
        start += kept
    return ranges


def padded(n: int, unit: int) -> int:
    """The smallest multiple of `unit` that is at least n."""
    return -(-n // unit) * unit


def even_ranges(n: int, world_size: int, uncut: Sequence[range] = (), unit: int = 1) -> list[range]:
    """Cut n numbers into ranges whose lengths differ by at most `unit`.

    Args:
        n: numbers, a multiple of `unit`.
        world_size: how many ranges; some are empty where n is smaller.
        uncut: stretches that no border may fall into; a border there moves to the nearer end.
        unit: borders are multiples of it, unless such a stretch moves them.

    Returns:
        One range for each rank, in order.
    """
    cuts = [n // unit * rank // world_size * unit for rank in range(world_size + 1)]
    for stretch in uncut:
        middle = (stretch.start + stretch.stop) / 2
        for i, cut in enumerate(cuts):
            if stretch.start < cut < stretch.stop:
                cuts[i] = stretch.start if cut < middle else stretch.stop
    return [range(a, b) for a, b in itertools.pairwise(cuts)]


def overlap(a: range, b: range) -> range:
    """What two ranges share; empty, but at its place, where they share nothing."""
    start = min(max(a.start, b.start), b.stop)
    return range(start, max(start, min(a.stop, b.stop)))


@dataclass(frozen=True)
class Box:
    """A box of a tensor whose numbers are neighbours in memory.

    Attributes:
        start: its first number, in the order of memory.
        offsets: where it begins in each dimension of the tensor.
        sizes: its extent in each dimension.
        memory_sizes: the same, dimensions in the order of memory, slowest first.
        to_shape: the permutation from the order of memory to that of the shape.
    """

    start: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    memory_sizes: tuple[int, ...]
    to_shape: tuple[int, ...]


def boxes(shape: Sequence[int], strides: Sequence[int], stretch: range) -> list[Box]:
    """Cut a stretch of a dense tensor's memory into boxes of its shape.

    Args:
        shape: of the tensor.
        strides: its strides; its memory has no gaps.
        stretch: first number and last plus one, in the order of memory.

    Returns:
        At most 2 d - 1 boxes for d dimensions, in the order of memory; none for an empty stretch.
    """
    order = sorted(range(len(shape)), key=lambda d: (-strides[d], -shape[d], d))
    to_shape = tuple(order.index(d) for d in range(len(shape)))
    found: list[Box] = []
    start = stretch.start
    for offsets, sizes in _boxes([shape[d] for d in order], stretch.start, stretch.stop):
        found.append(
            Box(
                start,
                tuple(offsets[i] for i in to_shape),
                tuple(sizes[i] for i in to_shape),
                tuple(sizes),
                to_shape,
            )
        )
        start += math.prod(sizes)
    return found


def _boxes(shape: list[int], start: int, stop: int) -> list[tuple[list[int], list[int]]]:
    """Offsets and sizes of the boxes of a stretch in row-major order."""
    if start >= stop:
        return []
    if not shape:
        return [([], [])]
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # within one row
        inner = _boxes(shape[1:], start - last * row, stop - last * row)
        return [([last, *offsets], [1, *sizes]) for offsets, sizes in inner]
    found = []
    if start < first * row:
        inner = _boxes(shape[1:], start - (first - 1) * row, row)
        found += [([first - 1, *offsets], [1, *sizes]) for offsets, sizes in inner]
    if first < last:
        found.append(([first, *[0] * (len(shape) - 1)], [last - first, *shape[1:]]))
    if stop > last * row:
        inner = _boxes(shape[1:], 0, stop - last * row)
        found += [([last, *offsets], [1, *sizes]) for offsets, sizes in inner]
    return found
