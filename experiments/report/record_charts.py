"""The drawings of what is recorded along a run: the curvature, and the gradient of all images.

Steps of every group's curvature records are drawn as median and range over Hessian blocks and
seeds. Of the gradient of the whole training set there are few records, so every seed is a line.
"""

from __future__ import annotations

from experiments.analysis.measuring.curvature import Trace, trace
from experiments.analysis.measuring.groups import Group, Results
from experiments.analysis.measuring.pl import PlTrace, pl_trace
from experiments.analysis.showing.palette import look_of
from experiments.report import charts, svg
from experiments.report.charts import Panel
from experiments.report.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Scale

CURVATURE = {
    "mu": "curvature ratio μ (dashed: damped)",
    "gamma": "initial scale γ",
    "cos_direction_gradient": "cos(d, g)",
    "direction_over_gradient": "length ‖d‖ / ‖g‖",
}
GRADIENT = {
    "loss": "training loss L of all images",
    "squared_norm": "squared gradient norm ‖∇L‖²",
    "ratio": "‖∇L‖² / L",
}
DECADES = 30.0  # a quantity that spans more is drawn on a logarithmic axis


def curvature_panels(results: Results, name: str) -> list[Panel]:
    """The curvature records against steps: median over blocks and seeds, smallest to largest.

    A quantity that no run recorded has no panel.
    """
    panels = []
    for field in CURVATURE:
        traces = {group: trace(group.ended, field) for group in results.groups}
        if any(steps.size for steps, *_ in traces.values()):
            panels.append(_curvature_panel(results, traces, field, name))
    return panels


def gradient_panels(results: Results, name: str) -> list[Panel]:
    """L, ‖∇L‖² and their ratio of the whole training set against epochs (M Figure 7).

    Args:
        results: the runs of one scale.
        name: prefix of the ids, unique on the page.

    Returns:
        Nothing without gradient records.
    """
    traces = {
        group: found
        for group in results.groups
        if (found := {run.seed: pl_trace(run) for run in group.ended if pl_trace(run).loss.size})
    }
    return [_gradient_panel(results, traces, field, name) for field in GRADIENT] if traces else []


def _gradient_panel(
    results: Results, traces: dict[Group, dict[int, PlTrace]], field: str, name: str
) -> Panel:
    drawn = [points for by_seed in traces.values() for points in by_seed.values()]
    epochs = [float(v) for points in drawn for v in points.epoch]
    values = [float(v) for points in drawn for v in getattr(points, field)]
    logarithmic = min(values) > 0
    x = svg.scale_for(epochs, LEFT, WIDTH - RIGHT, from_zero=True)
    y = svg.scale_for(values, HEIGHT - BOTTOM, TOP, logarithmic=logarithmic)
    patterns, body, words = charts.dashes(results.groups), [], []
    for group, by_seed in traces.items():
        shape = ""
        for seed, points in by_seed.items():
            line = getattr(points, field)
            dash = svg.dash_attribute(patterns[group])
            shape += svg.polyline(charts.points_of(x, y, points.epoch, line), "line", dash)
            for i in charts.marked(line.size):
                said = f"{group.label}, seed {seed}: {charts.short(line[i])} after "
                said += f"{points.epoch[i]:.6g} epochs"
                at = (x(points.epoch[i]), y(line[i]))
                shape += svg.marker(look_of(group).marker, *at, said)
            ends = f"{charts.short(line[0])} to {charts.short(line[-1])}"
            words.append(f"{group.label}, seed {seed}, from {ends}")
        body.append(charts.group_shape(results.groups.index(group), group, shape))
    title = f"{GRADIENT[field]}{', log' if logarithmic else ''}"
    alt = f"{GRADIENT[field]} against epochs. {'; '.join(words)}."
    frame = svg.frame(x, y, title=title, x_label="epochs")
    return Panel("epoch", field, svg.panel(f"{name}-{field}", alt, frame, "".join(body)))


def _curvature_panel(results: Results, traces: dict[Group, Trace], field: str, name: str) -> Panel:
    found = [entry for entry in traces.values() if entry[0].size]
    values = [float(v) for _, _, low, high in found for v in (*low, *high)]
    damped = {}
    if field == "mu":
        damped = {group: trace(group.ended, "mu_damped") for group in results.groups}
        values += [float(v) for _, median, _, _ in damped.values() for v in median]
    x = svg.scale_for([float(v) for s, *_ in found for v in s], LEFT, WIDTH - RIGHT, from_zero=True)
    cosine = field == "cos_direction_gradient"
    positive = [v for v in values if v > 0]
    logarithmic = (
        not cosine and len(positive) == len(values) and max(values) > DECADES * min(values)
    )
    if cosine:  # how near to 1 it lies is the point
        values += [0.0, 1.0]
    y = svg.scale_for(values, HEIGHT - BOTTOM, TOP, logarithmic=logarithmic)
    patterns = charts.dashes(results.groups)
    body = []
    for place, group in enumerate(results.groups):
        steps, median, low, high = traces[group]
        if not steps.size:
            continue
        shape = _seed_traces(group, field, x, y)
        shape += svg.area(charts.points_of(x, y, steps, high), charts.points_of(x, y, steps, low))
        dash = svg.dash_attribute(patterns[group])
        shape += svg.polyline(charts.points_of(x, y, steps, median), "line", dash)
        if field == "mu":
            steps_damped, median_damped, _, _ = damped[group]
            points = charts.points_of(x, y, steps_damped, median_damped)
            shape += svg.polyline(points, "line thin", svg.dash_attribute("3 3"))
        for i in charts.marked(steps.size):
            spread = f"[{charts.short(low[i])}, {charts.short(high[i])}]"
            told = f"{group.label}: {charts.short(median[i])} {spread} at {steps[i]:.0f} steps"
            at = (x(steps[i]), y(median[i]))
            shape += svg.marker(look_of(group).marker, *at, told)
        body.append(charts.group_shape(place, group, shape))
    title = f"{CURVATURE[field]}{', log' if logarithmic else ''}"
    words = "; ".join(
        f"{group.label} from {charts.short(median[0])} to {charts.short(median[-1])}"
        for group, (steps, median, _, _) in traces.items()
        if steps.size
    )
    alt = f"{CURVATURE[field]} against steps, medians. {words}."
    frame = svg.frame(x, y, title=title, x_label="steps")
    return Panel("step", field, svg.panel(f"{name}-{field}", alt, frame, "".join(body)))


def _seed_traces(group: Group, field: str, x: Scale, y: Scale) -> str:
    lines = []
    for run in group.ended:
        steps, median, _, _ = trace([run], field)
        title = f"<title>seed {run.seed}</title>"
        line = svg.polyline(charts.points_of(x, y, steps, median), "seed")
        lines.append(line.replace("/>", f">{title}</path>"))
    return "".join(lines)
