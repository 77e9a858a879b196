"""The state of the optimizer: flat storage that is seen, checkpointed and loaded per parameter.

State belongs to parameters: what a checkpoint holds of a parameter are views of its own shape into
the flat storage, and a few counters. It is bound neither to a block plan nor to an order of the
flat vector nor, where ranks share the state (`mlbfgs.checkpoint`), to ranks.

    param_snapshot                   M_θ at the last multiple of T  (*shape)
    param_progress                   M_θ minus this snapshot: the s of a pair, so far
    grad_average, grad_snapshot      M_g, and M_g at the last multiple of T
    momentum_buffer                  where any group has momentum   (*shape)
    s_history, y_history             ring slots of the pairs        (M, *shape)
    growth_average                   the running average of the growth limit, where the variant has
                                     one: of shape (), the same for all parameters
    step                             steps taken by the optimizer
    seeded                           whether the averages have begun
    pairs, skipped, damped           pairs accepted, refused, damped so far
    block                            its block when the newest pair of all came in; -1 before

M_θ itself is not kept: in float32 it would round away what moves by less than 1e-7 of θ.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from operator import is_
from typing import Any

import torch
from torch import Tensor

from mlbfgs.checkpoint import is_shard, own_part, refuse_foreign_parts, same_memory, shown
from mlbfgs.collectives import Collectives
from mlbfgs.compact import ring_order
from mlbfgs.curvature import CurvatureHistory
from mlbfgs.damping import Bounds, usable_elsewhere
from mlbfgs.growth import AVERAGE
from mlbfgs.layout import Layout
from mlbfgs.state_view import as_state_view
from mlbfgs.variant import PAPER, Variant
from mlbfgs.warning import Warnings

logger = logging.getLogger(__name__)

VECTORS = ("param_progress", "grad_average", "param_snapshot", "grad_snapshot")
BLOCK_COUNTERS = ("pairs", "skipped", "damped")
_FOREIGN_PAIRS = (
    "the state was written under other blocks, in which its pairs were accepted: of block %s, %s "
    "pairs would not have been, and are dropped"
)
_BROKEN_PAIRS = "of block %s, %s pairs of the loaded state are zero or not finite, and are dropped"
#: Rounding errors that may have put a pair below σ_L where it is not known which blocks it is from:
#: those of storage in `history_dtype`, and those of long sums.
SLACK = 64


class FlatState:
    """Flat vectors, history and counters over one layout.

    Attributes:
        layout: where each parameter lies.
        collectives: what ranks tell each other.
        history: the pairs of all blocks.
        flat: the flat vectors by name, each (n,).
        views: for each name, every parameter's view, in flat order.
        pieces: for the vectors that a step updates, every piece's view, in flat order.
        work: a buffer of the largest segment's size.
        work_pieces: for every piece, its view into `work`.
        sums_in_one_pass: whether gradient and weight decay may be added straight into `work`.
        step: steps taken.
        seeded: for each parameter, whether its averages have begun.
        skipped: for each block, pairs refused.
        damped: for each block, accepted pairs on which a threshold acted.
        origin: for each parameter, its block when the newest pair of all came in; -1 before.
        outside: the number of the last "block", if its parameters are in no block: it never gets
            pairs, so that its H is the identity.
        inside: the number of true blocks.
        of_step: (5, B) products of the newest pair update's direction (`mlbfgs.step`).
        asked: one-element tensors that are to be read with the next pair's products.
        heard: their numbers.
        of_start: (2, B) gᵀg and dᵀd of the first step with a block's first pair.
        warnings: what has been said of pairs.
        growth: the running average of the growth limit, once for each parameter; None where the
            variant has none.
    """

    def __init__(
        self,
        layout: Layout,
        collectives: Collectives,
        *,
        history_size: int,
        history_dtype: torch.dtype | None,
        with_momentum: bool,
        variant: Variant = PAPER,
        outside: int | None = None,
    ):
        """Allocate everything, zeroed.

        Args:
            layout: where each parameter lies.
            collectives: what ranks tell each other.
            history_size: M.
            history_dtype: of the pairs, None for the layout's.
            with_momentum: whether to keep a momentum buffer.
            variant: what the history must know of the switches.
            outside: the number of the last "block", if its parameters are in no block.
        """
        self.layout = layout
        self._settings = (history_size, history_dtype, with_momentum, variant, outside)
        names = (*VECTORS, "momentum_buffer") if with_momentum else VECTORS
        self.flat = {
            name: torch.zeros(layout.numel, dtype=layout.dtype, device=layout.device)
            for name in names
        }
        self.collectives = collectives
        self.history = CurvatureHistory(
            history_size,
            layout.blocks,
            numel=layout.numel,
            dtype=layout.dtype,
            history_dtype=history_dtype or layout.dtype,
            device=layout.device,
            total=collectives.sum_gram,
            kept=[owner in (None, collectives.rank) for owner in layout.owners],
            variant=variant,
        )
        self.outside = outside
        self.inside = len(layout.blocks) if outside is None else outside
        self.of_step = self.history.gram.new_zeros(5, len(layout.blocks))
        self.of_start = self.of_step[:2].clone()
        self.warnings = Warnings(
            logging.WARNING if collectives.rank == 0 else logging.DEBUG,
            guarded=variant.growth_limit is not None,
        )
        self.growth: Tensor | None = None
        if variant.growth_limit is not None:  # a place each: entries of a state share no memory
            self.growth = self.history.gram.new_zeros(max(len(layout.params), 1))
        self.views = {name: layout.views(vector) for name, vector in self._vectors().items()}
        updated = [name for name in names if name != "grad_snapshot"]
        self.pieces = {name: layout.piece_views(self.flat[name]) for name in updated}
        self.step = 0
        self.seeded = [False] * len(layout.params)
        self.skipped = [0] * len(layout.blocks)
        self.damped = [0] * len(layout.blocks)
        self.origin = [-1] * len(layout.params)
        self.asked: list[Tensor] = []
        self.heard: list[float] = []
        #: what `expose` gave, in flat order, and the tensors in it
        self._shown: list[dict[str, Any]] = []
        self._shown_tensors: list[tuple[Tensor, ...]] = []
        self.work, self.work_pieces = self._allocate_work()
        # low-precision operands would be added in their own dtype before they are widened
        self.sums_in_one_pass = layout.device.type == "cpu" and all(
            p.dtype == layout.dtype for p in layout.params
        )

    def _vectors(self) -> dict[str, Tensor]:
        """Everything that belongs to parameters: flat vectors and the two halves of W."""
        m = self.history.history_size
        return {**self.flat, "s_history": self.history.W[:m], "y_history": self.history.W[m:]}

    def _allocate_work(self) -> tuple[Tensor, list[Tensor]]:
        segments, shapes = self.layout.segments, self.pieces["param_progress"]
        size = max((s.stop - s.start for s in segments), default=0)
        work = torch.empty(size, dtype=self.layout.dtype, device=self.layout.device)
        views: list[Tensor] = []
        for segment in segments:
            offset = 0
            for like in shapes[segment.first : segment.last]:
                views.append(work.as_strided(like.shape, like.stride(), offset))
                offset += like.numel()
        return work, views

    @property
    def state_bytes(self) -> int:
        """Bytes of the state, without the work buffer and what does not grow with n."""
        tensors = [*self.flat.values(), self.history.W]
        return sum(t.numel() * t.element_size() for t in tensors)

    def read(self, products: Tensor) -> list[list[float]]:
        """Take products (r, c) to the host, and in the same message what was `asked`."""
        asked = [t.reshape(1).to(products) for t in self.asked]
        numbers: list[float] = torch.cat([products.reshape(-1), *asked]).tolist()
        self.heard = numbers[products.numel() :]
        width = products.shape[1]
        return [numbers[i : i + width] for i in range(0, products.numel(), width)]

    def expose(self) -> dict[Tensor, dict[str, Any]]:
        """The state of every parameter, for `torch.optim.Optimizer.state`."""
        layout = self.layout
        self._shown = [
            {
                name: shown(vector, layout, i, self.collectives)
                for name, vector in self._vectors().items()
            }
            for i in range(len(layout.params))
        ]
        if self.growth is not None:
            for i, entry in enumerate(self._shown):
                entry[AVERAGE] = as_state_view(self.growth[i])
        self._shown_tensors = [tuple(entry.values()) for entry in self._shown]
        self.write_counters()
        return dict(zip(layout.params, self._shown, strict=True))

    def is_shown_by(self, state: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Whether a state still has the entries that `expose` gave, with the same tensors."""
        entries, tensors = self._shown, self._shown_tensors
        if len(state) < len(entries) or not all(map(is_, entries, state.values())):
            return False
        return all(
            len(entry) >= len(known) and all(map(is_, known, entry.values()))
            for entry, known in zip(entries, tensors, strict=True)
        )

    def is_filled_by(
        self,
        values: Mapping[Tensor, Mapping[str, Any]],
        layout: Layout,
        collectives: Collectives,
        settings: Mapping[str, Any],
    ) -> bool:
        """Whether this state would be laid out the same and has these values already.

        That is so where somebody wrote into its tensors and then loads them. All ranks ask this.

        Args:
            values: for each parameter its state.
            layout: of the state that is wanted.
            collectives: of it.
            settings: of it, as given to the class.
        """
        given = [values.get(p, {}) for p in self.layout.params]
        kept = (
            self.collectives is collectives
            and self._settings == tuple(settings.values())
            and self.layout.lies_as(layout)
            and all(
                name in entry and same_memory(entry[name], shown_now[name])
                for entry, shown_now in zip(given, self._shown, strict=True)
                for name in self.views
            )
        )
        return not collectives.anywhere(not kept, layout.device)

    def without_reshaped(self, state: Mapping[Tensor, dict[str, Any]]) -> dict[Tensor, Any]:
        """The entries of a state, but those of parameters that have another shape since.

        Raises:
            RuntimeError: one of these had begun its averages.
        """
        layout, values = self.layout, dict(state)
        places = zip(layout.params, layout.tensors(), layout.shapes, strict=True)
        for i, (p, t, shape) in enumerate(places):
            if t.shape != shape:
                if self.seeded[i]:
                    raise RuntimeError(
                        f"{layout.names[i]} has shape {tuple(t.shape)} and a state of shape "
                        f"{tuple(shape)}: after a change of shape make a new optimizer"
                    )
                values.pop(p, None)
        return values

    def write_counters(self) -> None:
        """Bring the counters in every parameter's state up to date."""
        places = zip(self._shown, self.layout.block_of, self.seeded, self.origin, strict=True)
        for entry, block, seeded, origin in places:
            entry["step"] = self.step
            entry["seeded"] = int(seeded)
            entry["pairs"] = self.history.pairs[block]
            entry["skipped"] = self.skipped[block]
            entry["damped"] = self.damped[block]
            entry["block"] = origin

    def load(
        self, values: Mapping[Tensor, Mapping[str, Any]], bounds: Bounds | None = None
    ) -> None:
        """Take over per-parameter values, whatever layout they were written under.

        Missing keys keep their initial values, and averages that are not finite start anew. Where
        the parameters of a block come with different numbers of pairs (they were in different
        blocks), the newest pairs are brought together. Pairs that are of no use are dropped: from
        other blocks those that would not have been accepted in these, and all that are zero or not
        finite.

        Args:
            values: for each parameter its state (`mlbfgs.loading.checked_entry`); parameters may be
                missing.
            bounds: thresholds (σ_L, σ_H) of the pairs, or None.

        Raises:
            ValueError: a tensor does not have its parameter's shape, or is another rank's part.
        """
        layout, history = self.layout, self.history
        refuse_foreign_parts(values, layout, self.collectives)
        counters = [
            {key: values.get(p, {}).get(key, 0) for key in ("step", *BLOCK_COUNTERS)}
            for p in layout.params
        ]
        for i, p in enumerate(layout.params):
            given = dict(values.get(p, {}))
            # a state of before `param_progress` holds M_θ itself
            whole_average = "param_progress" not in given and "param_average" in given
            if whole_average:
                given["param_progress"] = given["param_average"]
            for name in self.views:
                if name in given:
                    self._take(name, i, given[name])
            if whole_average:
                self.views["param_progress"][i].sub_(self.views["param_snapshot"][i])
            # an average means nothing without its snapshot, nor one average without the other
            self.seeded[i] = bool(given.get("seeded", 1)) and all(name in given for name in VECTORS)
            if not ("s_history" in given and "y_history" in given):  # half a pair is none
                counters[i]["pairs"] = 0
        if any(values.values()):
            self._restart_where_not_finite()
        self.step = max((c["step"] for c in counters), default=0)
        if self.growth is not None:
            averages = [float(given.get(AVERAGE, 0.0)) for given in values.values()]
            self.growth.fill_(max((a for a in averages if 0 < a < math.inf), default=0.0))
        for block in range(len(layout.blocks)):
            members = [i for i, b in enumerate(layout.block_of) if b == block]
            self.skipped[block] = max(counters[i]["skipped"] for i in members)
            self.damped[block] = max(counters[i]["damped"] for i in members)
            known = max(counters[i]["pairs"] for i in members)
            history.pairs[block] = 0 if block == self.outside else known
            for i in members:
                self._align(i, counters[i]["pairs"], history.pairs[block])
            history.clear_unused(block)
        history.rebuild(*range(len(layout.blocks)))
        self.origin = [values.get(p, {}).get("block", -1) for p in layout.params]
        self._drop_unusable(bounds)

    def warn_of_missing(self, values: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Log which vectors a loaded state lacks, and of how many parameters.

        Args:
            values: as in `load`; a parameter without any state has not been trained.
        """
        given = [values[p] for p in self.layout.params if values.get(p)]
        if self.layout.params and not given:
            logger.warning("the loaded state has nothing of any parameter: all of them start anew")
        older = {"param_progress": "param_average"}
        counts = {
            name: sum(entry.get(name, entry.get(older.get(name, name))) is None for entry in given)
            for name in self.views
        }
        lacking = [f"{name} of {count}" for name, count in counts.items() if count]
        if lacking:
            logger.warning(
                "the loaded state of %d parameters lacks %s: starts anew there",
                *(len(given), ", ".join(lacking)),
            )

    def hold_what_is_not_finite(self) -> None:
        """Let numbers that are not finite, as the -inf of a mask, have no progress.

        They cannot move, but θ minus the snapshot is NaN there, and no pair would be accepted.
        Where such a number has become finite since, its average starts there.
        """
        layout = self.layout
        for i, (t, kept) in enumerate(zip(layout.tensors(), layout.stretches, strict=True)):
            if kept:
                theta = layout.part(t, i, kept.start, kept.stop).reshape(-1)
                snapshot = layout.stretch_view(self.flat["param_snapshot"], i)
                held = ~(theta.isfinite() & snapshot.isfinite())
                layout.stretch_view(self.flat["param_progress"], i).masked_fill_(held, 0.0)
                snapshot.copy_(torch.where(held, theta.to(snapshot.dtype), snapshot))

    def _restart_where_not_finite(self) -> None:
        """Let averages and momentum of a parameter start anew where they are not finite.

        Where the parameter itself is not finite they follow it and stay.
        """
        layout, collectives = self.layout, self.collectives
        if layout.device.type == "meta":  # no numbers
            return
        finite = all(bool(vector.isfinite().all()) for vector in self.flat.values())
        if not collectives.anywhere(not finite, layout.device):
            return
        counts = torch.zeros(len(self.flat), len(layout.params), dtype=self.of_step.dtype)
        for i, (t, kept) in enumerate(zip(layout.tensors(), layout.stretches, strict=True)):
            if kept:
                theta = layout.part(t, i, kept.start, kept.stop).reshape(-1).isfinite()
                for row, vector in zip(counts, self.flat.values(), strict=True):
                    wrong = ~layout.stretch_view(vector, i).isfinite() & theta
                    row[i] = wrong.sum()
        counts = counts.to(layout.device)
        counts = collectives.sum_products(counts, counts[:0], [None] * len(layout.params))
        told = []
        for i, column in enumerate(counts.T.tolist()):
            names = {name for name, count in zip(self.flat, column, strict=True) if count}
            if not names:
                continue
            together = names & {"momentum_buffer"}
            if names - together:  # the averages mean nothing without each other
                together |= self.flat.keys() - {"momentum_buffer"}
                self.seeded[i] = False
            for name in together:
                layout.stretch_view(self.flat[name], i).zero_()
            told.append(f"{', '.join(sorted(names))} of {layout.names[i]}")
        if told:
            logger.log(
                logging.WARNING if collectives.rank == 0 else logging.DEBUG,
                "the loaded state has numbers that are not finite in %s: starts anew there",
                "; ".join(told[:3]) + ("; ..." if len(told) > 3 else ""),
            )

    def _drop_unusable(self, bounds: Bounds | None) -> None:
        """Drop pairs that are from other blocks and of no use in these, or of none anywhere."""
        history, collectives = self.history, self.collectives
        if not any(history.pairs) or self.layout.device.type == "meta":
            return
        slacks, m = self._slacks(), history.history_size
        products = history.pair_products()
        numbers = collectives.sum_products(products[:0], products, self.layout.owners).T.tolist()
        moved: dict[int, int] = {}
        broken: dict[int, int] = {}
        for block, pairs in enumerate(history.pairs):
            slots = ring_order(pairs, m)
            kept = [
                slot
                for slot in slots
                if self._usable(numbers[block][slot::m], bounds, slacks, block)
            ]
            if len(kept) < len(slots):
                (moved if block in slacks else broken)[block] = len(slots) - len(kept)
                history.keep(block, kept)
        if moved:
            self.origin = list(self.layout.block_of)
        history.rebuild(*moved, *broken)
        for dropped, why in ((moved, _FOREIGN_PAIRS), (broken, _BROKEN_PAIRS)):
            if dropped:
                logger.log(
                    logging.WARNING if collectives.rank == 0 else logging.DEBUG,
                    why,
                    *(", ".join(map(str, numbers)) for numbers in (dropped, dropped.values())),
                )

    def _usable(
        self, numbers: list[float], bounds: Bounds | None, slacks: Mapping[int, float], block: int
    ) -> bool:
        """Whether a pair with these products may stay: one of this block unless it is broken."""
        variant, at_home = self.history.variant, block not in slacks
        return usable_elsewhere(
            *numbers,
            bounds=None if at_home else bounds,
            eps=torch.finfo(self.layout.dtype).eps,
            slack=slacks.get(block, 0.0),
            variant=replace(variant, pair_threshold=-math.inf) if at_home else variant,
        )

    def _slacks(self) -> dict[int, float]:
        """Blocks whose pairs are from others or of unknown origin, and the slack of each."""
        homes = set(zip(self.origin, self.layout.block_of, strict=True))
        slacks = {}
        for block, pairs in enumerate(self.history.pairs):
            origins = {origin for origin, home in homes if home == block}
            if pairs == 0 or block == self.outside:
                continue
            if origins == {-1}:
                slacks[block] = SLACK * torch.finfo(self.history.W.dtype).eps
            elif len(origins) > 1 or sum(origin in origins for origin, _ in homes) > 1:
                slacks[block] = torch.finfo(self.layout.dtype).eps
        return slacks

    def _take(self, name: str, i: int, value: Tensor) -> None:
        vector = self._vectors()[name]
        like = shown(vector, self.layout, i, self.collectives)
        shared = is_shard(like)
        target = self.layout.stretch_view(vector, i) if shared else self.views[name][i]
        try:
            part = own_part(value, like, self.collectives)
        except ValueError as error:
            raise ValueError(f"loaded state {name!r} of {self.layout.names[i]} {error}") from None
        if not same_memory(part, target):
            target.copy_(part)

    def _align(self, i: int, pairs: int, target: int) -> None:
        """Move the ring of parameter i so that its newest pair is pair number `target`."""
        m = self.history.history_size
        if pairs == target:
            return
        old = ring_order(pairs, m)
        new = ring_order(target, m)[-len(old) :] if old else []
        for name in ("s_history", "y_history"):
            view = self.views[name][i]
            rows = view[old].clone()
            view.zero_()
            if new:
                view[new] = rows


def check_values(
    values: Mapping[Tensor, Mapping[str, Any]],
    layout: Layout,
    collectives: Collectives,
    history_size: int,
) -> None:
    """Refuse a state that does not fit before anything is given up for it: a collective call.

    Args:
        values: for each parameter its state.
        layout: what each rank keeps.
        collectives: the ranks.
        history_size: M.

    Raises:
        ValueError: a tensor does not have its parameter's shape, or is another rank's part.
    """
    refuse_foreign_parts(values, layout, collectives)
    rows = {name: () for name in (*VECTORS, "param_average", "momentum_buffer")}
    expected = {**rows, "s_history": (history_size,), "y_history": (history_size,)}
    for param, name in zip(layout.params, layout.names, strict=True):
        for key, value in values.get(param, {}).items():
            shape = (*expected.get(key, ()), *param.shape)
            if key in expected and tuple(value.shape) != shape:
                raise ValueError(
                    f"loaded state {key!r} of {name} has shape {tuple(value.shape)}, "
                    f"expected {shape}"
                )
            if is_shard(value):
                value.check_ranks(collectives)


def whole_tensors(vector: Tensor, flat: FlatState) -> list[Tensor]:
    """A flat vector as tensors of the parameters' shapes, whole on every rank.

    Args:
        vector: (n,), this rank's shard of it.
        flat: the state whose layout it has.

    Returns:
        One tensor for each parameter, in flat order: views where this rank keeps everything, a
        DTensor where the parameter is one.
    """
    layout, collectives = flat.layout, flat.collectives
    if not collectives.copies:
        return [shown(vector, layout, i, collectives) for i in range(len(layout.params))]
    whole = [torch.empty_like(t, dtype=vector.dtype) for t in layout.tensors()]
    for i, (t, kept) in enumerate(zip(whole, layout.stretches, strict=True)):
        if kept:
            part = layout.part(t, i, kept.start, kept.stop)
            part.copy_(layout.stretch_view(vector, i).view(part.shape))
    collectives.exchange(layout, whole)
    return whole
