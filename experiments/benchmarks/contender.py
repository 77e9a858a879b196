"""One optimizer of the cost table in the middle of a training, its steps timed by what they do."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.benchmarks.measure import pairs_like_training, state_bytes, time_of
from experiments.composition import compose_config
from experiments.data import Batch
from experiments.data.shapes import data_shape
from experiments.models import build_model
from experiments.optimizers import build_optimizer
from experiments.training.passes import NeedsPasses, Passes

EXPERIMENT = "cifar10_resnet18"
#: Small, so that the weights stay finite; no cost depends on it.
LEARNING_RATE = 1e-4

Kind = frozenset[str]


@dataclass(frozen=True)
class Event:
    """Work that an optimizer does every so many steps.

    Attributes:
        name: in the report.
        key: of the config, which says how many steps.
        interval: steps here; all are powers of two, so that rarer events fall on frequent ones.
    """

    name: str
    key: str
    interval: int


EVENTS = (
    Event("pair", "update_interval", 2),
    Event("factors", "factor_update_interval", 2),
    Event("inverses", "inverse_update_interval", 4),
    Event("full gradient", "snapshot_interval", 4),
    Event("roots", "preconditioning_compute_steps", 2),
    Event("bases", "precondition_frequency", 2),
)


class OneBatch:
    """A data set of one batch of noise, in the shapes of an experiment.

    Args:
        size: images.
        device: where they are.
        experiment: whose shapes they have.
    """

    batches_per_epoch = 1

    def __init__(self, size: int, device: torch.device, experiment: str = EXPERIMENT):
        shape = data_shape(compose_config([f"experiment={experiment}"]).dataset)
        self.experiment, self.images_of_epoch = experiment, shape.train_size
        self.num_classes, self.input_shape = shape.num_classes, shape.input_shape
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(size, *self.input_shape, generator=generator).to(device)
        labels = torch.randint(self.num_classes, (size,), generator=generator).to(device)
        self.batch = Batch(images.contiguous(memory_format=torch.channels_last), labels)
        self.train_size = self.test_size = size

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batch."""
        yield self.batch

    def random_batches(self, number: int, count: int) -> Iterator[Batch]:
        """The batch."""
        assert count == self.train_size
        yield self.batch

    def test_batches(self) -> Iterator[Batch]:
        """The batch."""
        yield self.batch


