"""Whether a run stayed stable: did it fail, did it fail where the rate drops, how it shook.

A run *fails* where it diverges (a loss or weight that is not finite), or where the training loss
of an epoch is at least ln C, C classes. That is the loss of guessing: a network whose output does
not depend on the image cannot have a lower mean loss over balanced classes (Jensen), so such a run
has lost what it had learned, even where no number overflowed.

The *drop* is the first milestone of the schedule `steps`, in epochs; other schedules have none.
`before the drop` means the epochs that end at or before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.analysis.measuring.runs import FloatArray, Run, series

# Steps between two step records that are compared: `train.log_interval` as the configs have it.
RECORD_STEPS = 10
# Second differences that a fluctuation of the accuracy needs.
FEWEST = 8
# Classes of the data sets whose config does not say it (a test compares with the data sets).
CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100}


def failed(run: Run) -> float | None:
    """1 if the run failed, else 0; None where the loss of guessing is not known."""
    return _failed_within(run, math.inf)


def failed_before_drop(run: Run) -> float | None:
    """1 if the run failed before the learning rate dropped, else 0; None without a drop."""
    drop = drop_epoch(run)
    return None if drop is None else _failed_within(run, drop)


def failed_at_drop(run: Run) -> float | None:
    """1 if the drop of the learning rate was the run's undoing, else 0.

    That is: it failed after the drop, or its last epoch's training loss is not below that of the
    last epoch before the drop.

    Returns:
        None without a drop, for a run that failed before it, and for one that has no epoch after
        it although it did not diverge.
    """
    drop = drop_epoch(run)
    if drop is None or _failed_within(run, drop) != 0.0:
        return None
    if failed(run) == 1.0:
        return 1.0
    epochs, losses = run.epoch_series("epoch"), run.epoch_series("train_loss")
    if not np.any(epochs == drop) or not np.any(epochs > drop):
        return None
    return float(not losses[-1] < losses[epochs == drop][0])


def top1_fluctuation(run: Run) -> float | None:
    """How much the test accuracy shakes from epoch to epoch before the drop, in points.

    The sample standard deviation of the second differences of `test_top1`, over √6: that of
    independent noise around a curve that is straight from one evaluation to the one after the next.
    Neither a rise nor its slow bending counts.

    Returns:
        None with fewer than `FEWEST` second differences, since that of a few epochs is mostly the
        bend; infinite for a run that diverged before the drop.
    """
    drop = _drop_or_end(run)
    if _diverged_by(run, drop):
        return math.inf
    values = run.epoch_series("test_top1")[run.epoch_series("epoch") <= drop]
    bends = np.diff(values[np.isfinite(values)], 2)
    deviation = _deviation(bends) if bends.size >= FEWEST else None
    return None if deviation is None else deviation / math.sqrt(6)


def loss_fluctuation(run: Run) -> float | None:
    """How much the training loss shakes before the drop: of its logarithm, without unit.

    The sample standard deviation of the change of ln(loss) from one step record to the next,
    `RECORD_STEPS` steps later. Each is the loss of one batch, so that the noise of drawing a batch
    is a part of it; runs of one seed see the same batches.

    Returns:
        None where no two changes are recorded; infinite for a run that diverged before the drop.
    """
    drop = _drop_or_end(run)
    if _diverged_by(run, drop):
        return math.inf
    records = [record for record in run.steps if record["epoch"] < drop]
    steps, losses = series(records, "step"), series(records, "loss")
    with np.errstate(divide="ignore", invalid="ignore"):
        changes = np.diff(np.log(losses))
    return _deviation(changes[(np.diff(steps) == RECORD_STEPS) & np.isfinite(changes)])


def drop_epoch(run: Run) -> int | None:
    """Finished epochs at the first drop of the learning rate; None where it never drops."""
    schedule = _node(run, "schedule")
    milestones = schedule.get("milestones") or [] if schedule.get("name") == "steps" else []
    epochs = _node(run, "train").get("epochs", math.inf)
    return int(milestones[0]) if milestones and milestones[0] < epochs else None


def loss_of_guessing(run: Run) -> float | None:
    """ln C of the run's data set with C classes; None where that is not known."""
    dataset = _node(run, "dataset")
    classes = dataset.get("num_classes") or CLASSES.get(str(dataset.get("name")))
    return math.log(classes) if classes else None


def _failed_within(run: Run, last: float) -> float | None:
    """Whether the run failed in its first `last` epochs."""
    if _diverged_by(run, last):
        return 1.0
    guessing = loss_of_guessing(run)
    if guessing is None:
        return None
    losses = run.epoch_series("train_loss")[run.epoch_series("epoch") <= last]
    return float(not np.all(losses < guessing))


def _diverged_by(run: Run, last: float) -> bool:
    """Whether the run diverged in its first `last` epochs; it ends inside an epoch."""
    return run.status == "diverged" and len(run.epochs) < last


def _drop_or_end(run: Run) -> float:
    drop = drop_epoch(run)
    return math.inf if drop is None else drop


def _deviation(changes: FloatArray) -> float | None:
    return float(np.std(changes, ddof=1)) if changes.size >= 2 else None


def _node(run: Run, name: str) -> Mapping[str, Any]:
    node = run.config.get(name)
    return node if isinstance(node, Mapping) else {}
