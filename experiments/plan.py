r"""Plan a run before there is a machine for it: memory, messages, FLOPs and seconds on each rank.

    python -m experiments.plan experiment=cifar10_resnet18 optimizer=mlbfgs launch.nproc=8
    python -m experiments.plan --model torchvision:resnet50 --images 1281167 --input 3,224,224 \
        --classes 1000 train.batch_size=512 optimizer=mlbfgs 'optimizer.blocks="resblocks:2"' \
        optimizer.distribution=blocks launch.nproc=8

Overrides are those of `experiments.train`. Nothing is allocated and nothing is trained: a model of
some billion parameters is planned in seconds. Exit code 2: something will not do, told in one line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from experiments.composition import compose_config
from experiments.contestants import CONFIG_DIR
from experiments.cost_plan import (
    META,
    Assumptions,
    CostPlan,
    Machine,
    Prediction,
    make_plan,
    predict,
)
from experiments.data.shapes import DataShape, data_shape
from experiments.entry import entry
from experiments.errors import UserError, nearest
from experiments.models import build_model

HARDWARE_FILE = CONFIG_DIR / "hardware.yaml"
# Ranks beyond these are not listed one by one.
_LISTED = 16


@entry
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="as for experiments.train")
    parser.add_argument("--model", help="torchvision:NAME or timm:NAME, instead of the config's")
    parser.add_argument("--images", type=int, help="training images, instead of the data set's")
    parser.add_argument("--input", help="C,H,W of an image, instead of the data set's")
    parser.add_argument("--classes", type=int, help="classes, instead of the data set's")
    parser.add_argument("--utilisation", type=float, help="share of the peak FLOPs, 0 to 1")
    parser.add_argument("--json", action="store_true", help="the numbers as JSON")
    options = parser.parse_intermixed_args(arguments)
    cost, machines, assumed = _plan(options)
    predictions = {machine.name: predict(cost, machine, assumed) for machine in machines}
    if options.json:
        print(json.dumps(as_json(cost, predictions), indent=1))
    else:
        print(report(cost, machines, predictions, assumed))
    return 0


def _plan(options: argparse.Namespace) -> tuple[CostPlan, list[Machine], Assumptions]:
    """Compose, build on the meta device, count.

    Raises:
        UserError: an option, an override or a name will not do.
    """
    overrides = list(options.overrides)
    if not any(override.startswith("launch=") for override in overrides):
        overrides.insert(0, "launch=torchrun")
    config = compose_config(overrides)
    data = _shape(config, options)
    model = _model(config, options.model, data)
    launch = config.launch
    cost = make_plan(
        model.train(),
        OmegaConf.to_container(config.optimizer, resolve=True),  # type: ignore[arg-type]
        data,
        batch_size=int(config.train.batch_size),
        micro_batch=config.train.get("micro_batch"),
        world_size=int(launch.get("nproc", 1)) * int(launch.get("nnodes", 1)),
    )
    return cost, *read_hardware(options.utilisation)


def read_hardware(utilisation: float | None = None) -> tuple[list[Machine], Assumptions]:
    """The machines and assumptions of configs/hardware.yaml.

    Args:
        utilisation: replaces the assumed share of the peak FLOPs.

    Raises:
        UserError: the share is none.
    """
    if utilisation is not None and not 0 < utilisation <= 1:
        raise UserError(f"--utilisation {utilisation} must be above 0 and at most 1")
    content: Any = OmegaConf.to_container(OmegaConf.load(HARDWARE_FILE))
    machines = [Machine(**values) for values in content["machines"].values()]
    assumed = content["assumptions"]
    if utilisation is not None:
        assumed["utilisation"] = dict.fromkeys(assumed["utilisation"], utilisation)
    return machines, Assumptions(**assumed)


def _shape(config: DictConfig, options: argparse.Namespace) -> DataShape:
    given = (options.images, options.input, options.classes)
    if all(value is None for value in given):
        return data_shape(config.dataset)
    if any(value is None for value in given):
        raise UserError("--images, --input and --classes describe a data set together: give all")
    try:
        channels, height, width = (int(size) for size in options.input.split(","))
    except ValueError as error:
        raise UserError(f"--input {options.input} must be C,H,W, such as 3,224,224") from error
    if min(channels, height, width, options.images, options.classes) < 1:
        raise UserError("--images, --input and --classes must be at least 1")
    return DataShape(options.classes, (channels, height, width), options.images)


def _model(config: DictConfig, source: str | None, data: DataShape) -> nn.Module:
    """Build the network on the meta device, where weights take no memory."""
    with torch.device(META):
        if source is None:
            return build_model(
                config.model, num_classes=data.num_classes, input_shape=data.input_shape
            )
        library, _, name = source.partition(":")
        if library == "torchvision":
            from torchvision import models

            known = models.list_models(module=models)
            if name not in known:
                raise UserError(f"torchvision has no model {name!r}; {nearest(name, known)[:200]}")
            built: nn.Module = models.get_model(name, num_classes=data.num_classes)
            return built
        if library == "timm":
            import timm

            if not timm.is_model(name):
                close = nearest(name, timm.list_models())[:200]
                raise UserError(f"timm has no model {name!r}; {close}")
            made: nn.Module = timm.create_model(name, num_classes=data.num_classes)
            return made
    raise UserError(f"--model {source} must be torchvision:NAME or timm:NAME")


def report(
    cost: CostPlan,
    machines: Sequence[Machine],
    predictions: dict[str, Prediction],
    assumed: Assumptions,
) -> str:
    """The plan in words and tables."""
    lines = [
        f"{cost.parameters:,} parameters, {cost.world_size} ranks, optimizer state "
        f"{cost.distribution}; {cost.images} images a rank and step in {cost.passes} "
        f"pass{'es' if cost.passes > 1 else ''}, {cost.steps_per_epoch:,} steps an epoch",
        "",
        "Memory of the rank that keeps most",
        *(_row(kind, size) for kind, size in cost.memory.items()),
        _row("together", sum(cost.memory.values())),
        *_history_lines(cost),
        "",
        "Messages a step (bytes of each message; a ring sends 2 (p - 1) / p of an all-reduce)",
        *_message_lines(cost),
        "",
        f"Forward and backward: {cost.flops / 1e9:,.1f} GFLOPs a rank and step",
        f"Optimizer: {cost.optimizer_traffic / 1e9:,.3f} GB read and written a step",
        *_balance(cost),
        "",
        "Predicted; seconds of a step, minutes of an epoch",
        f"  {'':<24}{'compute':>9}{'optimizer':>11}{'exposed':>9}{'step':>9}{'epoch':>9}",
        *(_prediction_line(name, p) for name, p in predictions.items()),
        "",
        "Assumed",
        *_assumption_lines(cost, machines, assumed),
    ]
    return "\n".join(lines)


def as_json(cost: CostPlan, predictions: dict[str, Prediction]) -> dict[str, Any]:
    """The numbers of a plan, ready for JSON."""
    blocks = cost.blocks
    return {
        "parameters": cost.parameters,
        "world_size": cost.world_size,
        "distribution": cost.distribution,
        "images": cost.images,
        "passes": cost.passes,
        "steps_per_epoch": cost.steps_per_epoch,
        "memory_bytes": dict(cost.memory),
        "message_bytes": asdict(cost.messages),
        "flops": cost.flops,
        "optimizer_traffic_bytes": cost.optimizer_traffic,
        "block_sizes": None if blocks is None else blocks.block_sizes,
        "kept": None if blocks is None else list(blocks.kept),
        "predictions": {name: {**asdict(p), "step_s": p.step_s} for name, p in predictions.items()},
        "left_out": list(cost.notes),
    }


def _row(name: str, size: float) -> str:
    return f"  {name:<34}{size:>18,.0f}  {size / 2**20:>12,.2f} MiB"


def _history_lines(cost: CostPlan) -> list[str]:
    if cost.blocks is None:
        return []
    numbers = 2 * cost.blocks.history_size * cost.parameters
    return [
        f"  the paper's 2Md/p: {numbers:,} numbers / {cost.world_size} = "
        f"{4 * numbers / cost.world_size / 2**20:,.2f} MiB of float32 history a rank"
    ]


def _message_lines(cost: CostPlan) -> list[str]:
    messages = cost.messages
    if not messages.every_step:
        return ["  none: there is one rank"]
    lines = [_row(name, size) for name, size in messages.every_step.items()]
    for name, size in messages.every_interval.items():
        lines.append(f"{_row(name, size)}  every {messages.interval} steps")
    return lines


def _balance(cost: CostPlan) -> list[str]:
    """How evenly the numbers are spread; the whole list where it is short."""
    if cost.blocks is None or not cost.blocks.kept:
        return []
    kept = cost.blocks.kept
    lines = [
        "",
        f"Balance: {min(kept):,} to {max(kept):,} numbers a rank; the fullest keeps "
        f"{max(kept) * len(kept) / max(sum(kept), 1):.2f} times the mean",
    ]
    idle = sum(1 for size in kept if size == 0)
    if idle:
        lines.append(f"  {idle} of {len(kept)} ranks keep nothing: there are fewer blocks")
    if len(kept) <= _LISTED:
        lines += [f"  rank {rank}: {size:,}" for rank, size in enumerate(kept)]
    return lines


def _prediction_line(name: str, p: Prediction) -> str:
    fits = "" if p.fits else "  memory does not suffice"
    return (
        f"  {name:<24}{p.compute_s:>9.4f}{p.optimizer_s:>11.4f}{p.exposed_s:>9.4f}"
        f"{p.step_s:>9.4f}{p.epoch_s / 60:>9.2f}{fits}"
    )


def _assumption_lines(
    cost: CostPlan, machines: Sequence[Machine], assumed: Assumptions
) -> list[str]:
    lines = []
    for machine in machines:
        share = assumed.utilisation[machine.precision]
        lines.append(
            f"  {machine.name}: {machine.peak_flops / 1e12:g} TFLOPS {machine.precision} x "
            f"{share:g}, {machine.memory_bandwidth / 1e9:g} GB/s x {assumed.memory_efficiency:g}, "
            f"{machine.link / 1e9:g} GB/s to neighbours and {machine.network / 1e9:g} GB/s between "
            f"machines x {assumed.network_efficiency:g}"
        )
        lines += [f"    {key}: {source}" for key, source in machine.sources.items()]
    lines += [
        f"  {assumed.latency_s * 1e6:g} microseconds a collective for every doubling of the ranks",
        "  the gradients' all-reduce hides behind the backward pass, 2/3 of the compute; "
        "nothing else hides",
        "  data arrive in time; float32 weights and gradients",
        "  left out: workspaces of libraries, temporary tensors, evaluation, checkpoints",
    ]
    return lines + [f"  left out: {note}" for note in cost.notes]


if __name__ == "__main__":
    sys.exit(main())
