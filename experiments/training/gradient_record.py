"""Loss and gradient norm of the training set along a run: is ‖∇L(θ)‖² >= λ L(θ) (M Figure 7)?

Off unless `train.gradient_record` is set: `interval`, the epochs between two records, and
`images`, how many training images stand for the training set (null: all of them). They are drawn
once, without replacement and with the training's augmentation, and are the same at every record, so
that L is one function of θ. Of fewer than all images, ‖∇L‖² is larger than that of all, on average
by the trace of the gradient's covariance over the number of images.

L is the mean loss that the steps descend: in training mode, in batches of the training's size, each
normalised by its own statistics, without weight decay; in float32, its norm summed in float64. In
evaluation mode it would be another function, whose running statistics lag behind the weights.

A record costs what training on its images costs; its time is outside the training clock. It leaves
weights, buffers, gradients, optimizer and random states as they are, so the run has the same bits
with and without (tested); only the peak memory can be larger.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from experiments.errors import UserError
from experiments.runs.metrics import GradientRecord
from experiments.settings import Node
from experiments.training.passes import Passes
from experiments.training.ranks import ALONE, Ranks
from experiments.training.task import Task


class GradientRecorder:
    """Measures L and ‖∇L‖² at the ends of epochs, and before the first step.

    Args:
        task: the model and its data.
        settings: the node `train.gradient_record`, {interval, images}.
        epochs: of the run.
        ranks: who shares the images; each of them measures.

    Raises:
        UserError: there are not so many images.
    """

    def __init__(self, task: Task, settings: Node, *, epochs: int, ranks: Ranks = ALONE):
        self._model, self._data, self._epochs = task.model, task.data, epochs
        self._interval = int(settings["interval"])
        wanted = settings["images"]
        self._images = task.data.train_size if wanted is None else int(wanted)
        if self._images > task.data.train_size:
            raise UserError(
                f"train.gradient_record.images={wanted}, but there are "
                f"{task.data.train_size} training images: use at most so many, or null for all"
            )
        # Passes of its own: what they count is no cost of the optimizer.
        self._passes = Passes(task.model, task.data, memory_format=task.memory_format, ranks=ranks)

    def is_due(self, epoch: int) -> bool:
        """Whether there is a record after so many finished epochs."""
        return epoch % self._interval == 0 or epoch == self._epochs

    def measure(self, epoch: int, step: int) -> GradientRecord:
        """Compute L and ‖∇L‖² at the current weights.

        Args:
            epoch: finished epochs.
            step: finished steps.
        """
        start_s = time.perf_counter()
        was_training = self._model.training
        weights = [p.detach() for p in self._model.parameters() if p.requires_grad]
        device = weights[0].device
        forked = [device] if device.type == "cuda" else []
        self._model.train()
        with torch.random.fork_rng(devices=forked), torch.autocast(device.type, enabled=False):
            loss, gradient = self._passes.loss_and_gradient(
                self._data.random_batches(0, self._images), weights
            )
        self._model.train(was_training)
        return GradientRecord(
            epoch=epoch,
            step=step,
            loss=loss.item(),
            squared_norm=squared_norm(gradient).item(),
            images=self._images,
            gradient_time_s=time.perf_counter() - start_s,
        )


def build_gradient_recorder(task: Task, train: Node, ranks: Ranks) -> GradientRecorder | None:
    """What the node `train` of a config wants; None where it wants no records."""
    settings = train.get("gradient_record")
    if settings is None:
        return None
    return GradientRecorder(task, settings, epochs=int(train["epochs"]), ranks=ranks)


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of all squares, () float64."""
    return torch.stack([tensor.double().square().sum() for tensor in tensors]).sum()
