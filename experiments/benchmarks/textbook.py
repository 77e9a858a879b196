"""The step of MLBFGS with the two-loop recursion: what `mlbfgs_step_s` is compared with.

The same averages, weight decay, momentum and pairs, but the direction by the two-loop recursion
over separate vectors, on one flattened gradient: line by line as the textbooks and both papers
print it (`mlbfgs.reference.hessian_vector`), or with every line in place, as torch.optim.LBFGS has
it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mlbfgs.reference import hessian_vector


class TwoLoopStep:
    """One preconditioned step, two-loop recursion on separate vectors.

    Args:
        params: parameters, each with a gradient.
        pairs: M pairs (s, ŷ) of flat vectors (n,), oldest first.
        lr: learning rate.
        momentum: heavy-ball coefficient.
        weight_decay: added to the gradient.
        betas: of the averages.
        in_place: whether the recursion updates its vector in place.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        pairs: list[tuple[Tensor, Tensor]],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        betas: tuple[float, float],
        in_place: bool,
    ):
        self.params = list(params)
        self.pairs = pairs
        self.lr, self.momentum, self.weight_decay, self.betas = lr, momentum, weight_decay, betas
        self.in_place = in_place
        self.rho = [1.0 / s.dot(y) for s, y in pairs]
        theta = self.flatten(self.params)
        self.param_average, self.grad_average = theta.clone(), torch.zeros_like(theta)
        self.momentum_buffer = torch.zeros_like(theta)

    @staticmethod
    def flatten(tensors: Iterable[Tensor]) -> Tensor:
        """One vector (n,) from tensors of any shapes."""
        return torch.cat([t.reshape(-1) for t in tensors])

    @torch.no_grad()
    def step(self) -> None:
        """One step."""
        theta = self.flatten(self.params)
        g = self.flatten([p.grad for p in self.params if p.grad is not None])
        g.add_(theta, alpha=self.weight_decay)
        self.param_average.lerp_(theta, 1 - self.betas[0])
        self.grad_average.lerp_(g, 1 - self.betas[1])
        if self.in_place:
            d = self.direction(g)
        else:
            d = hessian_vector(g, [s for s, _ in self.pairs], [y for _, y in self.pairs])
        self.momentum_buffer.mul_(self.momentum).add_(d)
        offset = 0
        for p in self.params:
            part = self.momentum_buffer[offset : offset + p.numel()].view_as(p)
            p.add_(part, alpha=-self.lr)
            offset += p.numel()

    def direction(self, g: Tensor) -> Tensor:
        """H g (S Algorithm 1, M Algorithm 2), in place: (n,) -> (n,)."""
        alphas: list[Tensor] = []
        for (s, y), rho in zip(self.pairs[::-1], self.rho[::-1], strict=True):
            alphas.append(s.dot(g) * rho)
            g.add_(y, alpha=-float(alphas[-1]))
        s, y = self.pairs[-1]
        g.mul_(s.dot(y) / y.dot(y))
        for (s, y), rho, alpha in zip(self.pairs, self.rho, alphas[::-1], strict=True):
            g.add_(s, alpha=float(alpha - y.dot(g) * rho))
        return g
