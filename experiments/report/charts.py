"""The drawings of a page: training curves, intervals side by side, where the time goes.

A group is drawn with the colour and marker of its optimizer (`analysis.palette`). Line and band are
those of `analysis.curves`: the mean over seeds, and smallest to largest seed. Every seed's own line
is in the drawing too and is shown when the reader asks for it; that of a seed which is not over is
always shown, with a ring at its end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from experiments.analysis.measuring.curves import (
    AXES,
    Axis,
    Curve,
    Extent,
    Trace,
    curve,
    extent,
)
from experiments.analysis.measuring.groups import Group, Results
from experiments.analysis.measuring.quantities import MINUS
from experiments.analysis.measuring.runs import FloatArray, Run
from experiments.analysis.showing.palette import LINES, look_of
from experiments.report import svg
from experiments.report.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Scale

METRICS = {
    "train_loss": "training loss",
    "test_loss": "test loss",
    "test_top1": "test top-1 accuracy, %",
}
AXIS_LABELS: dict[Axis, str] = {
    "epoch": "epochs",
    "step": "steps",
    "train_time_s": "training time, seconds",
}
# Parts of the training time: names, and fields of the epoch records.
PARTS = {
    "forward, backward": "forward_backward_time_s",
    "optimizer": "optimizer_time_s",
    "data": "data_time_s",
}
MARKS = 8  # on a line of any length
POINTS = 300  # of a line at most


@dataclass(frozen=True)
class Panel:
    """One drawing.

    Attributes:
        axis: what stands on the horizontal axis: a field of the epoch records, or `step`.
        metric: what stands on the vertical one.
        svg: the drawing.
    """

    axis: str
    metric: str
    svg: str


@dataclass(frozen=True)
class Entry:
    """One line of a legend.

    Attributes:
        name: of the group, a word for CSS.
        label: of the group.
        swatch: its line and marker.
        runs: its keys.
    """

    name: str
    label: str
    swatch: str
    runs: tuple[str, ...]


def dashes(groups: Sequence[Group]) -> dict[Group, str]:
    """The dash pattern of each group: its number among the configs of its contestant."""
    seen: dict[str, int] = {}
    patterns = {}
    for group in groups:
        place = seen.get(group.contestant, 0)
        style = LINES[place % len(LINES)]
        patterns[group] = "" if isinstance(style, str) else " ".join(map(str, style[1]))
        seen[group.contestant] = place + 1
    return patterns


def legend(groups: Sequence[Group]) -> list[Entry]:
    """The legend of a page, which has one entry per group, in the order of its tables."""
    patterns = dashes(groups)
    entries = []
    for place, group in enumerate(groups):
        look = look_of(group)
        picture = svg.swatch(look.colour, look.marker, patterns[group])
        keys = tuple(run.key for run in group.ended)
        entries.append(Entry(f"g{place}", group.label, picture, keys))
    return entries


def training_panels(results: Results, name: str) -> list[Panel]:
    """Loss and accuracy against epochs, steps and seconds; metrics that no run has are left out.

    Args:
        results: the runs of one scale.
        name: prefix of the ids, unique on the page.
    """
    panels = []
    for metric in METRICS:
        by_axis = {axis: {g: curve(g, metric, axis) for g in results.groups} for axis in AXES}
        shown = extent(line for curves in by_axis.values() for line in curves.values())
        if shown is None:
            continue
        for axis, curves in by_axis.items():
            if any(line.drawn for line in curves.values()):
                panels.append(_training_panel(results, curves, shown, metric, axis, name))
    return panels


def interval_panel(
    title: str,
    rows: Sequence[tuple[Group, float, float, float]],
    *,
    neutral: float | None = None,
    logarithmic: bool = False,
) -> str:
    """Centres with intervals, one row a group; "" without rows.

    Args:
        title: what is shown, with its unit.
        rows: group, centre, low, high; low and high are NaN where there is no interval.
        neutral: a vertical line, such as 1 for a ratio.
        logarithmic: whether the axis is.
    """
    if not rows:
        return ""
    row_height, left = 24, 190
    height = 34 + row_height * len(rows) + 34
    numbers = [v for row in rows for v in row[1:]] + ([] if neutral is None else [neutral])
    x = svg.scale_for(numbers, left, WIDTH - RIGHT, logarithmic=logarithmic)
    floor = height - 34
    parts = [f'<text class="title" x="4" y="17">{escape(title)}</text>']
    for value in x.ticks():
        at = x(value)
        parts.append(f'<path class="grid" d="M{at:.1f} 26V{floor}"/>')
        parts.append(svg.label_below(at, floor, value))
    if neutral is not None:
        parts.append(f'<path class="target" d="M{x(neutral):.1f} 26V{floor}"/>')
    told = []
    for place, (group, centre, low, high) in enumerate(rows):
        look = look_of(group)
        at = 26 + row_height * (place + 0.5)
        label = _clipped(group.label, 22)
        parts.append(f'<text class="tick end" x="{left - 12}" y="{at + 4}">{label}</text>')
        bounds = "" if math.isnan(low) else f" [{short(low)}, {short(high)}]"
        words = f"{group.label}: {short(centre)}{bounds}"
        told.append(words)
        body = "" if math.isnan(low) else _bar(x, low, high, at)
        body += svg.marker(look.marker, x(centre), at, words)
        parts.append(f'<g style="--c:{svg.ink(look.colour)}">{body}</g>')
    alt = escape(f"{title}. {'; '.join(told)}.")
    return (
        f'<svg class="panel" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{alt}">'
        f"{''.join(parts)}</svg>"
    )


def time_panel(rows: Sequence[tuple[Group, Mapping[str, float]]]) -> str:
    """Where the training time goes: seconds per epoch by part, one bar a group; "" without rows.

    Args:
        rows: group, and the seconds per epoch of each of `PARTS`.
    """
    if not rows:
        return ""
    row_height, left, top = 24, 190, 48
    floor = top + row_height * len(rows)
    totals = [sum(parts.values()) for _, parts in rows]
    x = svg.scale_for(totals, left, WIDTH - RIGHT, from_zero=True)
    parts = ['<text class="title" x="4" y="17">seconds per epoch</text>']
    for place, name in enumerate(PARTS):
        at = (12, 152, 242)[place]
        parts.append(f'<rect class="part{place}" x="{at}" y="26" width="12" height="12"/>')
        parts.append(f'<text class="tick" x="{at + 18}" y="37">{name}</text>')
    for value in x.ticks():
        parts.append(f'<path class="grid" d="M{x(value):.1f} {top}V{floor}"/>')
        parts.append(svg.label_below(x(value), floor, value))
    told = []
    for place, (group, seconds) in enumerate(rows):
        at = top + row_height * place + 4
        label = _clipped(group.label, 22)
        parts.append(f'<text class="tick end" x="{left - 12}" y="{at + 12}">{label}</text>')
        start = 0.0
        for number, name in enumerate(PARTS):
            wide = x(start + seconds[name]) - x(start)
            words = f"{group.label}: {name} {short(seconds[name])} s per epoch"
            parts.append(
                f'<rect class="part{number}" x="{x(start):.1f}" y="{at}" width="{wide:.1f}" '
                f'height="{row_height - 8}"><title>{escape(words)}</title></rect>'
            )
            start += seconds[name]
        told.append(f"{group.label} {', '.join(f'{n} {short(s)}' for n, s in seconds.items())}")
    alt = escape(f"seconds per epoch. {'; '.join(told)}.")
    return (
        f'<svg class="panel" viewBox="0 0 {WIDTH} {floor + 34}" role="img" aria-label="{alt}">'
        f"{''.join(parts)}</svg>"
    )


def _training_panel(
    results: Results,
    curves: dict[Group, Curve],
    shown: Extent,
    metric: str,
    axis: Axis,
    name: str,
) -> Panel:
    drawn = [line for line in curves.values() if line.drawn]
    ceiling, logarithmic = shown.ceiling, shown.logarithmic
    x_values = [float(v) for line in drawn for v in line.x]
    x_values += [run.epochs[-1][axis] for line in drawn for run in line.group.ended if run.epochs]
    x_values += [float(trace.x[-1]) for line in drawn for trace in line.unfinished]
    x = svg.scale_for(x_values, LEFT, WIDTH - RIGHT, from_zero=True)
    y = svg.scale_for((shown.low, shown.high), HEIGHT - BOTTOM, TOP, logarithmic=logarithmic)
    patterns = dashes(results.groups)
    body = []
    if results.target is not None and results.target.metric == metric:
        at = y(results.target.value)
        body.append(f'<path class="target" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
    for place, group in enumerate(results.groups):
        line = curves[group]
        shape = "".join(_seed_line(run, metric, axis, x, y, ceiling) for run in group.ended)
        shape += "".join(_unfinished(trace, x, y, ceiling) for trace in line.unfinished)
        shape += _curve(line, x, y, ceiling, patterns[group], AXIS_LABELS[axis])
        body.append(group_shape(place, group, shape))
    title = f"{METRICS[metric]}{', log' if logarithmic else ''}"
    alt = f"{METRICS[metric]} against {AXIS_LABELS[axis]}. {_ends_in_words(drawn)}"
    frame = svg.frame(x, y, title=title, x_label=AXIS_LABELS[axis])
    drawing = svg.panel(f"{name}-{metric}-{axis}", alt, frame, "".join(body))
    return Panel(axis, metric, drawing)


def _curve(line: Curve, x: Scale, y: Scale, ceiling: float, dash: str, unit: str) -> str:
    if not line.x.size:
        return "".join(_cross(x(a), y(min(b, ceiling))) for a, b in line.ends)

    def places(values: FloatArray) -> list[tuple[float, float]]:
        keep = _thinned(line.x.size)
        return [(x(line.x[i]), y(min(float(values[i]), ceiling))) for i in keep]

    parts = [svg.area(places(line.high), places(line.low))] if line.n.max() > 1 else []
    parts.append(svg.polyline(places(line.mean), "line", svg.dash_attribute(dash)))
    for i in marked(line.x.size):
        spread = f" [{short(line.low[i])}, {short(line.high[i])}]" if line.n[i] > 1 else ""
        told = f"{line.group.label}: {short(line.mean[i])}{spread} at {line.x[i]:.6g} {unit}"
        at = (x(line.x[i]), y(min(float(line.mean[i]), ceiling)))
        parts.append(svg.marker(look_of(line.group).marker, *at, told))
    parts += [_cross(x(a), y(min(b, ceiling))) for a, b in line.ends]
    return "".join(parts)


def _seed_line(run: Run, metric: str, axis: Axis, x: Scale, y: Scale, ceiling: float) -> str:
    at, values = run.epoch_series(axis), run.epoch_series(metric)
    keep = np.flatnonzero(np.isfinite(at) & np.isfinite(values))
    keep = keep[_thinned(keep.size)]
    points = [(x(float(at[i])), y(min(float(values[i]), ceiling))) for i in keep]
    title = f"<title>seed {run.seed}</title>"
    return svg.polyline(points, "seed").replace("/>", f">{title}</path>")


def _unfinished(trace: Trace, x: Scale, y: Scale, ceiling: float) -> str:
    points = points_of(x, y, trace.x, np.minimum(trace.y, ceiling))
    at, height = points[-1]
    told = f"seed {trace.run.seed} so far, {trace.run.progress}: {short(trace.y[-1])}; not counted"
    ring = f'<circle class="ring" cx="{at:.1f}" cy="{height:.1f}" r="5">'
    ring += f"<title>{escape(told)}</title></circle>"
    return f"{svg.polyline(points, 'line thin')}{ring}"


def points_of(x: Scale, y: Scale, at: FloatArray, values: FloatArray) -> list[tuple[float, float]]:
    """Places of a line's points in a panel; `POINTS` of them and the last at most."""
    return [(x(float(at[i])), y(float(values[i]))) for i in _thinned(at.size)]


