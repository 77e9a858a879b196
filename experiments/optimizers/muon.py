"""Muon for the hidden weights, AdamW for the rest, as one optimizer.

Muon (Jordan et al. 2024) orthogonalises the momentum of a matrix. Its authors use it for hidden
weights, with a convolution's weight as the matrix (c_out, c_in kh kw), and AdamW for the first and
the last layer, biases and gains. Both algorithms are torch's own (`torch.optim.Muon`, which takes
matrices only, and `torch.optim.AdamW`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim._muon import muon
from torch.optim.adamw import adamw

AdjustLr = Literal["original", "match_rms_adamw", "spectral_unclamped"]

# Of torch.optim.Muon: the quintic's coefficients, and what keeps a zero gradient from 0 / 0.
_NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NS_EPS = 1e-7


class Muon(Optimizer):
    """Muon on the weights of all Linear and Conv2d layers but the first and the last, else AdamW.

    The first parameter group holds the hidden weights, the second all other parameters. A
    learning rate written into both, as a schedule does, is Muon's; AdamW's is `adamw_lr_ratio`
    times that.

    Args:
        model: the network; "first" and "last" are in the order of `model.modules()`.
        lr: learning rate of Muon, before `adjust_lr`.
        weight_decay: of both, decoupled (times their learning rate).
        momentum: of Muon.
        nesterov: whether Muon's momentum is Nesterov's.
        ns_steps: Newton-Schulz iterations, of which each is a step towards orthogonality.
        adjust_lr: how Muon's learning rate depends on the matrix's shape (see torch.optim.Muon):
            `original`: times sqrt(max(1, rows / columns)); `match_rms_adamw`: times 0.2
            sqrt(max(rows, columns)); `spectral_unclamped`: times sqrt(rows / columns).
        adamw_lr_ratio: AdamW's learning rate over Muon's.
        betas: of AdamW.
        eps: of AdamW.

    Raises:
        ValueError: a setting out of its range, or a model without a hidden weight.
    """

    #: The model is for the order of its layers; a step depends on gradients alone.
    takes_parts = True

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.02,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr: AdjustLr = "original",
        adamw_lr_ratio: float = 0.015,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
    ):
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "adjust_lr": adjust_lr,
            "adamw_lr_ratio": adamw_lr_ratio,
            "betas": betas,
            "eps": eps,
        }
        _check_settings(defaults)
        hidden = hidden_weights(model)
        named = list(model.named_parameters())
        chosen = [(name, p) for name, p in named if p in hidden]
        others = [(name, p) for name, p in named if p not in hidden]
        groups = [{"params": chosen, "algorithm": "muon"}]
        if others:
            groups.append({"params": others, "algorithm": "adamw"})
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step.

        Args:
            closure: computes the loss again, with its gradients.

        Returns:
            The closure's loss, if there is one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["algorithm"] == "muon":
                self._muon(params, group)
            elif params:
                self._adamw(params, group)
        return loss

    def _muon(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            assert p.grad is not None
            # One order of the columns for every memory format, so that a state fits all of them.
            weight, gradient = p.reshape(len(p), -1), p.grad.reshape(len(p), -1)
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            muon(
                [weight],
                [gradient],
                [state["momentum_buffer"]],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                nesterov=group["nesterov"],
                ns_coefficients=_NS_COEFFICIENTS,
                ns_steps=group["ns_steps"],
                eps=_NS_EPS,
                adjust_lr_fn=group["adjust_lr"],
                has_complex=False,
            )
            if weight.data_ptr() != p.data_ptr():  # a copy, of a weight in channels_last
                p.copy_(weight.view(p.shape))

    def _adamw(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            [self.state[p]["step"] for p in params],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"] * group["adamw_lr_ratio"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def hidden_weights(model: nn.Module) -> set[Tensor]:
    """The weights of all Linear and Conv2d layers but the first and the last.

    Raises:
        ValueError: there are fewer than three such layers.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    weights: list[Tensor] = [layer.weight for layer in layers]
    hidden = set(weights).difference(weights[:1], weights[-1:])
    if not hidden:
        raise ValueError(
            "Muon steps on the weights of the Linear and Conv2d layers between the first and the "
            f"last, and {type(model).__name__} has {len(layers)} such layers: use a deeper model, "
            "or optimizer=adamw"
        )
    return hidden


def _check_settings(values: dict[str, Any]) -> None:
    """The settings, with messages in torch's own form."""
    if not values["lr"] >= 0.0:
        raise ValueError(f"Invalid learning rate: {values['lr']}")
    for key in ("weight_decay", "adamw_lr_ratio", "eps"):
        if not values[key] >= 0.0:
            raise ValueError(f"Invalid {key} value: {values[key]}")
    if not 0.0 <= values["momentum"] < 1.0:
        raise ValueError(f"Invalid momentum value: {values['momentum']} (in [0, 1))")
    if not (isinstance(values["ns_steps"], int) and 1 <= values["ns_steps"] < 100):
        raise ValueError(f"Invalid ns_steps: {values['ns_steps']} (a whole number from 1 to 99)")
    if values["adjust_lr"] not in get_args(AdjustLr):
        choices = ", ".join(get_args(AdjustLr))
        raise ValueError(f"Invalid adjust_lr: {values['adjust_lr']!r} (one of {choices})")
    if len(values["betas"]) != 2 or not all(0.0 <= beta < 1.0 for beta in values["betas"]):
        raise ValueError(f"Invalid betas: {values['betas']} (two numbers in [0, 1))")
