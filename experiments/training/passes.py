"""Further passes over the training data, for optimizers that want more than one gradient a step.

An optimizer that has the methods of `NeedsPasses` is bound to the `Passes` of its run once, and is
called between the backward pass and the step, inside the training clock. What it computes there is
booked apart (`extra_passes`) and counted in images.

All passes run in training mode, as the training itself: BatchNorm normalises with the statistics of
the pass's own batch, so that gradients at two weights on one batch are gradients of one function.
The running statistics and all other buffers are copies: those of the model stay as they are.
`p.grad` stays as it is, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from experiments.data import Batch, Data
from experiments.training.ranks import ALONE, Ranks


@dataclass
class PassCounts:
    """How many images the further passes have seen, over the whole run.

    Attributes:
        gradient_images: in gradients, each a forward and a backward pass.
        hessian_images: in Hessian-vector products, each about two such pairs of passes.
    """

    gradient_images: int = 0
    hessian_images: int = 0


class Passes:
    """Gradients and Hessian-vector products of the mean training loss at any weights.

    Vectors are lists with one tensor for each trainable parameter, in the model's order.

    On several ranks a batch is this rank's part, and the means are over the images of all ranks.

    Args:
        model: the network, on its device, in training mode whenever a pass is asked for.
        data: where the batches come from.
        memory_format: of the images.
        ranks: who shares a batch; each of them asks for the same passes.

    Attributes:
        steps_per_epoch: batches of an epoch.
        train_size: training images.
        counts: images seen so far; part of a checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        *,
        memory_format: torch.memory_format,
        ranks: Ranks = ALONE,
    ):
        self._model = model
        self._data = data
        self._ranks = ranks
        self._memory_format = memory_format
        self._names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.steps_per_epoch = data.batches_per_epoch
        self.train_size = data.train_size
        self.counts = PassCounts()

    def epoch_batches(self, epoch: int) -> Iterator[Batch]:
        """The batches that this epoch trains on, from its first on, augmented as there."""
        return self._data.train_batches(epoch)

    def random_batches(self, number: int, count: int) -> Iterator[Batch]:
        """Draw `count` training images without replacement; equal numbers give equal images."""
        return self._data.random_batches(number, count)

    def gradient(self, batches: Iterable[Batch], at: Sequence[Tensor]) -> list[Tensor]:
        """The gradient of the mean loss over all images of the batches.

        Args:
            batches: at least one.
            at: the weights.
        """
        return self.loss_and_gradient(batches, at)[1]

    def loss_and_gradient(
        self, batches: Iterable[Batch], at: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The mean loss over all images of the batches, () float64, and its gradient.

        Args:
            batches: at least one.
            at: the weights.
        """
        mean, images = [torch.zeros_like(w) for w in at], 0
        loss_sum = torch.zeros((), dtype=torch.float64, device=at[0].device)
        for batch in batches:
            weights = _leaves(at)
            loss = self._loss(batch, weights)
            grads = torch.autograd.grad(loss, weights)
            images += len(batch.labels)
            torch._foreach_lerp_(mean, grads, len(batch.labels) / images)
            loss_sum += loss.detach().double() * len(batch.labels)
        total = self._over_ranks(mean, images)
        self._ranks.sum_(loss_sum)
        self.counts.gradient_images += total
        return loss_sum / total, mean

    def hessian_vector(
        self, batches: Iterable[Batch], at: Sequence[Tensor], vector: Sequence[Tensor]
    ) -> list[Tensor]:
        """The Hessian of the mean loss over all images of the batches, times a vector.

        Args:
            batches: at least one; with BatchNorm, each is normalised by itself.
            at: the weights.
            vector: what the Hessian is applied to.
        """
        mean, images = [torch.zeros_like(w) for w in at], 0
        for batch in batches:
            weights = _leaves(at)
            grads = torch.autograd.grad(self._loss(batch, weights), weights, create_graph=True)
            products = torch.autograd.grad(grads, weights, grad_outputs=list(vector))
            images += len(batch.labels)
            torch._foreach_lerp_(mean, products, len(batch.labels) / images)
        self.counts.hessian_images += self._over_ranks(mean, images)
        return mean

    def _over_ranks(self, mean: list[Tensor], images: int) -> int:
        """Turn this rank's mean into the one over the images of all ranks; their number."""
        if self._ranks.world_size == 1:
            return images
        total = torch.tensor(images, device=mean[0].device)
        self._ranks.sum_(total)
        torch._foreach_mul_(mean, images / int(total))
        self._ranks.sum_(*mean)
        return int(total)

    def _loss(self, batch: Batch, weights: Sequence[Tensor]) -> Tensor:
        assert self._model.training
        # Copies, into which BatchNorm writes what it would write into the model's own.
        buffers = {name: buffer.clone() for name, buffer in self._model.named_buffers()}
        images = batch.images.contiguous(memory_format=self._memory_format)
        state = {**dict(zip(self._names, weights, strict=True)), **buffers}
        with torch.enable_grad():
            return cross_entropy(functional_call(self._model, state, (images,)), batch.labels)

    def state_dict(self) -> dict[str, int]:
        """The counts, for a checkpoint."""
        return asdict(self.counts)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on with the counts of a checkpoint."""
        self.counts = PassCounts(**state)


@runtime_checkable
class NeedsPasses(Protocol):
    """An optimizer that computes more than the gradient of the step's batch."""

    def bind(self, passes: Passes) -> None:
        """Take over the passes of the run, once, before the first step and before a resume.

        Raises:
            ValueError: a setting does not fit the data or the length of an epoch.
        """
        ...

    def before_step(self, batch: Batch, epoch: int) -> None:
        """Compute what the step needs; the batch's gradients are in `p.grad`, the rate is set.

        Args:
            batch: what the gradients were computed on.
            epoch: the epoch that the step is in, from 0.
        """
        ...


def _leaves(weights: Sequence[Tensor]) -> list[Tensor]:
    return [w.detach().requires_grad_() for w in weights]
