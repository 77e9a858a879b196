"""What a run trains: its data, model and optimizer, built from the config on one device."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import Optimizer

from experiments.data import Batch, Data, build_data
from experiments.data.randomness import stream
from experiments.errors import UserError
from experiments.models import build_model
from experiments.optimizers import build_optimizer
from experiments.runs.spec import RunSpec
from experiments.training.batch_parts import pass_sizes
from experiments.training.compilation import check_no_hooks, compile_now, compiled
from experiments.training.feasibility import check_memory, check_pairs
from experiments.training.passes import NeedsPasses, Passes
from experiments.training.precision import Precision
from experiments.training.ranks import ALONE, Ranks
from experiments.training.synchronised_batchnorm import synchronise_batchnorm
from experiments.training.weight_average import WeightAverage

logger = logging.getLogger(__name__)


@runtime_checkable
class SharesBatches(Protocol):
    """An optimizer that looks into the model's passes and can put parts of a batch together."""

    def share_batches(self, ranks: Ranks) -> None:
        """Take all passes before a step, on all ranks, for parts of one batch."""


@dataclass(frozen=True)
class Task:
    """The parts that the loop turns round.

    Attributes:
        data: training and test batches.
        model: on its device, in its memory format.
        optimizer: of the model's parameters.
        memory_format: of weights and images.
        passes: the further passes of an optimizer that wants them, which is bound to them; None
            for all others.
        parallel: the model as it is called in training: compiled where `train.compile` says so, and
            its backward pass averages the gradients over the ranks.
        precision: of the forward passes; takes the steps.
        average: of the weights; None where `train.ema` is null.
    """

    data: Data
    model: nn.Module
    optimizer: Optimizer
    memory_format: torch.memory_format
    passes: Passes | None
    parallel: nn.Module
    precision: Precision
    average: WeightAverage | None = None

    def images(self, batch: Batch) -> torch.Tensor:
        """The images of a batch in the memory format of the weights."""
        return batch.images.contiguous(memory_format=self.memory_format)


def build_task(spec: RunSpec, device: torch.device, ranks: Ranks = ALONE) -> Task:
    """Build what a spec describes, with the initial weights of its seed.

    Args:
        spec: the run.
        device: where data and model shall be.
        ranks: who trains it.

    Raises:
        UserError: a setting will not do, or data are absent.
    """
    config, train = spec.config, spec.config.train
    precision = Precision(train.get("precision", "float32"), device)
    with ranks.leader_first():
        data = build_data(
            config.dataset,
            batch_size=train.batch_size,
            seed=spec.seed,
            device=device,
            part=ranks.part,
        )
    # Right before the model, so that all optimizers start from the same weights.
    torch.manual_seed(spec.seed)
    model = build_model(
        config.model, num_classes=data.num_classes, input_shape=data.input_shape
    ).to(device)
    memory_format = torch.channels_last if train.channels_last else torch.contiguous_format
    model = model.to(memory_format=memory_format)
    check_pairs(
        config.optimizer,
        steps=train.epochs * data.batches_per_epoch,
        steps_per_epoch=data.batches_per_epoch,
        scale=spec.scale,
    )
    check_memory(config.optimizer, model, device)
    if train.get("sync_batchnorm", False):
        synchronise_batchnorm(model, ranks)
    if not ranks.leads:  # what is drawn in training is drawn anew for each rank's images
        torch.manual_seed(stream(spec.seed, ranks.rank, "rank").initial_seed())
    compilation = train.get("compile", False)
    parallel = ranks.parallel(compiled(model, compilation))

    def settle(sizes: list[int]) -> None:
        for size in sizes:
            images = torch.zeros(size, *data.input_shape, device=device)
            _settle(parallel, images.contiguous(memory_format=memory_format), precision)

    if compilation is not False:
        compile_now(lambda: settle(_all_pass_sizes(train, data, ranks)))
    elif parallel is not model:
        settle([2])
    optimizer = build_optimizer(_optimizer_config(config.optimizer, ranks), model)
    check_no_hooks(model, compilation, optimizer=spec.optimizer)
    has_model = bool(config.optimizer.get("takes_model", False))
    precision.bind(optimizer, name=spec.optimizer, has_model=has_model)
    if ranks.world_size > 1 or train.get("micro_batch") is not None:
        _take_parts(optimizer, spec, ranks)
    passes = None
    if isinstance(optimizer, NeedsPasses):
        passes = Passes(model, data, memory_format=memory_format, ranks=ranks)
        try:
            optimizer.bind(passes)
        except ValueError as error:
            raise UserError(f"optimizer {spec.optimizer!r}: {error}") from error
    decay = train.get("ema")
    average = None if decay is None else WeightAverage(model, float(decay))
    return Task(data, model, optimizer, memory_format, passes, parallel, precision, average)


