"""Adaptive damping of a pair: ŷ = τ y + (1 - τ) s (S Eq. (3)-(4); M Eq. (7) and below).

Plain numbers in and out: the optimizer takes sᵀs, sᵀy and yᵀy to the host once per pair and decides
there, in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlbfgs.variant import PAPER, Variant

Bounds = tuple[float, float]


@dataclass(frozen=True)
class DampedPair:
    """What damping makes of one pair of one block.

    Attributes:
        mu: curvature ratio μ = sᵀy / (sᵀs + ε) before damping (NaN where s = 0).
        mu_damped: sᵀŷ / sᵀs after it.
        tau: the coefficient τ.
        damped: whether a threshold acted, that is τ < τ0.
        gamma: sᵀŷ / (ŷᵀŷ + ε), the initial inverse-Hessian scale of this pair.
        accepted: whether the pair enters the history.
    """

    mu: float
    mu_damped: float
    tau: float
    damped: bool
    gamma: float
    accepted: bool


def damping_coefficient(mu: float, tau0: float, bounds: Bounds | None) -> float:
    """τ by S Eq. (4) (M, below Eq. (7)).

    Args:
        mu: curvature ratio sᵀy / sᵀs, finite.
        tau0: constant coefficient τ0, in (0, 1].
        bounds: (σ_L, σ_H) with σ_L < 1 <= σ_H, or None for no thresholds. σ_H = 1 is what S
            prints; then τ = 0 for μ > 1, and the 0/0 at μ = 1 is taken as τ0: sᵀŷ = sᵀs there
            whatever τ is.

    Returns:
        τ in [0, τ0], such that σ_L <= τ μ + (1 - τ) <= σ_H.
    """
    if bounds is None:
        return tau0
    low, high = bounds
    if mu <= low:
        return min((1 - low) / (1 - mu), tau0)
    if mu >= high and mu != 1:
        return min((high - 1) / (mu - 1), tau0)
    return tau0


def damp(
    ss: float,
    sy: float,
    yy: float,
    *,
    tau0: float,
    bounds: Bounds | None,
    eps: float,
    variant: Variant = PAPER,
) -> DampedPair:
    """Damp one pair, given its three products, and decide whether it can be used.

    A pair is refused when a product is not finite, and when sᵀŷ cannot be told from the rounding
    error of a dot product, |sᵀŷ| <= eps ‖s‖ ‖ŷ‖ (which includes s = 0): Algorithm 2 divides by it.
    A negative sᵀŷ is not refused: without thresholds the papers have no such rule, and their
    ablation shows what follows from it. `variant.pair_threshold` replaces the rounding rule; what
    no division survives (s = 0, products that are not finite) is refused all the same.

    Args:
        ss: sᵀs.
        sy: sᵀy.
        yy: yᵀy.
        tau0: constant coefficient τ0.
        bounds: thresholds (σ_L, σ_H) or None.
        eps: relative rounding error of the dot products.
        variant: `pair_threshold`, `ratio_epsilon` and `recursion_epsilon` count here.

    Returns:
        The damped pair's numbers.
    """
    if not (math.isfinite(ss) and math.isfinite(sy) and math.isfinite(yy)) or ss <= 0:
        return DampedPair(math.nan, math.nan, tau0, damped=False, gamma=math.nan, accepted=False)
    mu = sy / (ss + variant.ratio_epsilon)
    tau = damping_coefficient(mu, tau0, bounds)
    rest = 1 - tau
    s_yhat = tau * sy + rest * ss
    yhat_yhat = tau * tau * yy + 2 * tau * rest * sy + rest * rest * ss
    gamma = s_yhat / (yhat_yhat + variant.ratio_epsilon) if yhat_yhat > 0 else math.nan
    if variant.pair_threshold is None:
        usable = abs(s_yhat) > eps * math.sqrt(ss) * math.sqrt(max(yhat_yhat, 0.0))
    else:
        usable = s_yhat >= variant.pair_threshold
    divisible = s_yhat + variant.recursion_epsilon != 0
    accepted = usable and divisible and math.isfinite(gamma)
    return DampedPair(mu, s_yhat / ss, tau, damped=tau < tau0, gamma=gamma, accepted=accepted)


def usable_elsewhere(
    ss: float,
    sy: float,
    yy: float,
    *,
    bounds: Bounds | None,
    eps: float,
    slack: float,
    variant: Variant = PAPER,
) -> bool:
    """Whether a pair ŷ that was damped in other blocks may stay in a history.

    It must be one that `damp` accepts as it is and, with thresholds, sᵀŷ >= σ_L sᵀs, which damping
    would have seen to. Above σ_H a pair shortens steps, which does no harm; a `pair_threshold`
    decides alone.

    Args:
        ss: sᵀs over the new block.
        sy: sᵀŷ.
        yy: ŷᵀŷ.
        bounds: thresholds (σ_L, σ_H) or None.
        eps: as in `damp`.
        slack: how far below σ_L sᵀs rounding may have put sᵀŷ, relative to ‖s‖ ‖ŷ‖.
        variant: as in `damp`.
    """
    if not damp(ss, sy, yy, tau0=1.0, bounds=None, eps=eps, variant=variant).accepted:
        return False
    if bounds is None or variant.pair_threshold is not None:
        return True
    return sy >= bounds[0] * ss - slack * math.sqrt(ss) * math.sqrt(yy)
