"""The gradient of the mean loss of one batch, however many ranks and passes share its images.

The batch has N images over all ranks. A rank cuts its part into passes of `train.micro_batch`
images at most, and weighs the mean loss of a pass of k images by k p / N, because the average that
the backward pass takes over the p ranks divides by p:

    (1/p) Σ_ranks Σ_passes (k p / N) (1/k) Σ_images ∇l = (1/N) Σ_images ∇l

So the gradient is that of one process up to the order of its sums, also where N does not divide.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from experiments.data import Part
from experiments.training.batch_parts import number_of_passes
from experiments.training.ranks import Ranks
from experiments.training.task import Task


@dataclass(frozen=True)
class BatchLoss:
    """The loss of a batch before its step.

    Attributes:
        own_sum: () float64, over the images of this rank.
        own_mean: () of the loss's dtype, where one pass saw the whole batch.
        images: of the whole batch.
    """

    own_sum: Tensor
    own_mean: Tensor | None
    images: int

    def mean(self, ranks: Ranks) -> float:
        """The mean over all images; every rank asks for it."""
        if self.own_mean is not None:
            return self.own_mean.item()
        total = self.own_sum.clone()
        ranks.sum_(total)
        return total.item() / self.images


def batch_gradient(
    task: Task,
    images: Tensor,
    labels: Tensor,
    *,
    whole_batch: int,
    micro_batch: int | None,
    ranks: Ranks,
) -> BatchLoss:
    """Put the gradient of the whole batch's mean loss into `p.grad`, which was empty.

    With float16 it is that of the scaled loss (`experiments.training.precision`).

    Args:
        task: the model, in training mode.
        images: (b, C, H, W), this rank's part.
        labels: (b,).
        whole_batch: N, images over all ranks.
        micro_batch: images of a pass at most, or None, see `number_of_passes`.
        ranks: who shares the batch.
    """
    passes = number_of_passes(whole_batch, micro_batch, ranks.world_size)
    sums: list[Tensor] = []
    for index in range(passes):
        places = Part(index, passes).of(0, len(labels))
        count = places.stop - places.start
        with _local(task) if index < passes - 1 else nullcontext():
            with task.precision.autocast():
                loss = cross_entropy(task.parallel(images[places]), labels[places])
            weight = count * ranks.world_size / whole_batch
            weighted = loss if weight == 1 else loss * weight
            torch.autograd.backward(task.precision.scaled(weighted))
        sums.append(loss.detach().double() * count)
    alone = passes == ranks.world_size == 1
    own_sum = sums[0] if passes == 1 else torch.stack(sums).sum()
    return BatchLoss(own_sum, loss.detach() if alone else None, whole_batch)


def _local(task: Task) -> AbstractContextManager[None]:
    """Inside, a backward pass adds to this rank's gradients alone."""
    no_sync = getattr(task.parallel, "no_sync", nullcontext)
    context: AbstractContextManager[None] = no_sync()
    return context
