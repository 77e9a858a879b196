"""The PL condition ‖∇L(θ)‖² >= λ L(θ) along a run (M assumption 3, Figure 7).

A run's gradient records (`experiments.training.gradient_record`) hold L and ‖∇L‖² of the training
set at some epochs. The largest λ for which the condition holds at all of them is the smallest ratio
‖∇L‖² / L.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from experiments.analysis.measuring.runs import FloatArray, Run, series


@dataclass(frozen=True)
class PlTrace:
    """The gradient records with finite numbers and a loss above 0; float64, of one length.

    Attributes:
        epoch: finished epochs.
        loss: L.
        squared_norm: ‖∇L‖².
    """

    epoch: FloatArray
    loss: FloatArray
    squared_norm: FloatArray

    @property
    def ratio(self) -> FloatArray:
        """‖∇L‖² / L: the largest λ at each record."""
        return self.squared_norm / self.loss


def pl_trace(run: Run) -> PlTrace:
    """The gradient records of a run; empty where it has none."""
    epoch, loss, norm = (series(run.gradients, name) for name in ("epoch", "loss", "squared_norm"))
    keep = np.isfinite(loss) & np.isfinite(norm) & (loss > 0)
    return PlTrace(epoch[keep], loss[keep], norm[keep])


def constant(run: Run) -> float | None:
    """The largest λ for which the condition holds at every record; None without records."""
    ratio = pl_trace(run).ratio
    return float(ratio.min()) if ratio.size else None


def fall(run: Run) -> float | None:
    """How many times smaller the smallest ratio is than the first; None without records."""
    ratio = pl_trace(run).ratio
    if not ratio.size:
        return None
    return float(ratio[0] / ratio.min()) if ratio.min() > 0 else math.inf


def exponent(run: Run) -> float | None:
    """Slope of ln ‖∇L‖² over ln L by least squares.

    1 where ‖∇L‖² is proportional to L, so that one λ serves all along; 2 where the ratio vanishes
    in proportion to L; below 1 where the ratio grows as L falls.

    Returns:
        None with fewer than three records, or with records of one loss.
    """
    trace = pl_trace(run)
    keep = trace.squared_norm > 0
    x, y = np.log(trace.loss[keep]), np.log(trace.squared_norm[keep])
    if x.size < 3 or np.ptp(x) == 0:
        return None
    centred = x - x.mean()
    return float(centred @ y / (centred @ centred))
