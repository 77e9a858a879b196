"""What one run is measured by: a name, a unit, and a function of the run's records.

Which runs count, for every measure in the same way:

* A diverged run counts. Its accuracy is the last one evaluated; a run that diverged before its
  first evaluation has the accuracy minus infinity, below anything. Its training loss is infinite.
* A target not reached is reached after infinitely many steps and seconds, whether the run is done,
  diverged, ran out of time or crashed; one reached before the end counts as reached.
* A run that ran out of time or crashed has no final value: it is absent from final values and
  shown in the status column. A running run enters nothing.

Flags and fluctuations are defined in `stability`, those about the PL condition in `pl`.
`final:<field>` is the last value of any field of the epoch records.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from experiments.analysis.measuring import pl, stability
from experiments.analysis.measuring.runs import FloatArray, Run
from experiments.errors import UserError, nearest

FINISHED = frozenset({"done", "diverged"})
ENDED = FINISHED | {"timeout", "crashed"}
FALLING_METRICS = ("train_loss", "test_loss")


@dataclass(frozen=True)
class Target:
    """What a run must reach: fixed in the experiment's config, before the run."""

    metric: str
    value: float

    @property
    def falls(self) -> bool:
        """Whether lower is better."""
        return self.metric in FALLING_METRICS

    def __str__(self) -> str:
        return f"{self.metric} {'<=' if self.falls else '>='} {self.value:g}"


@dataclass(frozen=True)
class Measure:
    """A named number of a run.

    Attributes:
        name: as claims and CSV columns write it.
        unit: of the number; "" if it has none.
        kind: decides how the number is printed; a flag is 1 or 0, for what happened or not.
        statuses: the runs that have this number.
        of: the number; None where the run cannot have it (no records, no target).
    """

    name: str
    unit: str
    kind: Literal["percent", "loss", "count", "seconds", "bytes", "plain", "flag"]
    statuses: frozenset[str]
    of: Callable[[Run], float | None]

    def __call__(self, run: Run) -> float | None:
        """The number for this run; None if its status excludes it or it has no such record."""
        return self.of(run) if run.status in self.statuses else None

    @property
    def infinite(self) -> str:
        """What an infinite number of a run means."""
        return "miss" if self.name.endswith("_to_target") else "diverged"


