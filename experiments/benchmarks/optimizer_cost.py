r"""What one step of every optimizer costs, beside a forward and a backward pass.

    python -m experiments.benchmarks.optimizer_cost [--optimizers sgd,kfac] [--batch 128]
    python -m experiments.benchmarks.optimizer_cost --experiment imagenet_resnet50 --batch 64 \
        --optimizers sgd,adam,kfac,slimqn,mlbfgs --rounds 3 --name step_cost_resnet50

ResNet-18 at CIFAR-10's shapes and the settings of its recipes, or the network, shapes and recipes
of another experiment; beside the ratios that the mL-BFGS paper's Table 4 gives for ResNet-50. Work
that an optimizer does every T steps (pairs, factors, inverses, full gradients) is measured in steps
of its own, at a shorter interval, and spread over the interval of its config. All optimizers take
turns in every round of one process, and medians are compared, so that the ratios hold on a busy
machine; those that need real passes over a batch (hooks, further gradients) take part in fewer
rounds.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.atomic import write_atomically
from experiments.benchmarks.cost_report import markdown
from experiments.benchmarks.measure import pairs_like_training, state_bytes, time_of
from experiments.composition import compose_config
from experiments.contestants import options
from experiments.data import Batch
from experiments.data.shapes import data_shape
from experiments.errors import UserError, nearest
from experiments.models import build_model
from experiments.optimizers import build_optimizer
from experiments.passes import NeedsPasses, Passes
from experiments.provenance import describe_origin
from experiments.task import choose_device

logger = logging.getLogger(__name__)

EXPERIMENT = "cifar10_resnet18"
PRINTED = Path(__file__).resolve().parents[2] / "results/paper/mlbfgs.yaml"
#: Small, so that the weights stay finite; no cost depends on it.
LEARNING_RATE = 1e-4
#: So many sets of gradients take turns: differences of neighbours make pairs.
GRADIENT_SETS = 3

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
        gradients: sets of gradients that take turns, a tensor for each parameter.
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
        gradients: Sequence[Sequence[Tensor]],
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
        if self.hooked:
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
                found[event.name] = group.get("step", 0) // event.interval
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
        if "param_average" in values:
            values["param_average"].copy_(params[i].detach())
        values.update({key: number for key, number in counters.items() if key in values})
    optimizer.load_state_dict(state)


def measure(
    names: Sequence[str],
    *,
    width: int,
    batch: int,
    rounds: int,
    heavy_rounds: int,
    device: torch.device,
    experiment: str = EXPERIMENT,
) -> dict[str, Any]:
    """All numbers of all optimizers.

    Args:
        names: options of the config group `optimizer`; `sgd` is always measured.
        width: of ResNet-18.
        batch: images.
        rounds: of the turns that all take, after one that is discarded.
        heavy_rounds: in how many of them optimizers take part that need real passes.
        device: where.
        experiment: whose network, shapes and recipes are measured.

    Raises:
        UserError: an optimizer cannot be built.
    """
    data = OneBatch(batch, device, experiment)
    plain = network(width, device, data)
    shapes = [p.shape for p in plain.parameters()]
    torch.manual_seed(1)
    gradients = [
        [torch.randn(shape, device=device) * 1e-3 for shape in shapes] for _ in range(GRADIENT_SETS)
    ]
    gradients = [
        [torch.empty_like(p).copy_(g) for p, g in zip(plain.parameters(), some, strict=True)]
        for some in gradients
    ]
    chosen = dict.fromkeys(["sgd", *names])
    contenders = {
        name: Contender(name, width=width, data=data, gradients=gradients, device=device)
        for name in chosen
    }
    passes_s: list[float] = []
    for round_ in range(rounds + 1):
        seconds = time_of(lambda: forward_backward(plain, data.batch), device)
        if round_:
            passes_s.append(seconds)
        for contender in contenders.values():
            if not contender.heavy:
                contender.run_cycle(record=round_ > 0)
            elif 0 < round_ <= heavy_rounds:
                contender.run_cycle()
        logger.info("round %d of %d", round_, rounds)
    return with_ratios(
        statistics.median(passes_s), {name: c.result() for name, c in contenders.items()}
    )


def with_ratios(forward_backward_s: float, results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Add what an iteration takes, as a multiple of SGD's."""
    sgd_s = forward_backward_s + results["sgd"]["optimizer_s"]
    for result in results.values():
        iteration_s = forward_backward_s + result["passes_s"] + result["optimizer_s"]
        result["iteration_over_sgd"] = iteration_s / sgd_s
    return {"forward_backward_s": forward_backward_s, "optimizers": dict(results)}


