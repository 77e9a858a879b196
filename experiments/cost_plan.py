"""What one training step needs on one rank, counted without allocating it: bytes, messages, FLOPs.

The network and the optimizer are built on torch's meta device, where tensors have shapes and no
memory, and one forward and backward pass is made there. So what is counted is what the real code
would allocate and compute, for models and numbers of ranks that no machine at hand has.

Legend: `n` parameters, `p` ranks, `M` history size, `T` update interval, `B` Hessian blocks.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from experiments.data.part import Part
from experiments.data.shapes import DataShape
from experiments.errors import UserError
from experiments.optimizers import build_optimizer
from mlbfgs import MLBFGS
from mlbfgs.collectives import BUFFER_BYTES
from mlbfgs.partition import BlockPlan, plan

logger = logging.getLogger(__name__)

META = torch.device("meta")
# What the state of MLBFGS holds besides the history, by kind.
_AVERAGES = ("param_progress", "grad_average", "param_snapshot", "grad_snapshot")
_HISTORY = ("s_history", "y_history")
# Optimizers whose step is what `_traffic` and `_messages` count.
_COUNTED = ("mlbfgs.", "torch.optim.", "experiments.optimizers.normalized_sgd.")


@dataclass(frozen=True)
class Messages:
    """What a step sends, by collective; the sizes of the messages, in bytes.

    Attributes:
        every_step: in every step.
        every_interval: on top, in the steps that make a pair.
        interval: T, steps between those; 0 where there are none.
    """

    every_step: Mapping[str, int]
    every_interval: Mapping[str, int]
    interval: int = 0

    @property
    def mean(self) -> dict[str, float]:
        """The mean over the steps of an interval."""
        means: Counter[str] = Counter(self.every_step)
        for name, size in self.every_interval.items():
            means[name] += size / self.interval  # type: ignore[assignment]
        return dict(means)


@dataclass(frozen=True)
class CostPlan:
    """The cost of one step on the rank that has most to keep.

    Attributes:
        parameters: n.
        world_size: p.
        images: of this rank in a step.
        passes: forward passes that they are cut into.
        steps_per_epoch: steps.
        memory: bytes by kind.
        messages: what is sent.
        flops: of the forward and backward passes of a step, multiplications and additions apart.
        optimizer_traffic: bytes that a step of the optimizer reads and writes.
        blocks: the Hessian blocks and who keeps them; None where the optimizer has none.
        distribution: how the optimizer's state is spread.
        notes: what could not be counted.
    """

    parameters: int
    world_size: int
    images: int
    passes: int
    steps_per_epoch: int
    memory: Mapping[str, int]
    messages: Messages
    flops: int
    optimizer_traffic: int
    blocks: BlockPlan | None
    distribution: str
    notes: tuple[str, ...]


def make_plan(
    model: nn.Module,
    optimizer_config: Mapping[str, Any],
    data: DataShape,
    *,
    batch_size: int,
    micro_batch: int | None,
    world_size: int,
) -> CostPlan:
    """Count the cost of a step.

    Args:
        model: on the meta device, in training mode.
        optimizer_config: the config node `optimizer`.
        data: sizes of the data set.
        batch_size: images of a step over all ranks.
        micro_batch: images of a forward pass on a rank; None for all of its part.
        world_size: ranks.

    Raises:
        UserError: the optimizer, its blocks or the ranks do not fit.
    """
    if not 1 <= world_size <= batch_size:
        raise UserError(
            f"{world_size} ranks cannot share train.batch_size={batch_size} images: 1 to "
            f"{batch_size} ranks will do"
        )
    share = Part(0, world_size).of(0, batch_size)
    images = share.stop - share.start
    passes = 1 if micro_batch is None else -(-images // micro_batch)
    pass_images = -(-images // passes)
    params = [p for p in model.parameters() if p.requires_grad]
    n = sum(p.numel() for p in params)
    parameter_bytes = sum(p.nbytes for p in params)

    state, blocks, notes = _optimizer_state(model, optimizer_config, world_size)
    if leaves_work_out(optimizer_config):
        name = optimizer_config["name"]
        notes += (
            f"what {name} computes and tells other ranks beyond reading and writing its state: its "
            "seconds are a lower bound",
        )
    flops, activations = _passes(model, data, pass_images)
    distribution = str(optimizer_config.get("distribution", "replicated"))
    copies = distribution != "replicated" and world_size > 1
    memory = {
        "parameters": sum(p.nbytes for p in model.parameters()),
        "buffers": sum(b.nbytes for b in model.buffers()),
        "gradients": parameter_bytes,
        "activations": activations,
        **{f"optimizer: {kind}": size for kind, size in state.items()},
    }
    if copies:
        memory["optimizer: exchange buffers"] = 2 * min(BUFFER_BYTES, parameter_bytes)
    kept = max(blocks.kept, default=n) if blocks is not None else n
    full, rest = divmod(data.train_size, batch_size)
    return CostPlan(
        parameters=n,
        world_size=world_size,
        images=images,
        passes=passes,
        steps_per_epoch=full + (1 if rest and not data.drop_last else 0),
        memory=memory,
        messages=_messages(optimizer_config, blocks, parameter_bytes, world_size),
        flops=flops * passes,
        optimizer_traffic=_traffic(optimizer_config, kept, parameter_bytes, state),
        blocks=blocks,
        distribution=distribution,
        notes=notes,
    )


def is_quasi_newton(config: Mapping[str, Any]) -> bool:
    """Whether an optimizer's config names this project's optimizer."""
    return str(config.get("_target_", "")).startswith("mlbfgs.")


def leaves_work_out(config: Mapping[str, Any]) -> bool:
    """Whether an optimizer does more than read and write its state, and we do not count it."""
    return not str(config.get("_target_", "")).startswith(_COUNTED)


def _optimizer_state(
    model: nn.Module, config: Mapping[str, Any], world_size: int
) -> tuple[dict[str, int], BlockPlan | None, tuple[str, ...]]:
    """Bytes of the state by kind, on the rank that keeps most; the blocks; what is left out."""
    local = dict(config)
    if is_quasi_newton(config):
        local.pop("distribution", None)  # here there is one process
    optimizer = build_optimizer(local, model)
    if isinstance(optimizer, MLBFGS):
        return _quasi_newton_state(model, optimizer, config, world_size)
    note: tuple[str, ...] = ()
    if not config.get("takes_model", False):
        for p in model.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad else None
        try:
            optimizer.step()
        except (RuntimeError, NotImplementedError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())[:120]
            note = (f"state that the first step of {config['name']} makes ({reason})",)
        model.zero_grad()
    kinds: Counter[str] = Counter()
    for state in optimizer.state.values():
        for kind, value in state.items():
            if isinstance(value, Tensor):
                kinds[kind] += value.nbytes
    return dict(kinds), None, note


def _quasi_newton_state(
    model: nn.Module, optimizer: MLBFGS, config: Mapping[str, Any], world_size: int
) -> tuple[dict[str, int], BlockPlan, tuple[str, ...]]:
    group = optimizer.param_groups[0]
    try:
        blocks = plan(
            model,
            config.get("blocks"),
            history_size=group["history_size"],
            momentum=group["momentum"],
            distribution=str(config.get("distribution", "replicated")),
            world_size=world_size,
        )
    except ValueError as error:
        raise UserError(f"optimizer {config['name']!r}: {error}") from error
    whole: Counter[str] = Counter()
    for state in optimizer.state.values():
        for kind, value in state.items():
            if isinstance(value, Tensor):
                whole[kind] += value.nbytes
    n = sum(blocks.sizes)
    kept = max(blocks.kept, default=n)
    part = {kind: size * kept // max(n, 1) for kind, size in whole.items()}
    kinds = {
        "averages and snapshots": sum(part.pop(kind) for kind in _AVERAGES),
        "history": sum(part.pop(kind) for kind in _HISTORY),
        **part,
    }
    m = group["history_size"]
    kinds["gram and coefficients"] = 2 * len(blocks.block_sizes) * (2 * m) ** 2 * 8
    return kinds, blocks, ()


def _passes(model: nn.Module, data: DataShape, images: int) -> tuple[int, int]:
    """FLOPs of a forward and backward pass, and bytes of activations kept between the two."""
    own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
            kept.append(tensor)  # so that no later storage gets the same address
        return tensor

    inputs = torch.empty(images, *data.input_shape, device=META)
    labels = torch.empty(images, dtype=torch.int64, device=META)
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = cross_entropy(model(inputs), labels)
        torch.autograd.backward(loss)
    model.zero_grad()
    return counter.get_total_flops(), sum(saved.values())


def _messages(
    config: Mapping[str, Any], blocks: BlockPlan | None, parameter_bytes: int, world_size: int
) -> Messages:
    """Sizes of messages: those of `mlbfgs.collectives`, and DDP's all-reduce of gradients."""
    if world_size == 1:
        return Messages({}, {})
    every_step = {"all-reduce of gradients": parameter_bytes}
    distribution = config.get("distribution", "replicated")
    if blocks is None or distribution == "replicated":
        return Messages(every_step, {})
    b, m = len(blocks.block_sizes), blocks.history_size
    pairs = {"all-reduce of pair products": b * 8 * 8}
    if distribution == "sharded":
        every_step["all-reduce of projections"] = b * (2 * m + 1) * 8
        pairs["all-reduce of gram columns"] = b * 2 * 2 * m * 8
    every_step["all-gather of parameters"] = parameter_bytes + 8 * world_size
    return Messages(every_step, pairs, int(config["update_interval"]))