def group_shape(place: int, group: Group, shape: str) -> str:
    """What is drawn of a group, which the legend shows and hides by its place."""
    colour = svg.ink(look_of(group).colour)
    return f'<g class="group g{place}" style="--c:{colour}">{shape}</g>'


def _ends_in_words(lines: Iterable[Curve]) -> str:
    told = []
    for line in lines:
        if line.x.size:
            ends = f"{short(line.mean[0])} to {short(line.mean[-1])}"
            told.append(f"{line.group.label} from {ends} (n = {line.n.max()})")
        for trace in line.unfinished:
            ends = f"{short(trace.y[0])} to {short(trace.y[-1])}"
            told.append(f"{line.group.label}, seed {trace.run.seed} so far, from {ends}")
    return f"{'; '.join(told)}."


def _thinned(count: int) -> list[int]:
    """Every so many indices, the last included, `POINTS` at most."""
    stride = max(1, math.ceil(count / POINTS))
    kept = list(range(0, count, stride))
    return kept if not count or kept[-1] == count - 1 else [*kept, count - 1]


def marked(count: int) -> list[int]:
    """Indices of the points that get a marker, the last among them."""
    stride = max(1, math.ceil(count / MARKS))
    return list(range(count - 1, -1, -stride))[::-1]


def _bar(x: Scale, low: float, high: float, at: float) -> str:
    """The bar of an interval; one that leaves the axis has no cap there."""
    left, right = x(low), x(high)
    caps = "".join(f"M{end:.1f} {at - 5}v10" for end in (left, right))
    return f'<path class="line" d="M{left:.1f} {at}H{right:.1f}{caps}"/>'


def _cross(x: float, y: float) -> str:
    d = f"M{x - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10"
    return f'<path class="cross" d="{d}"><title>a seed diverged here</title></path>'


def short(value: float) -> str:
    """A number in a text of a drawing: four digits."""
    return f"{value:.4g}".replace("-", MINUS)


def _clipped(text: str, length: int) -> str:
    return escape(text if len(text) <= length else f"{text[: length - 1]}…")
