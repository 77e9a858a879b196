"""One step of the optimizer: Algorithm 1 of M (Algorithm 2 of S).

It passes twice over segments of the flat vector (`mlbfgs.parts`):

    1. g = gradient + wd θ;  M_θ <- β1 M_θ + (1-β1) θ;  M_g <- β2 M_g + (1-β2) g;  p += W g
    2. a, c from p: H g has a = γ, c = C p (`mlbfgs.direction`)
    3. d = a g + Wᵀ c;  v <- m v + d;  θ <- θ - lr v
    4. every T steps: a pair (s, ŷ) from the averages and their snapshots, then new snapshots

During the first 2T steps d = g, and 3 is done within 1. Where a pair is used in the step that
stores it (`Variant.same_step`), 4 comes between the averages and p. All sums over n that the
direction needs are in one tensor when the first pass ends; nothing is read by the host but the
pair's products, in 4.

Legend: `n` numbers in all parameters, `M` history size, `T` update interval, `B` blocks;
flat vectors are (n,), W is (2M, n).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mlbfgs.damping import damp
from mlbfgs.diagnostics import CurvatureRecord, StepProducts, curvature_record, length_ratio
from mlbfgs.direction import (
    Direction,
    clip_scale,
    direction_of_kind,
    hessian_direction,
    normalizing_scale,
    products,
    products_with,
)
from mlbfgs.flat_state import FlatState
from mlbfgs.groups import Groups
from mlbfgs.growth import limit_growth_
from mlbfgs.layout import Segment
from mlbfgs.parts import Part, add_decay, descend, gather, part_of, update_averages
from mlbfgs.settings import SharedSettings


def take_step(
    flat: FlatState, groups: Groups, shared: SharedSettings, grads: Sequence[Tensor | None]
) -> list[CurvatureRecord] | None:
    """Move the parameters and update the state once.

    Args:
        flat: the state.
        groups: the optimizer's `param_groups`.
        shared: what they share.
        grads: the gradients, in flat order; None in all places only where ranks share parameters.

    Returns:
        What happened at the pair update, one record for each block; None where none was due.

    Raises:
        RuntimeError: ranks have gradients for different parameters.
    """
    flat.collectives.begin_step()
    flat.step += 1
    _seed_averages(flat, groups, shared, grads)
    step = _Step(flat, groups, shared, grads)
    idle = all(g is None for g in grads)
    records = None
    at_once = step.pair_due and shared.variant.same_step
    if at_once:  # an idle rank would go another way than the others
        flat.collectives.compare(flat.layout, grads)
    if at_once and not idle:
        step.first_pass(averaging=True, projecting=False)
        records = _update_pairs(flat, shared, None)
        step.close_interval()
        step.first_pass(averaging=False, projecting=True)
        step.second_pass()
        known = step.products()
        flat.of_start.copy_(known[0:3:2])  # gᵀg and dᵀd
        owners = flat.layout.owners
        # read when somebody asks for the records
        flat.of_step.copy_(flat.collectives.sum_products(known[:0], known, owners))
        flat.collectives.share(flat.layout, grads, wait=True)
        return records
    step.first_pass(averaging=True, projecting=True)
    step.second_pass()
    if step.uses_first_pair:
        flat.of_start.copy_(step.products()[0:3:2])  # gᵀg and dᵀd
    flat.collectives.share(flat.layout, grads, wait=step.pair_due or idle)
    if idle:  # nor has any other rank a gradient
        flat.step -= 1
        return None
    if step.pair_due:  # Alg. 1, lines 13-17
        records = _update_pairs(flat, shared, step.products())
    if step.ends_interval:
        step.close_interval()
    return records


class _Step:
    """The two passes of one step.

    Attributes:
        ends_interval: whether t mod T = 0.
        pair_due: whether it also ends an interval that began with a snapshot.
        uses_first_pair: whether it is the first step in which some block uses its first pair.
        sums: (1, B, 2M + 1) float64: p = W g and gᵀg; (2, ...) where the clip needs W v and vᵀg
            of the gradient v without weight decay as well.
    """

    def __init__(
        self,
        flat: FlatState,
        groups: Groups,
        shared: SharedSettings,
        grads: Sequence[Tensor | None],
    ):
        layout = flat.layout
        self.flat, self.groups, self.shared = flat, groups, shared
        theta, gradients = layout.cut(layout.tensors()), layout.cut(grads)
        self.parts = [part_of(flat, segment, theta, gradients) for segment in layout.segments]
        self.ends_interval = flat.step % shared.update_interval == 0
        self.pair_due = self.ends_interval and flat.step > shared.update_interval
        after = (flat.step - 1) % shared.update_interval == 0
        warm = flat.step > 2 * shared.update_interval
        self.uses_first_pair = after and warm and 1 in flat.history.pairs
        variant = shared.variant
        self.guarded = variant.growth_limit is not None
        self.scaled = self.guarded or variant.normalize_direction or variant.kl_clip is not None
        undecayed = variant.kl_clip is not None and any(g["weight_decay"] != 0 for g in groups)
        self.sums = flat.history.new_sums(2 if undecayed else 1)
        self.direction: Direction | None = None
        self.fresh: list[tuple[Part, list[Tensor]]] = []

    def preconditioned(self) -> list[bool]:
        """For each block whether its direction is H g."""
        warm = self.flat.step > 2 * self.shared.update_interval  # Alg. 1, lines 7-8
        late = warm or self.shared.variant.same_step
        return [late and pairs > 0 for pairs in self.flat.history.pairs]

    def waits(self) -> list[bool]:
        """For each block whether its direction is known after the first pass only."""
        preconditioned = self.preconditioned()
        return [any(preconditioned)] * len(preconditioned) if self.scaled else preconditioned

    def decay(self, segment: Segment) -> float:
        """The weight decay of a segment in the direction."""
        decay: float = self.groups[segment.group]["weight_decay"]
        if segment.block == self.flat.outside and not self.shared.variant.decay_outside_blocks:
            return 0.0 if any(self.preconditioned()) else decay
        return decay

    def first_pass(self, *, averaging: bool, projecting: bool) -> None:
        """Alg. 1, lines 4-8: averages, sums over n, and the step of blocks without pairs.

        Args:
            averaging: whether to update the averages.
            projecting: whether to do the rest.
        """
        history, variant = self.flat.history, self.shared.variant
        preconditioned, waits = self.preconditioned(), self.waits()
        kind = self.shared.direction
        with_rows = kind != "gamma_gradient" or self.pair_due  # else nothing asks for H g
        with_square = kind == "norm_matched_gradient" or self.scaled
        with_square = with_square or self.pair_due or self.uses_first_pair
        undecayed = len(self.sums) == 2
        for segment, part in zip(self.flat.layout.segments, self.parts, strict=True):
            if not part.theta:  # nothing to add to a sum, nothing to move
                continue
            group, decay = self.groups[segment.group], self.decay(segment)
            decayed = variant.averaged_gradient == "decayed"
            plain = undecayed or not decayed
            g = gather(self.flat, segment, part, group, 0.0 if plain else decay)
            if averaging and not decayed:
                self._average(part, group["weight_decay"])
            v = g.clone() if undecayed else g
            if plain:
                add_decay(part, decay)
            if averaging and decayed:
                self._average(part, group["weight_decay"])
            if not projecting:
                continue
            block, start, stop = segment.block, segment.start, segment.stop
            if with_square:
                self.sums[0, block, -1].add_(torch.dot(g, g))
            if preconditioned[block] and with_rows:
                history.project(self.sums[0], block, start, stop, g)
            if undecayed and waits[block]:
                self.sums[1, block, -1].add_(torch.dot(v, g))
                if preconditioned[block] and kind == "hessian":
                    history.project(self.sums[1], block, start, stop, v)
            if not waits[block]:
                descend(part, group)
        summed = any(waits) and (with_rows or with_square)
        if projecting and (self.pair_due or self.guarded or summed):
            self.flat.collectives.sum_step(self.sums)

    def _average(self, part: Part, decay: float) -> None:
        variant = self.shared.variant
        scale = 1 + decay if variant.averaged_gradient == "scaled" else 1.0
        update_averages(part, self.shared.betas, variant, scale)
        if variant.reset_grad_average and self.ends_interval:
            self.fresh.append((part, [w * scale for w in part.work]))

    def second_pass(self) -> None:
        """Alg. 1, lines 9-11: the direction, and the step along it."""
        flat, waits = self.flat, self.waits()
        p, g_dot_g = self.sums[0, :, :-1], self.sums[0, :, -1]
        direction = direction_of_kind(self.shared.direction, flat.history, p, g_dot_g)
        if self.guarded or (self.scaled and any(waits)):
            direction = direction.scaled(self._scale(direction))
        self.direction = direction
        if not any(waits):
            return
        rows = None if direction.c is None else direction.c.to(flat.layout.dtype)
        # backwards: what the first pass read last is still in cache
        pairs = zip(reversed(flat.layout.segments), reversed(self.parts), strict=True)
        for segment, part in pairs:
            if waits[segment.block] and part.theta:
                group = self.groups[segment.group]
                g = gather(flat, segment, part, group, self.decay(segment))
                flat.history.combine_(
                    direction.a, rows, segment.block, segment.start, segment.stop, g
                )
                descend(part, group)

    def _scale(self, direction: Direction) -> Tensor:
        """What the variant multiplies every direction with, of shape ()."""
        history, variant = self.flat.history, self.shared.variant
        if self.flat.growth is not None:
            promise = products_with(direction, self.sums[0]).abs()
            of_blocks = torch.stack([promise, self.sums[0, :, -1]])
            # block by block, so that ranks add up in the order of one process
            self.flat.collectives.sum_owned(of_blocks)
            limit = variant.growth_limit if any(self.waits()) else None  # the warm-up is SGD's
            promise, g_dot_g = of_blocks.sum(1)
            return limit_growth_(self.flat.growth, promise, g_dot_g, limit)
        if variant.kl_clip is None:
            _, squares = products(history, direction, self.sums[0])
            total = squares[: self.flat.inside].sum()
            self.flat.collectives.sum_owned(total)
            return normalizing_scale(total)
        total = products_with(direction, self.sums[-1]).sum()
        self.flat.collectives.sum_owned(total)
        return clip_scale(total, variant.kl_clip)

    def products(self) -> Tensor:
        """(5, B) gᵀg, then dᵀg and dᵀd of the direction taken, then of H g."""
        history, sums = self.flat.history, self.sums[0]
        assert self.direction is not None
        applied = products(history, self.direction, sums)
        full = applied
        if self.scaled or self.shared.direction != "hessian":
            full = products(history, hessian_direction(history, sums[:, :-1]), sums)
        return torch.stack([sums[:, -1], *applied, *full])

    def close_interval(self) -> None:
        """Alg. 1, line 13: new snapshots; then, if asked for, a new gradient average."""
        flat = self.flat
        flat.flat["param_snapshot"].add_(flat.flat["param_progress"])
        flat.flat["param_progress"].zero_()
        flat.flat["grad_snapshot"].copy_(flat.flat["grad_average"])
        for part, fresh in self.fresh:
            torch._foreach_copy_(part.grad_average, fresh)


def _seed_averages(
    flat: FlatState, groups: Groups, shared: SharedSettings, grads: Sequence[Tensor | None]
) -> None:
    """A parameter's averages start at its first value and gradient (Alg. 1, line 1).

    So do its snapshots: of a parameter that joins late, the current s and y have what it did since.
    (Averages that are sums grow from the first value on, as in the release.)
    """
    if all(flat.seeded):
        return
    entering = shared.variant.averaged_gradient
    for i, (p, grad) in enumerate(zip(flat.layout.tensors(), grads, strict=True)):
        if grad is not None and not flat.seeded[i]:
            group = groups[flat.layout.group_of[i]]
            decay = group["weight_decay"]
            g = grad.to(flat.layout.dtype)
            g = -g if group["maximize"] else g
            if decay != 0 and entering != "plain":
                g = g.add(p, alpha=decay) if entering == "decayed" else g * (1 + decay)
            # β 0 + x = x: what a sum begins with is added by this step
            from_zero = shared.variant.averaging == "sum"
            value = p.to(flat.layout.dtype)
            started = {
                "param_snapshot": value,
                "param_progress": -value if from_zero else torch.zeros_like(value),
                "grad_snapshot": g,
                "grad_average": torch.zeros_like(g) if from_zero else g,
            }
            for name, first in started.items():
                flat.layout.put(flat.flat[name], i, first)
            flat.seeded[i] = True


def _update_pairs(
    flat: FlatState, shared: SharedSettings, of_step: Tensor | None
) -> list[CurvatureRecord]:
    """One pair for every block (Alg. 1, lines 14-16); holds the one host synchronisation.

    Args:
        flat: the state.
        shared: what the groups share.
        of_step: (5, B) `_Step.products`, None where the step's direction is not known yet.
    """
    history = flat.history
    moved = flat.flat["param_progress"], flat.flat["grad_average"], flat.flat["grad_snapshot"]
    first = 1 in history.pairs  # the interval that ends used a first pair
    parts = [flat.of_start] if first else []
    known = torch.cat([*parts, flat.of_step[:0] if of_step is None else of_step])
    numbers = _pair_products(flat, moved, known)
    if not all(math.isfinite(number) for row in numbers for number in row[:3]):
        flat.hold_what_is_not_finite()  # rare: the host waits once more
        numbers = _pair_products(flat, moved, known)

    records, written, shortened = [], [], []
    for block, (ss, sy, yy, *rest) in enumerate(numbers[: flat.inside]):
        pairs, start = history.pairs[block], math.nan
        if first:
            g_dot_g, d_dot_d, *rest = rest
            start = length_ratio(d_dot_d, g_dot_g) if pairs == 1 else math.nan
        pair = damp(
            *(ss, sy, yy),
            tau0=shared.damping,
            bounds=shared.curvature_bounds,
            eps=torch.finfo(flat.layout.dtype).eps,
            variant=shared.variant,
        )
        if pair.accepted:
            slot = history.write(block, *moved, tau=pair.tau)
            written.append((block, slot))
            flat.damped[block] += pair.damped
        else:
            flat.skipped[block] += 1
            if shared.variant.drop_oldest_first and history.drop_oldest(block):
                shortened.append(block)
        products_of_step = StepProducts(*rest) if rest else None
        record = curvature_record(flat, block, pair, products_of_step)
        ratio = record.direction_over_gradient
        flat.warnings.of_pair(flat.step, block, pair, pairs, ratio, start, shared.curvature_bounds)
        records.append(record)
    history.enter(written)
    history.rebuild(*shortened)
    if written:
        flat.origin = list(flat.layout.block_of)
    return records


def _pair_products(
    flat: FlatState, moved: tuple[Tensor, Tensor, Tensor], known: Tensor
) -> list[list[float]]:
    """For each block sᵀs, sᵀy and yᵀy of the pair to come, then what is known of the step."""
    dots = flat.of_step.new_zeros(3, len(flat.layout.blocks))
    for block in range(flat.inside):
        for _, _, s, y in flat.history.candidate(block, *moved):
            tile = torch.stack([torch.dot(s, s), torch.dot(s, y), torch.dot(y, y)])
            dots[:, block].add_(tile)
    return flat.read(flat.collectives.sum_products(dots, known, flat.layout.owners).T)
