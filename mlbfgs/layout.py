"""One flat vector over all parameters; blocks, shards, segments and pieces are slices of it.

The order of the flat vector is by block (by owner and block where ranks own blocks), then by
parameter group, then as the user gave the parameters; within a parameter it is the order of its
memory. A rank keeps one range of it, its *shard*; where nothing is distributed, that is all. A
*stretch* is what the shard holds of one parameter, a *piece* a stretch small enough to be worked on
at once, a *segment* a run of neighbouring pieces of one block and one group. On a CPU pieces and
segments are small enough to stay in its cache between the operations of a step. On an accelerator,
where every operation is a kernel launch, a segment is all of one block and one group.

Every block begins at a 64-byte border of the flat vector, and so does every row of a row set: a few
numbers of padding, which stay zero, end a block and a row. Kernels for dot products add in an order
that depends on where their operands begin relative to such a border. With the padding a block gives
the same bits wherever it lies, on a rank of its own or among the others.

Legend: `n` numbers in the shard, padding included; flat vectors have shape (n,), row sets (r, n).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_
from typing import TypeVar, cast

import torch
from torch import Tensor

from mlbfgs.partition import alignment, state_dtype
from mlbfgs.sharding import even_ranges, overlap, owners_of_blocks, padded, ranges_of_owners

#: On a CPU a segment is closed once it holds this many numbers (1 MiB of float32), and no piece is
#: longer.
SEGMENT_NUMEL = 1 << 18
#: Devices on which neighbouring operations find their numbers in cache, or have none.
IN_CACHE = ("cpu", "meta")

_MaybeTensor = TypeVar("_MaybeTensor", Tensor, "Tensor | None")


@dataclass(frozen=True)
class Piece:
    """A stretch of one parameter.

    Attributes:
        param: position of the parameter in `Layout.params`.
        start: first number, in the order of the parameter's memory.
        stop: last number plus one.
    """

    param: int
    start: int
    stop: int


@dataclass(frozen=True)
class Segment:
    """Neighbouring pieces of one block and one group.

    Attributes:
        block: number of the Hessian block.
        group: number of the parameter group.
        first: position of its first piece in `Layout.pieces`.
        last: position after its last piece.
        start: where it begins in the flat vector.
        stop: where it ends.
    """

    block: int
    group: int
    first: int
    last: int
    start: int
    stop: int


@dataclass(frozen=True)
class Spread:
    """How the flat vector is divided and which part lies here.

    Attributes:
        distribution: `"replicated"`, `"blocks"` or `"sharded"`, see :mod:`mlbfgs.sharding`.
        rank: this rank's number.
        world_size: how many ranks there are.
    """

    distribution: str = "replicated"
    rank: int = 0
    world_size: int = 1


class Layout:
    """Where each parameter lies in the flat vector.

    Attributes:
        params: the parameters in flat order, each once.
        group_of: the parameter group of each.
        block_of: the Hessian block of each.
        names: of the parameters.
        owners: the rank that owns each block, None where every rank has its part in it.
        unit: numbers between two borders that a block may begin at.
        offsets: the start of each parameter in the flat vector over all ranks.
        length: of that vector, padding included.
        ranges: what each rank keeps of that vector.
        shard: what this rank keeps.
        numel: n, the length of this rank's flat vectors, a multiple of `unit`.
        stretches: what the shard holds of each parameter, in the order of its memory.
        pieces: stretches of parameters, in flat order.
        segments: the units of work of a step, in flat order, positions counted in the shard.
        blocks: the slice of the shard that lies in each Hessian block.
        segment_numel: numbers after which a segment is closed.
        dtype: of the averages and of all arithmetic: float64 if any parameter is, else float32.
        device: the one device of all parameters.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        groups: Sequence[int],
        blocks: Sequence[int],
        spread: Spread | None = None,
        names: Sequence[str] | None = None,
    ):
        """Lay out parameters.

        Args:
            params: parameters, each once, in the user's order; there may be none. Of a DTensor,
                its local tensor is laid out.
            groups: number of the parameter group of each.
            blocks: number of the Hessian block of each, from 0 without gaps.
            spread: how it is divided between ranks; None is not at all.
            names: of the parameters, for messages.
        """
        spread = spread or Spread()
        sizes = [0] * (max(blocks, default=-1) + 1)
        for p, block in zip(params, blocks, strict=True):
            sizes[block] += local(p).numel()
        self.dtype = state_dtype([local(p) for p in params])
        self.unit = alignment(self.dtype)
        lengths = [padded(size, self.unit) for size in sizes]
        owned = spread.distribution == "blocks"
        owners = owners_of_blocks(lengths, spread.world_size) if owned else [0] * len(sizes)
        self.owners: list[int | None] = list(owners) if owned else [None] * len(sizes)
        order = sorted(
            range(len(params)), key=lambda i: (owners[blocks[i]], blocks[i], groups[i], i)
        )
        self.params = [params[i] for i in order]
        self.names = [names[i] if names else f"parameter {i}" for i in order]
        self.group_of = [groups[i] for i in order]
        self.block_of = [blocks[i] for i in order]
        tensors = self.tensors()
        self.shapes = [t.shape for t in tensors]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.segment_numel = SEGMENT_NUMEL if in_cache(self.device) else sys.maxsize
        self.offsets, self.length = self._offsets()
        self._dense = [torch.ops.aten.is_non_overlapping_and_dense(t) for t in tensors]
        self._orders = [memory_order(t) for t in tensors]
        self._seen = [(t.shape, t.stride(), t.dtype, t.device) for t in tensors]
        #: of the state's views: a parameter's own, row-major where it has gaps
        self.strides = [
            t.stride() if dense else torch.empty(t.shape, device="meta").stride()
            for t, dense in zip(tensors, self._dense, strict=True)
        ]
        self.ranges = self._ranges(spread, lengths, owners)
        self.shard = self.ranges[spread.rank]
        self.numel = padded(len(self.shard), self.unit)
        self.stretches = [self.stretch(i, self.shard) for i in range(len(self.params))]
        self.pieces = self._cut_pieces()
        self.segments = self._cut_segments()
        self.blocks = self._block_slices(len(sizes))

    def _offsets(self) -> tuple[list[int], int]:
        """Where each parameter begins, and where the last block ends."""
        offsets: list[int] = []
        end = 0
        for i, block in enumerate(self.block_of):
            if i > 0 and block != self.block_of[i - 1]:
                end = padded(end, self.unit)
            offsets.append(end)
            end += self.shapes[i].numel()
        return offsets, padded(end, self.unit)

    def _ranges(self, spread: Spread, lengths: Sequence[int], owners: Sequence[int]) -> list[range]:
        everything = range(self.length)
        if spread.distribution == "blocks":
            return ranges_of_owners(lengths, owners, spread.world_size)
        if spread.distribution == "sharded":
            # a parameter with gaps in its memory cannot be cut in memory order
            uncut = [self._span(i) for i, dense in enumerate(self._dense) if not dense]
            return even_ranges(len(everything), spread.world_size, uncut, self.unit)
        return [everything] * spread.world_size

    def _span(self, i: int) -> range:
        return range(self.offsets[i], self.offsets[i] + self.shapes[i].numel())

    def stretch(self, i: int, shard: range) -> range:
        """What a range of the flat vector holds of parameter i, in the order of its memory."""
        start = self.offsets[i]
        kept = overlap(shard, self._span(i))
        return range(kept.start - start, kept.stop - start)

    def tensors(self) -> list[Tensor]:
        """The parameters in flat order; of a DTensor, its local tensor."""
        return [local(p) for p in self.params]

    def gradients(self) -> list[Tensor | None]:
        """Their gradients, None where there is none."""
        return [None if p.grad is None else local(p.grad) for p in self.params]

    def _cut_pieces(self) -> list[Piece]:
        pieces: list[Piece] = []
        for i, kept in enumerate(self.stretches):
            pieces += [Piece(i, a, b) for a, b in self.tiles(i, kept, self.segment_numel)]
        return pieces

    def tiles(self, i: int, kept: range, size: int) -> list[tuple[int, int]]:
        """Cut a stretch of parameter i into tiles of at most `size` numbers, gaps permitting."""
        length = size if self._dense[i] else max(len(kept), 1)
        starts = range(kept.start, kept.stop, length)
        return [(start, min(start + length, kept.stop)) for start in starts]

    def _cut_segments(self) -> list[Segment]:
        segments: list[Segment] = []
        first = size = 0
        for k, piece in enumerate(self.pieces):
            last = k + 1
            size += piece.stop - piece.start
            home = (self.block_of[piece.param], self.group_of[piece.param])
            border = last == len(self.pieces) or home != (
                self.block_of[self.pieces[last].param],
                self.group_of[self.pieces[last].param],
            )
            if size >= self.segment_numel or border:
                stop = self.offsets[piece.param] + piece.stop - self.shard.start
                segments.append(Segment(*home, first, last, stop - size, stop))
                first, size = last, 0
        return segments

    def _block_slices(self, count: int) -> list[slice]:
        slices = [slice(0, 0)] * count
        for i, block in enumerate(self.block_of):
            kept = overlap(self.shard, self._span(i))
            if kept:
                first = not slices[block].stop
                start = kept.start - self.shard.start if first else slices[block].start
                slices[block] = slice(start, kept.stop - self.shard.start)
        return slices

    def fits(self) -> bool:
        """Whether the parameters' shapes, strides, dtypes and devices are those of construction."""
        pairs = zip(self.tensors(), self._seen, strict=True)
        return all((t.shape, t.stride(), t.dtype, t.device) == seen for t, seen in pairs)

    def lies_as(self, other: Layout) -> bool:
        """Whether another layout has the same parameters, of the same form, in the same places."""
        places = [
            (lay.group_of, lay.block_of, lay.offsets, lay.ranges, lay.shard, lay._seen, lay.dtype)
            for lay in (self, other)
        ]
        return places[0] == places[1] and all(map(is_, self.params, other.params))

    def cut(self, tensors: Sequence[_MaybeTensor]) -> list[_MaybeTensor]:
        """Each parameter's tensor as pieces, which are views wherever the memory allows it.

        Args:
            tensors: for each parameter a tensor of its shape, or None.

        Returns:
            For each piece a tensor: one-dimensional, or of the parameter's shape where the
            parameter has gaps in its memory; None where the tensor is None.
        """
        whole = [
            t if t is None or not self.stretches[i] else self._flatten(t, i)
            for i, t in enumerate(tensors)
        ]
        cut: list[_MaybeTensor] = []
        for piece in self.pieces:
            t = whole[piece.param]
            cut.append(t if t is None else self._slice(t, piece.param, piece.start, piece.stop))
        return cut

    def part(self, t: Tensor, i: int, start: int, stop: int) -> Tensor:
        """Numbers start to stop of a tensor of parameter i's shape, in the order of its memory.

        Args:
            t: of parameter i's shape.
            i: position in `params`.
            start: first number.
            stop: last number plus one; all numbers where the parameter's memory has gaps.

        Returns:
            (stop - start,), or t itself where that is all of it and has gaps; a view wherever t is
            ordered as the parameter is.
        """
        return self._slice(self._flatten(t, i), i, start, stop)

    def _slice(self, flattened: Tensor, i: int, start: int, stop: int) -> Tensor:
        full = stop - start == self.shapes[i].numel()
        return flattened if full else flattened[start:stop]

    def _flatten(self, t: Tensor, i: int) -> Tensor:
        if not self._dense[i]:
            return t
        if memory_order(t) != self._orders[i]:  # a gradient that is ordered unlike its parameter
            t = torch.empty_like(local(self.params[i]), dtype=t.dtype).copy_(t)
        return t.as_strided((t.numel(),), (1,))

    def view(self, flat: Tensor, i: int) -> Tensor:
        """Parameter i's part of a flat vector or of rows of flat vectors.

        Args:
            flat: (n,) or (r, n).
            i: position in `params`.

        Returns:
            A view of shape `p.shape` or (r, *p.shape), ordered as the parameter's memory is. Where
            the shard holds a stretch of k numbers only, of shape (k,) or (r, k).
        """
        kept, shape, strides = self.stretches[i], self.shapes[i], self.strides[i]
        if len(kept) < shape.numel():
            shape, strides = torch.Size([len(kept)]), (1,)
        offset = flat.storage_offset() + self._start(i) * flat.stride(-1)
        if flat.dim() == 1:
            return flat.as_strided(shape, strides, offset)
        return flat.as_strided((flat.shape[0], *shape), (flat.stride(0), *strides), offset)

    def put(self, flat: Tensor, i: int, value: Tensor) -> None:
        """Copy this rank's part of a tensor of parameter i's shape into a flat vector."""
        kept = self.stretches[i]
        if len(kept) == self.shapes[i].numel():
            self.view(flat, i).copy_(value)
        elif kept:
            self.stretch_view(flat, i).copy_(self.part(value, i, kept.start, kept.stop))

    def stretch_view(self, flat: Tensor, i: int) -> Tensor:
        """The same as (k,) or (r, k), in the order of the parameter's memory."""
        start = self._start(i)
        return flat[..., start : start + len(self.stretches[i])]

    def _start(self, i: int) -> int:
        kept = self.stretches[i]
        return self.offsets[i] + kept.start - self.shard.start if kept else 0

    def piece_views(self, flat: Tensor) -> list[Tensor]:
        """Every piece's part of a flat vector, shaped as `cut` shapes pieces."""
        views = []
        for piece in self.pieces:
            start = self.offsets[piece.param] + piece.start - self.shard.start
            dense = self._dense[piece.param]
            length = piece.stop - piece.start
            views.append(flat[start : start + length] if dense else self.view(flat, piece.param))
        return views

    def views(self, flat: Tensor) -> list[Tensor]:
        """`view` of every parameter."""
        return [self.view(flat, i) for i in range(len(self.params))]


def in_cache(device: torch.device) -> bool:
    """Whether a device works through the flat vector in short segments and tiles."""
    return device.type in IN_CACHE


def is_dtensor(t: object) -> bool:
    """Whether a parameter is distributed by torch itself, as FSDP2 does."""
    # importing it takes a second, and without the import there is no DTensor
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def local(t: Tensor) -> Tensor:
    """A DTensor's local tensor; any other tensor is local itself."""
    return cast(Tensor, t.to_local()) if is_dtensor(t) else t  # type: ignore[attr-defined]


def memory_order(t: Tensor) -> tuple[int, ...]:
    """The strides that matter: those of dimensions longer than one."""
    return tuple(stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1)
