"""The direction as coefficients: d = a g + Wᵀ c for every block, and its products with g.

`direction` names what stands for H g:

    hessian                 a = γ              c = C W g     d = H g, the papers' algorithm
    gamma_gradient          a = γ              c = 0         d = γ g: the step length alone
    norm_matched_gradient   a = ‖H g‖ / ‖g‖    c = 0         d = g, scaled to the length of H g

The last two are controls: they ask whether a gain comes from the curvature's direction or from its
length. Everything follows from p = W g, gᵀg and the Gram matrix, without a pass over n.

The released code scales all directions together, which is a factor of a and c (`clip_scale`,
`normalizing_scale`).

Legend: `M` history size, `B` blocks; `W: (2M, n)`, `p, c: (B, 2M)`, `a, g_dot_g: (B,)`, and
`sums: (B, 2M + 1)`, W v and vᵀg of a vector v; all float64 (float32 where a device has no float64).
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

    def scaled(self, factor: Tensor) -> Direction:
        """The direction times a factor of shape ()."""
        return Direction(self.a * factor, None if self.c is None else self.c * factor)


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
    _, square = products(history, full, torch.cat([p, g_dot_g.unsqueeze(1)], dim=1))
    # where g = 0, any length will do
    return Direction((square / g_dot_g).sqrt().where(g_dot_g > 0, history.gamma), None)


def products_with(direction: Direction, sums: Tensor) -> Tensor:
    """dᵀv = a gᵀv + (W v)ᵀc.

    Args:
        direction: d, from g.
        sums: (B, 2M + 1) W v and vᵀg.

    Returns:
        (B,).
    """
    along = direction.a * sums[:, -1]
    return along if direction.c is None else along + (sums[:, :-1] * direction.c).sum(1)


def products(
    history: CurvatureHistory, direction: Direction, sums: Tensor
) -> tuple[Tensor, Tensor]:
    """dᵀg, and dᵀd = a² gᵀg + 2 a pᵀc + cᵀ(W Wᵀ)c.

    Args:
        history: the pairs.
        direction: d.
        sums: (B, 2M + 1) p = W g and gᵀg.

    Returns:
        dᵀg and dᵀd, each (B,).
    """
    a, c, g_dot_g = direction.a, direction.c, sums[:, -1]
    square = a * a * g_dot_g
    if c is not None:
        gram_c = torch.matmul(history.gram, c.unsqueeze(-1)).squeeze(-1)
        square = square + 2 * a * (sums[:, :-1] * c).sum(1) + (c * gram_c).sum(1)
    # rounding can make a tiny square negative
    return products_with(direction, sums), square.clamp(min=0.0)


def normalizing_scale(total: Tensor) -> Tensor:
    """1 / √(Σ ‖d‖²), or 1 where all d are zero.

    Args:
        total: Σ ‖d‖² over the blocks, of shape ().
    """
    return torch.where(total > 0, total.rsqrt(), 1.0)


def clip_scale(total: Tensor, kappa: float) -> Tensor:
    """min(1, √(κ / Σ gᵀd)), and 1 where the sum is not positive: then there is nothing to bound.

    Args:
        total: Σ gᵀd, of shape ().
        kappa: κ.
    """
    return torch.where(total > kappa, (kappa / total).sqrt(), 1.0)
