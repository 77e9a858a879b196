r"""What one step of every optimizer costs, beside a forward and a backward pass.

    python -m experiments.benchmarks.optimizer_cost [--optimizers sgd,kfac] [--batch 128]
    python -m experiments.benchmarks.optimizer_cost --experiment imagenet_resnet50 --batch 64 \
        --optimizers sgd,adam,kfac,slimqn,mlbfgs --rounds 3 --apart --name step_cost_resnet50

ResNet-18 at CIFAR-10's shapes and the settings of its recipes, or the network, shapes and recipes
of another experiment; beside the ratios that the mL-BFGS paper's Table 4 gives for ResNet-50. Work
that an optimizer does every T steps (pairs, factors, inverses, full gradients) is measured in steps
of its own, at a shorter interval, and spread over the interval of its config. All optimizers take
turns in every round of one process, and medians are compared, so that the ratios hold on a busy
machine; those that need real passes over a batch (hooks, further gradients) take part in fewer
rounds. With `--apart` each has a process of its own instead, on a quiet machine: one at a time is
in memory, and the peak of its real steps is measured.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from experiments.benchmarks.contender import EXPERIMENT, OneBatch, network
from experiments.benchmarks.cost_report import markdown
from experiments.benchmarks.cost_rounds import Plan, measure_apart, measure_together
from experiments.benchmarks.measure import folder_for, write_measured
from experiments.composition import compose_config
from experiments.contestants import options
from experiments.data.shapes import data_shape
from experiments.entry import entry
from experiments.errors import UserError, nearest
from experiments.given import user_path
from experiments.optimizers import build_optimizer
from experiments.runs.provenance import describe_origin
from experiments.training.task import choose_device

PRINTED = Path(__file__).resolve().parents[2] / "results/paper/mlbfgs.yaml"


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


@entry
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
    parser.add_argument("--apart", action="store_true", help="each in a process of its own")
    parser.add_argument("--threads", type=int, default=None, help="default: torch's own choice")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", type=user_path, default=Path("results/benchmarks"))
    chosen = parser.parse_args(arguments)
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    folder = folder_for(chosen.out, chosen.name)
    device = choose_device(chosen.device)
    names, left_out = available(chosen.optimizers, chosen.experiment)
    plan = Plan(
        experiment=chosen.experiment,
        width=chosen.width,
        batch=chosen.batch,
        rounds=chosen.rounds,
        heavy_rounds=chosen.heavy_rounds,
        device=device,
        threads=chosen.threads,
    )
    measured = measure_apart(names, plan) if chosen.apart else measure_together(names, plan)
    left_out.update(measured.pop("lost", {}))
    task = compose_config([f"experiment={chosen.experiment}"])
    shape = data_shape(task.dataset).input_shape
    result = {
        "origin": describe_origin(device),
        "experiment": chosen.experiment,
        "network": {"name": task.model.name, "width": chosen.width, "input_shape": list(shape)},
        "batch": chosen.batch,
        "rounds": chosen.rounds,
        "heavy_rounds": chosen.heavy_rounds,
        "apart": chosen.apart,
        "threads": torch.get_num_threads(),
        "left_out": left_out,
        "printed_over_sgd": printed_ratios(chosen.experiment),
        **measured,
    }
    write_measured(folder, chosen.name, result, markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
