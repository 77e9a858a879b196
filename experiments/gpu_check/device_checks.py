"""What is looked at besides trainings: waits of the host, conformance, cost of steps."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from experiments.benchmarks.cost_rounds import Plan, measure_together
from experiments.composition import compose_config
from experiments.gpu_check.outcome import Check, Details, NotOnThisDeviceError
from experiments.gpu_check.trainings import COMMON, Scope
from experiments.runs.spec import RunSpec
from experiments.training.clock import TrainingClock
from experiments.training.ranks import ALONE
from experiments.training.state import Position
from experiments.training.step import StepTaker
from experiments.training.task import build_task
from mlbfgs.testing import BoundCheck, conformance_checks

#: A step in the middle of an interval T, with a full history.
INTERVAL, HISTORY_SIZE = 4, 2
ORDINARY_STEP = INTERVAL * (HISTORY_SIZE + 1) + 2
OPTIMIZERS = ("sgd", "adam", "kfac", "slimqn", "mlbfgs")
SUBJECTS = ("mlbfgs.MLBFGS", "mlbfgs.SLIMQN")


def synchronisation_checks(scope: Scope) -> Iterator[Check]:
    """No step but one with a pair, factors or an overflow check makes the host wait."""
    for name in OPTIMIZERS:
        for precision in scope.precisions:
            if precision != "float16":  # whose scaler reads whether there is an overflow
                yield _synchronisation(scope, name, precision)


def _synchronisation(scope: Scope, name: str, precision: str) -> Check:
    overrides = [
        *(f"experiment={COMMON}", f"optimizer={name}", "scale=smoke", "dataset.synthetic=true"),
        *(f"train.device={scope.device.type}", f"train.precision={precision}"),
        *(
            "dataset.train_limit=1024",
            "dataset.test_limit=64",
            "train.batch_size=64",
            f"results_dir={scope.folder}",
        ),
    ]
    if name in ("slimqn", "mlbfgs"):
        overrides += [
            f"optimizer.update_interval={INTERVAL}",
            f"optimizer.history_size={HISTORY_SIZE}",
        ]

    def run() -> Details:
        if scope.device.type != "cuda":
            raise NotOnThisDeviceError("only a GPU works while the host goes on")
        spec = RunSpec.from_config(compose_config(overrides))
        task = build_task(spec, scope.device)
        clock = TrainingClock(scope.device)
        steps, position = StepTaker(spec, task, clock, ALONE), Position()
        batches = list(task.data.train_batches(0))
        task.model.train()
        clock.start()
        try:
            for batch in batches[: ORDINARY_STEP - 1]:
                steps.take(batch, position)
            torch.cuda.set_sync_debug_mode("error")
            steps.take(batches[ORDINARY_STEP - 1], position)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            clock.stop()
        return {"step": ORDINARY_STEP}

    return Check(f"no wait/{name}/{precision}", run)


def conformance_on(scope: Scope) -> Iterator[Check]:
    """The list of `mlbfgs.testing`, with parameters on the device."""
    for subject in SUBJECTS:
        for bound in conformance_checks(subject, {"lr": 0.1}, slow=False):
            yield Check(f"conformance/{bound}", partial(_conformance, scope, bound))


def _conformance(scope: Scope, bound: BoundCheck) -> Details:
    with torch.device(scope.device):
        outcome = bound.run()
    if outcome.status == "fail":
        raise AssertionError(outcome.reason)
    return {"outcome": outcome.status}


def speed_check(scope: Scope) -> Check:
    """Seconds and bytes of a step of each optimizer, beside a forward and a backward pass."""
    full = scope.scale == "full"

    def run() -> Details:
        plan = Plan(
            experiment="imagenet_resnet50" if full else COMMON,
            width=64 if full else 4,
            batch=64 if full else 4,
            rounds=5 if full else 1,
            heavy_rounds=1,
            device=scope.device,
        )
        measured = measure_together(["sgd", "adam", "kfac", "slimqn", "mlbfgs"], plan)
        for result in measured["optimizers"].values():
            del result["settings"]
        shown = {"experiment": plan.experiment, "width": plan.width, "batch": plan.batch}
        return {**shown, **measured}

    return Check("speed of steps", run)
