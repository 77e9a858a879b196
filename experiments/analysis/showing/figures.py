"""Figures of one experiment at one scale: training curves, what curvature and gradient did.

The line is the mean over seeds, the band reaches from the smallest to the largest seed. Where fewer
seeds have data than were run, the line is thin; a cross marks where a seed diverged. A thin line
with a ring at its end is a seed that is not over and in no mean. Files are deterministic: the same
runs give the same bytes, so that a committed figure changes only with them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from experiments.analysis.measuring.curvature import trace as curvature_trace
from experiments.analysis.measuring.curves import FEW_DECADES, Axis, Curve, Extent, curve, extent
from experiments.analysis.measuring.groups import Group, Results
from experiments.analysis.measuring.pl import pl_trace
from experiments.analysis.showing.palette import LINES, look_of
from experiments.runs.owned_folder import OwnedFolder

METRIC_LABELS = {"train_loss": "training loss", "test_top1": "test top-1 accuracy (%)"}
AXIS_LABELS: dict[Axis, str] = {
    "epoch": "epoch",
    "step": "step",
    "train_time_s": "training time (s)",
}
# Marks on a curve of any length: enough to tell optimizers apart, few enough to see the curve.
MARKS = 8
STYLE: dict[str, Any] = {
    "svg.hashsalt": "mlbfgs",  # the ids in the file are random otherwise
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
}


def write_figures(results: Results, out_dir: Path) -> tuple[Path, ...]:
    """Draw everything there is to draw about the runs of one scale.

    Figures of this scale that an earlier summary had and this one has not are removed.

    Args:
        results: the runs.
        out_dir: the folder of the summary.

    Returns:
        The files written, SVG and PNG.

    Raises:
        UserError: one of them would replace a file from elsewhere, or cannot be written.
    """
    files: dict[str, bytes] = {}
    with _style():
        for kind, recorded, draw in KINDS:
            for suffix, part in _parts(_having(results, recorded)).items():
                figure = draw(part)
                if figure is not None:
                    files.update(_rendered(figure, f"{kind}{suffix}-{results.scale}"))
    kinds = tuple(kind for kind, _, _ in KINDS)
    endings = (f"-{results.scale}.svg", f"-{results.scale}.png")

    def of_this_scale(name: str) -> bool:
        return name.startswith(kinds) and name.endswith(endings)

    return OwnedFolder(out_dir).replace(files, outdated=of_this_scale)


def training_figure(results: Results) -> Figure | None:
    """Training loss and test accuracy against epochs and seconds; None without any record."""
    axes_names: tuple[Axis, ...] = ("epoch", "train_time_s")
    groups = list(_having(results, "epochs").groups)
    if not groups:
        return None
    styles = _lines(groups)
    figure, grid = _new_figure(2, 2)
    for row, metric in enumerate(METRIC_LABELS):
        curves = {axis: [curve(group, metric, axis) for group in groups] for axis in axes_names}
        shown = extent(line for lines in curves.values() for line in lines)
        for column, axis in enumerate(axes_names):
            panel = grid[row][column]
            for line in curves[axis]:
                _draw(panel, line, styles[line.group], shown.ceiling if shown else math.inf)
            if shown is not None:
                _scale_y(panel, shown)
            panel.set_ylabel(METRIC_LABELS[metric])
            panel.set_xlabel(AXIS_LABELS[axis])
            panel.set_xlim(left=0)
            if axis == "epoch":
                panel.xaxis.set_major_locator(MaxNLocator(integer=True))
            if results.target is not None and results.target.metric == metric:
                panel.axhline(results.target.value, color="0.4", linewidth=0.9, linestyle=":")
    caption = "line: mean over seeds; band: smallest to largest seed; thin: fewer seeds; "
    caption += "×: a seed diverged\nagainst time, a finished seed keeps its last value"
    if results.target is not None:
        caption += f"; dotted: target {results.target}"
    if any(group.unfinished for group in groups):
        caption += "\n○: so far, of a seed that has not ended and counts nowhere"
    _finish(figure, _title(results, groups), caption, grid[0][0])
    return figure


def curvature_figure(results: Results) -> Figure | None:
    """μ before and after damping, gamma, cos(d, g) and ‖d‖/‖g‖; None without such records."""
    groups = [group for group in results.groups if any(run.curvature for run in group.ended)]
    if not groups:
        return None
    styles = _lines(groups)
    figure, grid = _new_figure(2, 2)
    panels = (
        (grid[0][0], "mu", "curvature ratio μ = sᵀy / sᵀs"),
        (grid[0][1], "gamma", "initial scale γ"),
        (grid[1][0], "cos_direction_gradient", "cos(d, g)"),
        (grid[1][1], "direction_over_gradient", "‖d‖ / ‖g‖"),
    )
    for panel, name, label in panels:
        for group in groups:
            _draw_trace(panel, group, name, styles[group])
        if not panel.lines:
            panel.set_axis_off()
            panel.text(0.5, 0.5, f"{label}: not recorded", ha="center", transform=panel.transAxes)
            continue
        panel.set_xlabel("step")
        panel.set_ylabel(label)
        if name != "cos_direction_gradient" and _spans_decades(panel):
            panel.set_yscale("log")
    for group in groups:
        steps, median, _, _ = curvature_trace(group.ended, "mu_damped")
        if steps.size:
            colour = look_of(group).colour
            grid[0][0].plot(steps, median, color=colour, linewidth=1.2, linestyle=(0, (1, 1.5)))
    # The cosine is shown from 0 on: how near to 1 it lies is the point of the panel.
    if grid[1][0].lines:
        grid[1][0].set_ylim(bottom=min(0.0, grid[1][0].get_ylim()[0]), top=1.03)
    caption = (
        "line: median over blocks and seeds; band: smallest to largest; dotted: μ after damping"
    )
    _finish(figure, _title(results, groups), caption, grid[0][0])
    return figure


def gradient_figure(results: Results) -> Figure | None:
    """‖∇L‖² and ‖∇L‖² / L of the training set (M Figure 7); None without such records."""
    groups = [group for group in results.groups if any(pl_trace(r).loss.size for r in group.ended)]
    if not groups:
        return None
    figure, grid = _new_figure(2, 2)
    panels = (
        (grid[0][0], "loss", "training loss L"),
        (grid[0][1], "squared_norm", "‖∇L‖²"),
        (grid[1][0], "ratio", "‖∇L‖² / L"),
    )
    styles = _lines(groups)
    for group in groups:
        appearance = look_of(group)
        look: dict[str, Any] = {"color": appearance.colour, "linestyle": styles[group]}
        look |= {"marker": appearance.marker, "markersize": 4.5}
        seeds = sum(bool(run.gradients) for run in group.ended)
        for number, run in enumerate(group.ended):
            points = pl_trace(run)
            label = _counted(group, seeds) if number == 0 else None
            every = max(1, math.ceil(points.loss.size / MARKS))
            for panel, name, _ in panels:
                line = getattr(points, name)
                panel.plot(points.epoch, line, markevery=every, label=label, **look)
            grid[1][1].plot(points.loss, points.squared_norm, markevery=every, **look)
    for panel, _, axis in panels:
        panel.set_xlabel("epoch")
        panel.set_ylabel(axis)
        panel.set_yscale("log")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    grid[1][1].set(xscale="log", yscale="log", xlabel="training loss L", ylabel="‖∇L‖²")
    _finish(figure, _title(results, groups), "one line a seed", grid[0][0])
    return figure


def _having(results: Results, recorded: str) -> Results:
    """The groups that have records of a kind, such as `curvature`; unfinished runs have epochs."""
    groups = (
        group
        for group in results.groups
        if any(getattr(run, recorded) for run in group.ended)
        or (recorded == "epochs" and group.unfinished)
    )
    return replace(results, groups=tuple(groups))


def _parts(results: Results) -> dict[str, Results]:
    """What each figure of a kind shows: all contestants, or those that the configs name for it."""
    parts = {
        f"-{name}": replace(
            results, groups=tuple(g for g in results.groups if g.contestant in shown)
        )
        for name, shown in results.figures().items()
    }
    return parts or {"": results}


# What is drawn, from which records of a run, and how.
KINDS = (
    ("curves", "epochs", training_figure),
    ("curvature", "curvature", curvature_figure),
    ("gradient", "gradients", gradient_figure),
)


@contextmanager
def _style() -> Iterator[None]:
    with matplotlib.rc_context(STYLE):
        yield


def _new_figure(rows: int, columns: int) -> tuple[Figure, Any]:
    # Without pyplot: no global state, no window system, nothing to close.
    figure = Figure(figsize=(8.6, 6.8), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def _lines(groups: Sequence[Group]) -> dict[Group, Any]:
    """The line style of each group: its number among the configs of its contestant."""
    seen: dict[str, int] = {}
    styles = {}
    for group in groups:
        position = seen.get(group.contestant, 0)
        styles[group] = LINES[position % len(LINES)]
        seen[group.contestant] = position + 1
    return styles


def _counted(group: Group, drawn: int) -> str:
    """A group's name in a legend: of how many seeds its line is, and of how many it is not."""
    of = "" if drawn == len(group.ended) else f" of {len(group.ended)}"
    return f"{group.label} (n = {drawn}{of})"


