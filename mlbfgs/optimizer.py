"""MLBFGS as a torch optimizer: settings, state and what a user may ask.

What a step does stands in `mlbfgs.step`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from mlbfgs.collectives import (
    Collectives,
    Distribution,
    ProcessGroup,
    collectives_for,
    refuse_flat_shards,
)
from mlbfgs.damping import Bounds
from mlbfgs.diagnostics import CurvatureRecord, StepProducts, with_products
from mlbfgs.direction import DirectionKind
from mlbfgs.flat_state import FlatState, check_values, whole_tensors
from mlbfgs.groups import (
    KnownParameters,
    check_parameters,
    holds_state,
    is_active,
    names_of,
    parameters_of,
)
from mlbfgs.layout import Layout, is_dtensor
from mlbfgs.loading import by_name, checked_entry, entries_of, of_this_kind
from mlbfgs.partition import BlockPlan, BlockPolicy, assign_active
from mlbfgs.product import hessian_product
from mlbfgs.settings import KEYS, SHARED, Settings, normalize_group, refuse_in_group
from mlbfgs.step import take_step
from mlbfgs.variant import (
    RELEASED_BLOCKWISE,
    Variant,
    as_variant,
    check_effects,
)

VariantT = str | Mapping[str, Any] | Variant
ParamsT = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class MLBFGS(Optimizer):
    r"""mL-BFGS: L-BFGS on exponential averages of parameters and gradients, with damping.

    Algorithm 1 of "mL-BFGS: A Momentum-based L-BFGS for Distributed Large-Scale Neural Network
    Optimization" (TMLR 2023), with the weight decay and the heavy-ball momentum of the SLIM-QN
    paper, whose Algorithm 2 is the same with other settings (:class:`mlbfgs.SLIMQN`). For every
    block of parameters, with history size M and update interval T:

    .. code-block:: text

        g   = gradient + weight_decay * θ
        M_θ = β1 M_θ + (1 - β1) θ,   M_g = β2 M_g + (1 - β2) g
        d   = g                      in the first 2T steps
              H g                    afterwards (L-BFGS two-loop product over the last M pairs),
                                     shortened where gᵀd grows too fast (variant="guarded")
        v   = momentum * v + d
        θ   = θ - lr v
        every T steps, from the second time on:
            s = M_θ - (M_θ, T steps ago),   y = M_g - (M_g, T steps ago)
            ŷ = τ y + (1 - τ) s,  τ <= damping such that σ_L <= sᵀŷ / sᵀs <= σ_H
            the pair (s, ŷ) enters H

    State: 4 + 2M numbers for each parameter (averages, snapshots, history), one more with
    momentum, all allocated at construction. There is no host synchronisation but one every T
    steps. A pair that is not finite or whose sᵀŷ is rounding error is skipped and counted; the
    logger `mlbfgs` warns of that, of curvature at its bound and of a long first direction.
    A frozen parameter (`requires_grad` is False) has no state and takes no time until it is thawed
    or given a gradient.

    Args:
        params: parameters, named parameters, or groups of either. `lr`, `momentum`,
            `weight_decay` and `maximize` may differ between groups, the other settings may not.
        lr: learning rate, a number or a tensor.
        momentum: heavy-ball coefficient, applied after preconditioning.
        weight_decay: added to the gradient as `weight_decay * θ` before the averages.
        betas: β1 of the parameters' average and β2 of the gradients'; one number for both.
        history_size: M, the number of pairs kept.
        update_interval: T, steps between pairs; also fixes the warm-up of 2T steps.
        damping: τ0 in (0, 1]; 1 mixes nothing of s into y (SLIM-QN prints 1 - τ0).
        curvature_bounds: (σ_L, σ_H) of adaptive damping, or None for none.
        blocks: Hessian blocks, see :mod:`mlbfgs.partition`; None is one block.
        direction: what stands for H g after the warm-up: "hessian" (H g), or one of two controls,
            "gamma_gradient" (γ g) and "norm_matched_gradient" (g scaled to ‖H g‖, in every block).
        variant: "guarded", the algorithm above with a bound on how fast gᵀd may grow
            (:mod:`mlbfgs.growth`); "paper", without it; "released", what the authors' released
            code does instead; or a mapping of switches, see :mod:`mlbfgs.variant`, with an optional
            `base`, one of these names ("paper" where it is left out).
        outside_blocks: regular expressions; parameters whose names match are in no block: their
            direction is their gradient.
        history_dtype: of the pairs, `torch.float32`, `torch.bfloat16` or `torch.float64`; None is
            float32 (float64 if a parameter is float64), the dtype of everything else in the state.
        maximize: ascend instead of descend.
        distribution: "replicated" (every rank keeps everything), "blocks" (a rank keeps whole
            blocks) or "sharded" (even parts; required for FSDP2). In the last two each rank keeps
            its part of the state and moves its part of the parameters; gradients must be equal on
            all ranks, as DDP leaves them. See docs/distributed.md.
        process_group: the ranks; None is torch.distributed's default group.

    Raises:
        ValueError: a setting is out of its range or has no effect, parameters are complex or on
            several devices, or the block policy does not fit them.

    Example:
        >>> optimizer = MLBFGS(model.named_parameters(), lr=0.1, weight_decay=2e-4)
        >>> loss_fn(model(inputs), targets).backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()
    """

    #: What `variant="released"` stands for.
    _released: Variant = RELEASED_BLOCKWISE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        betas: float | tuple[float, float] = (0.999, 0.999),
        history_size: int = 10,
        update_interval: int = 50,
        damping: float = 0.99,
        curvature_bounds: Bounds | None = (0.01, 1.5),
        blocks: BlockPolicy = None,
        direction: DirectionKind = "hessian",
        variant: VariantT = "guarded",
        outside_blocks: Sequence[str] = (),
        history_dtype: torch.dtype | None = None,
        maximize: bool = False,
        distribution: Distribution = "replicated",
        process_group: ProcessGroup | None = None,
    ):
        if history_dtype not in (None, torch.float32, torch.bfloat16, torch.float64):
            raise ValueError(
                f"Invalid history_dtype: {history_dtype} (float32, bfloat16, float64 or None)"
            )
        switches, asked = as_variant(variant, self._released)
        defaults: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "betas": betas,
            "history_size": history_size,
            "update_interval": update_interval,
            "damping": damping,
            "curvature_bounds": curvature_bounds,
            "direction": direction,
            "variant": switches.switches(),
            "maximize": maximize,
        }
        normalize_group(defaults, self._released)
        # In `defaults`, betas would pass for Adam's: OneCycleLR and CyclicLR would cycle β1 instead
        # of the momentum. So the groups get them in `add_param_group`.
        self._betas = defaults.pop("betas")
        self._blocks = blocks
        self._outside = outside_blocks
        self._history_dtype = history_dtype
        self._records: list[CurvatureRecord] = []
        self._unread = False
        self._built: FlatState | None = None
        self._known = KnownParameters([])
        self._frozen: list[Tensor] = []
        self._settings = Settings(self._released)
        self._collectives: Collectives | None = None
        self._ranks: tuple[str, ProcessGroup | None] = (distribution, process_group)
        super().__init__(params, defaults)
        check_effects(switches, asked, self.param_groups, with_outside=len(outside_blocks) > 0)
        self._rebuild({})

    # --- one step --------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        A parameter without a gradient does not move, and its averages stay as they are; without
        any gradient nothing happens at all.

        Args:
            closure: computes the loss and the gradients anew; called once.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    # what happens depends on the step number: a compiled step would be compiled again and again
    @_disable_dynamo  # as torch.optim does; torch.compiler.disable imports torch._dynamo at once
    def _step(self) -> None:
        shared = self._settings.shared(self.param_groups)
        flat = self._flat_state()
        grads = flat.layout.gradients()
        if all(g is None for g in grads) and not flat.collectives.copies:
            return
        if any(g is not None and g.is_sparse for g in grads):
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
        flat.asked = self._settings.pending
        records = take_step(flat, self.param_groups, shared, grads)
        if records is not None:
            self._records, self._unread = records, shared.variant.same_step
            self._settings.take(flat.heard)
        flat.write_counters()

    # --- what a user may ask -------------------------------------------------------------------

    @torch.no_grad()
    def hessian_vector(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """H applied to a vector: what gradients are multiplied with after the warm-up.

        H itself, whatever `direction` makes of it.

        Args:
            vectors: one tensor for each parameter, in the order of the parameter groups, each of
                its parameter's shape.

        Returns:
            The product, in the same order and shapes, in the dtype of the averages. Before the
            first pair H is the identity.

        Raises:
            ValueError: there are other than the parameters' numbers or shapes.
        """
        return hessian_product(self._flat_state(), parameters_of(self.param_groups), vectors)

    @torch.no_grad()
    def parameter_averages(self) -> list[Tensor]:
        """M_θ, the parameters' exponential average (M Eq. (5)), for instance to evaluate there.

        Ranks that share the state call this together.

        Returns:
            One tensor for each parameter, in the order of the parameter groups and in the dtype of
            the averages; before its first gradient, and while it is frozen, the parameter itself.
        """
        flat = self._flat_state()
        layout = flat.layout
        average = flat.flat["param_snapshot"] + flat.flat["param_progress"]
        places = zip(layout.params, whole_tensors(average, flat), flat.seeded, strict=True)
        known = {p: tensor for p, tensor, seeded in places if seeded}
        params = parameters_of(self.param_groups)
        return [known[p] if p in known else p.detach().to(layout.dtype) for p in params]

    def curvature_records(self) -> list[dict[str, int | float | bool]]:
        """What happened at the newest pair update, one record for each block.

        Returns:
            The fields of :class:`mlbfgs.diagnostics.CurvatureRecord`; empty before the first pair
            update, after a load, and after `add_param_group` or another change that lays the
            state out anew. Reading them waits for nothing, but once for the direction of a step
            that used its own pair (`same_step`).
        """
        if self._unread:
            numbers = self._flat_state().of_step.T.tolist()
            known = zip(self._records, numbers, strict=False)  # parameters in no block come last
            self._records = [with_products(r, StepProducts(*row)) for r, row in known]
            self._unread = False
        return [record.as_dict() for record in self._records]

    def communication(self) -> dict[str, Any]:
        """What this rank and the others told each other so far.

        Returns:
            `steps`; `last_step` and `total`: bytes by collective (`all_gather_parameters`,
            `all_reduce_step`, `all_reduce_products`, `all_reduce_gram`, with `same_step`
            `all_gather_gradients`, and in `total` what construction and loading took). Counted are
            the bytes of the result: n parameters, or the numbers summed. What crosses a wire
            follows from the algorithm, see docs/distributed.md.
        """
        collectives = self._flat_state().collectives
        return {
            "steps": collectives.steps,
            "last_step": dict(collectives.in_step),
            "total": dict(collectives.total),
        }

    def plan(self) -> BlockPlan:
        """The blocks, their sizes and the memory of this optimizer."""
        flat = self._flat_state()
        layout, history = flat.layout, flat.history.W
        place = {p: i for i, p in enumerate(layout.params)}
        order = [place[p] for p in parameters_of(self.param_groups) if p in place]
        sizes = [layout.params[i].numel() for i in order]
        return BlockPlan(
            names=tuple(layout.names[i] for i in order),
            sizes=tuple(sizes),
            blocks=tuple(layout.block_of[i] for i in order),
            history_size=flat.history.history_size,
            state_bytes=flat.state_bytes,
            history_bytes=history.numel() * history.element_size(),
            kept=tuple(len(r) for r in layout.ranges) if flat.collectives.copies else (),
            owners=tuple(owner for owner in layout.owners if owner is not None),
            outside=flat.outside,
            padding=layout.length - sum(shape.numel() for shape in layout.shapes),
        )

    # --- groups and state ----------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; works in the middle of training.

        The new parameters have no part in the pairs kept so far. The state is allocated anew and
        copied.

        Args:
            param_group: `params` and any of `lr`, `momentum`, `weight_decay`, `maximize`. In the
                middle of training, what groups share is as in the first.

        Raises:
            ValueError: see the class.
        """
        if isinstance(param_group, dict):  # else torch refuses it
            refuse_in_group(param_group, type(self).__name__)
            shared = {**self.defaults, "betas": self._betas}
            if self._built is not None:
                self._flat_state()
                shared = self.param_groups[0]
            for key in SHARED:
                param_group.setdefault(key, shared[key])
        super().add_param_group(param_group)
        try:
            normalize_group(self.param_groups[-1], self._released)
            if self._built is not None:
                self._rebuild(self.state)
        except Exception:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """The state by number of the parameter, and the groups: see torch.optim.Optimizer."""
        self._flat_state()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, written under any block policy and on any device.

        Parameters are matched by name where both sides have names, without what wrappers put into
        them ("module.", "_orig_mod."), otherwise by their order. Under other blocks than those in
        which its pairs were accepted, a pair that would not have been accepted is dropped, with a
        warning, and so are pairs and averages that are not finite.

        torch would cast every tensor to the dtype of its parameter, which ruins a float32 history
        of bfloat16 parameters; here values keep the dtype of this optimizer's own state.

        Args:
            state_dict: from `state_dict()`. Missing keys keep their initial values. Of a state of
                `torch.optim.SGD` momentum buffers, `lr`, `momentum`, `weight_decay` and `maximize`
                are taken over, of another optimizer's nothing; a warning says so.

        Raises:
            ValueError: groups, names, shapes or dtypes do not fit, or a value makes no sense.
        """
        given: dict[str, Any] = {}
        # until the loaded ones are known to fit
        before: list[Any] = [self.param_groups, self.state]
        own = True

        def take_state(_: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            nonlocal own
            loaded = by_name(loaded, self.param_groups)
            loaded, own = of_this_kind(loaded, self.param_groups, type(self).__name__)
            given.update(loaded)
            return {**loaded, "state": {}}

        def put_state(_: Optimizer) -> None:
            values = entries_of(given, self.param_groups)
            self._rebuild(values, instead_of=before)
            if own:
                self._flat_state().warn_of_missing(values)

        hooks = [
            self.register_load_state_dict_pre_hook(take_state),
            self.register_load_state_dict_post_hook(put_state, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        except Exception:
            if before:
                self.param_groups, self.state = before
            raise
        finally:
            for hook in hooks:
                hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy needs; flat storage is laid out anew from the per-parameter state."""
        self._flat_state()
        self.curvature_records()  # reads what lies in flat storage
        kept = ("_betas", "_blocks", "_outside", "_history_dtype", "_records", "_collectives")
        own = {key: self.__dict__[key] for key in kept}
        state = {p: dict(entry) for p, entry in self.state.items()}
        ranks = (self._ranks[0], None)  # `_collectives` has the group, which cannot be copied
        if _on_mesh(parameters_of(self.param_groups)):
            own["_collectives"] = None  # the parameters bring their ranks
        return {
            **super().__getstate__(),
            **own,
            "state": defaultdict(dict, state),
            "_ranks": ranks,
            "_built": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or unpickled optimizer; torch also calls this with loaded groups."""
        super().__setstate__(state)
        self._settings = Settings(self._released)
        for group in self.param_groups:
            # a state of before there were switches is one of the printed algorithm
            own = {**self.defaults, "betas": self._betas, "variant": "paper"}
            for key in KEYS:
                group.setdefault(key, own[key])
            normalize_group(group, self._released)
        if "_blocks" in state:  # a copy, not a load
            records = self._records
            self._rebuild(self.state)
            self._records = records

    @torch.inference_mode(False)  # or the state could not be written to outside of it
    @torch.no_grad()
    def _rebuild(
        self, values: Mapping[Tensor, Mapping[str, Any]], instead_of: list[Any] | None = None
    ) -> None:
        """Lay out flat storage for the groups as they are now and fill it from `values`.

        Args:
            values: for each parameter its state.
            instead_of: emptied, and the state kept so far given up, before anything is allocated
                and after `values` are known to fit: else a load would need that memory as well. If
                the values are the state itself, written in place, it stays.
        """
        everything, all_names = parameters_of(self.param_groups), names_of(self.param_groups)
        group_of = {p: i for i, group in enumerate(self.param_groups) for p in group["params"]}
        names = all_names or [f"parameter {i}" for i in range(len(everything))]
        values = {
            p: checked_entry(values[p], p, name)
            for p, name in zip(everything, names, strict=True)
            if p in values
        }
        active = [is_active(p) or holds_state(values.get(p, {})) for p in everything]
        blocks, outside = assign_active(
            self._blocks,
            self._outside,
            all_names,
            [p.numel() for p in everything],
            [group_of[p] for p in everything],
            active,
        )
        params = [p for p, here in zip(everything, active, strict=True) if here]
        check_parameters(params)
        refuse_flat_shards(params)
        groups = [group_of[p] for p in params]
        shared = self._settings.shared(self.param_groups)
        collectives = self._collectives
        if collectives is None or (
            self._built is not None and _on_mesh(self._built.layout.params) != _on_mesh(params)
        ):
            collectives = collectives_for(params, *self._ranks)
        names = [name for name, here in zip(names, active, strict=True) if here]
        layout = Layout(params, groups, blocks, collectives.spread, names)
        collectives.lay_out(layout)
        settings: dict[str, Any] = {
            "history_size": shared.history_size,
            "history_dtype": self._history_dtype,
            "with_momentum": any(group["momentum"] != 0 for group in self.param_groups),
            "variant": shared.variant,
            "outside": outside,
        }
        flat = None
        if instead_of is not None:
            check_values(values, layout, collectives, shared.history_size)
            kept, self._built = self._built, None
            if kept is not None and kept.is_filled_by(values, layout, collectives, settings):
                flat = kept
            instead_of.clear()
            del kept
        flat = flat or FlatState(layout, collectives, **settings)
        flat.load(values, shared.curvature_bounds)
        self._built, self._collectives = flat, collectives
        self._records, self._unread = [], False
        exposed = flat.expose()
        self.state.clear()
        self.state.update(exposed)
        self._known = KnownParameters(self.param_groups)
        self._frozen = [p for p, here in zip(everything, active, strict=True) if not here]

    def _flat_state(self) -> FlatState:
        """The state, laid out anew from `self.state` where something was changed from outside.

        That is: a frozen parameter was thawed; a group was given momentum; a switch of the variant
        was changed; parameters are of another dtype, device or memory format, or were exchanged for
        others of their shapes (as for FSDP2's); tensors of the state were exchanged (as by whoever
        moves them to another device and back) or removed.

        Raises:
            RuntimeError: parameters or groups are missing or were added behind our back.
            ValueError: `history_size` was changed, or a setting in the groups makes no sense.
        """
        flat = self._built
        if flat is None:  # there was no memory for a load
            self._rebuild(self.state)
            return self._flat_state()
        wanted = self.param_groups[0].get("history_size")
        if wanted != flat.history.history_size:
            raise ValueError(
                f"history_size cannot change from {flat.history.history_size} to {wanted} "
                "after construction"
            )
        variant = self._settings.shared(self.param_groups).variant
        exchanged = not self._known.are_in(self.param_groups)
        if exchanged:
            refuse_flat_shards(parameters_of(self.param_groups))
            self._known.check_exchanged(self.param_groups)
        if (
            exchanged
            or not flat.is_shown_by(self.state)
            or (
                "momentum_buffer" not in flat.flat and any(g["momentum"] for g in self.param_groups)
            )
            or (flat.history.variant is not variant and flat.history.variant != variant)
            or not flat.layout.fits()
            or any(map(is_active, self._frozen))
        ):
            self._rebuild(flat.without_reshaped(self.state))
        assert self._built is not None
        return self._built


def _on_mesh(params: Sequence[Tensor]) -> bool:
    return any(is_dtensor(p) for p in params)