def target_of(run: Run) -> Target | None:
    """The target in `experiment.target` of the run's config; None if it has none.

    Raises:
        UserError: the target is not `{metric, value}`.
    """
    experiment = run.config.get("experiment")
    entry = experiment.get("target") if isinstance(experiment, dict) else None
    if entry is None:
        return None
    try:
        return Target(str(entry["metric"]), float(entry["value"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{run.path / 'config.yaml'}: experiment.target is {entry!r}, "
            "{metric: test_top1, value: <number>} is needed"
        ) from error


def reach(run: Run, target: Target, field: str) -> float:
    """Steps, seconds or epochs until the target is first seen in an evaluation.

    There is no interpolation between evaluations: the resolution is one epoch.

    Args:
        run: the run.
        target: what to reach.
        field: `step`, `train_time_s` or `epoch`.

    Returns:
        The field at the first epoch record that reaches the target; infinite if none does.
    """
    values = run.epoch_series(target.metric)
    with np.errstate(invalid="ignore"):  # NaN: not evaluated at that epoch, so not reached
        reached = values <= target.value if target.falls else values >= target.value
    hits = np.flatnonzero(reached)
    return float(run.epochs[hits[0]][field]) if hits.size else math.inf


def measure_named(name: str) -> Measure:
    """Look up a measure.

    Raises:
        UserError: there is no such measure.
    """
    if name in MEASURES:
        return MEASURES[name]
    if name.startswith("final:") and len(name) > len("final:"):
        record_field = name.removeprefix("final:")
        return Measure(name, "", "plain", FINISHED, lambda run: _last(run, record_field))
    hint = nearest(name, [*MEASURES, "final:<field>"])
    raise UserError(f"unknown metric {name!r}: {hint}")


def _finite(run: Run, field: str) -> FloatArray:
    values = run.epoch_series(field)
    finite: FloatArray = values[np.isfinite(values)]
    return finite


def _last(run: Run, field: str) -> float | None:
    values = _finite(run, field)
    return float(values[-1]) if values.size else None


def _accuracy(pick: Callable[[FloatArray], float]) -> Callable[[Run], float | None]:
    def of(run: Run) -> float | None:
        values = _finite(run, "test_top1")
        if values.size:
            return float(pick(values))
        return -math.inf if run.status == "diverged" else None

    return of


def _train_loss(run: Run) -> float | None:
    return math.inf if run.status == "diverged" else _last(run, "train_loss")


def _mean_log_train_loss(run: Run) -> float | None:
    """Area under the log training loss over epochs, divided by their number: lower is faster."""
    if run.status == "diverged":
        return math.inf
    return _mean_log(_finite(run, "train_loss"))


def _mean_log_train_loss_before_drop(run: Run) -> float | None:
    """The same up to the first drop of the learning rate; of the whole run where it has none."""
    if run.status == "diverged":
        return math.inf
    drop = stability.drop_epoch(run)
    losses = run.epoch_series("train_loss")
    if drop is not None:
        losses = losses[run.epoch_series("epoch") <= drop]
    return _mean_log(losses[np.isfinite(losses)])


def _mean_log(values: FloatArray) -> float | None:
    return float(np.mean(np.log(values))) if values.size and np.all(values > 0) else None


def _to_target(field: str) -> Callable[[Run], float | None]:
    def of(run: Run) -> float | None:
        target = target_of(run)
        return None if target is None else reach(run, target, field)

    return of


def _seconds_per_epoch(run: Run) -> float | None:
    if not run.epochs:
        return None
    return float(run.epochs[-1]["train_time_s"]) / float(run.epochs[-1]["epoch"])


def _optimizer_share(run: Run) -> float | None:
    spent, total = _last(run, "optimizer_time_s"), _last(run, "train_time_s")
    return None if spent is None or not total else 100.0 * spent / total


def _peak_memory(run: Run) -> float | None:
    values = _finite(run, "peak_memory_bytes")
    return float(values.max()) if values.size else None


MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure("final_top1", "%", "percent", FINISHED, _accuracy(lambda v: v[-1])),
        Measure("best_top1", "%", "percent", FINISHED, _accuracy(lambda v: v.max())),
        Measure("final_train_loss", "", "loss", FINISHED, _train_loss),
        Measure("mean_log_train_loss", "", "loss", FINISHED, _mean_log_train_loss),
        Measure(
            "mean_log_train_loss_before_drop",
            "",
            "loss",
            FINISHED,
            _mean_log_train_loss_before_drop,
        ),
        Measure("steps_to_target", "steps", "count", ENDED, _to_target("step")),
        Measure("seconds_to_target", "s", "seconds", ENDED, _to_target("train_time_s")),
        Measure("seconds_per_epoch", "s", "seconds", FINISHED, _seconds_per_epoch),
        Measure("optimizer_share", "%", "percent", FINISHED, _optimizer_share),
        Measure("peak_memory", "bytes", "bytes", FINISHED, _peak_memory),
        Measure("diverged", "", "flag", FINISHED, lambda run: float(run.status == "diverged")),
        Measure("failed", "", "flag", FINISHED, stability.failed),
        Measure("failed_before_drop", "", "flag", FINISHED, stability.failed_before_drop),
        Measure("failed_at_drop", "", "flag", FINISHED, stability.failed_at_drop),
        Measure("top1_fluctuation", "points", "percent", FINISHED, stability.top1_fluctuation),
        Measure("pl_constant", "", "loss", FINISHED, pl.constant),
        Measure("pl_fall", "", "plain", FINISHED, pl.fall),
        Measure("pl_exponent", "", "plain", FINISHED, pl.exponent),
        Measure("loss_fluctuation", "", "loss", FINISHED, stability.loss_fluctuation),
    )
}
