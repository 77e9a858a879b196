"""The guarded step: what a step promises may grow only slowly.

Along d = H g the quadratic model of L-BFGS promises a decrease in proportion to gᵀd = dᵀB d, with
B = H⁻¹. A bad pair shows there first: γ jumps, and gᵀd with it. With P the sum of |gᵀd| over all
blocks, q the switch `growth_limit` and A a running average of P:

    A = Σ gᵀg                      at first
    d <- d min(1, q A / P)         once there are pairs; one factor for all blocks
    A <- β A + (1-β) P             P after that factor, so that A grows by (1-β)(q-1) at most

P has no unit to choose: it is compared with itself. lr and momentum come after it: a step of
lr / (1-momentum) = 1 along d is the one that the model wants, and the bound says nothing about
longer ones. A step without any gradient, or with one that is not finite, leaves A as it is.

The papers have no such bound. The authors' SLIM-QN code has one with a unit (`Variant.kl_clip`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: β of A: a memory of fifty steps, so that q = 1.2 lets A grow by 0.4 % a step.
MEMORY = 0.98
#: The growth limit of `variant="guarded"`.
DEFAULT_LIMIT = 1.2
#: The name of A in a parameter's state.
AVERAGE = "growth_average"


def limit_growth_(average: Tensor, promise: Tensor, first: Tensor, limit: float | None) -> Tensor:
    """Bound what a step promises, and enter what remains of it in the running average, in place.

    Args:
        average: A, any number of times; 0 where it has not begun.
        promise: P, of shape ().
        first: Σ gᵀg, of shape (), with which A begins.
        limit: q; None bounds nothing.

    Returns:
        What to multiply every direction with, of shape (), at most 1.
    """
    before = average[0]
    known = torch.where(before > 0, before, first)
    kept = promise
    if limit is not None:
        kept = torch.where(promise < math.inf, promise.minimum(limit * known), promise)
    fed = known.lerp(kept, 1 - MEMORY)
    average.copy_(torch.where((kept > 0) & (fed < math.inf), fed, before))
    return torch.where(kept < promise, kept / promise, 1.0)
