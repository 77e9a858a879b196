"""The direction as coefficients: d = a g + Wᵀ c for every block, and its products with g.

`direction` names what stands for H g:

    hessian                 a = γ              c = C W g     d = H g, the papers' algorithm
    gamma_gradient          a = γ              c = 0         d = γ g: the step length alone
    norm_matched_gradient   a = ‖H g‖ / ‖g‖    c = 0         d = g, scaled to the length of H g

The last two are controls: they ask whether a gain comes from the curvature's direction or from its
length. Everything follows from p = W g, gᵀg and the Gram matrix, without a pass over n.

Legend: `M` history size, `B` blocks; `W: (2M, n)`, `p, c: (B, 2M)`, `a, g_dot_g: (B,)`, all float64
(float32 where the device has no float64).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mlbfgs.curvature import CurvatureHistory

DirectionKind = Literal["hessian", "gamma_gradient", "norm_matched_gradient"]


@dataclass(frozen=True)
class Direction:
    """d = a g + Wᵀ c of every block.

    Attributes:
        a: (B,) weight of the gradient.
        c: (B, 2M) weights of the rows of W; None is zero.
    """

    a: Tensor
    c: Tensor | None


def hessian_direction(history: CurvatureHistory, p: Tensor) -> Direction:
    """H g.

    Args:
        history: the pairs.
        p: (B, 2M) W g.
    """
    return Direction(history.gamma, history.coefficients(p))


def direction_of_kind(
    kind: DirectionKind, history: CurvatureHistory, p: Tensor, g_dot_g: Tensor
) -> Direction:
    """The direction that a user asked for.

    Args:
        kind: its name.
        history: the pairs.
        p: (B, 2M) W g; not read for `gamma_gradient`.
        g_dot_g: (B,) gᵀg; read for `norm_matched_gradient` only.
    """
    if kind == "gamma_gradient":
        return Direction(history.gamma, None)
    full = hessian_direction(history, p)
    if kind == "hessian":
        return full
    _, square = products(history, full, p, g_dot_g)
    # where g = 0, any length will do
    return Direction((square / g_dot_g).sqrt().where(g_dot_g > 0, history.gamma), None)


def products(
    history: CurvatureHistory, direction: Direction, p: Tensor, g_dot_g: Tensor
) -> tuple[Tensor, Tensor]:
    """dᵀg and dᵀd, as dᵀg = a gᵀg + pᵀc and dᵀd = a² gᵀg + 2 a pᵀc + cᵀ(W Wᵀ)c.

    Args:
        history: the pairs.
        direction: d.
        p: (B, 2M) W g.
        g_dot_g: (B,) gᵀg.

    Returns:
        dᵀg and dᵀd, each (B,).
    """
    a, c = direction.a, direction.c
    along, square = a * g_dot_g, a * a * g_dot_g
    if c is not None:
        p_dot_c = (p * c).sum(1)
        gram_c = torch.matmul(history.gram, c.unsqueeze(-1)).squeeze(-1)
        along = along + p_dot_c
        square = square + 2 * a * p_dot_c + (c * gram_c).sum(1)
    return along, square.clamp(min=0.0)  # rounding can make a tiny square negative
