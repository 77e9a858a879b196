"""A multilayer perceptron with ReLU, for images small enough to be flattened."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Sequence

from torch import nn


class MLP(nn.Sequential):
    """Flatten, then `fc1`, `relu1`, ..., and the classifier `fc`."""

    def __init__(self, sizes: Sequence[int]) -> None:
        """Initialise weights as He et al. (2015), eq. 10, biases at zero.

        Args:
            sizes: numbers in, hidden sizes, numbers out.
        """
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        for index, (inputs, outputs) in enumerate(itertools.pairwise(sizes[:-1]), 1):
            layers[f"fc{index}"] = nn.Linear(inputs, outputs)
            layers[f"relu{index}"] = nn.ReLU()
        layers["fc"] = nn.Linear(sizes[-2], sizes[-1])
        super().__init__(layers)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)


def mlp(hidden: Sequence[int], *, num_classes: int, input_shape: tuple[int, int, int]) -> MLP:
    """A perceptron with the given hidden sizes.

    Args:
        hidden: hidden sizes, at least one.
        num_classes: logits.
        input_shape: (C, H, W); flattened to C * H * W numbers.
    """
    return MLP([math.prod(input_shape), *hidden, num_classes])
