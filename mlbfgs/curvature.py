"""The pair history W = [S; Ŷ], its Gram matrix, and the product H g.

For every block b with slice [a, e) of the flat vector, W[:, a:e] holds M rows of s and M rows of
damped ŷ in ring slots, and H_b = γ_b I + W_bᵀ C_b W_b (`mlbfgs.compact`). Products run over tiles
that stay in cache; p = W g adds the tiles' float32 sums in float64, so that its rounding error does
not grow with n, and the Gram matrix, once per pair, is computed in float64 altogether.

Where W is spread over ranks, a block's products are sums over the ranks: the caller adds up p, and
`total`, given at construction, the columns of the Gram matrix.

Everything but W and the count of accepted pairs follows from them, so neither the Gram matrix nor C
is part of a checkpoint; `rebuild` repeats exactly the products that `push` computed.

Legend: `M` history size, `B` number of blocks; `W: (2M, n)`; `gram, C: (B, 2M, 2M)`, `gamma: (B,)`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mlbfgs.compact import compact_coefficients, ring_order
from mlbfgs.layout import in_cache
from mlbfgs.variant import PAPER, Variant

#: Numbers of a flat vector per tile on a CPU.
TILE_NUMEL = 1 << 18
#: The same on an accelerator, where rows of W must be widened and the copy needs memory.
WIDENED_NUMEL = 1 << 22
#: The same where products are summed: few enough for the rounding error of a float32 sum to stay
#: that of float32 itself, and for the Gram matrix's float64 copies to stay in cache.
SUM_TILE_NUMEL = 1 << 16


class CurvatureHistory:
    """Pairs of all blocks over one flat vector.

    Attributes:
        W: (2M, n) in `history_dtype`.
        pairs: pairs accepted, for each block.
        gram: (B, 2M, 2M) float64, W_b W_bᵀ.
        C: (B, 2M, 2M) float64, coefficients of the compact form.
        gamma: (B,) float64, the initial scale γ (1 before the first pair).
    """

    def __init__(
        self,
        history_size: int,
        blocks: Sequence[slice],
        *,
        numel: int,
        dtype: torch.dtype,
        history_dtype: torch.dtype,
        device: torch.device,
        total: Callable[[Tensor], None] = lambda columns: None,
        kept: Sequence[bool] | None = None,
        variant: Variant = PAPER,
    ):
        """Allocate an empty history.

        Args:
            history_size: M.
            blocks: the slice of each block; together they cover the flat vector.
            numel: n.
            dtype: of the vectors that H is applied to.
            history_dtype: of W.
            device: of everything.
            total: adds a tensor up over the ranks that share blocks, in place.
            kept: for each block whether this rank knows its Gram matrix; None is all.
            variant: `pair_momentum` and the two epsilons count here.
        """
        self._total = total
        self._kept = list(kept) if kept is not None else [True] * len(blocks)
        self.history_size = history_size
        self.blocks = list(blocks)
        self.dtype = dtype
        self.variant = variant
        # No float64 on MPS; everywhere else sums of partial sums are kept in it.
        self.sum_dtype = torch.float32 if device.type == "mps" else torch.float64
        self._in_cache = in_cache(device)
        rows, count = 2 * history_size, len(self.blocks)
        self.W = torch.zeros(rows, numel, dtype=history_dtype, device=device)
        self.pairs = [0] * count
        self.gram = torch.zeros(count, rows, rows, dtype=self.sum_dtype, device=device)
        self.C = torch.zeros_like(self.gram)
        self.gamma = torch.ones(count, dtype=self.sum_dtype, device=device)

    def new_sums(self, vectors: int = 1) -> Tensor:
        """(vectors, B, 2M + 1) zeros: where W v and, in the last column, vᵀg are added up."""
        return self.gram.new_zeros(vectors, len(self.blocks), 2 * self.history_size + 1)

    def project(self, sums: Tensor, block: int, start: int, stop: int, g: Tensor) -> None:
        """p[block] += W[:, start:stop] g.

        Args:
            sums: (B, 2M + 1) float64, one vector's part of `new_sums`; the first 2M columns are p.
            block: the block that [start, stop) lies in.
            start: first number of the flat vector.
            stop: last number plus one.
            g: (stop - start,) part of the vector.
        """
        rows, out = 2 * self.history_size, sums[block, : 2 * self.history_size]
        if self._in_cache:
            tiles = list(_tiles(start, stop, SUM_TILE_NUMEL))
            partial = g.new_empty(len(tiles), rows)
            for row, (a, b) in zip(partial, tiles, strict=True):
                torch.mv(self._tile(a, b), g[a - start : b - start], out=row)
            out.add_(partial.sum(0, dtype=sums.dtype))
            return
        for a, b in _tiles(start, stop, self._tile_numel()):
            self._project_batched(out, self._tile(a, b), g[a - start : b - start])

    def _project_batched(self, out: Tensor, w: Tensor, v: Tensor) -> None:
        """out (2M,) += w v, as one batched product over tiles of columns, and one of the rest.

        A matrix-vector product with 2M long rows would leave most of an accelerator idle; a batch
        of short ones fills it, and its float32 sums are as short as on a CPU.
        """
        whole = w.shape[1] // SUM_TILE_NUMEL * SUM_TILE_NUMEL
        if whole:
            tiles = w[:, :whole].view(len(w), -1, SUM_TILE_NUMEL).transpose(0, 1)
            partial = torch.bmm(tiles, v[:whole].view(-1, SUM_TILE_NUMEL, 1))
            out.add_(partial.sum((0, 2), dtype=out.dtype))
        if whole < w.shape[1]:
            out.add_(torch.mv(w[:, whole:], v[whole:]))

    def coefficients(self, p: Tensor) -> Tensor:
        """c = C p for every block: the weights of the rows of W in H g - γ g.

        Args:
            p: (B, 2M) float64, W g.

        Returns:
            (B, 2M) float64.
        """
        return torch.matmul(self.C, p.unsqueeze(-1)).squeeze(-1)

    def combine_(
        self, a: Tensor, c: Tensor | None, block: int, start: int, stop: int, g: Tensor
    ) -> None:
        """g <- a g + W[:, start:stop]ᵀ c, in place.

        Args:
            a: (B,) weight of g.
            c: (B, 2M) in `dtype`, weights of the rows of W; None is zero.
            block: the block that [start, stop) lies in.
            start: first number of the flat vector.
            stop: last number plus one.
            g: (stop - start,) part of the vector.
        """
        weight, row = a[block], None if c is None else c[block]
        for first, last in _tiles(start, stop, self._tile_numel()):
            part = g[first - start : last - start]
            part.mul_(weight)
            if row is not None:
                part.addmv_(self._tile(first, last).t(), row)

    def candidate(
        self, block: int, progress: Tensor, average: Tensor, snapshot: Tensor
    ) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """The next pair before damping, tile by tile: differences of averages (M Eq. (6)).

        With `variant.pair_momentum` m they are averaged with the newest pair in the history.

        Args:
            block: which block.
            progress: (n,) s, what the parameters' average moved in the last T steps.
            average: (n,) the gradients' average.
            snapshot: (n,) the same, T steps ago.

        Yields:
            Borders of a tile in the flat vector, and s and y there.
        """
        m = self.variant.pair_momentum
        newest = (self.pairs[block] - 1) % self.history_size
        for a, b in self.tiles(block):
            s, y = progress[a:b], average[a:b] - snapshot[a:b]
            if m != 0 and self.pairs[block] > 0:
                s = (s * (1 - m)).add_(self.W[newest, a:b], alpha=m)
                y.mul_(1 - m).add_(self.W[self.history_size + newest, a:b], alpha=m)
            yield a, b, s, y

    def push(
        self,
        block: int,
        progress: Tensor,
        average: Tensor,
        snapshot: Tensor,
        tau: float,
    ) -> None:
        """Write the pair s, ŷ = τ (M_g - snapshot) + (1-τ) s into the next slot.

        M Algorithm 1, lines 14-16. The oldest pair leaves when the ring is full.

        Args:
            block: which block.
            progress: (n,) s, what M_θ moved in the last T steps.
            average: (n,) M_g.
            snapshot: (n,) M_g, T steps ago.
            tau: damping coefficient τ.
        """
        self.enter([(block, self.write(block, progress, average, snapshot, tau))])

    def write(
        self,
        block: int,
        progress: Tensor,
        average: Tensor,
        snapshot: Tensor,
        tau: float,
    ) -> int:
        """The first half of `push`: write the pair's two rows and count it.

        Args:
            block: which block.
            progress: as in `push`.
            average: as in `push`.
            snapshot: as in `push`.
            tau: damping coefficient τ.

        Returns:
            The slot, for `enter`.
        """
        slot = self.pairs[block] % self.history_size
        for a, b, s, y in self.candidate(block, progress, average, snapshot):
            self.W[slot, a:b] = s
            self.W[self.history_size + slot, a:b] = y.mul_(tau).add_(s, alpha=1 - tau)
        self.pairs[block] += 1
        return slot

    def enter(self, written: Sequence[tuple[int, int]]) -> None:
        """The second half: bring Gram matrix and C up to date with rows that `write` wrote.

        Args:
            written: blocks and slots, the same on every rank; their columns are added up over the
                ranks in one call.
        """
        if not written:
            return
        columns = self.gram.new_zeros(len(written), 2, 2 * self.history_size)
        for new, (block, slot) in zip(columns, written, strict=True):
            self._add_columns(new, block, slot)
        self._total(columns)
        for new, (block, slot) in zip(columns, written, strict=True):
            for column, row in zip(new, (slot, self.history_size + slot), strict=True):
                self.gram[block, row, :] = column
                self.gram[block, :, row] = column
        for block in dict(written):
            self._update_coefficients(block)

    def rebuild(self, *blocks: int) -> None:
        """Compute the Gram matrix and C of blocks from W and the numbers of pairs.

        Every entry is computed by the same product as when the newer of its two rows was pushed:
        after a load the matrix is the same to the last bit.
        """
        written = []
        for block in blocks:
            self.gram[block].zero_()
            self.C[block].zero_()
            self.gamma[block].fill_(1.0)
            slots = ring_order(self.pairs[block], self.history_size)
            written += [(block, slot) for slot in slots]
        self.enter(written)

    def pair_products(self) -> Tensor:
        """(3M, B): sᵀs of every slot, then sᵀŷ, then ŷᵀŷ."""
        m = self.history_size
        squares = self.gram.diagonal(dim1=1, dim2=2)
        sy = self.gram.diagonal(offset=m, dim1=1, dim2=2)
        return torch.cat([squares[:, :m], sy, squares[:, m:]], dim=1).T.contiguous()

    def keep(self, block: int, slots: Sequence[int]) -> None:
        """Drop all pairs of a block but those of some slots, oldest first; `rebuild` it then."""
        m, span = self.history_size, self.blocks[block]
        rows = self.W[[*slots, *(m + slot for slot in slots)], span]
        self.W[:, span] = 0
        k = len(slots)
        self.W[:k, span], self.W[m : m + k, span] = rows[:k], rows[k:]
        self.pairs[block] = k

    def clear_unused(self, block: int) -> None:
        """Zero the slots of a block that hold no pair: C gives them no weight, but 0 NaN is NaN."""
        m = self.history_size
        unused = sorted(set(range(m)) - set(ring_order(self.pairs[block], m)))
        if unused:
            self.W[[*unused, *(m + slot for slot in unused)], self.blocks[block]] = 0

    def drop_oldest(self, block: int) -> bool:
        """Drop the oldest pair of a full history (`variant.drop_oldest_first`); `rebuild` it then.

        Returns:
            Whether the history was full.
        """
        if self.pairs[block] < self.history_size:
            return False
        self.keep(block, ring_order(self.pairs[block], self.history_size)[1:])
        return True

    def tiles(self, block: int) -> Iterator[tuple[int, int]]:
        """The borders of one block's tiles in the flat vector."""
        b = self.blocks[block]
        return _tiles(b.start, b.stop, self._tile_numel())

    def _tile_numel(self) -> int:
        """Numbers of a tile: what a CPU's cache holds, elsewhere all but where W is widened."""
        if self._in_cache:
            return TILE_NUMEL
        return sys.maxsize if self.W.dtype == self.dtype else WIDENED_NUMEL

    def _tile(self, a: int, b: int) -> Tensor:
        """Columns a to b of W in the dtype of the arithmetic, a view where that is W's own."""
        return self.W[:, a:b].to(self.dtype)

    def _add_columns(self, columns: Tensor, block: int, slot: int) -> None:
        """columns (2, 2M) += the products of the slot's two rows with all rows, of this rank."""
        span = self.blocks[block]
        if not self._in_cache:
            for a, b in _tiles(span.start, span.stop, WIDENED_NUMEL):
                w = self.W[:, a:b].to(self.sum_dtype)
                columns.add_(w[slot :: self.history_size] @ w.t())
            return
        for a, b in _tiles(span.start, span.stop, SUM_TILE_NUMEL):
            w = self.W[:, a:b].to(self.sum_dtype)
            for column, row in zip(columns, (slot, self.history_size + slot), strict=True):
                column.add_(torch.mv(w, w[row]))

    def _update_coefficients(self, block: int) -> None:
        if self.pairs[block] == 0 or not self._kept[block]:
            self.C[block].zero_()
            self.gamma[block].fill_(1.0)
            return
        c, gamma = compact_coefficients(
            self.gram[block],
            self.pairs[block],
            ratio_epsilon=self.variant.ratio_epsilon,
            recursion_epsilon=self.variant.recursion_epsilon,
        )
        self.C[block].copy_(c)
        self.gamma[block].copy_(gamma)


def _tiles(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    for a in range(start, stop, size):
        yield a, min(a + size, stop)
