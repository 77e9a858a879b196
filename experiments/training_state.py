"""What a checkpoint holds: everything that the rest of a run depends on, taken and put back."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.clock import TrainingClock
from experiments.task import Task

logger = logging.getLogger(__name__)


@dataclass
class Position:
    """How far the training is.

    Attributes:
        epoch: finished epochs.
        batch: finished batches of the current epoch.
        step: finished steps.
        images: images of the finished batches of the current epoch.
        epoch_start_time_s: training seconds at the start of the current epoch.
        curvature_step: step of the newest curvature record; -1 before the first.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    images: int = 0
    epoch_start_time_s: float = 0.0
    curvature_step: int = -1


def capture(
    task: Task, position: Position, loss_sum: Tensor, clock: TrainingClock
) -> dict[str, Any]:
    """Gather the state of a run between two steps, while the clock stands.

    Args:
        task: model, optimizer and its passes.
        position: where the training is.
        loss_sum: () float64, the sum of the losses of the current epoch's images.
        clock: the training seconds.
    """
    device = loss_sum.device
    return {
        "model": task.model.state_dict(),
        "optimizer": task.optimizer.state_dict(),
        "passes": None if task.passes is None else task.passes.state_dict(),
        "position": asdict(position),
        "loss_sum": loss_sum,
        "clock": clock.state_dict(),
        "device": device.type,
        "rng": torch.get_rng_state(),
        "rng_cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore(state: dict[str, Any], task: Task, loss_sum: Tensor, clock: TrainingClock) -> Position:
    """Put a captured state back.

    Args:
        state: from `capture`.
        task: receives the state of model, optimizer and passes.
        loss_sum: receives the sum.
        clock: receives the seconds.

    Returns:
        Where the training is.
    """
    device = loss_sum.device
    if state["device"] != device.type:
        logger.warning(
            "the checkpoint was written on %s, this is %s: the numbers will agree "
            "up to rounding only",
            state["device"],
            device.type,
        )
    task.model.load_state_dict(state["model"])
    task.optimizer.load_state_dict(state["optimizer"])
    if task.passes is not None:
        task.passes.load_state_dict(state["passes"])
    loss_sum.copy_(state["loss_sum"])
    clock.load_state_dict(state["clock"])
    torch.set_rng_state(state["rng"])
    if device.type == "cuda" and state["rng_cuda"] is not None:
        torch.cuda.set_rng_state(state["rng_cuda"], device)
    return Position(**state["position"])
