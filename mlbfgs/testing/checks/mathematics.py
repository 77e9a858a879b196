"""Whether the optimizer finds minima that are known."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

from mlbfgs.testing.outcome import expect
from mlbfgs.testing.problems import normal
from mlbfgs.testing.registry import Registry
from mlbfgs.testing.subject import Subject

CHECKS = Registry()

#: Tried one after the other; None is the optimizer's own default or the subject's setting.
RATES = (0.1, 0.01, 0.002, 0.001, None)


def _reach(
    subject: Subject,
    objective: Callable[[Tensor], Tensor],
    first: Tensor,
    minimum: float,
    *,
    tolerance: float,
    steps: int,
) -> None:
    """Some learning rate brings f - min f below `tolerance` times its first value."""
    best: dict[str, float] = {}
    started = float(objective(first)) - minimum
    for rate in RATES:
        x = Parameter(first.clone())
        settings = {} if rate is None else {"lr": rate}
        if subject.has("weight_decay"):
            settings["weight_decay"] = 0.0
        optimizer = subject.make([x], **settings)
        gap = started
        for _ in range(steps):
            optimizer.zero_grad()
            loss = objective(x)
            gap = min(gap, loss.item() - minimum)
            if gap <= tolerance * started or not torch.isfinite(loss):
                break
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if gap <= tolerance * started:
            return
        best["default lr" if rate is None else f"lr {rate}"] = gap / started
    found = ", ".join(f"{k}: {v:.2g}" for k, v in best.items())
    expect(False, f"f - min f over its first value after {steps} steps: {found}")


@CHECKS.check("Mathematics")
def ill_conditioned_quadratic(subject: Subject) -> None:
    """Reaches the minimum of a quadratic with condition number 100."""
    h = torch.logspace(-2, 0, 20, dtype=torch.float64)
    first = torch.ones(20, dtype=torch.float64)
    _reach(subject, lambda x: 0.5 * (h * x * x).sum(), first, 0.0, tolerance=1e-4, steps=3000)


@CHECKS.check("Mathematics")
def rosenbrock(subject: Subject) -> None:
    """Goes down Rosenbrock's valley."""

    def f(x: Tensor) -> Tensor:
        return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2

    first = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    _reach(subject, f, first, 0.0, tolerance=1e-3, steps=4000)


@CHECKS.check("Mathematics")
def logistic_regression(subject: Subject) -> None:
    """Reaches the minimum of a regularised logistic regression."""
    generator = torch.Generator().manual_seed(0)
    inputs = normal((60, 5), generator, torch.float64)
    noise = normal((60,), generator, torch.float64)
    labels = (inputs @ torch.linspace(-2, 2, 5, dtype=torch.float64) + noise > 0).double()

    def f(w: Tensor) -> Tensor:
        logits = inputs @ w
        losses = torch.nn.functional.softplus(logits) - labels * logits
        return losses.mean() + 0.01 * (w * w).sum()

    first = torch.zeros(5, dtype=torch.float64)
    minimum = _newton(f, first)
    _reach(subject, f, first, minimum, tolerance=1e-4, steps=3000)


def _newton(f: Callable[[Tensor], Tensor], x: Tensor, steps: Iterable[int] = range(20)) -> float:
    """The minimum of a smooth convex function of few variables."""
    for _ in steps:
        gradient = torch.func.grad(f)(x)
        x = x - torch.linalg.solve(torch.func.hessian(f)(x), gradient)
    return float(f(x))
