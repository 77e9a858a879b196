"""SGD on normalised gradients: the SGD baseline of the authors' released code.

    g = ∇L(θ) + wd θ        v = m v + g / ‖g‖        θ = θ - lr v

‖g‖ is one norm over all parameters, at every step. The papers call their baseline SGD and print no
normalisation; `torch.optim.SGD` is what they print.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT


class NormalizedSGD(Optimizer):
    """Heavy ball on the gradient divided by its norm.

    Args:
        params: parameters or parameter groups; the norm is over all of them.
        lr: learning rate: the length of a step without momentum.
        momentum: of the heavy ball, m.
        weight_decay: times the parameter, added to the gradient before the norm is taken.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ):
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        for name, value in (("momentum", momentum), ("weight_decay", weight_decay)):
            if not value >= 0.0:
                raise ValueError(f"Invalid {name} value: {value}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step.

        A gradient of zeros stays one; gradients that are not finite show in the weights.

        Args:
            closure: computes the loss again, with its gradients.

        Returns:
            The closure's loss, if there is one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        directions = [
            _decayed(some, group["weight_decay"])
            for some, group in zip(params, self.param_groups, strict=True)
        ]
        every = [d for some in directions for d in some]
        if not every:
            return loss
        norm = _norm(every)
        for some, of_group, group in zip(params, directions, self.param_groups, strict=True):
            if some:
                self._descend(some, torch._foreach_div(of_group, norm), group)
        return loss

    def _descend(
        self, params: list[Tensor], directions: tuple[Tensor, ...], group: dict[str, Any]
    ) -> None:
        """SGD's step with heavy ball."""
        if group["momentum"] != 0:
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, directions)
            directions = tuple(buffers)
        torch._foreach_add_(params, directions, alpha=-float(group["lr"]))


def _decayed(params: list[Tensor], weight_decay: float) -> list[Tensor]:
    gradients = [p.grad for p in params if p.grad is not None]
    if weight_decay == 0 or not params:
        return gradients
    return list(torch._foreach_add(gradients, params, alpha=weight_decay))


def _norm(tensors: list[Tensor]) -> Tensor:
    """() ‖·‖ over all tensors, in float32 at least; never zero, so that 0 / ‖0‖ is 0."""
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    norms = torch._foreach_norm(tensors, dtype=dtype)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm.clamp(min=torch.finfo(dtype).tiny)
