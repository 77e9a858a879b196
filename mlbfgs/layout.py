"""One flat vector over all parameters; blocks, segments and pieces are slices of it.

The order of the flat vector is by block, then by parameter group, then as the user gave the
parameters; within a parameter it is the order of its memory. A *piece* is a stretch of one
parameter, a *segment* a run of neighbouring pieces of one block and one group, small enough to stay
in a processor's cache between the operations of a step.

Legend: `n` numbers in the flat vector; flat vectors have shape (n,), row sets (r, n).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from mlbfgs.partition import state_dtype

#: A segment is closed once it holds this many numbers (1 MiB of float32), and no piece is longer.
SEGMENT_NUMEL = 1 << 18

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


class Layout:
    """Where each parameter lies in the flat vector.

    Attributes:
        params: the parameters in flat order, each once.
        group_of: the parameter group of each.
        block_of: the Hessian block of each.
        offsets: the start of each, and n at the end.
        numel: n.
        pieces: stretches of parameters, in flat order.
        segments: the units of work of a step, in flat order.
        blocks: the slice of each Hessian block.
        dtype: of the averages and of all arithmetic: float64 if any parameter is, else float32.
        device: the one device of all parameters.
    """

    def __init__(self, params: Sequence[Tensor], groups: Sequence[int], blocks: Sequence[int]):
        """Lay out parameters.

        Args:
            params: parameters, each once, in the user's order.
            groups: number of the parameter group of each.
            blocks: number of the Hessian block of each, from 0 without gaps.
        """
        order = sorted(range(len(params)), key=lambda i: (blocks[i], groups[i], i))
        self.params = [params[i] for i in order]
        self.group_of = [groups[i] for i in order]
        self.block_of = [blocks[i] for i in order]
        self.offsets = [0]
        for p in self.params:
            self.offsets.append(self.offsets[-1] + p.numel())
        self.numel = self.offsets[-1]
        self.dtype = state_dtype(self.params)
        self.device = self.params[0].device
        self._dense = [torch.ops.aten.is_non_overlapping_and_dense(p) for p in self.params]
        self._orders = [memory_order(p) for p in self.params]
        self.pieces = self._cut_pieces()
        self.segments = self._cut_segments()
        self.blocks = self._block_slices()

    def _cut_pieces(self) -> list[Piece]:
        pieces: list[Piece] = []
        for i, p in enumerate(self.params):
            # a parameter with gaps in its memory cannot be cut in memory order
            length = SEGMENT_NUMEL if self._dense[i] else max(p.numel(), 1)
            for start in range(0, p.numel(), length):
                pieces.append(Piece(i, start, min(start + length, p.numel())))
        return pieces

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
            if size >= SEGMENT_NUMEL or border:
                stop = self.offsets[piece.param] + piece.stop
                segments.append(Segment(*home, first, last, stop - size, stop))
                first, size = last, 0
        return segments

    def _block_slices(self) -> list[slice]:
        slices = [slice(0, 0)] * (max(self.block_of) + 1)
        for i, block in enumerate(self.block_of):
            start = slices[block].start if slices[block].stop else self.offsets[i]
            slices[block] = slice(start, self.offsets[i + 1])
        return slices

    def fits(self) -> bool:
        """Whether the parameters' memory is still ordered as it was at construction."""
        return all(memory_order(p) == o for p, o in zip(self.params, self._orders, strict=True))

    def cut(self, tensors: Sequence[_MaybeTensor]) -> list[_MaybeTensor]:
        """Each parameter's tensor as pieces, which are views wherever the memory allows it.

        Args:
            tensors: for each parameter a tensor of its shape, or None.

        Returns:
            For each piece a tensor: one-dimensional, or of the parameter's shape where the
            parameter has gaps in its memory; None where the tensor is None.
        """
        whole = [t if t is None else self._flatten(t, i) for i, t in enumerate(tensors)]
        cut: list[_MaybeTensor] = []
        for piece in self.pieces:
            t = whole[piece.param]
            full = piece.stop - piece.start == self.params[piece.param].numel()
            cut.append(t if t is None or full else t[piece.start : piece.stop])
        return cut

    def _flatten(self, t: Tensor, i: int) -> Tensor:
        if not self._dense[i]:
            return t
        if memory_order(t) != self._orders[i]:  # a gradient that is ordered unlike its parameter
            t = torch.empty_like(self.params[i], dtype=t.dtype).copy_(t)
        return t.as_strided((t.numel(),), (1,))

    def view(self, flat: Tensor, i: int) -> Tensor:
        """Parameter i's part of a flat vector or of rows of flat vectors, in the parameter's shape.

        Args:
            flat: (n,) or (r, n).
            i: position in `params`.

        Returns:
            A view of shape `p.shape` or (r, *p.shape), ordered as the parameter's memory is.
        """
        p = self.params[i]
        strides = p.stride() if self._dense[i] else torch.empty(p.shape, device="meta").stride()
        offset = flat.storage_offset() + self.offsets[i] * flat.stride(-1)
        if flat.dim() == 1:
            return flat.as_strided(p.shape, strides, offset)
        return flat.as_strided((flat.shape[0], *p.shape), (flat.stride(0), *strides), offset)

    def views(self, flat: Tensor) -> list[Tensor]:
        """`view` of every parameter."""
        return [self.view(flat, i) for i in range(len(self.params))]


def memory_order(t: Tensor) -> tuple[int, ...]:
    """The strides that matter: those of dimensions longer than one."""
    return tuple(stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1)