class Contender:
    """One optimizer on its own copy of the network, in the middle of a training.

    Args:
        name: option of the config group `optimizer`.
        width: of ResNet-18.
        data: what it trains on.
        gradients: sets of gradients that take turns, a tensor for each parameter; None for those of
            real passes.
        device: where the network is.

    Raises:
        UserError: no such optimizer, or a package that it needs is absent.
    """

    def __init__(
        self,
        name: str,
        *,
        width: int,
        data: OneBatch,
        gradients: Sequence[Sequence[Tensor]] | None,
        device: torch.device,
    ):
        config = compose_config([f"experiment={data.experiment}", f"optimizer={name}"]).optimizer
        self.settings: dict[str, Any] = dict(OmegaConf.to_container(config))  # type: ignore[arg-type]
        self.events = [event for event in EVENTS if event.key in self.settings]
        short: dict[str, Any] = {event.key: event.interval for event in self.events}
        if "curvature_batch_size" in self.settings:
            short["curvature_batch_size"] = data.train_size
        self.model = network(width, device, data)
        settings = {**self.settings, **short, "lr": LEARNING_RATE}
        self.optimizer = build_optimizer(settings, self.model)
        for group in self.optimizer.param_groups:
            if group.get("variant", {}).get("pair_threshold") is not None:
                # made-up pairs are shorter than a training's: one that is dropped costs less
                group["variant"] = {**group["variant"], "pair_threshold": -math.inf}
        self.data, self.gradients, self.device = data, gradients, device
        self.passes: Passes | None = None
        if isinstance(self.optimizer, NeedsPasses):
            self.passes = Passes(self.model, data, memory_format=torch.channels_last)
            self.optimizer.bind(self.passes)
        self.steps = 0
        self.seconds: dict[Kind, list[tuple[float, float]]] = defaultdict(list)
        fill_history(self.optimizer)

    @property
    def cycle(self) -> int:
        """Steps after which every event was seen."""
        return max((event.interval for event in self.events), default=1)

    @property
    def hooked(self) -> bool:
        """Whether it listens to the passes through the network."""
        return any(module._forward_hooks for module in self.model.modules())

    @property
    def heavy(self) -> bool:
        """Whether its steps need passes over a batch."""
        return self.hooked or self.passes is not None

    def run_cycle(self, *, record: bool = True) -> None:
        """Take the steps of a cycle, and book their seconds by what they did."""
        for _ in range(self.cycle):
            kind, passes_s, step_s = self.step()
            if record:
                self.seconds[kind].append((passes_s, step_s))

    def step(self) -> tuple[Kind, float, float]:
        """Take one step.

        Returns:
            The events that happened, the seconds of further passes, and those of the step.
        """
        if self.hooked or self.gradients is None:
            forward_backward(self.model, self.data.batch)
        else:
            chosen = self.gradients[self.steps % len(self.gradients)]
            for p, gradient in zip(self.model.parameters(), chosen, strict=True):
                p.grad = gradient
        before, passes_s = self.counts(), 0.0
        optimizer = self.optimizer
        if isinstance(optimizer, NeedsPasses):
            passes_s = time_of(lambda: optimizer.before_step(self.data.batch, 0), self.device)
        step_s = time_of(optimizer.step, self.device)
        self.steps += 1
        after = self.counts()
        return frozenset(name for name in after if after[name] != before[name]), passes_s, step_s

    def counts(self) -> dict[str, int]:
        """How often each event has happened, as far as optimizer and passes tell."""
        found: dict[str, int] = {}
        if hasattr(self.optimizer, "curvature_records"):
            records = self.optimizer.curvature_records()
            found["pair"] = records[0]["step"] if records else 0
        for state in self.optimizer.state.values():
            for name, key in (("factors", "factor_updates"), ("inverses", "inversions")):
                if key in state:
                    found[name] = state[key]
        group = self.optimizer.param_groups[0]
        for event in self.events:
            if event.name in ("roots", "bases"):
                # SOAP's first step only gathers statistics, and does not count for its bases
                taken = max(group.get("step", 0) - (event.name == "bases"), 0)
                found[event.name] = taken // event.interval
        if self.passes is not None:
            batches = self.passes.counts.gradient_images // self.data.train_size
            found["full gradient"] = batches - self.steps  # one a step is not the full one
        return found

    def result(self) -> dict[str, Any]:
        """The measured numbers, seconds and bytes.

        Raises:
            AssertionError: a measured pair was skipped, so its step was cheaper than a real one.
        """
        if hasattr(self.optimizer, "curvature_records") and self.passes is None:
            assert all(record["accepted"] for record in self.optimizer.curvature_records())
        ordinary = self.median(frozenset())
        spread, events = list(ordinary), {}
        for event in self.events:
            kind = min((k for k in self.seconds if event.name in k), key=len)
            extra = [
                max(a - b, 0.0)
                for a, b in zip(self.median(kind), self.median(kind - {event.name}), strict=True)
            ]
            extra[0] *= self.batches_of(event)
            every = self.interval_of(event)
            events[event.name] = {"every_steps": every, "extra_s": sum(extra)}
            spread = [total + more / every for total, more in zip(spread, extra, strict=True)]
        numbers = sum(p.numel() for p in self.model.parameters())
        return {
            "settings": self.settings,
            "ordinary_step_s": ordinary[1],
            "events": events,
            "optimizer_s": spread[1],
            "passes_s": spread[0],
            "state_bytes_per_parameter": state_bytes(dict(self.optimizer.state)) / numbers,
            "steps_measured": sum(len(values) for values in self.seconds.values()),
        }

    def median(self, kind: Kind) -> tuple[float, float]:
        """Median seconds of the further passes and of the step."""
        passes, steps = zip(*self.seconds[kind], strict=True)
        return statistics.median(passes), statistics.median(steps)

    def interval_of(self, event: Event) -> int:
        """Steps between two events in a training."""
        value = self.settings[event.key]
        return (
            int(value) if value is not None else self.data.images_of_epoch // self.data.train_size
        )

    def batches_of(self, event: Event) -> float:
        """How many of the benchmark's batches the passes of one event see in a training."""
        if event.name == "full gradient":
            return self.data.images_of_epoch // self.data.train_size
        return float(self.settings.get("curvature_batch_size", 0)) / self.data.train_size


def network(width: int, device: torch.device, data: OneBatch) -> nn.Module:
    """The network of the experiment that the data are of, always with the same weights."""
    torch.manual_seed(0)
    config = compose_config([f"experiment={data.experiment}", f"model.width={width}"]).model
    model = build_model(config, num_classes=data.num_classes, input_shape=data.input_shape)
    return model.to(device).to(memory_format=torch.channels_last)


def forward_backward(model: nn.Module, batch: Batch) -> None:
    """Compute the gradients of one batch."""
    model.zero_grad()
    torch.autograd.backward(cross_entropy(model(batch.images), batch.labels))


def fill_history(optimizer: torch.optim.Optimizer) -> None:
    """Give a limited-memory optimizer a full history, as after many steps; leave others alone."""
    state = optimizer.state_dict()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    first: dict[str, Any] = next(iter(state["state"].values()), {})
    if "s_history" not in first:
        return
    size = len(first["s_history"])
    # Past the warm-up of 2T, and due for every event.
    counters = {"step": 8 * (size + 1), "seeded": 1, "pairs": size}
    for slot, (s, y) in enumerate(pairs_like_training([p.shape for p in params], size)):
        for i, values in state["state"].items():
            values["s_history"][slot], values["y_history"][slot] = s[i], y[i]
    for i, values in state["state"].items():
        if "param_progress" in values:
            values["param_progress"].copy_(params[i].detach())
        values.update({key: number for key, number in counters.items() if key in values})
    optimizer.load_state_dict(state)
