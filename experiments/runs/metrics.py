"""The records of a run: JSON lines, appended, and cut back when a run resumes.

A checkpoint stores how many bytes of `metrics.jsonl` belong to it. A resumed run cuts the file
back to that point before it goes on, so a killed run ends with the records of an uninterrupted one.
JSON has no infinities: a value that is not finite is written as `null`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.errors import UserError
from experiments.given import open_plain, parse_json
from experiments.runs.atomic import UnwritableError, open_own, write_atomically


@dataclass(frozen=True)
class StepRecord:
    """What is recorded every `train.log_interval` steps.

    Attributes:
        epoch: the epoch the step is in, from 0.
        step: finished steps.
        loss: mean loss of the step's batch, before the step.
        lr: learning rate of the step.
        train_time_s: cumulative training seconds.
    """

    epoch: int
    step: int
    loss: float
    lr: float
    train_time_s: float

    def as_record(self) -> dict[str, Any]:
        """The line of `metrics.jsonl`."""
        return {"kind": "step", **asdict(self)}


@dataclass(frozen=True)
class EpochRecord:
    """What is recorded at the end of an epoch.

    Attributes:
        epoch: finished epochs.
        step: finished steps.
        train_loss: mean over the images of the epoch, each at the weights it was trained at.
        test_loss: mean over the test images; None where the epoch was not evaluated.
        test_top1: percent; None where the epoch was not evaluated.
        test_top5: percent; None where the epoch was not evaluated.
        train_time_s: cumulative training seconds, the sum of the next three.
        data_time_s: cumulative seconds spent on waiting for batches.
        forward_backward_time_s: cumulative seconds of forward and backward passes.
        optimizer_time_s: cumulative seconds of optimizer steps, with the further passes of those
            that want them (`PassesRecord`).
        images_per_second: images of this epoch over its training seconds.
        peak_memory_bytes: of the device, or of the process where the device is the CPU.
    """

    epoch: int
    step: int
    train_loss: float
    test_loss: float | None
    test_top1: float | None
    test_top5: float | None
    train_time_s: float
    data_time_s: float
    forward_backward_time_s: float
    optimizer_time_s: float
    images_per_second: float
    peak_memory_bytes: int

    def as_record(self) -> dict[str, Any]:
        """The line of `metrics.jsonl`."""
        return {"kind": "epoch", **asdict(self)}


@dataclass(frozen=True)
class PassesRecord:
    """What the optimizer's further passes have cost by the end of an epoch, if it makes any.

    Attributes:
        epoch: finished epochs.
        step: finished steps.
        gradient_images: images in gradients beside those of the steps' own batches, cumulative.
        hessian_images: images in Hessian-vector products, cumulative.
        extra_passes_time_s: cumulative seconds of these passes, a part of `optimizer_time_s`.
    """

    epoch: int
    step: int
    gradient_images: int
    hessian_images: int
    extra_passes_time_s: float

    def as_record(self) -> dict[str, Any]:
        """The line of `metrics.jsonl`."""
        return {"kind": "passes", **asdict(self)}


@dataclass(frozen=True)
class AverageRecord:
    """Test results of the average of the weights (`train.ema`), beside those of an epoch record.

    Attributes:
        epoch: finished epochs.
        step: finished steps.
        test_loss: mean over the test images.
        test_top1: percent.
        test_top5: percent.
    """

    epoch: int
    step: int
    test_loss: float
    test_top1: float
    test_top5: float

    def as_record(self) -> dict[str, Any]:
        """The line of `metrics.jsonl`."""
        return {"kind": "ema", **asdict(self)}


@dataclass(frozen=True)
class OverflowRecord:
    """A step that was not taken, because a gradient was beyond float16.

    Attributes:
        epoch: the epoch the step is in, from 0.
        step: finished steps, with this one.
        overflows: how many so far.
        loss_scale: of the next step.
    """

    epoch: int
    step: int
    overflows: int
    loss_scale: float

    def as_record(self) -> dict[str, Any]:
        """The line of `metrics.jsonl`."""
        return {"kind": "overflow", **asdict(self)}


@dataclass(frozen=True)
class GradientRecord:
    """Loss and gradient norm of the training set, if wanted.

    `experiments.training.gradient_record` measures them.

    Attributes:
        epoch: finished epochs.
        step: finished steps.
        loss: L, mean over the images.
        squared_norm: ‖∇L‖².
        images: how many stand for the training set.
        gradient_time_s: seconds that this record took, outside the training clock.
    """

    epoch: int
    step: int
    loss: float
    squared_norm: float
    images: int
    gradient_time_s: float

    def as_record(self) -> dict[str, Any]:
        """The line of `metrics.jsonl`."""
        return {"kind": "gradient", **asdict(self)}


class MetricsFile:
    """`metrics.jsonl`, open for appending.

    Args:
        path: the file; made where it does not exist. One that has other names (hard links, as of
            a copy of the results that shares their files) is replaced by a copy of its own.
        offset: how many of its bytes to keep; the rest is cut off.

    Raises:
        UserError: the file is shorter than `offset`, what is to be kept is no run of records, or it
            cannot be written, as where it is a link.
    """

    def __init__(self, path: Path, *, offset: int = 0):
        self.path = path
        content = b"" if path.is_symlink() or not path.is_file() else path.read_bytes()
        if len(content) < offset:
            raise UserError(
                f"{path} has {len(content)} bytes but the checkpoint was written at {offset}: "
                "restore the file, or delete the run directory to start over"
            )
        kept = content[:offset]
        if kept and not kept.endswith(b"\n"):
            raise UserError(
                f"{path} would be cut in the middle of a record, at byte {offset}: "
                "restore the file, or delete the run directory to start over"
            )
        _parse(kept, path)
        if content and path.stat().st_nlink > 1:
            write_atomically(path, kept)
        try:
            self._descriptor = open_own(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.ftruncate(self._descriptor, offset)
        except OSError as error:
            raise UnwritableError(path, error) from error
        self._offset = offset

    @property
    def offset(self) -> int:
        """Length of the file, bytes."""
        return self._offset

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record, handed to the system so that a killed process loses none.

        Raises:
            UnwritableError: the disk is full; the file ends with the record before.
        """
        line = json.dumps(_finite(record), separators=(", ", ": "), allow_nan=False)
        left = memoryview(line.encode() + b"\n")
        size = len(left)
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError as error:
            os.ftruncate(self._descriptor, self._offset)
            raise UnwritableError(self.path, error) from error
        self._offset += size

    def sync(self) -> None:
        """Return once the records are on the disk; a checkpoint must never be ahead of them."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise UnwritableError(self.path, error) from error

    def close(self) -> None:
        """Close the file; more than once does no harm."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of a run.

    A last line without its end is what a killed process leaves, and is left out. Anything else
    that is no JSON object is a corrupt file.

    Args:
        path: a `metrics.jsonl`.

    Raises:
        UserError: the file is missing or a line is corrupt; the message names file and line.
    """
    try:
        with open_plain(path) as file:
            return _parse(file.read(), path)
    except FileNotFoundError as error:
        raise UserError(f"no records at {path}: expected the metrics.jsonl of a run") from error


def _parse(content: bytes, path: Path) -> list[dict[str, Any]]:
    """Decode the finished lines; what follows the last line end is left out."""
    records = []
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            record = parse_json(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or "kind" not in record:
            raise UserError(
                f"{path} is corrupt in line {number}: expected one JSON record a line, "
                f"found {line[:60]!r}; restore the file, or delete the run directory and run again"
            )
        records.append(record)
    return records


def _finite(value: Any) -> Any:
    """Replace what is not finite by None, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(child) for child in value]
    return value
