"""Small networks with batches for the tests of KFAC, and steps on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.optimizers.kfac import KFAC

EXACT = {"rtol": 1e-10, "atol": 1e-13}
CONFIG = {
    "name": "kfac",
    "_target_": "experiments.optimizers.kfac.KFAC",
    "takes_model": True,
    "lr": 0.05,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "factor_update_interval": 3,
    "inverse_update_interval": 7,
}
LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (5,)),
    "linear without bias": (lambda: nn.Linear(5, 4, bias=False), (5,)),
    "linear on sequences": (lambda: nn.Linear(5, 4), (3, 5)),
    "conv": (lambda: nn.Conv2d(2, 3, 3), (2, 5, 4)),
    "conv without bias": (lambda: nn.Conv2d(2, 3, 3, padding=1, bias=False), (2, 5, 4)),
    "conv 1x1": (lambda: nn.Conv2d(3, 2, 1, stride=2), (3, 5, 4)),
    "conv strided": (lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2)), (2, 6, 4)),
    "conv dilated": (lambda: nn.Conv2d(2, 3, (2, 3), dilation=(3, 2), padding=(2, 1)), (2, 6, 5)),
    "conv same": (lambda: nn.Conv2d(2, 3, (4, 2), dilation=(1, 3), padding="same"), (2, 6, 5)),
    "conv valid": (lambda: nn.Conv2d(2, 3, 2, padding="valid"), (2, 4, 4)),
    "conv reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 4, 4)),
    "conv circular": (
        lambda: nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="circular"),
        (2, 4, 5),
    ),
}


def network(case: str, examples: int = 4) -> tuple[nn.Sequential, Tensor, Tensor]:
    """The layer, an in-place ReLU and a classifier, in float64, with a batch."""
    torch.manual_seed(0)
    build, shape = LAYERS[case]
    layer = build().double()
    images = torch.randn(examples, *shape, dtype=torch.float64)
    width = layer(images)[0].numel()
    net = nn.Sequential(layer, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(width, 3).double())
    return net, images, torch.arange(examples) % 3


def conv_net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Two layers, one of each kind."""
    torch.manual_seed(1)
    layers = [nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)]
    return nn.Sequential(*layers).to(dtype)


def batch(step: int = 0, examples: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(examples, 2, 3, 3, dtype=torch.float64, generator=generator)
    return images, torch.randint(3, (examples,), generator=generator)


def backward(net: nn.Module, images: Tensor, labels: Tensor) -> None:
    cross_entropy(net(images), labels).backward()


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    dtype = next(net.parameters()).dtype
    for step in steps:
        images, labels = batch(step)
        optimizer.zero_grad()
        backward(net, images.to(dtype), labels)
        optimizer.step()


def layer_state(optimizer: KFAC, net: nn.Module, index: int) -> dict[str, Any]:
    weight = net[index].weight  # type: ignore[index]
    return optimizer.state[weight]


def assert_factors(state: dict[str, Any], wanted: tuple[Any, Any]) -> None:
    np.testing.assert_allclose(state["inputs_factor"].numpy(), wanted[0], **EXACT)
    np.testing.assert_allclose(state["outputs_factor"].numpy(), wanted[1], **EXACT)
