"""What a run trains: its data, model and optimizer, built from the config on one device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from experiments.data import Batch, Data, build_data
from experiments.errors import UserError
from experiments.models import build_model
from experiments.optimizers import build_optimizer
from experiments.passes import NeedsPasses, Passes
from experiments.spec import RunSpec


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
    """

    data: Data
    model: nn.Module
    optimizer: Optimizer
    memory_format: torch.memory_format
    passes: Passes | None

    def images(self, batch: Batch) -> torch.Tensor:
        """The images of a batch in the memory format of the weights."""
        return batch.images.contiguous(memory_format=self.memory_format)


def build_task(spec: RunSpec, device: torch.device) -> Task:
    """Build what a spec describes, with the initial weights of its seed.

    Args:
        spec: the run.
        device: where data and model shall be.

    Raises:
        UserError: a setting will not do, or data are absent.
    """
    config, train = spec.config, spec.config.train
    data = build_data(config.dataset, batch_size=train.batch_size, seed=spec.seed, device=device)
    # Right before the model, so that all optimizers start from the same weights.
    torch.manual_seed(spec.seed)
    model = build_model(
        config.model, num_classes=data.num_classes, input_shape=data.input_shape
    ).to(device)
    memory_format = torch.channels_last if train.channels_last else torch.contiguous_format
    model = model.to(memory_format=memory_format)
    optimizer = build_optimizer(config.optimizer, model)
    passes = None
    if isinstance(optimizer, NeedsPasses):
        passes = Passes(model, data, memory_format=memory_format)
        try:
            optimizer.bind(passes)
        except ValueError as error:
            raise UserError(f"optimizer {spec.optimizer!r}: {error}") from error
    return Task(data, model, optimizer, memory_format, passes)


def choose_device(name: str) -> torch.device:
    """Turn `train.device` into a device; `auto` is the GPU where there is one.

    Raises:
        UserError: a GPU is asked for and torch sees none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("train.device=cuda, but torch sees no GPU: use train.device=cpu or auto")
    return torch.device("cuda" if name != "cpu" and available else "cpu")
