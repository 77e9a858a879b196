"""One step of the optimizer: Algorithm 1 of M (Algorithm 2 of S).

It runs over segments of the flat vector instead of whole vectors, so that a segment's numbers are
still in cache when the next operation wants them:

    1. g = gradient + wd θ;  M_θ <- β1 M_θ + (1-β1) θ;  M_g <- β2 M_g + (1-β2) g;  p += W g
    2. a, c from p: H g has a = γ, c = C p (`mlbfgs.direction`)
    3. d = a g + Wᵀ c;  v <- m v + d;  θ <- θ - lr v
    4. every T steps: a pair (s, ŷ) from the averages and their snapshots, then new snapshots

During the first 2T steps d = g. g is gathered twice, in 1 and in 3: reading it again is cheaper
than keeping a flat copy, which would cost a write and n numbers of memory.

Legend: `n` numbers in all parameters, `M` history size, `T` update interval, `B` blocks;
flat vectors are (n,), W is (2M, n).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from mlbfgs.damping import damp
from mlbfgs.diagnostics import CurvatureRecord, StepProducts, curvature_record
from mlbfgs.direction import direction_of_kind, hessian_direction, products
from mlbfgs.flat_state import FlatState
from mlbfgs.layout import Segment
from mlbfgs.settings import SharedSettings

logger = logging.getLogger(__name__)

Groups = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class _Part:
    """What a step touches of one segment: the pieces that have a gradient."""

    incomplete: bool
    theta: list[Tensor]
    gradients: list[Tensor]
    work: list[Tensor]
    param_average: list[Tensor]
    grad_average: list[Tensor]
    momentum_buffer: list[Tensor]


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
    layout, history = flat.layout, flat.history
    flat.collectives.begin_step()
    flat.step += 1
    _seed_averages(flat, groups, grads)
    interval, kind = shared.update_interval, shared.direction
    pair_due = flat.step % interval == 0 and flat.step > interval
    preconditioned = [flat.step > 2 * interval and pairs > 0 for pairs in history.pairs]
    theta, gradients = layout.cut(layout.tensors()), layout.cut(grads)
    parts = [_part(flat, segment, theta, gradients) for segment in layout.segments]
    # every sum over n that the direction needs, in one tensor: p = W g and gᵀg
    sums = history.new_sums()
    with_projection = kind != "gamma_gradient" or pair_due  # else nothing asks for H g
    with_square = kind == "norm_matched_gradient" or pair_due

    for segment, part in zip(layout.segments, parts, strict=True):  # Alg. 1, lines 4-8
        group = groups[segment.group]
        g = _gather(flat, segment, part, group)
        _update_averages(part, shared.betas)
        if with_square:
            sums[segment.block, -1].add_(torch.dot(g, g))
        if not preconditioned[segment.block]:
            _descend(part, group)
        elif with_projection:
            history.project(sums, segment.block, segment.start, segment.stop, g)

    collectives = flat.collectives
    if pair_due or (any(preconditioned) and (with_projection or with_square)):
        collectives.sum_step(sums)
    p, g_dot_g = sums[:, :-1], sums[:, -1]
    direction = direction_of_kind(kind, history, p, g_dot_g)
    if any(preconditioned):
        rows = None if direction.c is None else direction.c.to(layout.dtype)
        # Alg. 1, lines 10-11; backwards: what the loop above read last is still in cache
        for segment, part in zip(reversed(layout.segments), reversed(parts), strict=True):
            if preconditioned[segment.block]:
                group = groups[segment.group]
                g = _gather(flat, segment, part, group)
                history.combine_(direction.a, rows, segment.block, segment.start, segment.stop, g)
                _descend(part, group)

    idle = all(g is None for g in grads)
    collectives.share(layout, grads, wait=pair_due or idle)
    if idle:  # nor has any other rank a gradient
        flat.step -= 1
        return None
    records = None
    if pair_due:  # Alg. 1, lines 13-17
        full = products(history, hessian_direction(history, p), p, g_dot_g)
        applied = products(history, direction, p, g_dot_g)
        records = _update_pairs(flat, shared, torch.stack([g_dot_g, *applied, *full]))
    if flat.step % interval == 0:
        flat.flat["param_snapshot"].copy_(flat.flat["param_average"])
        flat.flat["grad_snapshot"].copy_(flat.flat["grad_average"])
    return records


def _part(
    flat: FlatState, segment: Segment, theta: list[Tensor], gradients: list[Tensor | None]
) -> _Part:
    here = [k for k in range(segment.first, segment.last) if gradients[k] is not None]
    vectors = {name: [pieces[k] for k in here] for name, pieces in flat.pieces.items()}
    return _Part(
        incomplete=len(here) < segment.last - segment.first,
        theta=[theta[k] for k in here],
        gradients=[cast(Tensor, gradients[k]) for k in here],
        work=[flat.work_pieces[k] for k in here],
        param_average=vectors["param_average"],
        grad_average=vectors["grad_average"],
        momentum_buffer=vectors.get("momentum_buffer", []),
    )


def _seed_averages(flat: FlatState, groups: Groups, grads: Sequence[Tensor | None]) -> None:
    """A parameter's averages start at its first value and gradient (Alg. 1, line 1).

    So do its snapshots: a parameter that joins late has no part in the current s and y.
    """
    if all(flat.seeded):
        return
    for i, (p, grad) in enumerate(zip(flat.layout.tensors(), grads, strict=True)):
        if grad is not None and not flat.seeded[i]:
            group = groups[flat.layout.group_of[i]]
            g = grad.to(flat.layout.dtype)
            g = -g if group["maximize"] else g
            g = g.add(p, alpha=group["weight_decay"]) if group["weight_decay"] != 0 else g
            for moment in ("average", "snapshot"):
                flat.layout.put(flat.flat[f"param_{moment}"], i, p)
                flat.layout.put(flat.flat[f"grad_{moment}"], i, g)
            flat.seeded[i] = True


def _gather(flat: FlatState, segment: Segment, part: _Part, group: Mapping[str, Any]) -> Tensor:
    """The segment's gradient with weight decay, in the work buffer (S Alg. 2, line 4)."""
    if part.incomplete:
        flat.work.zero_()
    decay = group["weight_decay"]
    if decay != 0 and flat.sums_in_one_pass and not group["maximize"]:
        # the same sums as below, in one pass: there are no kernel launches to save on a CPU
        for out, g, t in zip(part.work, part.gradients, part.theta, strict=True):
            torch.add(g, t, alpha=decay, out=out)
    elif part.theta:
        torch._foreach_copy_(part.work, part.gradients)
        if group["maximize"]:
            torch._foreach_neg_(part.work)
        if decay != 0:
            torch._foreach_add_(part.work, part.theta, alpha=decay)
    return flat.work[: segment.stop - segment.start]


