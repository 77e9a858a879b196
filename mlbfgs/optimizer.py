"""MLBFGS and SLIMQN as torch optimizers.

A step reads as Algorithm 1 of M (Algorithm 2 of S), over segments of the flat vector instead of
whole vectors, so that a segment's numbers are still in cache when the next operation wants them:

    1. g = gradient + wd θ;  M_θ <- β1 M_θ + (1-β1) θ;  M_g <- β2 M_g + (1-β2) g;  p += W g
    2. c = C p
    3. d = γ g + Wᵀ c;  v <- m v + d;  θ <- θ - lr v
    4. every T steps: a pair (s, ŷ) from the averages and their snapshots, then new snapshots

During the first 2T steps d = g. g is gathered twice, in 1 and in 3: reading it again is cheaper
than keeping a flat copy, which would cost a write and n numbers of memory.

Legend: `n` numbers in all parameters, `M` history size, `T` update interval, `B` blocks;
flat vectors are (n,), W is (2M, n).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from mlbfgs.damping import Bounds, damp
from mlbfgs.diagnostics import CurvatureRecord, curvature_record
from mlbfgs.flat_state import FlatState
from mlbfgs.layout import Layout, Segment
from mlbfgs.partition import BlockPlan, BlockPolicy, assign_blocks

logger = logging.getLogger(__name__)

ParamsT = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

#: Settings of the one curvature history: the same in every parameter group.
SHARED = ("betas", "history_size", "update_interval", "damping", "curvature_bounds")


@dataclass(frozen=True)
class _Part:
    """What a step touches of one segment: the pieces that have a gradient."""

    incomplete: bool
    theta: list[Tensor]
    gradients: list[Tensor]
    work: list[Tensor]
    param_average: list[Tensor]
    grad_average: list[Tensor]
    momentum_buffer: list[Tensor]


class MLBFGS(Optimizer):
    r"""mL-BFGS: L-BFGS on exponential averages of parameters and gradients, with damping.

    Algorithm 1 of "mL-BFGS: A Momentum-based L-BFGS for Distributed Large-Scale Neural Network
    Optimization" (TMLR 2023), with the weight decay and the heavy-ball momentum of the SLIM-QN
    paper, whose Algorithm 2 is the same with other settings (:class:`SLIMQN`). For every block of
    parameters, with history size M and update interval T:

    .. code-block:: text

        g   = gradient + weight_decay * θ
        M_θ = β1 M_θ + (1 - β1) θ,   M_g = β2 M_g + (1 - β2) g
        d   = g                      in the first 2T steps
              H g                    afterwards (L-BFGS two-loop product over the last M pairs)
        v   = momentum * v + d
        θ   = θ - lr v
        every T steps, from the second time on:
            s = M_θ - (M_θ, T steps ago),   y = M_g - (M_g, T steps ago)
            ŷ = τ y + (1 - τ) s,  τ <= damping such that σ_L <= sᵀŷ / sᵀs <= σ_H
            the pair (s, ŷ) enters H

    State: 4 + 2M numbers for each parameter (averages, snapshots, history), one more with
    momentum, all allocated at construction. There is no host synchronisation but one every T
    steps. A pair that is not finite or whose sᵀŷ is rounding error is skipped and counted.

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
        history_dtype: of the pairs, `torch.float32`, `torch.bfloat16` or `torch.float64`; None is
            float32 (float64 if a parameter is float64), the dtype of everything else in the state.
        maximize: ascend instead of descend.

    Raises:
        ValueError: a setting is out of its range, parameters are complex or on several devices, or
            the block policy does not fit them.

    Example:
        >>> optimizer = MLBFGS(model.named_parameters(), lr=0.1, weight_decay=2e-4)
        >>> loss_fn(model(inputs), targets).backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()
    """

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
        history_dtype: torch.dtype | None = None,
        maximize: bool = False,
    ):
        if history_dtype not in (None, torch.float32, torch.bfloat16, torch.float64):
            raise ValueError(
                f"Invalid history_dtype: {history_dtype} (float32, bfloat16, float64 or None)"
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "history_size": history_size,
            "update_interval": update_interval,
            "damping": damping,
            "curvature_bounds": None if curvature_bounds is None else tuple(curvature_bounds),
            "maximize": maximize,
        }
        # In `defaults`, betas would pass for Adam's: OneCycleLR and CyclicLR would cycle β1 instead
        # of the momentum. So the groups get them in `add_param_group`.
        pair = (betas, betas) if isinstance(betas, (int, float)) else tuple(betas)
        _check_group({**defaults, "betas": pair})
        self._betas = pair
        self._blocks = blocks
        self._history_dtype = history_dtype
        self._records: list[CurvatureRecord] = []
        self._built: FlatState | None = None
        super().__init__(params, defaults)
        self._rebuild({})

    # --- the algorithm -------------------------------------------------------------------------

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
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _step(self) -> None:
        flat = self._flat_state()
        layout, history = flat.layout, flat.history
        grads = [p.grad for p in layout.params]
        if all(g is None for g in grads):
            return
        if any(g is not None and g.is_sparse for g in grads):
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
        flat.step += 1
        self._seed_averages(flat)
        interval = cast(int, self._shared("update_interval"))
        pair_due = flat.step % interval == 0 and flat.step > interval
        preconditioned = [flat.step > 2 * interval and pairs > 0 for pairs in history.pairs]
        theta, gradients = layout.cut(layout.params), layout.cut(grads)
        p = history.new_projection()
        g_dot_g = p.new_zeros(len(layout.blocks))

        parts = [_part(flat, segment, theta, gradients) for segment in layout.segments]
        for segment, part in zip(layout.segments, parts, strict=True):  # Alg. 1, lines 4-8
            g = self._gather(flat, segment, part)
            self._update_averages(part)
            if pair_due:
                g_dot_g[segment.block].add_(torch.dot(g, g))
            if preconditioned[segment.block]:
                history.project(p, segment.block, segment.start, segment.stop, g)
            else:
                self._descend(segment, part)

        c = history.coefficients(p)
        if any(preconditioned):
            rows = c.to(layout.dtype)
            # Alg. 1, lines 10-11; backwards: what the loop above read last is still in cache
            for segment, part in zip(reversed(layout.segments), reversed(parts), strict=True):
                if preconditioned[segment.block]:
                    g = self._gather(flat, segment, part)
                    history.precondition_(rows, segment.block, segment.start, segment.stop, g)
                    self._descend(segment, part)

        if pair_due:  # Alg. 1, lines 13-17
            self._update_pairs(flat, torch.stack([g_dot_g, *_gram_products(flat, p, c)]))
        if flat.step % interval == 0:
            flat.flat["param_snapshot"].copy_(flat.flat["param_average"])
            flat.flat["grad_snapshot"].copy_(flat.flat["grad_average"])
        flat.write_counters(self.state)

    def _gather(self, flat: FlatState, segment: Segment, part: _Part) -> Tensor:
        """The segment's gradient with weight decay, in the work buffer (S Alg. 2, line 4)."""
        group = self.param_groups[segment.group]
        if part.incomplete:
            flat.work.zero_()
        decay = group["weight_decay"]
        if decay != 0 and flat.sums_in_one_pass and not group["maximize"]:
            # the same sums as below, in one pass: there are no kernel launches to save on a CPU
            for out, g, t in zip(part.work, part.gradients, part.theta, strict=True):
                torch.add(g, t, alpha=decay, out=out)
        elif part.theta:
            torch._foreach_copy_(part.work, part.gradients)
            if group["maximize"]:
                torch._foreach_neg_(part.work)
            if decay != 0:
                torch._foreach_add_(part.work, part.theta, alpha=decay)
        return flat.work[: segment.stop - segment.start]

    def _update_averages(self, part: _Part) -> None:
        """The segment's M_θ and M_g (Alg. 1, line 6); its gradient lies in the work buffer."""
        beta1, beta2 = cast(tuple[float, float], self._shared("betas"))
        if part.theta:
            dtype = part.work[0].dtype  # lerp wants equal dtypes: low-precision θ is widened
            theta = [t if t.dtype == dtype else t.to(dtype) for t in part.theta]
            torch._foreach_lerp_(part.param_average, theta, 1 - beta1)
            torch._foreach_lerp_(part.grad_average, part.work, 1 - beta2)

    def _descend(self, segment: Segment, part: _Part) -> None:
        """Heavy ball and update of the segment; its direction lies in the work buffer."""
        group = self.param_groups[segment.group]
        if not part.theta:
            return
        step = part.work
        if group["momentum"] != 0:
            torch._foreach_mul_(part.momentum_buffer, group["momentum"])
            torch._foreach_add_(part.momentum_buffer, step)
            step = part.momentum_buffer
        if isinstance(group["lr"], Tensor):  # as an alpha the host would have to read it
            torch._foreach_sub_(part.theta, torch._foreach_mul(step, group["lr"]))
        else:
            torch._foreach_add_(part.theta, step, alpha=-group["lr"])

    def _update_pairs(self, flat: FlatState, direction: Tensor) -> None:
        """One pair for every block (Alg. 1, lines 14-16); holds the one host synchronisation."""
        history = flat.history
        averages = (flat.flat["param_average"], flat.flat["grad_average"])
        snapshots = (flat.flat["param_snapshot"], flat.flat["grad_snapshot"])
        products = direction.new_zeros(3, len(flat.layout.blocks))
        for block in range(len(flat.layout.blocks)):
            for a, b in history.tiles(block):
                s, y = (new[a:b] - old[a:b] for new, old in zip(averages, snapshots, strict=True))
                dots = torch.stack([torch.dot(s, s), torch.dot(s, y), torch.dot(y, y)])
                products[:, block].add_(dots)
        numbers = torch.cat([products, direction]).T.tolist()

        self._records = []
        for block, (ss, sy, yy, *of_direction) in enumerate(numbers):
            pair = damp(
                *(ss, sy, yy),
                tau0=cast(float, self._shared("damping")),
                bounds=cast("Bounds | None", self._shared("curvature_bounds")),
                eps=torch.finfo(flat.layout.dtype).eps,
            )
            if pair.accepted:
                history.push(block, averages, snapshots, pair.tau)
                flat.damped[block] += pair.damped
            else:
                flat.skipped[block] += 1
                logger.warning(
                    "step %d, block %d: pair skipped, sTs = %.3g, sTy = %.3g, yTy = %.3g",
                    *(flat.step, block, ss, sy, yy),
                )
            self._records.append(curvature_record(flat, block, pair, *of_direction))

    def _seed_averages(self, flat: FlatState) -> None:
        """A parameter's averages start at its first value and gradient (Alg. 1, line 1).

        So do its snapshots: a parameter that joins late has no part in the current s and y.
        """
        if all(flat.seeded):
            return
        for i, p in enumerate(flat.layout.params):
            if p.grad is not None and not flat.seeded[i]:
                group = self.param_groups[flat.layout.group_of[i]]
                g = p.grad.to(flat.layout.dtype)
                g = -g if group["maximize"] else g
                g = g.add(p, alpha=group["weight_decay"]) if group["weight_decay"] != 0 else g
                for moment, value in (("average", (p, g)), ("snapshot", (p, g))):
                    flat.views[f"param_{moment}"][i].copy_(value[0])
                    flat.views[f"grad_{moment}"][i].copy_(value[1])
                flat.seeded[i] = True

    # --- what a user may ask -------------------------------------------------------------------

    @torch.no_grad()
    def hessian_vector(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """H applied to a vector: what gradients are multiplied with after the warm-up.

        Args:
            vectors: one tensor for each parameter, in the order of the parameter groups, each of
                its parameter's shape.

        Returns:
            The product, in the same order and shapes, in the dtype of the averages. Before the
            first pair H is the identity.
        """
        flat = self._flat_state()
        layout, history = flat.layout, flat.history
        vector = torch.empty(layout.numel, dtype=layout.dtype, device=layout.device)
        views = dict(zip(layout.params, layout.views(vector), strict=True))
        for p, given in zip(self._parameters(), vectors, strict=True):
            views[p].copy_(given)
        projection = history.new_projection()
        for s in layout.segments:
            history.project(projection, s.block, s.start, s.stop, vector[s.start : s.stop])
        rows = history.coefficients(projection).to(layout.dtype)
        for s in layout.segments:
            history.precondition_(rows, s.block, s.start, s.stop, vector[s.start : s.stop])
        return [views[p] for p in self._parameters()]

    def curvature_records(self) -> list[dict[str, int | float | bool]]:
        """What happened at the newest pair update, one record for each block.

        Returns:
            The fields of :class:`mlbfgs.diagnostics.CurvatureRecord`; empty before the first pair
            update and after a load. Reading them waits for nothing.
        """
        return [record.as_dict() for record in self._records]

    def plan(self) -> BlockPlan:
        """The blocks, their sizes and the memory of this optimizer."""
        flat = self._flat_state()
        params = self._parameters()
        block_of = dict(zip(flat.layout.params, flat.layout.block_of, strict=True))
        history = flat.history.W
        return BlockPlan(
            names=tuple(self._names() or [f"parameter {i}" for i in range(len(params))]),
            sizes=tuple(p.numel() for p in params),
            blocks=tuple(block_of[p] for p in params),
            history_size=flat.history.history_size,
            state_bytes=flat.state_bytes,
            history_bytes=history.numel() * history.element_size(),
        )

    # --- groups and state ----------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; works in the middle of training.

        The new parameters have no part in the pairs kept so far. The state is allocated anew and
        copied.

        Args:
            param_group: `params` and any of `lr`, `momentum`, `weight_decay`, `maximize`.

        Raises:
            ValueError: see the class.
        """
        if isinstance(param_group, dict):  # else torch refuses it
            param_group.setdefault("betas", self._betas)
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
            _check_parameters(self._parameters())
            if self._built is not None:
                self._rebuild(self.state)
        except Exception:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, written under any block policy and on any device.

        torch would cast every tensor to the dtype of its parameter, which ruins a float32 history
        of bfloat16 parameters; here values keep the dtype of this optimizer's own state.

        Args:
            state_dict: from `state_dict()`. Missing keys keep their initial values, so that a
                state of `torch.optim.SGD` loads too and its momentum buffers are used.

        Raises:
            ValueError: groups or shapes do not fit.
        """
        given: dict[str, Any] = {}

        def take_state(_: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            given.update(loaded)
            return {**loaded, "state": {}}

        def put_state(_: Optimizer) -> None:
            ids = [i for group in given["param_groups"] for i in group["params"]]
            params = [p for group in self.param_groups for p in group["params"]]
            state = given["state"]
            self._rebuild({p: state.get(i, {}) for i, p in zip(ids, params, strict=True)})

        before = self.register_load_state_dict_pre_hook(take_state)
        after = self.register_load_state_dict_post_hook(put_state, prepend=True)
        groups, state = self.param_groups, self.state
        try:
            super().load_state_dict(state_dict)
        except Exception:
            self.param_groups, self.state = groups, state
            raise
        finally:
            before.remove()
            after.remove()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy needs; flat storage is laid out anew from the per-parameter state."""
        kept = ("_betas", "_blocks", "_history_dtype", "_records")
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or unpickled optimizer; torch also calls this with loaded groups."""
        super().__setstate__(state)
        for group in self.param_groups:
            own = {**self.defaults, "betas": self._betas}
            for key in (*SHARED, "lr", "momentum", "weight_decay", "maximize"):
                group.setdefault(key, own[key])
            group["betas"] = tuple(group["betas"])
            if group["curvature_bounds"] is not None:
                group["curvature_bounds"] = tuple(group["curvature_bounds"])
            _check_group(group)
        if "_blocks" in state:  # a copy, not a load
            records = self._records
            self._rebuild(self.state)
            self._records = records

    def _rebuild(self, values: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Lay out flat storage for the groups as they are now and fill it from `values`."""
        params = self._parameters()
        _check_parameters(params)
        group_of = {p: i for i, group in enumerate(self.param_groups) for p in group["params"]}
        blocks = assign_blocks(self._blocks, self._names(), [p.numel() for p in params])
        flat = FlatState(
            Layout(params, [group_of[p] for p in params], blocks),
            history_size=cast(int, self._shared("history_size")),
            history_dtype=self._history_dtype,
            with_momentum=any(group["momentum"] != 0 for group in self.param_groups),
        )
        with torch.no_grad():
            flat.load(values)
        self._built, self._records = flat, []
        exposed = flat.expose()
        self.state.clear()
        self.state.update(exposed)

    def _flat_state(self) -> FlatState:
        """The state, laid out anew where a group was given momentum or memory was reordered."""
        flat = self._built
        assert flat is not None
        if "momentum_buffer" not in flat.flat and any(g["momentum"] for g in self.param_groups):
            self._rebuild(dict(self.state))
        elif not flat.layout.fits():  # say, the model was made channels-last since
            self._rebuild(dict(self.state))
        if self._shared("history_size") != flat.history.history_size:
            raise ValueError(
                f"history_size cannot change from {flat.history.history_size} to "
                f"{self._shared('history_size')} after construction"
            )
        assert self._built is not None
        return self._built

    def _shared(self, key: str) -> object:
        """A setting of the one curvature history, which no group may have for itself."""
        value = self.param_groups[0][key]
        for group in self.param_groups[1:]:
            if group[key] != value:
                raise ValueError(
                    f"{key} must be the same in all parameter groups, not {value!r} and "
                    f"{group[key]!r}: there is one curvature history"
                )
        return cast(object, value)

    def _parameters(self) -> list[Tensor]:
        """Every parameter once, in the order of the groups."""
        return list(dict.fromkeys(p for group in self.param_groups for p in group["params"]))

    def _names(self) -> list[str] | None:
        """The parameters' names where they were given, in the same order."""
        if "param_names" not in self.param_groups[0]:
            return None
        names: dict[Tensor, str] = {}
        for group in self.param_groups:
            for name, p in zip(group["param_names"], group["params"], strict=True):
                names.setdefault(p, name)
        return list(names.values())


class SLIMQN(MLBFGS):
    """SLIM-QN: the same algorithm with the first paper's settings.

    "SLIM-QN: A stochastic, light, momentumized quasi-Newton optimizer for deep neural networks",
    Algorithm 2 and Tables 3 to 6: β1 = β2 = 0.9, damping 1 - τ0 = 0.05, (σ_L, σ_H) = (0.01, 1),
    L = 100 (called `update_interval` here), M = 10. The paper prints σ_H = 1 although its rule (4)
    asks for σ_H > 1: then a pair with μ >= 1 is damped to ŷ = s.

    Args:
        params: see :class:`MLBFGS`.
        lr: see :class:`MLBFGS`.
        momentum: see :class:`MLBFGS`.
        weight_decay: see :class:`MLBFGS`.
        betas: see :class:`MLBFGS`.
        history_size: see :class:`MLBFGS`.
        update_interval: see :class:`MLBFGS`.
        damping: τ0, which is one minus the "damping" of the paper's tables.
        curvature_bounds: see :class:`MLBFGS`.
        blocks: see :class:`MLBFGS`.
        history_dtype: see :class:`MLBFGS`.
        maximize: see :class:`MLBFGS`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        betas: float | tuple[float, float] = (0.9, 0.9),
        history_size: int = 10,
        update_interval: int = 100,
        damping: float = 0.95,
        curvature_bounds: Bounds | None = (0.01, 1.0),
        blocks: BlockPolicy = None,
        history_dtype: torch.dtype | None = None,
        maximize: bool = False,
    ):
        super().__init__(
            params,
            lr,
            momentum,
            weight_decay,
            betas=betas,
            history_size=history_size,
            update_interval=update_interval,
            damping=damping,
            curvature_bounds=curvature_bounds,
            blocks=blocks,
            history_dtype=history_dtype,
            maximize=maximize,
        )


def _part(
    flat: FlatState, segment: Segment, theta: list[Tensor], gradients: list[Tensor | None]
) -> _Part:
    here = [k for k in range(segment.first, segment.last) if gradients[k] is not None]
    vectors = {name: [pieces[k] for k in here] for name, pieces in flat.pieces.items()}
    return _Part(
        incomplete=len(here) < segment.last - segment.first,
        theta=[theta[k] for k in here],
        gradients=[cast(Tensor, gradients[k]) for k in here],
        work=[flat.work_pieces[k] for k in here],
        param_average=vectors["param_average"],
        grad_average=vectors["grad_average"],
        momentum_buffer=vectors.get("momentum_buffer", []),
    )


def _gram_products(flat: FlatState, p: Tensor, c: Tensor) -> list[Tensor]:
    """(B,) pᵀc, cᵀ(W Wᵀ)c and the γ in use: dᵀg and dᵀd follow from them without a pass over n."""
    gram_c = torch.matmul(flat.history.gram, c.unsqueeze(-1)).squeeze(-1)
    return [(p * c).sum(1), (c * gram_c).sum(1), flat.history.gamma]


def _check_group(group: Mapping[str, Any]) -> None:
    """The settings of one group, with messages in torch's own form."""
    lr, (beta1, beta2) = group["lr"], group["betas"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
    elif not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")
    for key in ("momentum", "weight_decay"):
        if not group[key] >= 0.0:
            raise ValueError(f"Invalid {key} value: {group[key]}")
    for i, beta in enumerate((beta1, beta2)):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
    for key in ("history_size", "update_interval"):
        if not (isinstance(group[key], int) and group[key] >= 1):
            raise ValueError(f"Invalid {key}: {group[key]} (a whole number, at least 1)")
    if not 0.0 < group["damping"] <= 1.0:
        raise ValueError(
            f"Invalid damping: {group['damping']} (τ0 in (0, 1]; SLIM-QN's tables print 1 - τ0)"
        )
    bounds = group["curvature_bounds"]
    if bounds is not None and not (len(bounds) == 2 and bounds[0] < 1.0 <= bounds[1]):
        raise ValueError(f"Invalid curvature_bounds: {bounds} (σ_L < 1 <= σ_H, or None)")


def _check_parameters(params: Sequence[Tensor]) -> None:
    for p in params:
        if not p.is_floating_point():
            raise ValueError(f"parameters must be real floating-point tensors, not {p.dtype}")
    devices = sorted({str(p.device) for p in params})
    if len(devices) > 1:
        raise ValueError(
            f"all parameters must be on one device, not on {' and '.join(devices)}: "
            "they share one flat vector"
        )
