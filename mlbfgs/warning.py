"""Warnings of a pair update: what a user should know before the loss shows it, each said once.

They speak of numbers that the host reads at a pair update anyway, so that a step waits for nothing.
Where ranks share the state, the first one speaks.
"""

from __future__ import annotations

import logging
import math

from mlbfgs.damping import Bounds, DampedPair

logger = logging.getLogger(__name__)

#: A first direction longer than this many gradients is worth a warning.
LONG_DIRECTION = 10.0
#: γ above this share of 1/σ_L is at its bound.
NEAR_BOUND = 0.5
ADVICE = "docs/optimizer.md, 'It diverged: what now'"


class Warnings:
    """What has been said of one optimizer's blocks.

    Attributes:
        level: of the messages: WARNING on the rank that speaks, DEBUG on the others.
        guarded: whether steps are bounded (`mlbfgs.growth`), which is the first remedy.
    """

    def __init__(self, level: int, *, guarded: bool):
        """Start with nothing said."""
        self.level = level
        self.guarded = guarded
        self._said: set[str] = set()
        self._skipping: set[int] = set()
        self._spoke_at = -1
        self._gamma: dict[int, float] = {}

    def of_pair(
        self,
        step: int,
        block: int,
        pair: DampedPair,
        pairs: int,
        ratio: float,
        first_ratio: float,
        bounds: Bounds | None,
    ) -> None:
        """Look at one block's pair update.

        Args:
            step: steps taken.
            block: number of the block.
            pair: the candidate pair.
            pairs: pairs accepted before it.
            ratio: ‖d‖ / ‖g‖ of this step, NaN where not known.
            first_ratio: the same of the first step with the block's first pair, NaN where this is
                not the update that follows it.
            bounds: (σ_L, σ_H) of the damping.
        """
        where = f"step {step}, block {block}"
        # after a load the host does not know it
        used = self._gamma.get(block, math.nan) if pairs else 1.0
        if first_ratio > LONG_DIRECTION:
            self._once(
                "long",
                f"{where}: the first direction after the warm-up was {first_ratio:.3g} times as "
                f"long as the gradient (γ = {used:.3g}, ‖d‖/‖g‖ = {ratio:.3g} now); "
                f"{self._remedy()}",
            )
        if not pair.accepted:
            self._skipped(step, block, pair, used, ratio)
            return
        self._gamma[block] = pair.gamma
        self._skipping.discard(block)
        if bounds is not None and _at_bound(pair, bounds[0]):
            self._once(
                "bound",
                f"{where}: the averages saw hardly any curvature (μ = {pair.mu:.3g}): H is at its "
                f"bound 1/σ_L = {1 / bounds[0]:.3g} along the newest pair, and lr is multiplied by "
                f"γ = {pair.gamma:.3g} (‖d‖/‖g‖ = {ratio:.3g} before it); {self._remedy()}",
            )

    def _skipped(self, step: int, block: int, pair: DampedPair, gamma: float, ratio: float) -> None:
        """Speak of the first of a run of refused pairs, and of one block at an update."""
        silent = block in self._skipping or self._spoke_at == step
        self._skipping.add(block)
        if silent:
            return
        self._spoke_at = step
        if math.isnan(pair.mu):
            reason = (
                "it is zero or not finite: look for NaN in loss, gradients and parameters, and "
                "go back to a checkpoint if parameters have it; " + self._remedy()
            )
        else:
            reason = (
                f"its curvature cannot be told from rounding (μ = {pair.mu:.3g}): a larger "
                "update_interval or damping below 1 helps"
            )
        logger.log(
            self.level,
            "%s: pair skipped (γ = %.3g, ‖d‖/‖g‖ = %.3g; said once of a run of them): %s",
            *(f"step {step}, block {block}", gamma, ratio, reason),
        )

    def _remedy(self) -> str:
        if self.guarded:
            return f"the guarded step bounds it; if the loss rises, lower lr ({ADVICE})"
        return f"use variant='guarded' or a smaller lr ({ADVICE})"

    def _once(self, kind: str, message: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            logger.log(self.level, "%s", message)


def _at_bound(pair: DampedPair, low: float) -> bool:
    """Whether the pair is, or γ nearly is, as long as the lower threshold σ_L lets it be."""
    return low > 0 and ((pair.damped and pair.mu <= low) or pair.gamma >= NEAR_BOUND / low)
