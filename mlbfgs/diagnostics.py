"""What the curvature is doing, as plain numbers on the host."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from mlbfgs.damping import DampedPair
from mlbfgs.flat_state import FlatState


@dataclass(frozen=True)
class CurvatureRecord:
    """One block at one pair update (every `update_interval` steps).

    Attributes:
        step: steps taken so far.
        block: number of the block.
        mu: curvature ratio sᵀy / sᵀs of the candidate pair, before damping.
        mu_damped: sᵀŷ / sᵀs after damping.
        tau: damping coefficient τ.
        damped: whether a threshold made τ smaller than τ0.
        accepted: whether the pair entered the history.
        gamma: sᵀŷ / ŷᵀŷ of the candidate pair: the γ of the next T steps if it was accepted.
        cos_direction_gradient: cosine between this step's direction d and gradient g.
        direction_over_gradient: ‖d‖ / ‖g‖ of this step.
        pairs: pairs in the history now.
        skipped: pairs refused so far.
        times_damped: pairs so far on which a threshold acted.
    """

    step: int
    block: int
    mu: float
    mu_damped: float
    tau: float
    damped: bool
    accepted: bool
    gamma: float
    cos_direction_gradient: float
    direction_over_gradient: float
    pairs: int
    skipped: int
    times_damped: int

    def as_dict(self) -> dict[str, int | float | bool]:
        """The fields by name."""
        return asdict(self)


def curvature_record(
    flat: FlatState,
    block: int,
    pair: DampedPair,
    g_dot_g: float,
    p_dot_c: float,
    c_gram_c: float,
    gamma: float,
) -> CurvatureRecord:
    """Put one block's numbers in words.

    With d = γ g + Wᵀc and p = W g: dᵀg = γ gᵀg + pᵀc and dᵀd = γ² gᵀg + 2 γ pᵀc + cᵀ(W Wᵀ)c.

    Args:
        flat: the state, after the pair entered the history or was refused.
        block: number of the block.
        pair: the candidate pair.
        g_dot_g: gᵀg of this step.
        p_dot_c: pᵀc, 0 where the step was not preconditioned.
        c_gram_c: cᵀ(W Wᵀ)c, likewise.
        gamma: the γ this step used; 1 before the first pair.
    """
    d_dot_g = gamma * g_dot_g + p_dot_c
    # rounding can make a tiny square negative
    d_dot_d = max(gamma * gamma * g_dot_g + 2 * gamma * p_dot_c + c_gram_c, 0.0)
    defined = d_dot_d > 0 and g_dot_g > 0
    return CurvatureRecord(
        step=flat.step,
        block=block,
        mu=pair.mu,
        mu_damped=pair.mu_damped,
        tau=pair.tau,
        damped=pair.damped,
        accepted=pair.accepted,
        gamma=pair.gamma,
        cos_direction_gradient=d_dot_g / math.sqrt(d_dot_d * g_dot_g) if defined else math.nan,
        direction_over_gradient=math.sqrt(d_dot_d / g_dot_g) if g_dot_g > 0 else math.nan,
        pairs=min(flat.history.pairs[block], flat.history.history_size),
        skipped=flat.skipped[block],
        times_damped=flat.damped[block],
    )
