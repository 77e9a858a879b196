"""What a step does with one segment of the flat vector: gather, average, descend.

Segments are short, so that a segment's numbers are still in cache when the next operation wants
them. The gradient is gathered once for each pass over the segments: reading it again is cheaper
than keeping a flat copy, which would cost a write and n numbers of memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from mlbfgs.flat_state import FlatState
from mlbfgs.groups import Group
from mlbfgs.layout import Segment
from mlbfgs.variant import Variant


@dataclass(frozen=True)
class Part:
    """What a step touches of one segment: the pieces that have a gradient.

    The functions below are for segments with one such piece at least.
    """

    incomplete: bool
    theta: list[Tensor]
    gradients: list[Tensor]
    work: list[Tensor]
    param_snapshot: list[Tensor]
    param_progress: list[Tensor]
    grad_average: list[Tensor]
    momentum_buffer: list[Tensor]


def part_of(
    flat: FlatState, segment: Segment, theta: list[Tensor], gradients: list[Tensor | None]
) -> Part:
    """The part that a segment has in a step, given all pieces of parameters and gradients."""
    here = [k for k in range(segment.first, segment.last) if gradients[k] is not None]
    vectors = {name: [pieces[k] for k in here] for name, pieces in flat.pieces.items()}
    return Part(
        incomplete=len(here) < segment.last - segment.first,
        theta=[theta[k] for k in here],
        gradients=[cast(Tensor, gradients[k]) for k in here],
        work=[flat.work_pieces[k] for k in here],
        param_snapshot=vectors["param_snapshot"],
        param_progress=vectors["param_progress"],
        grad_average=vectors["grad_average"],
        momentum_buffer=vectors.get("momentum_buffer", []),
    )


def gather(flat: FlatState, segment: Segment, part: Part, group: Group, decay: float) -> Tensor:
    """The segment's gradient with weight decay, in the work buffer (S Alg. 2, line 4)."""
    if part.incomplete:
        flat.work.zero_()
    if decay != 0 and flat.sums_in_one_pass and not group["maximize"]:
        # the same sums as below, in one pass: there are no kernel launches to save on a CPU
        for out, g, t in zip(part.work, part.gradients, part.theta, strict=True):
            torch.add(g, t, alpha=decay, out=out)
    else:
        torch._foreach_copy_(part.work, part.gradients)
        if group["maximize"]:
            torch._foreach_neg_(part.work)
        add_decay(part, decay)
    return flat.work[: segment.stop - segment.start]


def add_decay(part: Part, decay: float) -> None:
    """Add `decay` θ to what lies in the work buffer."""
    if decay != 0:
        torch._foreach_add_(part.work, part.theta, alpha=decay)


def update_averages(part: Part, betas: tuple[float, float], variant: Variant, scale: float) -> None:
    """The segment's M_θ and M_g (Alg. 1, line 6).

    M_θ is its snapshot plus its progress since. What is added up is θ minus the snapshot, which is
    exact where θ moves little, so that the progress keeps what is small beside θ.

    Args:
        part: the segment; the gradient that enters, but for `scale`, lies in the work buffer.
        betas: β1 and β2.
        variant: `averaging` counts here.
        scale: of the gradient.
    """
    beta1, beta2 = betas
    dtype = part.work[0].dtype  # low-precision θ is widened
    theta = [t if t.dtype == dtype else t.to(dtype) for t in part.theta]
    if variant.averaging == "ema":
        ahead = torch._foreach_sub(theta, part.param_snapshot)
        torch._foreach_lerp_(part.param_progress, ahead, 1 - beta1)
    else:
        ahead = torch._foreach_sub(theta, part.param_snapshot, alpha=1 - beta1)
        torch._foreach_mul_(part.param_progress, beta1)
        torch._foreach_add_(part.param_progress, ahead)
    if variant.averaging == "ema" and scale == 1:
        torch._foreach_lerp_(part.grad_average, part.work, 1 - beta2)
    else:
        weight = scale if variant.averaging == "sum" else (1 - beta2) * scale
        torch._foreach_mul_(part.grad_average, beta2)
        torch._foreach_add_(part.grad_average, part.work, alpha=weight)


def descend(part: Part, group: Group) -> None:
    """Heavy ball and update of the segment; its direction lies in the work buffer."""
    step = part.work
    if group["momentum"] != 0:
        torch._foreach_mul_(part.momentum_buffer, group["momentum"])
        torch._foreach_add_(part.momentum_buffer, step)
        step = part.momentum_buffer
    if isinstance(group["lr"], Tensor):  # as an alpha the host would have to read it
        torch._foreach_sub_(part.theta, torch._foreach_mul(step, group["lr"].reshape(())))
    else:
        torch._foreach_add_(part.theta, step, alpha=-group["lr"])
