"""KFAC in front of SGD, after Pauloski et al. 2020 (the papers' KFAC baseline).

The curvature and its scales are in `experiments.optimizers.kronecker`, the layers and what their
passes leave in `experiments.optimizers.kfac_layers`, what ranks do together in
`experiments.optimizers.kfac_parts`; here is when factors are updated and inverted, and the step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from experiments.optimizers.kfac_layers import Layer, find_layers
from experiments.optimizers.kfac_parts import owners_of_layers, whole_batch
from experiments.optimizers.kfac_settings import (
    Method,
    check_settings,
    check_state,
    inverse_entries,
    new_state,
)
from experiments.optimizers.kronecker import (
    Factors,
    Normalization,
    clip_scale,
    damped_inverses,
    eigenbases,
    precondition,
)
from experiments.training.ranks import ALONE, Ranks


class KFAC(Optimizer):
    """Gradients preconditioned by Kronecker-factored curvature, then SGD with heavy ball.

    The gradients of `torch.nn.Linear` and `torch.nn.Conv2d` layers are preconditioned and scaled
    by ν = min(1, sqrt(kl_clip / (lr² Σ Vᵀ∇W))); those of all other parameters are used as they
    are. What follows is `torch.optim.SGD`. Gradients (`p.grad`) are left as they were.

    The factors are computed in the step, from what hooks on the layers have kept of the forward
    and backward passes in training mode with gradients enabled, every `factor_update_interval`
    steps; the loss must be a mean over the batch, unscaled (or see `bind_loss_scale`), and an input
    must not be written over before the step. Several backward passes before a step count as batches
    of their own, of which the mean is taken, unless `share_batches` was called. The k-th update has
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
        check_settings(defaults)
        self._layers = find_layers(model, skip_layers)
        self._in_parts, self._ranks = False, ALONE
        self._owners = owners_of_layers(self._layers.values(), 1)
        super().__init__(model.named_parameters(), defaults)
        for p in self.param_groups[0]["params"]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p, requires_grad=False)
        hook = _forward_hook(weakref.ref(self))
        for layer in self._layers.values():
            self.state[layer.module.weight].update(new_state(layer.module, method))
            layer.module.register_forward_hook(hook, with_kwargs=True)

    def share_batches(self, ranks: Ranks) -> None:
        """Take all backward passes before a step, on all ranks, for parts of one batch.

        Of N images over p ranks, the loss of a pass with k images is k p / N times their mean, and
        gradients are averaged over the ranks. The factors are then those of the whole batch. A rank
        decomposes or inverts the factors of the layers that it owns and gives the others the
        result, so that the state is the same on all.

        Args:
            ranks: who shares the batches; each of them calls this before the first pass.
        """
        self._in_parts, self._ranks = True, ranks
        self._owners = owners_of_layers(self._layers.values(), ranks.world_size)

    def bind_loss_scale(self, loss_scale: Callable[[], Tensor]) -> None:
        """Take the backward pass for that of S times the loss, as float16 needs it.

        Args:
            loss_scale: gives S, () float32, of the passes since the last step.
        """
        for layer in self._layers.values():
            layer.loss_scale = loss_scale

    def skip_batch(self) -> None:
        """Forget the passes since the last step, of which there is to be none."""
        for layer in self._layers.values():
            layer.forget()

    # --- what happens in the forward pass --------------------------------------------------------

    def _capture(self, module: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
        """Keep what the factors need of a pass, where they are due; return the output."""
        layer = self._layers.get(module)  # None for a layer of a copied model
        if layer is None or not (module.training and output.requires_grad):
            return output
        # At other weights than the optimizer's own, as in a record of the gradient, a pass is no
        # part of a step.
        if layer.module.weight not in self.state:
            return output
        if not self._factors_are_due(layer):
            return output
        return layer.capture(inputs, output, self._setting("normalization"))

    # --- the step -------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step.

        Args:
            closure: computes the loss again, with its gradients.

        Returns:
            The closure's loss, if there is one.

        Raises:
            RuntimeError: a layer was called twice in one forward pass, its input was changed in
                place since, or, for `cholesky`, the damping is too small for the factors.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        for layer, factors in self._batch_factors():
            self._update_factors(layer, factors)
        self._update_inverses()
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

    def _factors_are_due(self, layer: Layer) -> bool:
        step: int = self.state[layer.module.weight]["step"]
        return bool(step % self._setting("factor_update_interval") == 0)

    def _batch_factors(self) -> Iterator[tuple[Layer, Factors]]:
        """The factors of the batches since the last step, of each layer that had a pass."""
        normalization = self._setting("normalization")
        layers = self._layers.values()
        if self._in_parts:
            parts = {layer: layer.take_factors(normalization) for layer in layers}
            due = {layer: parts[layer] for layer in layers if self._factors_are_due(layer)}
            yield from whole_batch(due, normalization, self._ranks).items()
            return
        for layer in layers:  # one at a time, so that no two layers' lie beside their averages
            batches = layer.take_factors(normalization)
            if batches:
                sides = [[getattr(b, side) for b in batches] for side in ("inputs", "outputs")]
                yield layer, Factors(*(sum(side) / len(side) for side in sides))

    def _update_factors(self, layer: Layer, factors: Factors) -> None:
        """Let the factors of a step's batches into the running averages."""
        state = self.state[layer.module.weight]
        state["factor_updates"] += 1
        weight = max(1 / state["factor_updates"], 1 - self._setting("factor_decay"))
        state["inputs_factor"].lerp_(factors.inputs, weight)
        state["outputs_factor"].lerp_(factors.outputs, weight)

    def _update_inverses(self) -> None:
        """Decompose or invert the factors, every `inverse_update_interval` steps."""
        due = []
        for layer in self._layers.values():
            state = self.state[layer.module.weight]
            on_time = state["step"] % self._setting("inverse_update_interval") == 0
            # A layer whose first gradient comes late does not wait for its first inverse.
            if state["factor_updates"] > 0 and (on_time or state["inversions"] == 0):
                due.append(layer)
        for layer in due:
            if self._owners[layer] == self._ranks.rank:
                self._invert(layer)
        for layer in due:
            state = self.state[layer.module.weight]
            self._ranks.copy_from(self._owners[layer], inverse_entries(state))
            state["inversions"] += 1

    def _invert(self, layer: Layer) -> None:
        state = self.state[layer.module.weight]
        factors = Factors(state["inputs_factor"], state["outputs_factor"])
        if self._setting("method") == "eigen":
            result = eigenbases(factors)
        else:
            damping, pi_correction = self._setting("damping"), self._setting("pi_correction")
            result = damped_inverses(factors, damping, pi_correction, name=layer.name)
        for key, value in result.items():
            state[key].copy_(value)

    def _precondition(self, gradients: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """ν V, in the parameters' dtypes, for all layers that have an inverse."""
        group = self.param_groups[0]
        preconditioned: dict[Layer, Tensor] = {}
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
            check_settings(self.param_groups[0])
            ids = state_dict["param_groups"][0]["params"]
            params = self.param_groups[0]["params"]
            loaded = {p: state_dict["state"].get(i, {}) for i, p in zip(ids, params, strict=True)}
            for p in params:
                check_state(state.get(p, {}), loaded[p])
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
