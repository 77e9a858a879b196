"""Optimizers that misbehave on purpose; configs name them as `_target_`."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch

from experiments.data import Batch
from experiments.training.passes import Passes


class NoisySGD(torch.optim.SGD):
    """SGD that draws from torch's global generator, so that its state decides the numbers."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    param.add_(torch.randn_like(param), alpha=1e-3)
        return result


class BrokenSGD(torch.optim.SGD):
    """SGD that raises at one step of each process."""

    def __init__(self, params: Iterable[Any], lr: float, fails_at: int):
        super().__init__(params, lr=lr)
        self._fails_at = fails_at
        self._steps = 0

    def step(self, closure: Any = None) -> Any:
        self._steps += 1
        if self._steps == self._fails_at:
            raise RuntimeError("the optimizer broke")
        return super().step(closure)


class PoisoningSGD(torch.optim.SGD):
    """SGD whose weights become infinite at one step, after a loss that was finite."""

    def __init__(self, params: Iterable[Any], lr: float, poisons_at: int):
        super().__init__(params, lr=lr)
        self._poisons_at = poisons_at
        self._steps = 0

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        self._steps += 1
        if self._steps == self._poisons_at:
            with torch.no_grad():
                self.param_groups[0]["params"][-1].fill_(float("inf"))
        return result


class SlowPassesSGD(torch.optim.SGD):
    """SGD that repeats every gradient of its batch, finds it equal, and sleeps."""

    def __init__(self, params: Iterable[Any], lr: float, sleep_s: float):
        super().__init__(params, lr=lr)
        self._sleep_s = sleep_s

    def bind(self, passes: Passes) -> None:
        self._passes = passes

    def before_step(self, batch: Batch, epoch: int) -> None:
        params = self.param_groups[0]["params"]
        again = self._passes.gradient([batch], params)
        for p, g in zip(params, again, strict=True):
            assert torch.equal(p.grad, g)
        time.sleep(self._sleep_s)


class SGDWithModel(torch.optim.SGD):
    """SGD that gets the model, as one does that looks into its passes."""

    def __init__(self, model: torch.nn.Module, lr: float):
        super().__init__(model.parameters(), lr=lr)


class InfiniteGradients(torch.optim.SGD):
    """SGD on gradients that are infinite, of losses that are not."""

    def __init__(self, params: Iterable[Any], lr: float):
        super().__init__(params, lr=lr)
        for p in self.param_groups[0]["params"]:
            p.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
