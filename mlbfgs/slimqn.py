"""SLIMQN: MLBFGS with the settings of the first paper."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mlbfgs.collectives import Distribution, ProcessGroup
from mlbfgs.damping import Bounds
from mlbfgs.direction import DirectionKind
from mlbfgs.optimizer import MLBFGS, ParamsT, VariantT
from mlbfgs.partition import BlockPolicy
from mlbfgs.variant import RELEASED_FULL


class SLIMQN(MLBFGS):
    """SLIM-QN: the same algorithm with the first paper's settings.

    "SLIM-QN: A stochastic, light, momentumized quasi-Newton optimizer for deep neural networks",
    Algorithm 2 and Tables 3 to 6: β1 = β2 = 0.9, damping 1 - τ0 = 0.05, (σ_L, σ_H) = (0.01, 1),
    L = 100 (called `update_interval` here), M = 10. The paper prints σ_H = 1 although its rule (4)
    asks for σ_H > 1: then a pair with μ >= 1 is damped to ŷ = s.

    Args:
        params: see :class:`MLBFGS`.
        lr: see :class:`MLBFGS`.
        momentum: see :class:`MLBFGS`.
        weight_decay: see :class:`MLBFGS`.
        betas: see :class:`MLBFGS`.
        history_size: see :class:`MLBFGS`.
        update_interval: see :class:`MLBFGS`.
        damping: τ0, which is one minus the "damping" of the paper's tables.
        curvature_bounds: see :class:`MLBFGS`.
        blocks: see :class:`MLBFGS`.
        direction: see :class:`MLBFGS`.
        variant: see :class:`MLBFGS`; "released" is the release of SLIM-QN here.
        outside_blocks: see :class:`MLBFGS`.
        history_dtype: see :class:`MLBFGS`.
        maximize: see :class:`MLBFGS`.
        distribution: see :class:`MLBFGS`.
        process_group: see :class:`MLBFGS`.
    """

    _released = RELEASED_FULL

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        betas: float | tuple[float, float] = (0.9, 0.9),
        history_size: int = 10,
        update_interval: int = 100,
        damping: float = 0.95,
        curvature_bounds: Bounds | None = (0.01, 1.0),
        blocks: BlockPolicy = None,
        direction: DirectionKind = "hessian",
        variant: VariantT = "guarded",
        outside_blocks: Sequence[str] = (),
        history_dtype: torch.dtype | None = None,
        maximize: bool = False,
        distribution: Distribution = "replicated",
        process_group: ProcessGroup | None = None,
    ):
        super().__init__(
            params,
            lr,
            momentum,
            weight_decay,
            betas=betas,
            history_size=history_size,
            update_interval=update_interval,
            damping=damping,
            curvature_bounds=curvature_bounds,
            blocks=blocks,
            direction=direction,
            variant=variant,
            outside_blocks=outside_blocks,
            history_dtype=history_dtype,
            maximize=maximize,
            distribution=distribution,
            process_group=process_group,
        )