def _all_pass_sizes(train: DictConfig, data: Data, ranks: Ranks) -> list[int]:
    """Images of the passes that this rank makes over a batch, and over a smaller last one."""
    whole, micro_batch = int(train.batch_size), train.get("micro_batch")
    sizes = pass_sizes(whole, micro_batch, ranks.part)
    rest = data.train_size - (data.batches_per_epoch - 1) * whole
    return sizes + (pass_sizes(rest, micro_batch, ranks.part) if rest < whole else [])


def _optimizer_config(config: DictConfig, ranks: Ranks) -> DictConfig:
    """The optimizer's config; one process alone keeps what ranks would divide between them."""
    if ranks.joined or config.get("distribution") not in ("blocks", "sharded"):
        return config
    logger.info("optimizer.distribution=%s: one process keeps everything", config.distribution)
    alone = config.copy()
    OmegaConf.set_readonly(alone, False)
    alone.distribution = "replicated"
    return alone


def _settle(parallel: nn.Module, images: torch.Tensor, precision: Precision) -> None:
    """Make a pass that leaves nothing but the order of gradients in messages, and compiled code.

    Ranks send their gradients in the order of the first backward pass of a process. Of three terms
    or more, the order decides the rounding of the sum; so it is fixed here, before the first step
    of a run and before the first of a resumed one.
    """
    buffers = [buffer.clone() for buffer in parallel.buffers()]
    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
        with precision.autocast():
            logits = parallel(images)
        torch.autograd.backward(logits.sum())
    parallel.zero_grad()
    for buffer, before in zip(parallel.buffers(), buffers, strict=True):
        buffer.copy_(before)


def _take_parts(optimizer: Optimizer, spec: RunSpec, ranks: Ranks) -> None:
    """Tell an optimizer that it sees parts of a batch, or refuse one that cannot put them together.

    Raises:
        UserError: the optimizer has the model, and says neither that it can put the parts of a
            batch together nor that it looks at gradients alone (`takes_parts`).
    """
    if isinstance(optimizer, SharesBatches):
        optimizer.share_batches(ranks)
        return
    has_model = spec.config.optimizer.get("takes_model", False)
    if not has_model or getattr(optimizer, "takes_parts", False):
        return
    if ranks.world_size > 1:
        raise UserError(
            f"optimizer={spec.optimizer} takes the part of a batch that a rank has for the whole: "
            "train on one rank"
        )
    raise UserError(
        f"optimizer={spec.optimizer} takes a part of a batch for the whole: "
        "use train.micro_batch=null"
    )


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Turn `train.device` into a device; `auto` is the GPU where there is one.

    Args:
        name: `auto`, `cpu` or `cuda`.
        local_rank: of several ranks on this machine, each of which has a GPU of its own.

    Raises:
        UserError: a GPU is asked for and torch sees none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("train.device=cuda, but torch sees no GPU: use train.device=cpu or auto")
    if name == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", local_rank) if local_rank else torch.device("cuda")
