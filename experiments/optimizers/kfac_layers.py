"""The layers that KFAC preconditions: which they are, and what their passes leave for a step.

A hook on each layer keeps its input and the gradient of its output, by reference, from the passes
to the step; the factors are computed in the step. So their seconds are the optimizer's, and an
activation is held no longer than the backward pass holds others of its size: those of the layers
in front, which it frees one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from experiments.optimizers.kronecker import (
    Factors,
    Normalization,
    SupportedLayer,
    factor_dtype,
    layer_factors,
)

logger = logging.getLogger(__name__)


class _Passes(NamedTuple):
    """What both passes through a layer leave.

    Attributes:
        inputs: of the forward pass, not copied.
        version: torch's count of the changes in place of `inputs` at the forward pass.
        gradient: of the loss with respect to the output.
    """

    inputs: Tensor
    version: int
    gradient: Tensor


@dataclass(eq=False)
class _Call:
    """One forward pass of a layer, and the backward pass through it once there was one.

    Attributes:
        unfinished: calls of the same layer that had no gradient yet when this one was made.
        passes: what is left of both passes until the factors are computed.
        factors: of this batch.
    """

    unfinished: list[_Call]
    passes: _Passes | None = None
    factors: Factors | None = None

    @property
    def finished(self) -> bool:
        return self.passes is not None or self.factors is not None


@dataclass(eq=False)
class Layer:
    """A layer that is preconditioned, and its calls since the last step.

    Attributes:
        name: in the model.
        module: the layer.
        loss_scale: S, () float32, where the backward pass is that of S times the loss.
    """

    name: str
    module: SupportedLayer
    loss_scale: Callable[[], Tensor] | None = None
    _calls: list[_Call] = field(default_factory=list)

    @property
    def params(self) -> list[nn.Parameter]:
        """Weight, then bias."""
        return list(self.module.parameters(recurse=False))

    def matrix(self, tensors: Mapping[Tensor, Tensor]) -> Tensor:
        """(d_out, d_in) of what `tensors` holds for the weight and the bias."""
        return torch.cat([tensors[p].reshape(p.shape[0], -1) for p in self.params], dim=1)

    def split(self, matrix: Tensor) -> dict[Tensor, Tensor]:
        """The inverse of `matrix`."""
        widths = [p[0].numel() for p in self.params]
        parts = torch.split(matrix, widths, dim=1)
        return {p: part.reshape(p.shape) for p, part in zip(self.params, parts, strict=True)}

    def capture(self, inputs: Tensor, output: Tensor, normalization: Normalization) -> Tensor:
        """Keep what the factors are computed from, once the gradient of the output is known.

        Args:
            inputs: of this forward pass.
            output: of this forward pass; it requires a gradient.
            normalization: see `layer_factors`; for the batch before, if there was no step since.

        Returns:
            The output that the rest of the network is to use.
        """
        # Several backward passes before a step must not hold the activations of all of them.
        self._reduce(normalization)
        call = _Call([earlier for earlier in self._calls if not earlier.finished])
        self._calls.append(call)
        # A hook on the tensor, not on the module, lets an in-place ReLU follow the layer; that
        # would lose the hook of a view, such as the output of a Linear on sequences.
        output = output.clone() if output._is_view() else output
        inputs = inputs.detach()
        receive = partial(_receive, call, inputs, inputs._version)
        output.register_hook(receive)  # type: ignore[no-untyped-call]
        return output

    def take_factors(self, normalization: Normalization) -> list[Factors]:
        """The factors of each backward pass since the last call of this method.

        Raises:
            RuntimeError: the layer was called twice in one forward pass, or an input was changed
                in place since.
        """
        self._reduce(normalization)
        calls = [call for call in self._calls if call.finished]
        self._calls.clear()
        if any(other.finished for call in calls for other in call.unfinished):
            raise RuntimeError(
                f"layer {self.name!r} was called more than once in one forward pass: KFAC has no "
                f"factors for that; leave it to SGD with skip_layers=({self.name!r},)"
            )
        return [call.factors for call in calls if call.factors is not None]

    def forget(self) -> None:
        """Drop what the passes since the last step have left."""
        self._calls.clear()

    @torch.no_grad()
    def _reduce(self, normalization: Normalization) -> None:
        """Turn what finished calls have kept into factors, in their own precision."""
        # not in that of a forward pass around it
        with torch.autocast(self.module.weight.device.type, enabled=False):
            self._reduce_calls(normalization)

    def _reduce_calls(self, normalization: Normalization) -> None:
        for call in self._calls:
            if call.passes is None:
                continue
            inputs, version, gradient = call.passes
            call.passes = None
            if inputs._version != version:
                raise RuntimeError(
                    f"the input of layer {self.name!r} was changed in place between the forward "
                    "pass and the step: KFAC's factors need it; give the network a copy"
                )
            if self.loss_scale is not None:
                gradient = gradient.to(factor_dtype(self.module.weight)) / self.loss_scale()
            call.factors = layer_factors(self.module, inputs, gradient, normalization)


def _receive(call: _Call, inputs: Tensor, version: int, gradient: Tensor) -> None:
    """Keep the gradient of a call's output, with the input."""
    call.passes = _Passes(inputs, version, gradient.detach())


def find_layers(model: nn.Module, skip: Collection[str]) -> dict[nn.Module, Layer]:
    """The layers to precondition; Linear and Conv2d layers left to SGD are named in the log.

    Args:
        model: the network.
        skip: names of layers to leave to SGD.

    Returns:
        By module, in the model's order.

    Raises:
        ValueError: a name in `skip` is none, or no layer is left.
    """
    if isinstance(skip, str):
        raise ValueError(f"Invalid skip_layers: {skip!r} (a list of names)")
    names: dict[nn.Module, list[str]] = {}
    users: dict[Tensor, set[nn.Module]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
        for p in module.parameters(recurse=False):
            users.setdefault(p, set()).add(module)
    known = {name for many in names.values() for name in many}
    for name in skip:
        if name not in known:
            raise ValueError(f"Invalid skip_layers: the model has no layer {name!r}")
    layers: dict[nn.Module, Layer] = {}
    left: list[str] = []
    for module, aliases in names.items():
        if not isinstance(module, SupportedLayer):
            continue
        reason = _why_not(module, aliases, skip, users)
        if reason is None:
            layers[module] = Layer(aliases[0], module)
        else:
            left.append(f"{aliases[0] or type(module).__name__} ({reason})")
    if not layers:
        found = f"; left out: {', '.join(left)}" if left else ""
        raise ValueError(
            "KFAC preconditions torch.nn.Linear and torch.nn.Conv2d (groups=1) layers and "
            f"{type(model).__name__} has none{found}; use such layers, or optimizer=sgd"
        )
    if left:
        logger.info("KFAC leaves to SGD: %s", ", ".join(left))
    return layers


def _why_not(
    module: SupportedLayer,
    aliases: list[str],
    skip: Collection[str],
    users: Mapping[Tensor, set[nn.Module]],
) -> str | None:
    """Why a layer is left to SGD; None if it is not."""
    params = list(module.parameters(recurse=False))
    if any(name in skip for name in aliases):
        return "skip_layers"
    if type(module) not in (nn.Linear, nn.Conv2d):
        return f"a subclass, {type(module).__name__}"
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return f"groups={module.groups}"
    if len(aliases) > 1 or any(len(users[p]) > 1 for p in params):
        return "shared"
    if not all(p.requires_grad for p in params):
        return "frozen"
    return None
