"""An exponential moving average of the weights, evaluated beside the weights themselves.

After every step taken, θ̄ <- β θ̄ + (1 - β) θ with β = `train.ema`, from θ̄ = θ at the start; the
buffers of floating point (BatchNorm's statistics) are averaged alike, other buffers copied. The
training does not see it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call


class WeightAverage:
    """θ̄ of one model.

    Args:
        model: on its device.
        decay: β, in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        self._model = model
        self._decay = decay
        self._averaged: dict[str, Tensor] = {}
        self._copied: dict[str, Tensor] = {}
        for name, tensor in model.state_dict().items():
            into = self._averaged if tensor.is_floating_point() else self._copied
            into[name] = tensor.detach().clone()

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        own = self._model.state_dict()
        now = [own[name] for name in self._averaged]
        torch._foreach_lerp_(list(self._averaged.values()), now, 1 - self._decay)
        for name, tensor in self._copied.items():
            tensor.copy_(own[name])

    def __call__(self, images: Tensor) -> Tensor:
        """What the model returns at θ̄."""
        logits: Tensor = functional_call(self._model, self.state_dict(), (images,))
        return logits

    def buffers(self) -> list[Tensor]:
        """What does not follow from the parameters, and so differs between ranks."""
        state = self.state_dict()
        return [state[name] for name, _ in self._model.named_buffers() if name in state]

    def state_dict(self) -> dict[str, Tensor]:
        """θ̄ under the model's own names: it loads into the model."""
        return {**self._averaged, **self._copied}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on with the average of a checkpoint."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