def _update_averages(part: _Part, betas: tuple[float, float]) -> None:
    """The segment's M_θ and M_g (Alg. 1, line 6); its gradient lies in the work buffer."""
    if part.theta:
        dtype = part.work[0].dtype  # lerp wants equal dtypes: low-precision θ is widened
        theta = [t if t.dtype == dtype else t.to(dtype) for t in part.theta]
        torch._foreach_lerp_(part.param_average, theta, 1 - betas[0])
        torch._foreach_lerp_(part.grad_average, part.work, 1 - betas[1])


def _descend(part: _Part, group: Mapping[str, Any]) -> None:
    """Heavy ball and update of the segment; its direction lies in the work buffer."""
    if not part.theta:
        return
    step = part.work
    if group["momentum"] != 0:
        torch._foreach_mul_(part.momentum_buffer, group["momentum"])
        torch._foreach_add_(part.momentum_buffer, step)
        step = part.momentum_buffer
    if isinstance(group["lr"], Tensor):  # as an alpha the host would have to read it
        torch._foreach_sub_(part.theta, torch._foreach_mul(step, group["lr"]))
    else:
        torch._foreach_add_(part.theta, step, alpha=-group["lr"])


def _update_pairs(
    flat: FlatState, shared: SharedSettings, of_direction: Tensor
) -> list[CurvatureRecord]:
    """One pair for every block (Alg. 1, lines 14-16); holds the one host synchronisation."""
    history = flat.history
    averages = (flat.flat["param_average"], flat.flat["grad_average"])
    snapshots = (flat.flat["param_snapshot"], flat.flat["grad_snapshot"])
    dots = of_direction.new_zeros(3, len(flat.layout.blocks))
    for block in range(len(flat.layout.blocks)):
        for a, b in history.tiles(block):
            s, y = (new[a:b] - old[a:b] for new, old in zip(averages, snapshots, strict=True))
            tile = torch.stack([torch.dot(s, s), torch.dot(s, y), torch.dot(y, y)])
            dots[:, block].add_(tile)
    owners = flat.layout.owners
    numbers = flat.collectives.sum_products(dots, of_direction, owners).T.tolist()

    records, written = [], []
    for block, (ss, sy, yy, *of_step) in enumerate(numbers):
        pair = damp(
            *(ss, sy, yy),
            tau0=shared.damping,
            bounds=shared.curvature_bounds,
            eps=torch.finfo(flat.layout.dtype).eps,
        )
        if pair.accepted:
            slot = history.write(block, averages, snapshots, pair.tau)
            written.append((block, slot))
            flat.damped[block] += pair.damped
        else:
            flat.skipped[block] += 1
            level = logging.WARNING if flat.collectives.rank == 0 else logging.DEBUG
            logger.log(
                level,
                "step %d, block %d: pair skipped, sTs = %.3g, sTy = %.3g, yTy = %.3g",
                *(flat.step, block, ss, sy, yy),
            )
        records.append(curvature_record(flat, block, pair, StepProducts(*of_step)))
    history.enter(written)
    return records