def printed_ratios(experiment: str) -> dict[str, float]:
    """Minutes of an epoch over SGD's, from the mL-BFGS paper's Table 4; empty for other tasks."""
    printed: Any = OmegaConf.to_container(OmegaConf.load(PRINTED))
    rows = printed["table4"].get(experiment, {})
    minutes = {name: float(row["minutes_per_epoch"]["value"]) for name, row in rows.items()}
    return {name: round(value / minutes["sgd"], 3) for name, value in minutes.items()}


def available(names: str | None, experiment: str = EXPERIMENT) -> tuple[list[str], dict[str, str]]:
    """The optimizers to measure: those asked for, or all that can be built for the network.

    Args:
        names: comma-separated, or None for all.
        experiment: whose network they are tried on, at width 1.

    Returns:
        Their names, and for each that is left out the reason.

    Raises:
        UserError: a name is no option.
    """
    known = options("optimizer")
    if names is not None:
        chosen = [name.strip() for name in names.split(",")]
        for name in chosen:
            if name not in known:
                raise UserError(f"--optimizers {name!r} does not exist; {nearest(name, known)}")
        return chosen, {}
    found, left_out = [], {}
    cpu = torch.device("cpu")
    probe = network(1, cpu, OneBatch(1, cpu, experiment))
    for name in known:
        try:
            build_optimizer(compose_config([f"optimizer={name}"]).optimizer, probe)
            found.append(name)
        except UserError as error:
            left_out[name] = str(error)
    return found, left_out


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the JSON file and the table, print the table."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--experiment", default=EXPERIMENT, help=f"default: {EXPERIMENT}")
    parser.add_argument("--name", default="optimizer_cost", help="of the files")
    parser.add_argument("--optimizers", help="comma-separated; default: all")
    parser.add_argument("--width", type=int, default=64, help="of the network; default: 64")
    parser.add_argument("--batch", type=int, default=128, help="images; default: 128")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--heavy-rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=None, help="default: torch's own choice")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    chosen = parser.parse_args(arguments)
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    try:
        device = choose_device(chosen.device)
        names, left_out = available(chosen.optimizers, chosen.experiment)
        measured = measure(
            names,
            width=chosen.width,
            batch=chosen.batch,
            rounds=chosen.rounds,
            heavy_rounds=chosen.heavy_rounds,
            device=device,
            experiment=chosen.experiment,
        )
        task = compose_config([f"experiment={chosen.experiment}"])
        shape = data_shape(task.dataset).input_shape
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = {
        "origin": describe_origin(device),
        "experiment": chosen.experiment,
        "network": {"name": task.model.name, "width": chosen.width, "input_shape": list(shape)},
        "batch": chosen.batch,
        "rounds": chosen.rounds,
        "heavy_rounds": chosen.heavy_rounds,
        "threads": torch.get_num_threads(),
        "left_out": left_out,
        "printed_over_sgd": printed_ratios(chosen.experiment),
        **measured,
    }
    chosen.out.mkdir(parents=True, exist_ok=True)
    write_atomically(chosen.out / f"{chosen.name}.json", json.dumps(result, indent=2) + "\n")
    page = markdown(result)
    write_atomically(chosen.out / f"{chosen.name}.md", page)
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
