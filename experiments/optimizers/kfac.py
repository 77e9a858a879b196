"""KFAC in front of SGD, after Pauloski et al. 2020 (the papers' KFAC baseline).

The curvature and its scales are in `experiments.optimizers.kronecker`; here is what collects the
factors from a model, when they are updated and inverted, and the step.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from experiments.optimizers.kronecker import (
    Factors,
    Normalization,
    SupportedLayer,
    clip_scale,
    damped_inverses,
    eigenbases,
    factor_dtype,
    input_size,
    layer_factors,
    precondition,
)

logger = logging.getLogger(__name__)

Method = Literal["eigen", "cholesky"]


@dataclass(eq=False)
class _Call:
    """One forward pass of a layer; its factors come with its gradient.

    Attributes:
        unfinished: calls of the same layer that had no gradient yet when this one was made.
        factors: of this batch.
    """

    unfinished: list[_Call]
    factors: Factors | None = None


@dataclass(eq=False)
class _Layer:
    """A layer that is preconditioned, and its calls since the last step."""

    name: str
    module: SupportedLayer
    calls: list[_Call] = field(default_factory=list)

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.module.parameters(recurse=False))  # weight, then bias

    def matrix(self, tensors: Mapping[Tensor, Tensor]) -> Tensor:
        """(d_out, d_in) of what `tensors` holds for the weight and the bias."""
        return torch.cat([tensors[p].reshape(p.shape[0], -1) for p in self.params], dim=1)

    def split(self, matrix: Tensor) -> dict[Tensor, Tensor]:
        """The inverse of `matrix`."""
        widths = [p[0].numel() for p in self.params]
        parts = torch.split(matrix, widths, dim=1)
        return {p: part.reshape(p.shape) for p, part in zip(self.params, parts, strict=True)}


class KFAC(Optimizer):
    """Gradients preconditioned by Kronecker-factored curvature, then SGD with heavy ball.

    The gradients of `torch.nn.Linear` and `torch.nn.Conv2d` layers are preconditioned and scaled
    by ν = min(1, sqrt(kl_clip / (lr² Σ Vᵀ∇W))); those of all other parameters are used as they
    are. What follows is `torch.optim.SGD`. Gradients (`p.grad`) are left as they were.

    The factors come from hooks on the layers: from the forward and backward passes in training
    mode with gradients enabled, every `factor_update_interval` steps; the loss must be a mean over
    the batch, and unscaled. Several backward passes before a step count as batches of their own,
    of which the mean is taken. The k-th update has
    the weight max(1 / k, 1 - factor_decay), so the factors are a mean at first (Martens & Grosse
    2015, section 5). They and their inverses are float32, or float64 for float64 parameters.

    Left to SGD, with a line in the log: layers with groups > 1, of a subclass (which may compute
    something else), frozen in part, or used under two names or sharing a parameter with another
    module. A layer called twice in one forward pass is an error at the next step.

    Args:
        model: the network; its parameters become the one parameter group.
        lr: learning rate.
        momentum: of the heavy ball.
        weight_decay: times the parameter, added to the preconditioned gradient, as the SGD behind
            the authors' preconditioner does.
        damping: λ > 0. `eigen` without π adds it to the eigenvalues of A ⊗ G; all others use
            (A + π √λ I) ⊗ (G + √λ / π I).
        factor_decay: weight of the past in the running averages of A and G, in [0, 1).
        factor_update_interval: steps between updates of the factors.
        inverse_update_interval: steps between inversions (T), not below the one above.
        kl_clip: κ, or None for no clip.
        method: `eigen` decomposes the factors and follows a changed `damping` at once; `cholesky`
            inverts the damped factors.
        pi_correction: π = sqrt((tr A / d_in) / (tr G / d_out)) instead of 1 (Martens & Grosse
            2015, section 6.3).
        normalization: scales of A and G, see `experiments.optimizers.kronecker`: `fisher`, or
            `pauloski` for those of the authors' code.
        precondition_weight_decay: add the weight decay before preconditioning instead, as SLIM-QN
            does.
        skip_layers: names of layers to leave to SGD.

    Raises:
        ValueError: a setting out of its range, or a model without a layer to precondition.

    Example:
        >>> optimizer = KFAC(model, lr=0.1, damping=1e-3)
        >>> cross_entropy(model(images), labels).backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        damping: float = 0.001,
        factor_decay: float = 0.95,
        factor_update_interval: int = 5,
        inverse_update_interval: int = 50,
        kl_clip: float | None = 0.001,
        method: Method = "eigen",
        pi_correction: bool = False,
        normalization: Normalization = "fisher",
        precondition_weight_decay: bool = False,
        skip_layers: Collection[str] = (),
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "damping": damping,
            "factor_decay": factor_decay,
            "factor_update_interval": factor_update_interval,
            "inverse_update_interval": inverse_update_interval,
            "kl_clip": kl_clip,
            "method": method,
            "pi_correction": pi_correction,
            "normalization": normalization,
            "precondition_weight_decay": precondition_weight_decay,
        }
        _check_settings(defaults)
        self._layers = _find_layers(model, skip_layers)
        super().__init__(model.named_parameters(), defaults)
        for p in self.param_groups[0]["params"]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p, requires_grad=False)
        hook = _forward_hook(weakref.ref(self))
        for layer in self._layers.values():
            self.state[layer.module.weight].update(_new_state(layer.module, method))
            layer.module.register_forward_hook(hook, with_kwargs=True)

    # --- what happens in the forward and the backward pass -------------------------------------

    def _capture(self, module: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
        """Have the factors computed when the gradient of this output is known; return it."""
        layer = self._layers.get(module)  # None for a layer of a copied model
        if layer is None or not (module.training and output.requires_grad):
            return output
        if self.state[layer.module.weight]["step"] % self._setting("factor_update_interval") != 0:
            return output
        call = _Call([earlier for earlier in layer.calls if earlier.factors is None])
        layer.calls.append(call)
        # A hook on the tensor, not on the module, lets an in-place ReLU follow the layer; that
        # would lose the hook of a view, such as the output of a Linear on sequences.
        output = output.clone() if output._is_view() else output
        receive = partial(self._receive, layer.module, call, inputs.detach())
        output.register_hook(receive)  # type: ignore[no-untyped-call]
        return output

    @torch.no_grad()
    def _receive(self, module: SupportedLayer, call: _Call, inputs: Tensor, grad: Tensor) -> None:
        call.factors = layer_factors(module, inputs, grad, self._setting("normalization"))

    # --- the step -------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step.

        Args:
            closure: computes the loss again, with its gradients.

        Returns:
            The closure's loss, if there is one.

        Raises:
            RuntimeError: a layer was called twice in one forward pass, or, for `cholesky`, the
                damping is too small for the factors.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        for layer in self._layers.values():
            self._update_factors(layer)
            self._update_inverse(layer)
        params = [p for p in group["params"] if p.grad is not None]
        directions = {p: p.grad for p in params}
        if group["precondition_weight_decay"]:
            directions = _decayed(directions, group["weight_decay"])
        directions.update(self._precondition(directions))
        if not group["precondition_weight_decay"]:
            directions = _decayed(directions, group["weight_decay"])
        self._descend(params, list(directions.values()))
        for layer in self._layers.values():
            self.state[layer.module.weight]["step"] += 1
        return loss

    def _update_factors(self, layer: _Layer) -> None:
        """Let the batches since the last step into the running averages."""
        calls = [call for call in layer.calls if call.factors is not None]
        layer.calls.clear()
        if any(other.factors is not None for call in calls for other in call.unfinished):
            raise RuntimeError(
                f"layer {layer.name!r} was called more than once in one forward pass: KFAC has no "
                f"factors for that; leave it to SGD with skip_layers=({layer.name!r},)"
            )
        if not calls:
            return
        state = self.state[layer.module.weight]
        state["factor_updates"] += 1
        weight = max(1 / state["factor_updates"], 1 - self._setting("factor_decay"))
        for side in ("inputs", "outputs"):
            batches = [getattr(call.factors, side) for call in calls]
            state[f"{side}_factor"].lerp_(sum(batches) / len(batches), weight)

    def _update_inverse(self, layer: _Layer) -> None:
        """Decompose or invert the factors, every `inverse_update_interval` steps."""
        state = self.state[layer.module.weight]
        due = state["step"] % self._setting("inverse_update_interval") == 0
        # A layer whose first gradient comes late does not wait for its first inverse.
        if state["factor_updates"] == 0 or not (due or state["inversions"] == 0):
            return
        factors = Factors(state["inputs_factor"], state["outputs_factor"])
        if self._setting("method") == "eigen":
            result = eigenbases(factors)
        else:
            damping, pi_correction = self._setting("damping"), self._setting("pi_correction")
            result = damped_inverses(factors, damping, pi_correction, name=layer.name)
        for key, value in result.items():
            state[key].copy_(value)
        state["inversions"] += 1

    def _precondition(self, gradients: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """ν V, in the parameters' dtypes, for all layers that have an inverse."""
        group = self.param_groups[0]
        preconditioned: dict[_Layer, Tensor] = {}
        products = []
        for layer in self._layers.values():
            state = self.state[layer.module.weight]
            if state["inversions"] == 0 or any(p not in gradients for p in layer.params):
                continue
            gradient = layer.matrix(gradients).to(state["inputs_factor"].dtype)
            v = precondition(gradient, state, group["damping"], group["pi_correction"])
            preconditioned[layer] = v
            products.append((v * gradient).sum())
        if products and group["kl_clip"] is not None:
            scale = clip_scale(torch.stack(products), float(group["lr"]), group["kl_clip"])
            torch._foreach_mul_(list(preconditioned.values()), scale)
        return {
            p: part.to(p.dtype)
            for layer, v in preconditioned.items()
            for p, part in layer.split(v).items()
        }

    def _descend(self, params: list[Tensor], directions: list[Tensor]) -> None:
        """SGD's step with heavy ball."""
        group = self.param_groups[0]
        if not params:
            return
        if group["momentum"] != 0:
            buffers: list[Tensor] = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, directions)
            directions = buffers
        torch._foreach_add_(params, directions, alpha=-float(group["lr"]))

    def _setting(self, key: str) -> Any:
        return self.param_groups[0][key]

    # --- groups and state -----------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse a second group: the parameters are those of the model.

        Raises:
            ValueError: there is a group already.
        """
        if self.param_groups:
            raise ValueError("KFAC has the parameters of its model: it takes no further group")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of a KFAC of the same layers and method.

        torch would cast every tensor to the dtype of its parameter and ruin float32 factors of
        bfloat16 parameters; here values keep the dtype and device of this optimizer's own state.

        Raises:
            ValueError: the settings or the state do not fit; nothing has been changed then.
        """
        groups, state = self.param_groups, dict(self.state)
        try:
            super().load_state_dict({**state_dict, "state": {}})
            if self.param_groups[0].get("method") != groups[0]["method"]:
                raise ValueError(
                    f"the state was written by method={self.param_groups[0].get('method')!r}, "
                    f"this optimizer has method={groups[0]['method']!r}"
                )
            _check_settings(self.param_groups[0])
            ids = state_dict["param_groups"][0]["params"]
            params = self.param_groups[0]["params"]
            loaded = {p: state_dict["state"].get(i, {}) for i, p in zip(ids, params, strict=True)}
            for p in params:
                _check_state(state.get(p, {}), loaded[p])
        except Exception:
            self.param_groups = groups
            raise
        finally:
            self.state.clear()
            self.state.update(state)
        for p in params:
            for key, value in loaded[p].items():
                own = self.state[p]
                own[key] = own[key].copy_(value) if isinstance(value, Tensor) else value


def _decayed(directions: Mapping[Tensor, Tensor], weight_decay: float) -> dict[Tensor, Tensor]:
    """New tensors, because these are the gradients themselves."""
    if weight_decay == 0:
        return dict(directions)
    return {p: d.add(p, alpha=weight_decay) for p, d in directions.items()}


def _forward_hook(optimizer: weakref.ref[KFAC]) -> Callable[..., Tensor]:
    """A hook that does not keep the optimizer alive and that a copy of the model can carry."""

    def hook(
        module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
    ) -> Tensor:
        owner = optimizer()
        if owner is None:
            return output
        return owner._capture(module, args[0] if args else kwargs["input"], output)

    return hook


def _find_layers(model: nn.Module, skip: Collection[str]) -> dict[nn.Module, _Layer]:
    """The layers to precondition; Linear and Conv2d layers left to SGD are named in the log."""
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
    layers: dict[nn.Module, _Layer] = {}
    left: list[str] = []
    for module, aliases in names.items():
        if not isinstance(module, SupportedLayer):
            continue
        reason = _why_not(module, aliases, skip, users)
        if reason is None:
            layers[module] = _Layer(aliases[0], module)
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


def _new_state(module: SupportedLayer, method: Method) -> dict[str, int | Tensor]:
    """All that a layer will need, so that memory does not grow once training has begun."""
    weight = module.weight
    state: dict[str, int | Tensor] = {"step": 0, "factor_updates": 0, "inversions": 0}
    for side, size in (("inputs", input_size(module)), ("outputs", weight.shape[0])):
        zeros = partial(torch.zeros, dtype=factor_dtype(weight), device=weight.device)
        state[f"{side}_factor"] = zeros(size, size)
        if method == "eigen":
            state[f"{side}_eigenvalues"] = zeros(size)
            state[f"{side}_eigenvectors"] = zeros(size, size)
        else:
            state[f"{side}_inverse"] = zeros(size, size)
    return state


def _check_state(own: Mapping[str, Any], loaded: Mapping[str, Any]) -> None:
    """Refuse a state that has other entries, or entries of other shapes, than one's own."""
    if own.keys() != loaded.keys():
        raise ValueError(
            f"the state has the entries {sorted(loaded)} where this KFAC has {sorted(own)}"
        )
    for key, value in own.items():
        if isinstance(value, Tensor) and value.shape != loaded[key].shape:
            raise ValueError(
                f"{key} has shape {tuple(loaded[key].shape)} in the state and "
                f"{tuple(value.shape)} here"
            )


def _check_settings(values: Mapping[str, Any]) -> None:
    """The settings, with messages in torch's own form."""
    if not values["lr"] >= 0.0:
        raise ValueError(f"Invalid learning rate: {values['lr']}")
    for key in ("momentum", "weight_decay"):
        if not values[key] >= 0.0:
            raise ValueError(f"Invalid {key} value: {values[key]}")
    if not 0.0 < values["damping"] < math.inf:
        raise ValueError(f"Invalid damping: {values['damping']} (above 0)")
    if not 0.0 <= values["factor_decay"] < 1.0:
        raise ValueError(f"Invalid factor_decay: {values['factor_decay']} (in [0, 1))")
    if values["kl_clip"] is not None and not values["kl_clip"] > 0.0:
        raise ValueError(f"Invalid kl_clip: {values['kl_clip']} (above 0, or None)")
    for key in ("factor_update_interval", "inverse_update_interval"):
        if not (isinstance(values[key], int) and values[key] >= 1):
            raise ValueError(f"Invalid {key}: {values[key]} (a whole number, at least 1)")
    if values["inverse_update_interval"] < values["factor_update_interval"]:
        raise ValueError(
            f"Invalid inverse_update_interval: {values['inverse_update_interval']} is below "
            f"factor_update_interval={values['factor_update_interval']}, so inverses would be "
            "computed again from the same factors"
        )
    for key, choices in (("method", get_args(Method)), ("normalization", get_args(Normalization))):
        if values[key] not in choices:
            raise ValueError(f"Invalid {key}: {values[key]!r} ({' or '.join(choices)})")
    if values["precondition_weight_decay"] and values["weight_decay"] == 0:
        raise ValueError("Invalid precondition_weight_decay: there is no weight_decay to add")
