"""How parameters are packed to be copied from the rank that moved them to all others.

A rank's shard is cut into *buckets* of bounded size, each sent in one call. A bucket holds parcels,
stretches of parameters of any dtype, wider dtypes first so that each lies aligned.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlbfgs.layout import Layout

#: In front of each rank's first bucket: which parameters had a gradient there.
TAG_BYTES = 8


@dataclass(frozen=True)
class Parcel:
    """A stretch of one parameter.

    Attributes:
        param: position in `Layout.params`.
        start: first number, in the order of the parameter's memory.
        stop: last number plus one.
        dtype: of the numbers.
    """

    param: int
    start: int
    stop: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its size."""
        return (self.stop - self.start) * self.dtype.itemsize


@dataclass(frozen=True)
class Bucket:
    """What one rank sends in one call.

    Attributes:
        rank: who sends.
        tagged: whether a tag stands in front.
        parcels: what follows, wider dtypes first.
    """

    rank: int
    tagged: bool
    parcels: tuple[Parcel, ...]

    @property
    def nbytes(self) -> int:
        """Its size, with the tag."""
        return TAG_BYTES * self.tagged + sum(parcel.nbytes for parcel in self.parcels)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Each parcel's place in a buffer of bytes, as a vector of its dtype."""
        found, offset = [], TAG_BYTES * self.tagged
        for parcel in self.parcels:
            found.append(buffer[offset : offset + parcel.nbytes].view(parcel.dtype))
            offset += parcel.nbytes
        return found


def buckets_of(layout: Layout, dtypes: Sequence[torch.dtype], limit: int) -> list[Bucket]:
    """All buckets of an exchange, ranks taking turns.

    Args:
        layout: what each rank keeps.
        dtypes: of each parameter, in flat order.
        limit: bytes of a bucket without its tag; more only where one parameter that cannot be cut
            is larger.

    Returns:
        The buckets in the order in which every rank sends and receives them, at least one for each
        rank.
    """
    of_rank = [_cut(layout, dtypes, rank, limit) for rank in range(len(layout.ranges))]
    turns = itertools.zip_longest(*of_rank)
    return [bucket for turn in turns for bucket in turn if bucket is not None]


def _cut(layout: Layout, dtypes: Sequence[torch.dtype], rank: int, limit: int) -> list[Bucket]:
    groups: list[list[Parcel]] = [[]]
    filled = 0
    for i, dtype in enumerate(dtypes):
        kept = layout.stretch(i, layout.ranges[rank])
        for start, stop in layout.tiles(i, kept, max(limit // dtype.itemsize, 1)):
            parcel = Parcel(i, start, stop, dtype)
            if groups[-1] and filled + parcel.nbytes > limit:
                groups.append([])
                filled = 0
            groups[-1].append(parcel)
            filled += parcel.nbytes
    return [
        Bucket(rank, first, tuple(sorted(parcels, key=lambda q: -q.dtype.itemsize)))
        for parcels, first in zip(groups, [True, *[False] * len(groups)], strict=False)
    ]


class Route:
    """The buckets of an exchange and the two buffers that they take turns in.

    Attributes:
        buckets: in the order of sending.
    """

    def __init__(self, layout: Layout, dtypes: Sequence[torch.dtype], limit: int):
        """Allocate the buffers: two of at most `limit` bytes and a tag; see `buckets_of`."""
        self._layout = layout
        self.buckets = buckets_of(layout, dtypes, limit)
        size = max(bucket.nbytes for bucket in self.buckets)
        shape = (min(2, len(self.buckets)), -(-size // TAG_BYTES) * TAG_BYTES)
        self._buffers = torch.empty(shape, dtype=torch.uint8, device=layout.device)
        self._views = [bucket.views(self._buffers[k % 2]) for k, bucket in enumerate(self.buckets)]

    def message(self, k: int) -> Tensor:
        """Bucket k's bytes."""
        return self._buffers[k % 2, : self.buckets[k].nbytes]

    def tag(self, k: int) -> Tensor:
        """(1,) int64, the tag of bucket k, which has one."""
        return self._buffers[k % 2, :TAG_BYTES].view(torch.int64)

    def pack(self, k: int, tensors: Sequence[Tensor]) -> None:
        """Copy what bucket k holds of tensors, one for each parameter, into its buffer."""
        sources = self._parts(k, tensors)
        if sources:
            torch._foreach_copy_(self._shaped(k, sources), sources)

    def unpack(self, k: int, tensors: Sequence[Tensor]) -> None:
        """Copy bucket k's content into the tensors."""
        targets = self._parts(k, tensors)
        if targets:
            torch._foreach_copy_(targets, self._shaped(k, targets))

    def _parts(self, k: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [
            self._layout.part(tensors[parcel.param], parcel.param, parcel.start, parcel.stop)
            for parcel in self.buckets[k].parcels
        ]

    def _shaped(self, k: int, parts: Sequence[Tensor]) -> list[Tensor]:
        # a parameter with gaps in its memory is not a vector
        return [view.view(part.shape) for view, part in zip(self._views[k], parts, strict=True)]
