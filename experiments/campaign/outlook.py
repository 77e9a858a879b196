"""What a campaign meets before its first step: ranks, data, disk and predicted time.

`python -m experiments.reproduce` prints it before it runs what is missing. Torch is loaded here, so
that planning without an outlook does without.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf

from experiments.analysis.measuring.quantities import duration
from experiments.cost_plan import META, CostPlan, make_plan, predict
from experiments.data import build_data
from experiments.data.shapes import data_shape
from experiments.errors import UserError
from experiments.models import build_model
from experiments.plan import read_hardware
from experiments.runs.spec import RunSpec

_GB = 1e9


@dataclass(frozen=True)
class Outlook:
    """What there is and what is missing.

    Attributes:
        lines: for people.
        problem: why the runs cannot start; None where they can.
    """

    lines: tuple[str, ...]
    problem: UserError | None


def ranks_found(scale: str) -> int:
    """The ranks of a run on this machine: one for each GPU.

    Without a GPU one, which uses all processors; two at the scale `smoke`, which is to show that
    several work, if there are two processors.

    Args:
        scale: of the runs.
    """
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return min(2, os.cpu_count() or 1) if scale == "smoke" else 1


def look_ahead(specs: Sequence[RunSpec], *, ranks: int, results_dir: Path) -> Outlook:
    """Find the data, measure the disk and predict the time of runs that share a data set.

    Args:
        specs: the runs that are missing, at least one.
        ranks: that train each of them.
        results_dir: where their directories will be.
    """
    first = specs[0].config
    problem = None
    try:
        data = build_data(
            first.dataset, batch_size=first.train.batch_size, seed=0, device=torch.device("cpu")
        )
        found = f"{data.train_size:,} training and {data.test_size:,} test images"
        where = "generated" if first.dataset.get("synthetic") else first.dataset.get("root")
        data_line = f"{first.dataset.name}, {found}" + (f" ({where})" if where else "")
    except UserError as error:
        problem, data_line = error, f"missing: {error}"
    lines = [
        f"  ranks     {ranks} ({'torchrun' if ranks > 1 else 'one process'})",
        f"  data      {data_line}",
        f"  disk      {_disk(results_dir)}",
        *(f"  predicted {line}" for line in _predicted(specs, ranks)),
    ]
    return Outlook(tuple(lines), problem)


def _disk(results_dir: Path) -> str:
    existing = results_dir.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    return f"{free / _GB:,.1f} GB free for checkpoints and results in {results_dir}"


def _predicted(specs: Sequence[RunSpec], ranks: int) -> list[str]:
    """The time of all runs together, one after the other, on the machines that are known."""
    machines, assumed = read_hardware()
    costs: dict[str, CostPlan] = {}
    for spec in specs:
        if spec.contestant not in costs:
            costs[spec.contestant] = count_cost(spec, ranks=ranks)
    lines = []
    for machine in machines:
        if machine.gpus < ranks:
            continue
        seconds = sum(
            predict(costs[spec.contestant], machine, assumed).epoch_s * spec.config.train.epochs
            for spec in specs
        )
        lines.append(f"{duration(seconds)} for {len(specs)} runs on {ranks} of {machine.name}")
    return lines


def count_cost(spec: RunSpec, *, ranks: int) -> CostPlan:
    """What a step of a run costs, counted without data.

    Args:
        spec: the run.
        ranks: that train it.
    """
    config = spec.config
    shape = data_shape(config.dataset)
    weightless = OmegaConf.to_container(config.model)
    assert isinstance(weightless, dict)
    if weightless.get("pretrained"):  # sizes do not depend on where the weights come from
        weightless |= {"pretrained": False, "weights": None}
    with torch.device(META):
        model = build_model(
            {str(key): value for key, value in weightless.items()},
            num_classes=shape.num_classes,
            input_shape=shape.input_shape,
        )
    return make_plan(
        model.train(),
        OmegaConf.to_container(config.optimizer),  # type: ignore[arg-type]
        shape,
        batch_size=int(config.train.batch_size),
        micro_batch=config.train.get("micro_batch"),
        world_size=ranks,
    )
