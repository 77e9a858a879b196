"""The training loop: epochs, pauses between steps, records, checkpoints.

Everything that the numbers depend on is either in the config or in the checkpoint: weights and
optimizer state, the position (epoch, batch, step), torch's random state, the running sum of the
training loss. On the CPU a run that is killed and resumed is bit-equal to one that is not.

A loss or weight that is not finite ends the run as `diverged`. The loss is summed on the device
without waiting for it, and looked at where the host waits anyway: every `train.log_interval`
steps, at the end of an epoch and before a checkpoint, so a checkpoint is never poisoned.

Several ranks train the same batches as one would, each its part of every batch. They compare their
signals, losses and clocks where they pause, so all of them pause, save and end at the same step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from experiments.runs.directory import CHECKPOINTS_FOLDER, RunStatus, Status
from experiments.runs.metrics import (
    AverageRecord,
    EpochRecord,
    OverflowRecord,
    PassesRecord,
    StepRecord,
)
from experiments.runs.provenance import describe_origin
from experiments.runs.spec import RunSpec
from experiments.training.checkpoint import CheckpointStore
from experiments.training.clock import TrainingClock, peak_memory_bytes, restart_peak_memory
from experiments.training.evaluation import Evaluation, evaluate
from experiments.training.gradient_record import build_gradient_recorder
from experiments.training.interruption import StopRequest
from experiments.training.ranks import Ranks
from experiments.training.records import Records
from experiments.training.schedules import check_schedule
from experiments.training.state import Position, capture, check_same_weights, restore
from experiments.training.step import Step, StepTaker
from experiments.training.task import build_task, choose_device

logger = logging.getLogger(__name__)


class TrainingLoop:
    """One process's share of a run: built, moved to the newest checkpoint, trained."""

    def __init__(
        self,
        spec: RunSpec,
        path: Path,
        records: Records,
        stop: StopRequest,
        ranks: Ranks,
        on_epoch: Callable[[EpochRecord], None] | None,
    ):
        self.spec = spec
        self.train = spec.config.train
        self.path = path
        self.records = records
        self.stop = stop
        self.ranks = ranks
        self.on_epoch = on_epoch
        if self.train.threads is not None:
            torch.set_num_threads(self.train.threads)
        self.device = choose_device(self.train.device, ranks.local_rank)
        restart_peak_memory(self.device)
        base_lr = float(spec.config.optimizer.lr)
        check_schedule(spec.config.schedule, base_lr=base_lr, epochs=self.train.epochs)
        self.task = build_task(spec, self.device, ranks)
        self.data, self.model = self.task.data, self.task.model
        self.optimizer, self.passes = self.task.optimizer, self.task.passes
        self.gradients = build_gradient_recorder(self.task, self.train, ranks)
        self.clock = TrainingClock(self.device)
        self.steps = StepTaker(spec, self.task, self.clock, ranks)
        self.position = Position()
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.checkpoints = CheckpointStore(
            path / CHECKPOINTS_FOLDER,
            key=spec.key,
            keep=self.train.keep_checkpoints,
            ranks=ranks,
        )
        self.records.open(self._resume())

    def run(self) -> Status:
        """Train to the end of the run or of its time."""
        self.records.write_meta(
            origin={**describe_origin(self.device), "ranks": self.ranks.world_size},
            parameters=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            resumed_at=self.position.step,
        )
        self._write_status("running")
        ending: Status = "running"
        try:
            with self.stop if self.ranks.world_size == 1 else nullcontext():
                ending = self._train_epochs()
            self._write_status(ending, self._message(ending))
        except (KeyboardInterrupt, SystemExit):
            self._write_status("running", "stopped by a signal; resumable")
            raise
        finally:
            self.records.close(ending)
        return ending

    def _train_epochs(self) -> Status:
        if self.position.step == 0:
            self._record_gradient()
        while self.position.epoch < self.train.epochs:
            if self._time_is_up():
                return "timeout"
            ending = self._train_epoch() or self._finish_epoch()
            if ending is not None:
                return ending
        return "done"

    def _train_epoch(self) -> Status | None:
        """Train on the batches that are left of the current epoch."""
        self.model.train()
        self.clock.start()
        for batch in self.data.train_batches(self.position.epoch, self.position.batch):
            step = self.steps.take(batch, self.position)
            self.loss_sum += step.loss.own_sum
            self._record_curvature()
            if self._must_pause(step):
                self.clock.stop()
                ending = self._pause(step)
                if ending is not None:
                    return ending
                self.clock.start()
        self.clock.stop()
        return None

    def _record_curvature(self) -> None:
        """Record a pair update once, right after it; the optimizer's numbers are on the host."""
        if not hasattr(self.optimizer, "curvature_records"):
            return
        records = self.optimizer.curvature_records()
        if records and records[0]["step"] != self.position.curvature_step:
            self.position.curvature_step = records[0]["step"]
            for record in records:
                # the optimizer counts the steps that were taken
                step = record["step"] + self.position.overflows
                self._record({"kind": "curvature", **record, "step": step})
            self.clock.lap(None)

    def _must_pause(self, step: Step) -> bool:
        """Whether there is something to do between two steps, outside the clock."""
        if step.overflowed or self._log_is_due() or self._checkpoint_is_due():
            return True
        # Of several ranks each knows its own signals and clock; they compare where they pause.
        return self.ranks.world_size == 1 and (self.stop.requested or self._time_is_up())

    def _log_is_due(self) -> bool:
        return bool(self.position.step % self.train.log_interval == 0)

    def _checkpoint_is_due(self) -> bool:
        # The last batch of an epoch is followed by the epoch's own checkpoint.
        ends_epoch = self.position.batch == self.data.batches_per_epoch
        return bool(self.position.step % self.train.checkpoint_interval == 0) and not ends_epoch

    def _time_is_up(self) -> bool:
        """Whether the run has had its `train.timeout_s` training seconds."""
        limit_s: float | None = self.train.timeout_s
        return limit_s is not None and self.clock.train_time_s >= limit_s

    def _pause(self, step: Step) -> Status | None:
        """Record, check and save what is due between two steps."""
        stops, finite = self._compare()
        if step.overflowed:
            finite = self._record_overflow() and finite
        saves = self._checkpoint_is_due() or stops or self._time_is_up()
        finite = finite and (not saves or self._weights_are_finite())
        if self._log_is_due() or not finite:
            self._record_step(step.loss.mean(self.ranks), step.lr)
        if not finite:
            return "diverged"
        if saves:
            self._save()
        if stops:
            self._end_by_signal()
        return "timeout" if self._time_is_up() else None

    def _compare(self) -> tuple[bool, bool]:
        """Have all ranks take the clock of the slowest one; the clock stands.

        Returns:
            Whether any rank is to stop, and whether the loss is finite on all of them.
        """
        finite = self._loss_is_finite()
        if self.ranks.world_size == 1:
            return self.stop.requested, finite
        clock = self.clock.state_dict()
        mine = [float(self.stop.requested), float(finite), *clock.values()]
        rows = self.ranks.rows(torch.tensor(mine, dtype=torch.float64))
        slowest = rows[int(rows[:, 2:].sum(dim=1).argmax()), 2:]
        self.clock.load_state_dict(dict(zip(clock, slowest.tolist(), strict=True)))
        return bool(rows[:, 0].any()), bool(rows[:, 1].all())

    def _end_by_signal(self) -> NoReturn:
        """End as the signal says, or in good order where it came to another rank."""
        self.stop.obey()
        raise SystemExit(0)

    def _finish_epoch(self) -> Status | None:
        """Evaluate, record and save at the end of an epoch."""
        position, train = self.position, self.train
        stops, finite = self._compare()
        train_loss = self._train_loss()
        if not (finite and self._weights_are_finite()):
            self._record_step(train_loss, self._current_lr())
            return "diverged"
        epoch = position.epoch + 1
        evaluation = None
        if epoch % train.eval_interval == 0 or epoch == train.epochs:
            evaluation = self._evaluate()
        record = self._epoch_record(epoch, train_loss, evaluation)
        self.position = Position(
            epoch=epoch,
            step=position.step,
            epoch_start_time_s=self.clock.train_time_s,
            curvature_step=position.curvature_step,
            overflows=position.overflows,
        )
        self.loss_sum.zero_()
        self._record(record.as_record())
        self._record_passes()
        if evaluation is not None:
            self._record_average()
        self._record_gradient()
        self._save()
        if self.ranks.leads:
            logger.info("%s", self._progress(record))
        if self.on_epoch is not None and self.ranks.leads:
            self.on_epoch(record)
        if stops or (self.ranks.world_size == 1 and self.stop.requested):
            self._end_by_signal()
        return None

    def _train_loss(self) -> float:
        """The mean loss over the images of the epoch so far."""
        total = self.loss_sum.clone()
        self.ranks.sum_(total)
        return total.item() / self.position.images

    def _epoch_record(
        self, epoch: int, train_loss: float, evaluation: Evaluation | None
    ) -> EpochRecord:
        position, clock = self.position, self.clock
        seconds = clock.train_time_s - position.epoch_start_time_s
        return EpochRecord(
            epoch=epoch,
            step=position.step,
            train_loss=train_loss,
            test_loss=evaluation.loss if evaluation else None,
            test_top1=evaluation.top1 if evaluation else None,
            test_top5=evaluation.top5 if evaluation else None,
            train_time_s=clock.train_time_s,
            data_time_s=clock.seconds("data"),
            forward_backward_time_s=clock.seconds("forward_backward"),
            optimizer_time_s=clock.seconds("optimizer") + clock.seconds("extra_passes"),
            images_per_second=position.images / seconds,
            peak_memory_bytes=max(self.ranks.objects(peak_memory_bytes(self.device))),
        )

    def _evaluate(self, model: Callable[[Tensor], Tensor] | None = None) -> Evaluation:
        """Evaluate on the test images, each once, in float32, leaving BatchNorm's statistics alone.

        Args:
            model: None is the model as it is trained.
        """
        self.model.eval()
        self.ranks.copy_from_leader(list(self.model.buffers()))
        with torch.inference_mode():
            batches = (
                (self.task.images(batch), batch.labels) for batch in self.data.test_batches()
            )
            return evaluate(model or self.model, batches, device=self.device, ranks=self.ranks)

    def _record_average(self) -> None:
        """Evaluate the average of the weights too, if there is one."""
        average = self.task.average
        if average is not None:
            self.ranks.copy_from_leader(average.buffers())
            found = self._evaluate(average)
            record = AverageRecord(
                self.position.epoch, self.position.step, found.loss, found.top1, found.top5
            )
            self._record(record.as_record())

    def _record_overflow(self) -> bool:
        """Record that a step was not taken.

        Returns:
            Whether a smaller scale of the loss can help: below 1 the gradients themselves are
            beyond the range of float16.
        """
        scale = self.task.precision.host_scale()
        position = self.position
        record = OverflowRecord(position.epoch, position.step, position.overflows, scale)
        self._record(record.as_record())
        return scale >= 1

    def _record_step(self, loss: float, lr: float) -> None:
        position = self.position
        record = StepRecord(position.epoch, position.step, loss, lr, self.clock.train_time_s)
        self._record(record.as_record())

    def _record_passes(self) -> None:
        """Record what the optimizer's further passes have cost so far, if it makes any."""
        if self.passes is not None:
            epoch, step = self.position.epoch, self.position.step
            seconds = self.clock.seconds("extra_passes")
            record = PassesRecord(
                epoch, step, **self.passes.state_dict(), extra_passes_time_s=seconds
            )
            self._record(record.as_record())

    def _record_gradient(self) -> None:
        """Record loss and gradient norm of the training set, where that is wanted and due."""
        position = self.position
        if self.gradients is not None and self.gradients.is_due(position.epoch):
            self._record(self.gradients.measure(position.epoch, position.step).as_record())

    def _record(self, record: Mapping[str, Any]) -> None:
        self.records.append(record)

    def _current_lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def _loss_is_finite(self) -> bool:
        """Whether every loss of the epoch so far was finite; one that was not stays in the sum."""
        return math.isfinite(self.loss_sum.item())

    def _weights_are_finite(self) -> bool:
        tensors = [t for t in self.model.state_dict().values() if t.is_floating_point()]
        return bool(torch.stack([torch.isfinite(t).all() for t in tensors]).all())

    def _save(self) -> None:
        """Write a checkpoint of the position; the records before it reach the disk first."""
        check_same_weights(self.task, self.ranks, self.position.step)
        self.records.sync()
        state = self._state()
        state["metrics_offset"] = self.records.offset
        self.checkpoints.save(state, step=self.position.step)
        self._write_status("running")

    def _state(self) -> dict[str, Any]:
        return capture(self.task, self.position, self.loss_sum, self.clock, self.ranks)

    def _resume(self) -> int:
        """Go to the newest intact checkpoint, if there is one.

        Returns:
            How many bytes of `metrics.jsonl` belong to it; 0 where there is none.
        """
        state = self.checkpoints.load_newest(self._state)
        if state is None:
            if self.records.found_status is not None:
                logger.warning("no checkpoint in %s: from the start", self.path)
            return 0
        self.position = restore(state, self.task, self.loss_sum, self.clock, self.ranks)
        if self.ranks.leads:
            logger.info("resumed at step %d: %s", self.position.step, self.path)
        return int(state["metrics_offset"])

    def _write_status(self, status: Status, message: str = "") -> None:
        position = self.position
        self.records.write_status(RunStatus(status, position.epoch, position.step, message))

    def _message(self, ending: Status) -> str:
        if ending == "diverged" and self.task.precision.overflowed:
            step = self.position.step
            return f"gradients beyond float16 at a loss scale below 1, at step {step}"
        if ending == "diverged":
            return f"loss or weights not finite, detected at step {self.position.step}"
        if ending == "timeout":
            return f"train.timeout_s={self.train.timeout_s} is over; a larger one resumes the run"
        return ""

    def _progress(self, record: EpochRecord) -> str:
        spec = self.spec
        tested = "" if record.test_top1 is None else f", test top-1 {record.test_top1:.2f} %"
        return (
            f"{spec.experiment}/{spec.contestant} seed {spec.seed}: "
            f"epoch {record.epoch}/{self.train.epochs}, "
            f"train loss {record.train_loss:.4f}{tested}, "
            f"{record.train_time_s:.1f} s of training"
        )
