"""Figures of the claims that need no training, drawn from the series of the findings.

PNG alone, deterministic, in the project's colours. A missing subject leaves its figure out.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.analysis.judging.theory import Subject
from experiments.analysis.showing.figures import STYLE
from experiments.analysis.showing.palette import LINES, LOOKS, Look

METHODS = {
    "sgd": ("SGD", LOOKS["sgd"]),
    "newton": ("exact Newton", LOOKS["adamw"]),
    "naive": ("naive L-BFGS", LOOKS["kfac"]),
    "momentum": ("L-BFGS with momentum", LOOKS["mlbfgs"]),
}
#: Factors drawn in one panel at most; what lies beyond stands at the border.
CEILING = 1e12


def figures_of(subjects: Mapping[str, Subject]) -> dict[str, bytes]:
    """Draw every figure whose subject is there.

    Args:
        subjects: what was found.

    Returns:
        The content of the files by their names.
    """
    figures: dict[str, tuple[str, Callable[[Subject], Figure]]] = {
        "figure1": ("quadratic", figure1),
        "floor": ("lemmas", floor),
        "bounds": ("hessian_bounds", bounds),
        "rate": ("linear_rate", rate),
    }
    files = {}
    with matplotlib.rc_context(STYLE):
        for stem, (name, draw) in figures.items():
            if name in subjects:
                content = io.BytesIO()
                figure = draw(subjects[name])
                figure.savefig(content, format="png", dpi=110, metadata={"Software": None})
                files[f"{stem}.png"] = content.getvalue()
    return files


def figure1(subject: Subject) -> Figure:
    """Trajectories as the papers draw them, and the loss of all seeds."""
    figure, (left, right) = _new()
    grid = np.linspace(-5, 5, 101)
    x, y = np.meshgrid(grid, np.linspace(-1.5, 5, 66))
    left.contour(x, y, 0.5 * (x**2 + y**2), levels=range(1, 13), colors="0.8", linewidths=0.7)
    for method, (label, appearance) in METHODS.items():
        path = np.array(subject.series["paths"][method])[:40]
        style = LINES[1] if method == "newton" else "-"  # newton lies on sgd
        left.plot(*path.T, label=label, **_line(appearance, len(path)), linestyle=style)
    left.plot(0, 0, marker="*", color="black", markersize=11, linestyle="none", label="optimum")
    left.set(xlim=(-5, 5), ylim=(-1.5, 5), xlabel="θ₁", ylabel="θ₂", title="one seed, 40 steps")
    for method, (label, appearance) in METHODS.items():
        band = {k: np.array(v, float) for k, v in subject.series["losses"][method].items()}
        steps = np.arange(len(band["middle"]))
        low, high = (np.minimum(band[key], CEILING) for key in ("low", "high"))
        right.fill_between(steps, low, high, color=appearance.colour, alpha=0.15, linewidth=0)
        style = LINES[1] if method == "newton" else "-"
        line = _line(appearance, len(steps))
        right.plot(steps, band["middle"], label=label, linestyle=style, **line)
    goal = subject.settings["tolerance"] * subject.series["losses"]["sgd"]["middle"][0]
    right.axhline(goal, color="0.4", linewidth=0.9, linestyle=":")
    right.set(yscale="log", ylim=(1e-4, 1e4), xlabel="step", ylabel="loss without noise")
    seeds = subject.settings["seeds"]
    right.set_title(f"{seeds} seeds: median, 10 to 90 %; dotted: the goal")
    _legend(figure, left, 5)
    return figure


def bounds(subject: Subject) -> Figure:
    """Worst eigenvalues over the stated bounds, by M and class of pairs."""
    figure, panels = _new()
    looks = {
        "damped": ("the damping bound", LOOKS["mlbfgs"]),
        "secant": ("ŷ = B_k s, the proof's premise", LOOKS["sgd"]),
        "quadratic": ("one B: exact quadratic", LOOKS["slimqn"]),
    }
    series = subject.series["search"]
    for panel, side in zip(panels, ("lower", "upper"), strict=True):
        for kind, (label, appearance) in looks.items():
            values = np.minimum(np.array(series[f"{kind}, {side}"], float), CEILING)
            m = np.arange(1, len(values) + 1)
            panel.plot(m, values, label=label, **_line(appearance, len(m), every=1))
        outside = (1e-6, 1.0) if side == "lower" else (1.0, CEILING * 10)
        panel.axhspan(*outside, color="0.92", zorder=0)
        panel.axhline(1.0, color="0.3", linewidth=0.9)
        panel.set(yscale="log", xlabel="M", ylim=(1e-6, 10) if side == "lower" else (1e-2, 10**13))
        panel.set_xticks([1, 5, 10, 15, 20])
    panels[0].set_ylabel("smallest eigenvalue / (1/σ_H)")
    panels[1].set_ylabel("largest eigenvalue / ((M+1)/σ_L)")
    for panel in panels:
        panel.set_title("grey: outside the stated bound" + _capped(panel))
    _legend(figure, panels[0], 3)
    return figure


def rate(subject: Subject) -> Figure:
    """The loss of mL-BFGS on least squares, with and without an exact fit."""
    figure, panels = _new()
    titles = {"interpolated": "targets that a θ fits", "label_noise": "targets with noise"}
    for panel, (name, title) in zip(panels, titles.items(), strict=True):
        for losses in subject.series[name]:
            values = np.minimum(np.array(losses, float), CEILING)
            panel.plot(values / values[0], color=LOOKS["mlbfgs"].colour, linewidth=0.9, alpha=0.7)
        panel.set(yscale="log", ylim=(1e-6, 1e6), xlabel="step", ylabel="loss / first loss")
        panel.set_title(f"η = 0.05, {title}: {len(subject.series[name])} seeds")
        panel.axhline(1.0, color="0.4", linewidth=0.9, linestyle=":")
    return figure


def floor(subject: Subject) -> Figure:
    """L-BFGS with selected pairs, and the floor of M Theorem 1."""
    figure, (panel,) = _new(1)
    height = float(subject.settings["theorem1"]["floor"])
    for losses in subject.series["theorem1"]:
        panel.plot(losses, color=LOOKS["mlbfgs"].colour, linewidth=0.9, alpha=0.7)
    panel.axhline(height, color="black", linewidth=1.2, linestyle=LINES[1])
    panel.text(len(losses), height * 1.15, "floor of M Theorem 1", ha="right", va="bottom")
    panel.set(yscale="log", xlabel="iteration", ylabel="loss without noise")
    panel.set_title(f"L-BFGS with selected pairs, {len(subject.series['theorem1'])} seeds")
    return figure


def _new(panels: int = 2) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(4.6 * panels, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _line(appearance: Look, count: int, every: int | None = None) -> dict[str, Any]:
    return {
        "color": appearance.colour,
        "marker": appearance.marker,
        "markersize": 4,
        "markevery": every or max(1, count // 8),
        "linewidth": 1.3,
    }


def _capped(panel: Axes) -> str:
    highest = max(float(np.max(np.asarray(line.get_ydata(), float))) for line in panel.lines)
    return f"; cut at {CEILING:g}" if highest >= CEILING else ""


def _legend(figure: Figure, panel: Axes, columns: int) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
