"""The arithmetic of the forward pass: float32, or autocast to bfloat16 or float16.

Weights, gradients, optimizer and evaluation are float32 whatever `train.precision` says: torch's
autocast computes matrix products and convolutions of the forward pass, and so of the backward pass,
in the narrow format, and the loss in float32. bfloat16 has the range of float32 and needs no more.

In float16 what is below 6e-8 becomes zero, and gradients are that small. So the loss is multiplied
by a scale S before the backward pass, and the gradients are divided by it after (Micikevicius et
al. 2018, "Mixed precision training", section 3.2), by torch's GradScaler with torch's settings: S
begins at 65536, is halved where a gradient is not finite, and doubled after 2000 steps without one.
Such an *overflow* takes no step: optimizer, weights and averages stay as they are, the schedule
goes on. On several ranks gradients are averaged while they are scaled, so all of them see the same
overflow.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear
from torch.optim import Optimizer

from experiments.errors import UserError
from experiments.training.passes import NeedsPasses

FORMATS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@runtime_checkable
class SeesBackwardPass(Protocol):
    """An optimizer that looks at gradients inside the backward pass: that of S times the loss."""

    def bind_loss_scale(self, loss_scale: Callable[[], Tensor]) -> None:
        """Take over where S, () float32, can be asked for; once, before the first pass."""

    def skip_batch(self) -> None:
        """Forget the passes since the last step: there is an overflow, and no step."""


class Precision:
    """The arithmetic of one run on its device.

    Args:
        name: `float32`, `bfloat16` or `float16`.
        device: where the run trains.

    Attributes:
        overflowed: whether the last `step` took none.

    Raises:
        UserError: the device has no such arithmetic.
    """

    def __init__(self, name: str, device: torch.device):
        self._device = device
        self._format = FORMATS.get(name)
        self._scaler: torch.amp.GradScaler | None = None
        self._optimizer: Optimizer | None = None
        self.overflowed = False
        if self._format is not None:
            _check(name, self._format, device)
        if self._format == torch.float16:
            self._scaler = torch.amp.GradScaler(device.type)

    def autocast(self) -> AbstractContextManager[Any]:
        """Inside, forward passes and losses are computed in this precision."""
        if self._format is None:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=self._format)

    def bind(self, optimizer: Optimizer, *, name: str, has_model: bool) -> None:
        """Take over the optimizer of the run, once, before the first step.

        Args:
            optimizer: gets gradients of the unscaled loss, and no step at an overflow.
            name: for messages.
            has_model: whether it was given the model, and so may look into the passes.

        Raises:
            UserError: it computes what this precision would spoil.
        """
        if self._format is None:
            return
        if isinstance(optimizer, NeedsPasses):
            raise UserError(
                f"optimizer={name} takes differences of gradients, which rounding to "
                f"{self._named()} would drown: use train.precision=float32"
            )
        if self._scaler is None:
            return
        if isinstance(optimizer, SeesBackwardPass):
            optimizer.bind_loss_scale(self.loss_scale)
        elif has_model and not getattr(optimizer, "takes_parts", False):
            raise UserError(
                f"optimizer={name} looks into the backward pass, which float16 scales: use "
                "train.precision=bfloat16 or float32"
            )
        self._optimizer = optimizer
        # torch's scaler does not say whether it took the step
        optimizer.register_step_post_hook(self._took_step)

    def loss_scale(self) -> Tensor:
        """S, () float32 on the device; without a wait."""
        assert self._scaler is not None
        return self._scaler.scale(torch.ones((), device=self._device))

    def scaled(self, loss: Tensor) -> Tensor:
        """What the backward pass is of: S times the loss, or the loss."""
        return loss if self._scaler is None else self._scaler.scale(loss)

    def step(self, optimizer: Optimizer) -> None:
        """Take a step with the gradients in `p.grad`, or none at an overflow.

        With float16 the host waits for the device once, to learn whether there is one, as always
        with torch's scaler.
        """
        if self._scaler is None:
            optimizer.step()
            return
        assert optimizer is self._optimizer, "bind() comes first"
        self.overflowed = True
        self._scaler.step(optimizer)
        self._scaler.update()
        if self.overflowed and isinstance(optimizer, SeesBackwardPass):
            optimizer.skip_batch()

    def _took_step(self, *_: Any) -> None:
        self.overflowed = False

    def host_scale(self) -> float:
        """S as a number; waits for the device."""
        assert self._scaler is not None
        return float(self._scaler.get_scale())

    def state_dict(self) -> dict[str, Any] | None:
        """S and the steps since its last change, for a checkpoint; None where there is no scale."""
        return None if self._scaler is None else self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on with the scale of a checkpoint."""
        if self._scaler is not None and state is not None:
            self._scaler.load_state_dict(state)

    def _named(self) -> str:
        return next(name for name, dtype in FORMATS.items() if dtype == self._format)


def _check(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Try the operations of a network in a format.

    Raises:
        UserError: the device does not know one of them.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UserError(
                f"train.precision={name}: {torch.cuda.get_device_name(device)} does not compute in "
                "bfloat16: use train.precision=float16 or float32"
            )
        return
    weight = torch.ones(2, 2, 1, 1, device=device, requires_grad=True)
    try:
        with torch.autocast(device.type, dtype=dtype):
            images = conv2d(torch.ones(2, 2, 2, 2, device=device), weight)
            logits = linear(images.flatten(2), weight[:, :, 0, 0].repeat(1, 2))
            loss = nn.functional.cross_entropy(
                logits.mean(1), torch.zeros(2, dtype=torch.int64, device=device)
            )
        torch.autograd.backward(loss)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"train.precision={name} does not work on {device.type} with torch "
            f"{torch.__version__} ({reason}): use train.precision=float32"
        ) from error
