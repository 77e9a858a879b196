"""Counts the runs that claims need, and predicts their seconds on a machine whose speed is known.

    python -m experiments.predictions      writes results/predictions.json

Nothing is trained: networks and optimizers are built on torch's meta device (`cost_plan`). FLOPs
are those of the forward and backward passes of all steps; seconds are predicted for one GPU of
`MACHINE` in configs/hardware.yaml, with the assumptions that stand there.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from omegaconf import OmegaConf

from experiments.analysis.judging.claims import DEFAULT_CLAIMS, load_claims
from experiments.analysis.judging.costs import PREDICTIONS, Work
from experiments.campaign.outlook import count_cost
from experiments.campaign.selection import select
from experiments.composition import compose_config
from experiments.cost_plan import CostPlan, leaves_work_out, predict
from experiments.entry import entry
from experiments.plan import read_hardware
from experiments.runs.atomic import write_atomically
from experiments.runs.spec import RunSpec

MACHINE = "8 x A100 80 GB SXM"
# A smoke run takes seconds anywhere: nobody asks what it would take.
PREDICTED_SCALES = ("full", "reduced")
# Settings that change neither sizes nor FLOPs, so that runs which differ in them are counted once.
_WITHOUT_COST = ("lr", "weight_decay")


def count(spec: RunSpec, counted: dict[str, CostPlan]) -> Work:
    """The work of one run on one GPU of `MACHINE`.

    Args:
        spec: the run.
        counted: what was counted before, by what decides it; added to.

    Raises:
        UserError: the network or the optimizer cannot be built.
    """
    machines, assumed = read_hardware()
    machine = next(machine for machine in machines if machine.name == MACHINE)
    cost = _cost(spec, counted)
    epochs = int(spec.config.train.epochs)
    steps = epochs * cost.steps_per_epoch
    seconds = epochs * predict(cost, machine, assumed).epoch_s
    return Work(
        epochs,
        steps,
        float(f"{float(cost.flops) * steps:.6g}"),
        float(f"{seconds:.6g}"),
        leaves_work_out(spec.config.optimizer),
    )


def count_all(claims_path: Path = DEFAULT_CLAIMS) -> dict[str, object]:
    """The content of `predictions.json`: all contestants of all claims, but for smoke runs.

    Raises:
        UserError: a run cannot be composed or counted.
    """
    runs: dict[str, dict[str, dict[str, object]]] = {}
    counted: dict[str, CostPlan] = {}
    for each in select((), load_claims(claims_path)).contestants:
        scales = runs.setdefault(each.experiment, {})
        for scale in PREDICTED_SCALES:
            found = scales.setdefault(scale, {})
            choices = [f"optimizer={name}" for name in each.optimizers]
            choices += [f"arm={name}" for name in each.arms]
            for choice in choices:
                spec = _spec(each.experiment, choice, scale)
                work = asdict(count(spec, counted))
                found[spec.contestant] = {k: v for k, v in work.items() if v is not False}
    return {"machine": f"one GPU of {MACHINE}", "runs": runs}


@entry
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 2 after a mistake of the user."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.predictions",
        description="Count the runs that claims need; write results/predictions.json.",
    )
    parser.parse_args(arguments)
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    path = DEFAULT_CLAIMS.parent / PREDICTIONS
    write_atomically(path, json.dumps(count_all(), indent=1) + "\n")
    print(path)
    return 0


def _cost(spec: RunSpec, counted: dict[str, CostPlan]) -> CostPlan:
    config = spec.config
    optimizer = {k: v for k, v in config.optimizer.items() if k not in _WITHOUT_COST}
    decisive = [OmegaConf.to_container(node) for node in (config.dataset, config.model)]
    sizes = [config.train.batch_size, config.train.get("micro_batch")]
    key = json.dumps([*decisive, optimizer, *sizes], default=str)
    if key not in counted:
        counted[key] = count_cost(spec, ranks=1)
    return counted[key]


def _spec(experiment: str, choice: str, scale: str) -> RunSpec:
    config = compose_config([f"experiment={experiment}", choice, f"scale={scale}"])
    if config.schedule.get("name") == "replay":  # what is replayed changes no cost
        config.schedule.source_key = "0000000000"
        config.schedule.multipliers = [[0, 1.0]]
    return RunSpec.from_config(config)


if __name__ == "__main__":
    sys.exit(main())
