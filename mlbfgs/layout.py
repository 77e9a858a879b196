"""One flat vector over all parameters; blocks and segments are slices of it.

The order of the flat vector is by block, then by parameter group, then as the user gave the
parameters. A *segment* is a run of neighbouring parameters of one block and one group, small enough
to stay in a processor's cache between the operations of a step.

Legend: `n` numbers in the flat vector; flat vectors have shape (n,), row sets (r, n).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlbfgs.partition import state_dtype

#: A segment is closed once it holds this many numbers (4 MiB of float32).
SEGMENT_NUMEL = 1 << 20


@dataclass(frozen=True)
class Segment:
    """Neighbouring parameters of one block and one group.

    Attributes:
        block: number of the Hessian block.
        group: number of the parameter group.
        first: position of its first parameter in `Layout.params`.
        last: position after its last parameter.
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
        blocks: the slice of each Hessian block.
        segments: the units of work of a step, in flat order.
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
        self.segments = self._cut_segments()
        self.blocks = self._block_slices()

    def _cut_segments(self) -> list[Segment]:
        segments: list[Segment] = []
        first = 0
        for i in range(len(self.params)):
            last = i + 1
            full = self.offsets[last] - self.offsets[first] >= SEGMENT_NUMEL
            border = last == len(self.params) or (self.block_of[last], self.group_of[last]) != (
                self.block_of[i],
                self.group_of[i],
            )
            if full or border:
                start, stop = self.offsets[first], self.offsets[last]
                block, group = self.block_of[i], self.group_of[i]
                segments.append(Segment(block, group, first, last, start, stop))
                first = last
        return segments

    def _block_slices(self) -> list[slice]:
        edges: dict[int, tuple[int, int]] = {}
        for s in self.segments:
            edges[s.block] = (edges.get(s.block, (s.start, 0))[0], s.stop)
        return [slice(*edges[b]) for b in sorted(edges)]

    def view(self, flat: Tensor, i: int) -> Tensor:
        """Parameter i's part of a flat vector or of rows of flat vectors, in the parameter's shape.

        The strides follow the parameter where it is dense, so that a channels-last parameter meets
        a channels-last view and elementwise operations run straight through memory.

        Args:
            flat: (n,) or (r, n).
            i: position in `params`.

        Returns:
            A view of shape `p.shape` or (r, *p.shape).
        """
        p = self.params[i]
        strides = p.stride() if _is_dense(p) else torch.empty(p.shape, device="meta").stride()
        offset = flat.storage_offset() + self.offsets[i] * flat.stride(-1)
        if flat.dim() == 1:
            return flat.as_strided(p.shape, strides, offset)
        return flat.as_strided((flat.shape[0], *p.shape), (flat.stride(0), *strides), offset)

    def views(self, flat: Tensor) -> list[Tensor]:
        """`view` of every parameter."""
        return [self.view(flat, i) for i in range(len(self.params))]


def _is_dense(p: Tensor) -> bool:
    """Whether the elements of p fill its stretch of memory exactly once."""
    return bool(torch.ops.aten.is_non_overlapping_and_dense(p))
