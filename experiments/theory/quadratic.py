"""Figure 1 of both papers: a noisy quadratic in the plane.

The papers minimise L(θ) = ½‖θ‖² with gradients θ + n, n ~ N(0, σ²) for each number, by SGD, exact
Newton, L-BFGS on plain differences ("naive", "vanilla") and L-BFGS on averages (β = 0.9). M prints
σ = 0.2. Neither prints the start, the learning rate, T, M or the number of steps; here they are the
papers' own values elsewhere (η = 0.1, M = 10), pairs from consecutive iterates (T = 1) as S's
Table 1 has them, and a start read off S's figure. A run reaches the goal at the first step t with
L(θ_t) <= 1 % of L(θ_0), L without noise; a goal never reached counts as infinite.

All four see the same noise at the same seed and step. L-BFGS is `mlbfgs.MLBFGS` itself. ½‖θ‖² has
the Hessian I, so exact Newton is SGD; a second quadratic, B = diag(1, 0.1), tells them apart.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.analysis.measuring.comparison import compare
from experiments.analysis.measuring.statistics import median_interval
from experiments.theory.findings import Findings, compared, exact, share
from mlbfgs import MLBFGS

METHODS = ("sgd", "newton", "naive", "momentum")
DAMPED = ("naive_damped", "momentum_damped")


@dataclass(frozen=True)
class Setting:
    """What a run is made of.

    Attributes:
        diagonal: of the Hessian B; L(θ) = ½ θᵀBθ.
        start: θ_0.
        sigma: standard deviation of the noise in each number of the gradient.
        lr: learning rate η.
        beta: of both averages of L-BFGS with momentum.
        interval: T.
        history_size: M.
        steps: iterations.
        tolerance: the goal, as a share of L(θ_0).
    """

    diagonal: tuple[float, ...] = (1.0, 1.0)
    start: tuple[float, ...] = (-4.0, 3.0)
    sigma: float = 0.2
    lr: float = 0.1
    beta: float = 0.9
    interval: int = 1
    history_size: int = 10
    steps: int = 120
    tolerance: float = 0.01


def trajectory(method: str, setting: Setting, seed: int) -> Tensor:
    """Run one method.

    Args:
        method: one of `METHODS` or `DAMPED`.
        setting: the problem.
        seed: of the noise, which depends on nothing else.

    Returns:
        (steps + 1, n) float64, θ_0 first.
    """
    generator = torch.Generator().manual_seed(seed)
    n = len(setting.start)
    noise = setting.sigma * torch.randn(setting.steps, n, generator=generator, dtype=torch.float64)
    b = torch.tensor(setting.diagonal, dtype=torch.float64)
    theta = nn.Parameter(torch.tensor(setting.start, dtype=torch.float64))
    optimizer = _optimizer(method, theta, setting)
    path = [theta.detach().clone()]
    for t in range(setting.steps):
        g = b * theta.detach() + noise[t]
        theta.grad = g / b if method == "newton" else g
        optimizer.step()
        path.append(theta.detach().clone())
    return torch.stack(path)


def losses(path: Tensor, setting: Setting) -> Tensor:
    """L without noise along a path: (steps + 1,) float64."""
    b = torch.tensor(setting.diagonal, dtype=torch.float64)
    return 0.5 * (b * path.square()).sum(dim=1)


def steps_to_goal(loss: Tensor, tolerance: float) -> float:
    """First step with L <= tolerance · L(θ_0); infinite if there is none."""
    hits = torch.nonzero(loss <= tolerance * loss[0])
    return float(hits[0]) if len(hits) else math.inf


def run(seeds: int = 100, grid_seeds: int = 20) -> Findings:
    """Settle S-F1 and M-F1.

    Args:
        seeds: runs of each method at the main setting.
        grid_seeds: runs of each method at every other learning rate and T.
    """
    logging.getLogger("mlbfgs").setLevel(logging.ERROR)  # runs that blow up refuse many pairs
    setting = Setting()
    found = Findings("quadratic", settings={**vars(setting), "seeds": seeds})
    methods = (*METHODS, *DAMPED)
    loss = {m: [losses(trajectory(m, setting, s), setting) for s in range(seeds)] for m in methods}
    goals = {m: [steps_to_goal(entry, setting.tolerance) for entry in loss[m]] for m in methods}
    _compare(found, goals)
    _stability(found, loss, setting)
    _identity(found, setting, seeds=min(seeds, 10))
    _summary(found, goals, loss)
    _grid(found, setting, grid_seeds)
    found.series["paths"] = {
        m: [[float(f"{v:.5g}") for v in point] for point in trajectory(m, setting, 0).tolist()]
        for m in METHODS
    }
    found.series["losses"] = {m: _bands(loss[m]) for m in METHODS}
    found.series["goals"] = {m: goals[m] for m in METHODS}
    return found


def _optimizer(method: str, theta: nn.Parameter, setting: Setting) -> torch.optim.Optimizer:
    if method in ("sgd", "newton"):
        return torch.optim.SGD([theta], lr=setting.lr)
    damped = method.endswith("_damped")
    return MLBFGS(
        [theta],
        lr=setting.lr,
        momentum=0.0,
        variant="paper",
        betas=setting.beta if method.startswith("momentum") else 0.0,
        history_size=setting.history_size,
        update_interval=setting.interval,
        damping=0.99 if damped else 1.0,
        curvature_bounds=(0.01, 1.5) if damped else None,
    )


def _compare(found: Findings, goals: dict[str, list[float]]) -> None:
    """Ratios of steps to the goal, paired by seed."""
    by_seed = {m: dict(enumerate(values)) for m, values in goals.items()}
    pairs = {
        "momentum_over_newton": ("momentum", "newton", "L-BFGS with momentum over exact Newton"),
        "sgd_over_momentum": ("sgd", "momentum", "SGD over L-BFGS with momentum"),
    }
    for name, (top, bottom, words) in pairs.items():
        ratio = compare(by_seed[top], by_seed[bottom], logarithmic=True)
        found.add(name, compared(ratio, f"steps to the goal, {words}"))
    n = len(goals["naive"])
    slower = sum(a > b for a, b in zip(goals["naive"], goals["momentum"], strict=True))
    found.add(
        "naive_slower",
        share(slower, n, "share of seeds in which naive L-BFGS needs more steps to the goal"),
    )
    missed = sum(math.isinf(value) for value in goals["naive"])
    found.add("naive_missed", share(missed, n, "share of seeds in which naive L-BFGS misses it"))


def _stability(found: Findings, loss: dict[str, list[Tensor]], setting: Setting) -> None:
    for method, entries in loss.items():
        if method in ("sgd", "newton"):
            continue
        lost = sum(float(entry[1:].max()) > float(entry[0]) for entry in entries)
        words = f"share of seeds in which {method} is above its starting loss at some step"
        found.add(f"{method}_lost", share(lost, len(entries), f"{words} of {setting.steps}"))


def _identity(found: Findings, setting: Setting, seeds: int) -> None:
    gap = max(
        float((trajectory("sgd", setting, s) - trajectory("newton", setting, s)).abs().max())
        for s in range(seeds)
    )
    words = "largest distance between the iterates of exact Newton and SGD at one learning rate"
    found.add("newton_minus_sgd", exact(gap, words, n=seeds))
    found.notes.append(
        "½‖θ‖² has the Hessian I: exact Newton and SGD are the same iteration at the same learning "
        "rate, so nothing can be as fast as the one and faster than the other."
    )


def _summary(found: Findings, goals: dict[str, list[float]], loss: dict[str, list[Tensor]]) -> None:
    rows = []
    for method, values in goals.items():
        middle, bounds = median_interval(values)
        missed = sum(math.isinf(value) for value in values)
        final = sorted(float(entry[-1]) for entry in loss[method])[len(values) // 2]
        spread = f"[{_steps(bounds.low)}, {_steps(bounds.high)}]"
        rows.append([method, f"{_steps(middle)} {spread}", f"{missed}/{len(values)}", final])
    columns = ("method", "steps to the goal, median [95 %]", "missed", "median of the last loss")
    found.table("Steps to 1 % of the starting loss on ½‖θ‖²", columns, rows)


def _grid(found: Findings, setting: Setting, seeds: int) -> None:
    """The choices that the papers do not print: learning rate and T, on both quadratics."""
    rows = []
    for diagonal in (setting.diagonal, (1.0, 0.1)):
        for lr in (0.05, 0.1, 0.2):
            for interval in (1, 5):
                here = Setting(diagonal=diagonal, lr=lr, interval=interval)
                cells = []
                for method in METHODS:
                    paths = (losses(trajectory(method, here, s), here) for s in range(seeds))
                    values = [steps_to_goal(entry, here.tolerance) for entry in paths]
                    cells.append(_median_with_misses(values))
                shape = "½‖θ‖²" if diagonal == (1.0, 1.0) else "diag(1, 0.1)"
                rows.append([shape, lr, interval, *cells])
    columns = ("Hessian", "η", "T", *METHODS)
    title = f"Median steps to the goal under other choices ({seeds} seeds; misses counted)"
    found.table(title, columns, rows)


def _median_with_misses(values: Sequence[float]) -> str:
    middle, _ = median_interval(values)
    missed = sum(math.isinf(value) for value in values)
    return _steps(middle) + (f" ({missed} missed)" if missed else "")


def _bands(entries: Sequence[Tensor]) -> dict[str, list[float]]:
    """Quantiles of the loss over seeds at every step."""
    stacked = torch.stack(list(entries))
    levels = {"low": 0.1, "middle": 0.5, "high": 0.9}
    return {
        name: [float(f"{v:.4g}") for v in torch.quantile(stacked, q, dim=0).tolist()]
        for name, q in levels.items()
    }


def _steps(value: float) -> str:
    return "never" if math.isinf(value) else f"{value:g}"
