"""What the quasi-Newton optimizer did, from the curvature records: as numbers and in words.

Symbols: curvature ratio μ = sᵀy/sᵀs before and after damping; gamma, the initial inverse-Hessian
scale; direction d = H g, before the learning rate. If cos(d, g) is close to 1, the optimizer is
gradient descent with momentum and another step length, whatever its name.

The words have thresholds, all of them here: `PARALLEL` and `OBLIQUE` for the median of cos(d, g)
(an angle below 18 degrees, and one of at most 60), `GROWTH` for the factor between the γ of the
first and of the last pair from which on its change is worth a word.

The record of the first pair tells of a step that was taken before it: d is still g. Such
directions, whose H is the identity, are left out of everything that is said or drawn of d.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.analysis.measuring.groups import Group
from experiments.analysis.measuring.runs import FloatArray, Record, Run, series

PARALLEL = 0.95
OBLIQUE = 0.5
GROWTH = 1.5

Trace = tuple[FloatArray, FloatArray, FloatArray, FloatArray]

_OF_DIRECTION = ("cos_direction_gradient", "direction_over_gradient", "cos_hessian_gradient")


@dataclass(frozen=True)
class CurvatureSummary:
    """Medians over all curvature records of all seeds of a group; NaN where never recorded.

    What is said of directions leaves those out that were taken before the first pair.

    Attributes:
        records: number of records.
        blocks: number of Hessian blocks.
        damped_percent: percentage of records on which a threshold of the damping acted.
        accepted_percent: percentage of records whose pair was accepted.
        cosine: median of cos(d, g).
        uphill_percent: percentage of directions with a negative cosine.
        length_ratio: median of ‖d‖ / ‖g‖.
        gamma: median of gamma.
        mu: median of μ before damping.
        mu_damped: median of μ after damping, which the constant part of it (1 - τ0) moves too.
        gamma_first: median of γ at the first pair.
        gamma_last: median of γ at the last pair.
        control: the setting `direction` where it is a control: d is then not H g.
        cosine_not_taken: median of cos(H g, g) of such a control.
    """

    records: int
    blocks: int
    damped_percent: float
    accepted_percent: float
    cosine: float
    uphill_percent: float
    length_ratio: float
    gamma: float
    mu: float
    mu_damped: float
    gamma_first: float
    gamma_last: float
    control: str
    cosine_not_taken: float

    def words(self) -> str:
        """One sentence on what the curvature did."""
        parts = [
            f"damping took μ from {self.mu:.2g} to {self.mu_damped:.2g} (medians), its thresholds "
            f"acted on {_percent(self.damped_percent)} of pairs"
        ]
        if self.accepted_percent < 100:
            parts.append(f"{_percent(100 - self.accepted_percent)} of pairs were refused")
        if self._gamma_changed():
            parts.append(
                f"γ went from {self.gamma_first:.2g} at the first pair to {self.gamma_last:.2g} at "
                f"the last (medians): a step length that changes by itself"
            )
        if np.isnan(self.cosine):
            return "; ".join([*parts, "no direction was recorded"])
        parts.append(f"|d|/|g| {self.length_ratio:.3g} (median)")
        if self.uphill_percent > 0:
            parts.append(f"{_percent(self.uphill_percent)} of directions point uphill")
        return f"{'; '.join(parts)}; cos(d, g) {self.cosine:.2f} (median): {self._likeness()}"

    def _gamma_changed(self) -> bool:
        if not (self.gamma_first > 0 and self.gamma_last > 0):  # false for NaN too
            return False
        factor = self.gamma_last / self.gamma_first
        return factor >= GROWTH or factor <= 1 / GROWTH

    def _likeness(self) -> str:
        if self.control:
            return (
                f"the gradient's own direction, by direction={self.control}; H g, not taken, has "
                f"cos(H g, g) {self.cosine_not_taken:.2f}"
            )
        if self.cosine >= PARALLEL:
            return "close to scaled momentum SGD"
        if self.cosine >= OBLIQUE:
            return "a direction of its own, near the gradient"
        return "a direction far from the gradient"


def summarise_curvature(group: Group) -> CurvatureSummary | None:
    """Summarise the curvature of a group; None if none was recorded."""
    records = [record for run in group.ended for record in run.curvature]
    if not records:
        return None
    cosine = _recorded(_values(records, "cos_direction_gradient"))
    return CurvatureSummary(
        records=len(records),
        blocks=len({record["block"] for record in records}),
        damped_percent=_share(series(records, "damped")),
        accepted_percent=_share(series(records, "accepted")),
        cosine=_median(cosine),
        uphill_percent=_share((cosine < 0).astype(np.float64)) if cosine.size else float("nan"),
        length_ratio=_median(_values(records, "direction_over_gradient")),
        gamma=_median(series(records, "gamma")),
        mu=_median(series(records, "mu")),
        mu_damped=_median(series(records, "mu_damped")),
        gamma_first=_gamma_at(group, 0),
        gamma_last=_gamma_at(group, -1),
        control=_control(group),
        cosine_not_taken=_median(_values(records, "cos_hessian_gradient")),
    )


def is_control(group: Group) -> bool:
    """Whether the group's direction is the gradient's own, by its settings or without curvature."""
    return _control(group) != "" or not any(run.curvature for run in group.ended)


def _control(group: Group) -> str:
    """The setting `direction` of a quasi-Newton group; "" where it is H g."""
    direction = group.runs[0].config.get("optimizer", {}).get("direction", "hessian")
    return "" if direction == "hessian" else str(direction)


def _gamma_at(group: Group, place: int) -> float:
    """Median over seeds and blocks of γ at the first (0) or last (-1) pair of each run."""
    values = []
    for run in group.ended:
        accepted = [record for record in run.curvature if record.get("accepted")]
        if accepted:
            step = accepted[place]["step"]
            values += [record for record in accepted if record["step"] == step]
    return _median(series(values, "gamma"))


def trace(runs: Sequence[Run], name: str) -> Trace:
    """A field of the curvature records along the steps, over blocks and seeds.

    Returns:
        Steps, median, minimum and maximum, float64, each of the length of the distinct steps.
    """
    records = [record for run in runs for record in run.curvature]
    steps, values = series(records, "step"), _values(records, name)
    keep = np.isfinite(values)
    steps, values = steps[keep], values[keep]
    distinct = np.unique(steps)
    groups = [values[steps == step] for step in distinct]
    return (
        distinct,
        np.array([np.median(group) for group in groups]),
        np.array([group.min() for group in groups]),
        np.array([group.max() for group in groups]),
    )


def _values(records: Sequence[Record], name: str) -> FloatArray:
    """A field of curvature records; of directions NaN where H was the identity."""
    values = series(records, name)
    if name in _OF_DIRECTION:
        # exact: without a pair d = g, and no other H leaves the length of g to the last bit
        identity = series(records, "hessian_over_gradient") == 1.0
        values = np.where(identity, np.nan, values)
    return values


def _recorded(values: FloatArray) -> FloatArray:
    finite: FloatArray = values[np.isfinite(values)]
    return finite


def _median(values: FloatArray) -> float:
    finite = _recorded(values)
    return float(np.median(finite)) if finite.size else float("nan")


def _share(values: FloatArray) -> float:
    """Percentage of ones among zeros and ones."""
    finite = _recorded(values)
    return 100.0 * float(np.mean(finite)) if finite.size else float("nan")


def _percent(value: float) -> str:
    if np.isnan(value):
        return "an unrecorded part"
    # A part that is small but not nothing is never shown as nothing.
    return f"{value:.0f} %" if value == 0 or value >= 1 else f"{value:.1g} %"
