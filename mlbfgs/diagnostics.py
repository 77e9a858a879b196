"""What the curvature is doing, as plain numbers on the host."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

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
        cos_direction_gradient: cosine between the direction d that this step took and g.
        direction_over_gradient: ‖d‖ / ‖g‖ of this step.
        cos_hessian_gradient: the same cosine of H g; another one where `direction` is a control.
        hessian_over_gradient: ‖H g‖ / ‖g‖ likewise.
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
    cos_hessian_gradient: float
    hessian_over_gradient: float
    pairs: int
    skipped: int
    times_damped: int

    def as_dict(self) -> dict[str, int | float | bool]:
        """The fields by name."""
        return asdict(self)


@dataclass(frozen=True)
class StepProducts:
    """What one block's step was made of.

    Attributes:
        g_dot_g: gᵀg.
        d_dot_g: dᵀg of the direction that was taken.
        d_dot_d: dᵀd.
        h_dot_g: (H g)ᵀg.
        h_dot_h: (H g)ᵀ(H g).
    """

    g_dot_g: float
    d_dot_g: float
    d_dot_d: float
    h_dot_g: float
    h_dot_h: float


def curvature_record(
    flat: FlatState, block: int, pair: DampedPair, step: StepProducts | None
) -> CurvatureRecord:
    """Put one block's numbers in words.

    Args:
        flat: the state, after the pair entered the history or was refused.
        block: number of the block.
        pair: the candidate pair.
        step: products of this step's direction; None where `with_products` will add them.
    """
    record = CurvatureRecord(
        step=flat.step,
        block=block,
        mu=pair.mu,
        mu_damped=pair.mu_damped,
        tau=pair.tau,
        damped=pair.damped,
        accepted=pair.accepted,
        gamma=pair.gamma,
        cos_direction_gradient=math.nan,
        direction_over_gradient=math.nan,
        cos_hessian_gradient=math.nan,
        hessian_over_gradient=math.nan,
        pairs=min(flat.history.pairs[block], flat.history.history_size),
        skipped=flat.skipped[block],
        times_damped=flat.damped[block],
    )
    return record if step is None else with_products(record, step)


def with_products(record: CurvatureRecord, step: StepProducts) -> CurvatureRecord:
    """The record with what is known of its step's direction."""
    return replace(
        record,
        cos_direction_gradient=_cosine(step.d_dot_g, step.d_dot_d, step.g_dot_g),
        direction_over_gradient=length_ratio(step.d_dot_d, step.g_dot_g),
        cos_hessian_gradient=_cosine(step.h_dot_g, step.h_dot_h, step.g_dot_g),
        hessian_over_gradient=length_ratio(step.h_dot_h, step.g_dot_g),
    )


def _cosine(a_dot_b: float, a_dot_a: float, b_dot_b: float) -> float:
    return a_dot_b / math.sqrt(a_dot_a * b_dot_b) if a_dot_a > 0 and b_dot_b > 0 else math.nan


def length_ratio(a_dot_a: float, b_dot_b: float) -> float:
    """‖a‖ / ‖b‖ from the squares; NaN where b = 0."""
    return math.sqrt(a_dot_a / b_dot_b) if b_dot_b > 0 else math.nan