def _traffic(
    config: Mapping[str, Any], kept: int, parameter_bytes: int, state: Mapping[str, int]
) -> int:
    """Bytes that a step of the optimizer moves.

    MLBFGS: (4 M + 12) numbers a parameter, its floor in `experiments.benchmarks.optimizer_step`.
    Others: all state read and written, the gradient read, the parameter read and written.
    """
    if is_quasi_newton(config):
        return (4 * int(config["history_size"]) + 12) * kept * 4
    return 2 * sum(state.values()) + 3 * parameter_bytes


@dataclass(frozen=True)
class Assumptions:
    """What a prediction of seconds rests on besides published numbers."""

    utilisation: Mapping[str, float]
    memory_efficiency: float
    network_efficiency: float
    latency_s: float


@dataclass(frozen=True)
class Machine:
    """A machine with GPUs, see configs/hardware.yaml."""

    name: str
    gpus: int
    memory_gib: float
    precision: str
    peak_flops: float
    memory_bandwidth: float
    link: float
    network: float
    sources: Mapping[str, str]


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step and of an epoch, and whether the memory suffices.

    Attributes:
        compute_s: forward and backward passes.
        optimizer_s: the optimizer's memory traffic.
        exposed_s: communication that nothing hides.
        hidden_s: communication behind the backward pass.
        epoch_s: of all steps of an epoch.
        fits: whether the counted memory is less than that of a GPU.
    """

    compute_s: float
    optimizer_s: float
    exposed_s: float
    hidden_s: float
    epoch_s: float
    fits: bool

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self.compute_s + self.optimizer_s + self.exposed_s


def predict(cost: CostPlan, machine: Machine, assumed: Assumptions) -> Prediction:
    """Predict seconds on a machine, or on as many of them as the ranks need.

    A ring sends 2 (p - 1) / p of the message in an all-reduce and (p - 1) / p in an all-gather; a
    collective also costs `latency_s` for each doubling of the ranks. The all-reduce of gradients
    hides behind the backward pass, which is two thirds of the compute; the rest hides nowhere.
    """
    p = cost.world_size
    rate = machine.link if p <= machine.gpus else min(machine.link, machine.network)
    rate *= assumed.network_efficiency
    compute_s = cost.flops / (machine.peak_flops * assumed.utilisation[machine.precision])
    optimizer_s = cost.optimizer_traffic / (machine.memory_bandwidth * assumed.memory_efficiency)
    hidden_s = exposed_s = 0.0
    for name, size in cost.messages.mean.items():
        factor = 2 if name.startswith("all-reduce") else 1
        seconds = factor * (p - 1) / p * size / rate + assumed.latency_s * math.log2(p)
        if name == "all-reduce of gradients":
            hidden_s = min(seconds, 2 / 3 * compute_s)
            seconds -= hidden_s
        exposed_s += seconds
    return Prediction(
        compute_s,
        optimizer_s,
        exposed_s,
        hidden_s,
        cost.steps_per_epoch * (compute_s + optimizer_s + exposed_s),
        sum(cost.memory.values()) <= machine.memory_gib * 2**30,
    )
