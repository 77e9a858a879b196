"""Stochastic L-BFGS (sL-BFGS in both papers' cost tables).

Moritz, Nishihara and Jordan, "A linearly-convergent stochastic L-BFGS algorithm" (AISTATS 2016),
Algorithm 1: variance-reduced gradients (Johnson & Zhang 2013) times an L-BFGS matrix whose pairs
are Hessian-vector products between averaged iterates (Byrd et al. 2016). Chang, Sun and Zhang
(2019), whom the papers cite for it, add a momentum; here that is the heavy ball of SGD.

Legend: `n` numbers in all parameters, `M` history size, `T` update interval (Moritz: L), `m`
snapshot interval, `b_H` curvature batch size; flat vectors are (n,), the history is (2M, n).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from experiments.data import Batch
from experiments.training.passes import Passes
from mlbfgs.curvature import CurvatureHistory
from mlbfgs.damping import DampedPair, damp
from mlbfgs.diagnostics import CurvatureRecord

logger = logging.getLogger(__name__)

_VECTORS = ("snapshot", "full_gradient", "iterate_sum", "iterate_average", "momentum_buffer")
_COUNTERS = ("step", "averages", "pairs", "skipped")


class _Pair(NamedTuple):
    """A pair on its way into the history: s = u_r - u_(r-1) and y = Hessian times s."""

    s: Tensor
    y: Tensor
    numbers: DampedPair


class SLBFGS(Optimizer):
    r"""Stochastic L-BFGS with variance reduction and Hessian-vector pairs.

    With f the mean training loss plus weight_decay/2 ‖θ‖², f_S the same on one batch S:

    .. code-block:: text

        every m steps:   w = θ,  μ = ∇f(w)                    (a pass over the whole epoch)
        v = ∇f_S(θ) - ∇f_S(w) + μ                             (a second gradient a step)
        θ = θ - lr H v                                        (H = I before the first pair)
        every T steps:   u_r = mean of the last T iterates
            from the second time on:  s = u_r - u_(r-1),  y = ∇²f_B(u_r) s   (B: b_H random images)
            the pair (s, y) enters H, from the next step on

    A pair is skipped, and counted, unless it is finite and sᵀy >= `min_curvature` sᵀs > 0 beyond
    rounding error: on a convex loss none is, on others H stays positive definite.

    The optimizer needs the passes of its run: `bind` once, `before_step` before every step
    (`experiments.training.passes.NeedsPasses`). The full gradient is the mean over the batches that
    the epoch trains on, in the training's own batch sizes and with its augmentation.

    State: 4 + 2M numbers for each parameter, one more with momentum.

    Args:
        params: parameters or named parameters of one group: those of the model, in its order.
        lr: learning rate.
        momentum: of a heavy ball on H v; 0 in Moritz et al.
        weight_decay: of the L2 term, a part of f and of its Hessian.
        history_size: M.
        update_interval: T, steps between averages.
        curvature_batch_size: b_H, images of a Hessian-vector product; where there are fewer, all.
        snapshot_interval: m, steps between full gradients; None is an epoch.
        min_curvature: least sᵀy / sᵀs of a pair.

    Raises:
        ValueError: a setting is out of its range, or there is more than one group or dtype.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        lr: float = 0.1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        history_size: int = 10,
        update_interval: int = 20,
        curvature_batch_size: int = 1024,
        snapshot_interval: int | None = None,
        min_curvature: float = 0.0,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "history_size": history_size,
            "update_interval": update_interval,
            "curvature_batch_size": curvature_batch_size,
            "snapshot_interval": snapshot_interval,
            "min_curvature": min_curvature,
        }
        _check_settings(defaults)
        super().__init__(params, defaults)
        self._params: list[Tensor] = self.param_groups[0]["params"]
        _check_parameters(self._params, len(self.param_groups))
        first, n = self._params[0], sum(p.numel() for p in self._params)
        names = _VECTORS if momentum != 0 else _VECTORS[:-1]
        self._flat = {name: first.new_zeros(n, requires_grad=False) for name in names}
        self._history = CurvatureHistory(
            history_size,
            [slice(0, n)],
            numel=n,
            dtype=first.dtype,
            history_dtype=first.dtype,
            device=first.device,
        )
        self._count = dict.fromkeys(_COUNTERS, 0)
        self._passes: Passes | None = None
        self._correction: list[Tensor] | None = None  # ∇f_S(w) of the coming step
        self._pair: _Pair | None = None  # enters the history at the end of the coming step
        self._records: list[CurvatureRecord] = []
        self._expose()

    # --- what needs the data, before the step ---------------------------------------------------

    def bind(self, passes: Passes) -> None:
        """Take over the passes of the run."""
        self._passes = passes
        size = self._setting("curvature_batch_size")
        if size > passes.train_size:
            logger.warning(
                "curvature_batch_size=%d is more than the %d training images: all are used",
                *(size, passes.train_size),
            )

    @torch.no_grad()
    def before_step(self, batch: Batch, epoch: int) -> None:
        """Compute ∇f_S(w) for the step's batch and, where due, μ at a new w, and a pair.

        Args:
            batch: S, on which the gradients in `p.grad` were computed.
            epoch: whose images the full gradient is of.
        """
        passes, step = self._bound(), self._count["step"]
        interval = self._setting("snapshot_interval") or passes.steps_per_epoch
        if step % interval == 0:  # Moritz et al., Algorithm 1, lines 4-5
            self._gather("snapshot", self._params)
            full = passes.gradient(passes.epoch_batches(epoch), self._views("snapshot"))
            self._gather("full_gradient", full)
        self._correction = passes.gradient([batch], self._views("snapshot"))  # line 9
        interval = self._setting("update_interval")
        if step % interval == 0 and step > interval:  # lines 12-17
            self._pair = self._new_pair(passes)

    def _new_pair(self, passes: Passes) -> _Pair:
        average = self._flat["iterate_sum"] / self._setting("update_interval")
        s, at = average - self._flat["iterate_average"], self._split(average)
        size = min(self._setting("curvature_batch_size"), passes.train_size)
        batches = passes.random_batches(self._count["averages"], size)
        y = self._joined(passes.hessian_vector(batches, at, self._split(s)))
        y.add_(s, alpha=self._setting("weight_decay"))
        ss, sy, yy = torch.stack([torch.dot(s, s), torch.dot(s, y), torch.dot(y, y)]).tolist()
        eps = torch.finfo(s.dtype).eps
        return _Pair(s, y, damp(ss, sy, yy, tau0=1.0, bounds=None, eps=eps))

    # --- the step -------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step.

        Args:
            closure: none is taken: the gradients must be those that `before_step` knew.

        Raises:
            RuntimeError: `before_step` was not called for this step, there is a closure, or a
                parameter has no gradient.
        """
        if closure is not None or self._correction is None:
            raise RuntimeError("SLBFGS.step() takes no closure and wants before_step() before it")
        gradient = self._reduced_gradient(self._correction)
        direction = gradient.clone()
        if self._history.pairs[0] > 0:
            self._precondition_(direction)
        self._average_iterates()
        if self._pair is not None:
            self._push(self._pair, gradient, direction)
        self._descend(direction)
        self._correction, self._pair = None, None
        self._count["step"] += 1
        self._write_counters()

    def _precondition_(self, v: Tensor) -> None:
        """v <- H v = γ v + Wᵀ C W v (`mlbfgs.compact`)."""
        history, n = self._history, len(v)
        (sums,) = history.new_sums()
        history.project(sums, 0, 0, n, v)
        rows = history.coefficients(sums[:, : 2 * history.history_size]).to(v.dtype)
        history.combine_(history.gamma.to(v.dtype), rows, 0, 0, n, v)

    def _reduced_gradient(self, correction: list[Tensor]) -> Tensor:
        """v = ∇f_S(θ) - ∇f_S(w) + μ; the decay of the last two cancels (line 10)."""
        grads = [p.grad for p in self._params if p.grad is not None]
        if len(grads) < len(self._params):
            raise RuntimeError("SLBFGS needs a gradient of every parameter")
        v: Tensor = self._flat["full_gradient"].clone()
        views = self._split(v)
        torch._foreach_add_(views, grads)
        torch._foreach_sub_(views, correction)
        torch._foreach_add_(views, self._params, alpha=float(self._setting("weight_decay")))
        return v

    def _average_iterates(self) -> None:
        """Close the average of the last T iterates where it is due, then add this one."""
        interval, total = self._setting("update_interval"), self._flat["iterate_sum"]
        if self._count["step"] % interval == 0 and self._count["step"] > 0:  # lines 12-14
            torch.div(total, interval, out=self._flat["iterate_average"])
            total.zero_()
            self._count["averages"] += 1
        torch._foreach_add_(self._views("iterate_sum"), self._params)

    def _push(self, pair: _Pair, gradient: Tensor, direction: Tensor) -> None:
        """Let a pair into the history, or skip it (lines 16-18)."""
        history, numbers = self._history, pair.numbers
        # not >, so that a curvature that is not a number is refused too
        accepted = numbers.accepted and numbers.mu > 0
        accepted = accepted and numbers.mu >= self._setting("min_curvature")
        if accepted:
            zero = pair.s.new_zeros(()).expand_as(pair.s)
            history.push(0, pair.s, pair.y, zero, 1.0)
        else:
            self._count["skipped"] += 1
        g, d = gradient, direction
        gg, gd, dd = torch.stack([torch.dot(g, g), torch.dot(g, d), torch.dot(d, d)]).tolist()
        cosine = gd / (gg * dd) ** 0.5 if gg * dd > 0 else float("nan")
        ratio = (dd / gg) ** 0.5 if gg > 0 else float("nan")
        self._records = [
            CurvatureRecord(
                step=self._count["step"] + 1,
                block=0,
                mu=numbers.mu,
                mu_damped=numbers.mu,
                tau=1.0,
                damped=False,
                accepted=accepted,
                gamma=numbers.gamma,
                cos_direction_gradient=cosine,
                direction_over_gradient=ratio,
                cos_hessian_gradient=cosine,
                hessian_over_gradient=ratio,
                pairs=min(history.pairs[0], history.history_size),
                skipped=self._count["skipped"],
                times_damped=0,
            )
        ]

    def _descend(self, direction: Tensor) -> None:
        group = self.param_groups[0]
        if group["momentum"] != 0:
            direction = self._flat["momentum_buffer"].mul_(group["momentum"]).add_(direction)
        torch._foreach_add_(self._params, self._split(direction), alpha=-group["lr"])  # line 11

    def curvature_records(self) -> list[dict[str, int | float | bool]]:
        """What happened at the newest pair, as in `mlbfgs.diagnostics.CurvatureRecord`."""
        return [record.as_dict() for record in self._records]

    # --- state ----------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state written by an optimizer with the same settings."""
        super().load_state_dict(state_dict)
        self._params = self.param_groups[0]["params"]
        loaded = {p: dict(self.state[p]) for p in self._params}
        self._expose()
        for p, values in loaded.items():
            for name, own in self.state[p].items():
                if isinstance(own, Tensor):
                    own.copy_(values[name])
        self._count = {name: loaded[self._params[0]][name] for name in _COUNTERS}
        self._history.pairs[0] = self._count["pairs"]
        self._history.rebuild(0)
        self._records = []
        self._write_counters()

    def _expose(self) -> None:
        """Let every parameter's state be its share of the flat vectors and of the history."""
        m = self._history.history_size
        history = {"s_history": self._history.W[:m], "y_history": self._history.W[m:]}
        for name, flat in {**self._flat, **history}.items():
            for p, view in zip(self._params, self._split(flat), strict=True):
                self.state[p][name] = view
        self._write_counters()

    def _write_counters(self) -> None:
        self._count["pairs"] = self._history.pairs[0]
        for p in self._params:
            self.state[p].update(self._count)

    def _split(self, flat: Tensor) -> list[Tensor]:
        """Every parameter's share of (n,) or (rows, n), as a view in the parameter's own layout."""
        views, offset = [], flat.storage_offset()
        rows, strides = list(flat.shape[:-1]), list(flat.stride()[:-1])
        for p in self._params:
            views.append(flat.as_strided([*rows, *p.shape], [*strides, *p.stride()], offset))
            offset += p.numel()
        return views

    def _views(self, name: str) -> list[Tensor]:
        return self._split(self._flat[name])

    def _gather(self, name: str, tensors: Sequence[Tensor]) -> None:
        torch._foreach_copy_(self._views(name), list(tensors))

    def _joined(self, tensors: Sequence[Tensor]) -> Tensor:
        flat = torch.empty_like(self._flat["snapshot"])
        torch._foreach_copy_(self._split(flat), list(tensors))
        return flat

    def _bound(self) -> Passes:
        if self._passes is None:
            raise RuntimeError("SLBFGS needs the passes of its run: call bind() first")
        return self._passes

    def _setting(self, key: str) -> Any:
        return self.param_groups[0][key]


def _check_settings(settings: dict[str, Any]) -> None:
    for key in ("lr", "momentum", "weight_decay", "min_curvature"):
        if not settings[key] >= 0.0:
            raise ValueError(f"Invalid {key}: {settings[key]} (a number of at least 0)")
    for key in ("history_size", "update_interval", "curvature_batch_size", "snapshot_interval"):
        value = settings[key]
        if key == "snapshot_interval" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"Invalid {key}: {value} (a whole number, at least 1)")


def _check_parameters(params: Sequence[Tensor], groups: int) -> None:
    kinds = {(p.dtype, p.device) for p in params}
    if groups > 1 or len(kinds) > 1:
        raise ValueError("SLBFGS takes one parameter group of one dtype on one device")
