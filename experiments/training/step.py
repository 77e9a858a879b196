"""One step of a run: learning rate, gradient, further passes, optimizer, average of the weights.

Every part is booked on the training clock. Where float16 overflows there is no step, and the
schedule goes on all the same (`experiments.training.precision`).
"""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import DictConfig

from experiments.data import Batch
from experiments.runs.spec import RunSpec
from experiments.training.batch_gradient import BatchLoss, batch_gradient
from experiments.training.clock import TrainingClock
from experiments.training.passes import NeedsPasses
from experiments.training.ranks import Ranks
from experiments.training.schedules import learning_rate, read_schedule
from experiments.training.state import Position
from experiments.training.task import Task


@dataclass(frozen=True)
class Step:
    """What a step was.

    Attributes:
        loss: of its batch, before it.
        lr: its learning rate.
        overflowed: whether it was not taken.
    """

    loss: BatchLoss
    lr: float
    overflowed: bool


class StepTaker:
    """Takes the steps of a run.

    Args:
        spec: the run.
        task: what is trained.
        clock: of the training seconds.
        ranks: who trains.

    Raises:
        UserError: the schedule's settings will not do.
    """

    def __init__(self, spec: RunSpec, task: Task, clock: TrainingClock, ranks: Ranks):
        self._train: DictConfig = spec.config.train
        self._task, self._clock, self._ranks = task, clock, ranks
        self._base_lr = float(spec.config.optimizer.lr)
        self._schedule = read_schedule(spec.config.schedule)

    def take(self, batch: Batch, position: Position) -> Step:
        """Train on one batch; the position moves on by it.

        Args:
            batch: this rank's part; the clock runs since it was asked for.
            position: where the training is.
        """
        task, clock = self._task, self._clock
        images = task.images(batch)
        clock.lap("data")
        lr = self._set_learning_rate(position.step)
        task.optimizer.zero_grad()
        loss = batch_gradient(
            task,
            images,
            batch.labels,
            whole_batch=self._images_in_batch(position.batch),
            micro_batch=self._train.get("micro_batch"),
            ranks=self._ranks,
        )
        clock.lap("forward_backward")
        if isinstance(task.optimizer, NeedsPasses):
            task.optimizer.before_step(batch, position.epoch)
            clock.lap("extra_passes")
        task.precision.step(task.optimizer)
        overflowed = task.precision.overflowed
        if task.average is not None and not overflowed:
            task.average.update()
        clock.lap("optimizer")
        position.batch += 1
        position.step += 1
        position.images += loss.images
        position.overflows += overflowed
        return Step(loss, lr, overflowed)

    def _images_in_batch(self, index: int) -> int:
        """Images of a batch of the epoch, over all ranks."""
        size = int(self._train.batch_size)
        return min(size, self._task.data.train_size - index * size)

    def _set_learning_rate(self, step: int) -> float:
        lr = learning_rate(
            self._schedule,
            base_lr=self._base_lr,
            step=step,
            steps_per_epoch=self._task.data.batches_per_epoch,
            epochs=self._train.epochs,
        )
        for group in self._task.optimizer.param_groups:
            group["lr"] = lr
        return lr
