"""What a checkpoint holds: everything that the rest of a run depends on, taken and put back."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.training.clock import TrainingClock
from experiments.training.ranks import ALONE, Ranks
from experiments.training.task import Task

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
        overflows: finished steps that were not taken, see `experiments.training.precision`.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    images: int = 0
    epoch_start_time_s: float = 0.0
    curvature_step: int = -1
    overflows: int = 0


def capture(
    task: Task,
    position: Position,
    loss_sum: Tensor,
    clock: TrainingClock,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Gather the state of a run between two steps, while the clock stands.

    Args:
        task: model, optimizer and its passes.
        position: where the training is.
        loss_sum: () float64, the sum of the losses of this rank's images of the current epoch.
        clock: the training seconds.
        ranks: who trains; of what differs between them a row each is kept.
    """
    device = loss_sum.device
    by_rank: dict[str, Tensor | None] = {
        "loss_sum": loss_sum,
        "rng": torch.get_rng_state(),
        "rng_cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }
    if ranks.world_size > 1:
        ranks.copy_from_leader(list(task.model.buffers()))
        if task.average is not None:
            ranks.copy_from_leader(task.average.buffers())
        by_rank = {
            key: None if value is None else ranks.rows(value.cpu())
            for key, value in by_rank.items()
        }
    return {
        "model": task.model.state_dict(),
        "optimizer": task.optimizer.state_dict(),
        "passes": None if task.passes is None else task.passes.state_dict(),
        "loss_scale": task.precision.state_dict(),
        "average": None if task.average is None else task.average.state_dict(),
        "position": asdict(position),
        "clock": clock.state_dict(),
        "device": device.type,
        **by_rank,
    }


def restore(
    state: dict[str, Any],
    task: Task,
    loss_sum: Tensor,
    clock: TrainingClock,
    ranks: Ranks = ALONE,
) -> Position:
    """Put a captured state back, which another number of ranks may have captured.

    Args:
        state: from `capture`.
        task: receives the state of model, optimizer and passes.
        loss_sum: receives the sum.
        clock: receives the seconds.
        ranks: who trains now.

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
    task.precision.load_state_dict(state.get("loss_scale"))
    if task.average is not None:
        task.average.load_state_dict(state["average"])
    sums = state["loss_sum"].reshape(-1)
    if len(sums) == ranks.world_size:
        loss_sum.copy_(sums[ranks.rank])
    else:
        loss_sum.copy_(sums.sum() if ranks.leads else torch.zeros(()))
    clock.load_state_dict(state["clock"])
    # A rank that was not there before goes on with the random numbers of its own seed.
    rng = _row(state["rng"], ranks.rank)
    if rng is not None:
        torch.set_rng_state(rng)
    rng_cuda = None if state["rng_cuda"] is None else _row(state["rng_cuda"], ranks.rank)
    if device.type == "cuda" and rng_cuda is not None:
        torch.cuda.set_rng_state(rng_cuda, device)
    return Position(**state["position"])


def check_same_weights(task: Task, ranks: Ranks, step: int) -> None:
    """Check that all ranks hold the same weights, bit for bit.

    Args:
        task: its model is compared.
        ranks: who trains.
        step: finished steps, for the message.

    Raises:
        RuntimeError: they do not; the ranks have been training different networks.
    """
    if ranks.world_size == 1:
        return
    sums = [
        p.detach().contiguous().view(-1).view(torch.uint8).sum(dtype=torch.int64)
        for p in task.model.parameters()
    ]
    rows = ranks.rows(torch.stack(sums).cpu())
    if not bool((rows == rows[0]).all()):
        raise RuntimeError(
            f"the ranks hold different weights at step {step}: the optimizer's step depends on "
            "something besides the averaged gradients, such as random numbers"
        )


def _row(states: Tensor, rank: int) -> Tensor | None:
    """A rank's random state of one (k,) or several (ranks, k); None where it has none."""
    rows = states[None] if states.dim() == 1 else states
    # a copy: torch reads a generator's state from the start of its storage
    return rows[rank].clone() if rank < len(rows) else None