def _draw(panel: Axes, line: Curve, style: Any, ceiling: float) -> None:
    appearance = look_of(line.group)
    for x, y in line.ends:
        cross: dict[str, Any] = {"marker": "x", "markersize": 9, "markeredgewidth": 2}
        panel.plot(x, min(y, ceiling), color=appearance.colour, clip_on=False, zorder=3, **cross)
    for number, trace in enumerate(line.unfinished):
        alone = number == 0 and not line.x.size
        thin: dict[str, Any] = {"color": appearance.colour, "linewidth": 0.8, "linestyle": style}
        thin |= {"label": _counted(line.group, 0)} if alone else {}
        panel.plot(trace.x, np.minimum(trace.y, ceiling), **thin)
        ring: dict[str, Any] = {"marker": "o", "markersize": 7, "markerfacecolor": "none"}
        end = (trace.x[-1], min(trace.y[-1], ceiling))
        panel.plot(*end, color=appearance.colour, clip_on=False, zorder=3, **ring)
    if not line.x.size:
        return
    panel.fill_between(
        line.x, line.low, line.high, color=appearance.colour, alpha=0.18, linewidth=0
    )
    fewer = line.n < len(line.group.ended)
    common: dict[str, Any] = {
        "color": appearance.colour,
        "marker": appearance.marker,
        "markersize": 4.5,
        "markevery": max(1, math.ceil(line.x.size / MARKS)),
        "linestyle": style,
    }
    full = np.where(fewer, np.nan, line.mean)
    panel.plot(line.x, full, label=_counted(line.group, line.n.max()), **common)
    if fewer.any():
        # One point further to the left, so that the thin line begins where the thick one ends.
        rest = np.where(fewer | np.append(fewer[1:], False), line.mean, np.nan)
        panel.plot(line.x, rest, **{**common, "linewidth": 0.8, "markersize": 3.0})


