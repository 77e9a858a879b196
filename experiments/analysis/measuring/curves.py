"""Mean and spread over seeds along training: against epochs, steps and training seconds.

Epochs and steps are the same for every seed, so each point is a mean over the seeds that have it,
and `n` says how many: a seed that diverged ends, and the curve goes on with fewer. Seconds are not:
each finished seed is interpolated on a common grid, from the latest first record to the latest last
one. A seed that is done earlier keeps its last value: it has trained, and that is what it is worth.
Where no seed has finished the grid ends with the first that ends. Runs that are not over are in no
mean: each is a line of its own, as far as it has come.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from experiments.analysis.measuring.groups import Group
from experiments.analysis.measuring.measures import FALLING_METRICS
from experiments.analysis.measuring.runs import FloatArray, Run
from experiments.analysis.measuring.statistics import Estimate

Axis = Literal["epoch", "step", "train_time_s"]
AXES: tuple[Axis, ...] = ("epoch", "step", "train_time_s")
METRICS = ("train_loss", "test_loss", "test_top1", "test_top5")
GRID_POINTS = 50
FEW_DECADES = 2.5  # a logarithmic axis that spans less is labelled between the powers of ten, too
LOSS_FALL = 5.0  # a loss that falls by more is shown on a logarithmic axis
EXPLOSION = 10.0  # and one that rises to more than so many times the largest first one, cut there


@dataclass(frozen=True)
class Trace:
    """The finite points of one run: `x` ascending, `y` of the same length, float64."""

    run: Run
    x: FloatArray
    y: FloatArray


@dataclass(frozen=True)
class Curve:
    """One metric of one group against one axis; all arrays have the length of `x`.

    Attributes:
        group: the group.
        metric: field of the epoch records.
        axis: field of the epoch records on the horizontal axis.
        x: float64, in epochs, steps or seconds.
        n: number of seeds behind each point, int64.
        mean: float64.
        low: smallest value over the seeds, float64.
        high: largest value over the seeds, float64.
        half_width: of Student's 95 % interval, float64; NaN where n = 1.
        ends: (x, value) of the last record of every diverged seed that has one.
        unfinished: what there is of the seeds that are not over, which are not in the arrays.
    """

    group: Group
    metric: str
    axis: Axis
    x: FloatArray
    n: np.ndarray[Any, np.dtype[np.int64]]
    mean: FloatArray
    low: FloatArray
    high: FloatArray
    half_width: FloatArray
    ends: tuple[tuple[float, float], ...]
    unfinished: tuple[Trace, ...]

    @property
    def drawn(self) -> bool:
        """Whether there is anything to draw."""
        return bool(self.x.size or self.unfinished)


@dataclass(frozen=True)
class Extent:
    """What the axis of a metric shows, the same in all panels of a figure.

    Attributes:
        low: smallest value of any curve.
        high: largest value, at most `ceiling`.
        ceiling: where larger values are drawn; infinite for what is not a loss.
        explodes: whether there are such values.
        logarithmic: whether the axis is.
    """

    low: float
    high: float
    ceiling: float
    explodes: bool
    logarithmic: bool


def curve(group: Group, metric: str, axis: Axis) -> Curve:
    """Compute one curve over the ended runs of a group; the unfinished ones stay by themselves.

    Args:
        group: the seeds of one config.
        metric: field of the epoch records.
        axis: what stands on the horizontal axis.

    Returns:
        The curve; of length 0 if no ended run has the metric.
    """
    traces = _traces(group.ended, metric, axis)
    ends = tuple(
        (float(trace.x[-1]), float(trace.y[-1]))
        for trace in traces
        if trace.run.status == "diverged"
    )
    if axis == "train_time_s":
        complete = [trace for trace in traces if trace.run.status == "done"]
        x, columns = _on_common_grid(complete or traces, done=bool(complete))
    else:
        x, columns = _on_shared_points(traces)
    estimates = [Estimate(tuple(column)) for column in columns]
    return Curve(
        group,
        metric,
        axis,
        x,
        np.array([len(column) for column in columns], dtype=np.int64),
        _array(estimate.mean for estimate in estimates),
        _array(min(column) for column in columns),
        _array(max(column) for column in columns),
        _array(estimate.half_width for estimate in estimates),
        ends,
        tuple(_traces(group.unfinished, metric, axis)),
    )


def extent(lines: Iterable[Curve]) -> Extent | None:
    """The extent of the curves of one metric, against whatever axes; None if all are empty.

    One extent for all axes, because a loss that is logarithmic against epochs and linear against
    seconds cannot be compared with itself.
    """
    drawn = [line for line in lines if line.drawn]
    if not drawn:
        return None
    edges = [(line.low, line.high) for line in drawn if line.x.size]
    edges += [(trace.y, trace.y) for line in drawn for trace in line.unfinished]
    low = min(float(lower.min()) for lower, _ in edges)
    high = max(float(upper.max()) for _, upper in edges)
    if drawn[0].metric not in FALLING_METRICS:
        return Extent(low, high, np.inf, explodes=False, logarithmic=False)
    ceiling = EXPLOSION * max(float(upper[0]) for _, upper in edges)
    shown = min(high, ceiling)
    return Extent(low, shown, ceiling, high > ceiling, low > 0 and shown > LOSS_FALL * low)


def _traces(runs: Sequence[Run], metric: str, axis: Axis) -> list[Trace]:
    """Of every run that has a finite point."""
    traces = []
    for run in runs:
        x, y = run.epoch_series(axis), run.epoch_series(metric)
        keep = np.isfinite(x) & np.isfinite(y)
        traces += [Trace(run, x[keep], y[keep])] if keep.any() else []
    return traces


def _on_shared_points(traces: Sequence[Trace]) -> tuple[FloatArray, list[list[float]]]:
    """Every x that any seed has, with the values of the seeds that have it."""
    if not traces:
        return np.empty(0), []
    x = np.unique(np.concatenate([trace.x for trace in traces]))
    lookups = [dict(zip(trace.x, trace.y, strict=True)) for trace in traces]
    return x, [[float(found[p]) for found in lookups if p in found] for p in x]


def _on_common_grid(traces: Sequence[Trace], *, done: bool) -> tuple[FloatArray, list[list[float]]]:
    """A grid of equal distances from where every seed has data; empty where there is none.

    Args:
        traces: of the seeds.
        done: all have finished, and keep their last value.
    """
    if not traces:
        return np.empty(0), []
    start = max(trace.x[0] for trace in traces)
    stop = (max if done else min)(trace.x[-1] for trace in traces)
    if start > stop:
        return np.empty(0), []
    x = np.linspace(start, stop, GRID_POINTS) if start < stop else np.array([start])
    values = np.stack([np.interp(x, trace.x, trace.y) for trace in traces])
    return x, [[float(value) for value in column] for column in values.T]


def _array(values: Any) -> FloatArray:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
