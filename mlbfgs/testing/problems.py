"""The small problems that the checks train on; every number is a function of a seed."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from mlbfgs.testing.subject import Subject

SHAPES: tuple[tuple[int, ...], ...] = ((4, 3), (5,), (2, 2, 3))


def make_params(
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    seed: int = 0,
) -> list[Parameter]:
    """Normally distributed parameters: the same numbers in every dtype, up to rounding.

    Args:
        shapes: of the parameters.
        dtype: of the parameters.
        device: of the parameters; None is torch's default device.
        seed: of the numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    values = [normal(s, generator, torch.float64) for s in shapes]
    return [Parameter(v.to(device=device or v.device, dtype=dtype)) for v in values]


def normal(
    shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Normally distributed numbers, the same on every device; on torch's default device."""
    values = torch.randn(shape, generator=generator, dtype=dtype, device="cpu")
    return values.to(torch.get_default_device())


class NoisyQuadratic:
    """f(x) = 1/2 Σ h_i (x_i - t_i)² with h from 0.1 to 2, and gradients with noise.

    The noise is a function of the step's number, so the trajectory of an optimizer depends on
    nothing but parameters, state and that number.

    Attributes:
        params: what is optimized.
        targets: the minimum.
        curvatures: h.
    """

    def __init__(self, params: Sequence[Tensor], *, noise: float = 0.02, seed: int = 0):
        self.params = list(params)
        self.noise, self.seed = noise, seed
        generator = torch.Generator().manual_seed(seed + 1)
        self.targets, self.curvatures = [], []
        for p in params:
            precise = torch.float64 if p.dtype == torch.float64 else torch.float32
            precise_on_cpu: Any = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
            target = torch.randn(p.shape, **precise_on_cpu)
            exponent = torch.rand(p.shape, **precise_on_cpu)
            self.targets.append(target.to(p.device, precise))
            self.curvatures.append((0.1 * 20**exponent).to(p.device, precise))

    def gradients(self, step: int) -> list[Tensor]:
        """The gradients at the current parameters with the noise of a step, in their dtypes."""
        generator = torch.Generator().manual_seed(1_000_003 * (self.seed + 1) + step)
        found = []
        for p, t, h in zip(self.params, self.targets, self.curvatures, strict=True):
            noise = normal(p.shape, generator).to(p.device, t.dtype)
            found.append((h * (p.detach().to(t.dtype) - t) + self.noise * noise).to(p.dtype))
        return found

    def set_gradients(self, step: int, without: Collection[int] = ()) -> None:
        """Write the gradients into `.grad`, None for the parameters with these numbers."""
        for i, (p, g) in enumerate(zip(self.params, self.gradients(step), strict=True)):
            p.grad = None if i in without else g

    def loss(self) -> float:
        """f(x), without noise, in float64."""
        terms = zip(self.params, self.targets, self.curvatures, strict=True)
        return sum(
            float((0.5 * h.double() * (p.detach().double() - t.double()) ** 2).sum())
            for p, t, h in terms
        )


@dataclass
class Run:
    """A noisy quadratic, an optimizer on it, and the number of the next step."""

    problem: NoisyQuadratic
    optimizer: Optimizer
    step: int = 0

    @property
    def params(self) -> list[Tensor]:
        """The parameters, in the problem's order."""
        return self.problem.params

    def advance(self, steps: int = 1, without: Collection[int] = ()) -> None:
        """Take steps; parameters with these numbers get no gradient."""
        for _ in range(steps):
            self.problem.set_gradients(self.step, without)
            self.optimizer.step()
            self.step += 1

    def values(self) -> list[Tensor]:
        """Copies of the parameters."""
        return [p.detach().clone() for p in self.params]


def start(
    subject: Subject, params: Sequence[Tensor] | None = None, *, seed: int = 0, **overrides: Any
) -> Run:
    """A run at step 0, with a little weight decay where the optimizer knows it.

    Args:
        subject: the optimizer.
        params: what to optimize; None is three parameters of different shapes.
        seed: of parameters, targets and noise.
        **overrides: settings of the optimizer.

    Returns:
        The run.
    """
    params = make_params(seed=seed) if params is None else params
    return Run(NoisyQuadratic(params, seed=seed), subject.make(params, **decay(subject, overrides)))


def decay(subject: Subject, overrides: dict[str, Any]) -> dict[str, Any]:
    """The overrides with a little weight decay added, unless somebody chose one."""
    chosen = "weight_decay" in overrides or "weight_decay" in subject.kwargs
    return (
        overrides
        if chosen or not subject.has("weight_decay")
        else {
            "weight_decay": 0.01,
            **overrides,
        }
    )


def continued(run: Run, subject: Subject, state_dict: dict[str, Any], **overrides: Any) -> Run:
    """What a resume has: copies of the parameters, a fresh optimizer, a loaded state."""
    params = [Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in run.params]
    fresh = subject.make(params, **decay(subject, overrides))
    fresh.load_state_dict(state_dict)
    return Run(NoisyQuadratic(params, seed=run.problem.seed), fresh, run.step)


def through_file(value: Any, **load_options: Any) -> Any:
    """Save with `torch.save`, load with `weights_only=True`."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True, **load_options)


def small_network(seed: int = 0) -> nn.Module:
    """Two linear layers, 6 -> 8 -> 3."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batch(step: int, size: int = 16) -> tuple[Tensor, Tensor]:
    """Inputs (size, 6) and labels (size,) of a step: the class is the largest of three inputs."""
    generator = torch.Generator().manual_seed(9_000_011 + step)
    inputs = normal((size, 6), generator)
    return inputs, inputs[:, :3].argmax(1)


def train(
    model: Callable[[Tensor], Tensor], optimizer: Optimizer, steps: int, first: int = 0
) -> list[float]:
    """A plain training loop.

    Args:
        model: network, or anything that maps inputs to logits.
        optimizer: its optimizer.
        steps: how many.
        first: number of the first step.

    Returns:
        The loss of every step.
    """
    losses = []
    for step in range(first, first + steps):
        inputs, labels = batch(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        cast(Any, loss).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def is_finite(params: Sequence[Tensor]) -> bool:
    """Whether all numbers are finite."""
    return all(math.isfinite(p.detach().double().sum().item()) for p in params)