def _draw_trace(panel: Axes, group: Group, name: str, style: Any) -> None:
    steps, median, low, high = curvature_trace(group.ended, name)
    if not steps.size:
        return
    appearance = look_of(group)
    seeds = sum(bool(run.curvature) for run in group.ended)
    panel.fill_between(steps, low, high, color=appearance.colour, alpha=0.18, linewidth=0)
    panel.plot(
        steps,
        median,
        color=appearance.colour,
        marker=appearance.marker,
        markersize=4.5,
        markevery=max(1, math.ceil(steps.size / MARKS)),
        linestyle=style,
        label=_counted(group, seeds),
    )


def _scale_y(panel: Axes, shown: Extent) -> None:
    if shown.logarithmic:
        panel.set_yscale("log")
    if shown.explodes:  # matplotlib chose the lower limit by what is no longer shown
        room = 0.05 * (shown.high - shown.low)
        panel.set_ylim(shown.low / 1.3 if shown.logarithmic else shown.low - room, shown.ceiling)


def _spans_decades(panel: Axes) -> bool:
    values = np.concatenate(
        [np.asarray(line.get_ydata(), dtype=float) for line in panel.lines] or [np.empty(0)]
    )
    values = values[np.isfinite(values)]
    return bool(values.size and values.min() > 0 and values.max() > 30 * values.min())


def _title(results: Results, groups: Sequence[Group]) -> str:
    counts = sorted({len(group.ended) for group in groups})
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    unit = "seed" if n == "1" else "seeds"
    return f"{results.experiment}, {results.scale} scale, n = {n} {unit}"


class _PlainNumbers(LogFormatter):
    """0.2 where matplotlib writes 2e−01; which ticks have a label is left to it."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _label_log_axes(figure: Figure) -> None:
    """Of an axis that spans few decades also what lies between the powers of ten, in plain numbers.

    Matplotlib's own labels are the powers alone, on such an axis one or none.
    """
    for panel in figure.axes:
        for axis in (panel.xaxis, panel.yaxis):
            low, high = axis.get_view_interval()
            if axis.get_scale() == "log" and high < 10**FEW_DECADES * low:
                axis.set_major_formatter(_PlainNumbers())
                axis.set_minor_formatter(_PlainNumbers(minor_thresholds=(FEW_DECADES, 0.4)))


def _finish(figure: Figure, title: str, caption: str, panel: Axes) -> None:
    _label_log_axes(figure)
    figure.suptitle(title, fontsize=11)
    handles, labels = panel.get_legend_handles_labels()
    columns = max(1, min(len(handles), 4 if max(map(len, labels), default=0) < 24 else 2))
    if handles:
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=columns,
            title=caption,
            title_fontsize=8,
            alignment="center",
        ).get_title().set_multialignment("center")


def _rendered(figure: Figure, stem: str) -> dict[str, bytes]:
    """A figure as SVG and PNG, by the names of the files."""
    svg, png = io.BytesIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    figure.savefig(png, format="png", dpi=140, metadata={"Software": None})
    return {f"{stem}.svg": svg.getvalue(), f"{stem}.png": png.getvalue()}
