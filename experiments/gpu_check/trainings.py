"""A few steps of every experiment in every precision, with the suite's own trainer."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.composition import compose_config
from experiments.contestants import arms, optimizers_with_recipe, options
from experiments.errors import UserError
from experiments.gpu_check.outcome import Check, Details, RefusedError
from experiments.runs.directory import read_status
from experiments.runs.metrics import EpochRecord, read_metrics
from experiments.runs.spec import RunSpec
from experiments.training.trainer import Trainer

logger = logging.getLogger(__name__)

#: A training ends with the first epoch after which it has taken so many steps.
STEPS = 6
#: Every optimizer is tried on this one.
COMMON = "cifar10_resnet18"
#: Of the loss of the first step, in another precision.
TOLERANCE = 0.05


@dataclass(frozen=True)
class Scope:
    """What is trained, and where.

    Attributes:
        device: the device.
        scale: `full`: the networks and batches of the papers; `smoke`: small ones.
        experiments: names.
        precisions: of `train.precision`, float32 first.
        folder: where runs and images may lie.
    """

    device: torch.device
    scale: str
    experiments: Sequence[str]
    precisions: Sequence[str]
    folder: Path


def all_experiments() -> list[str]:
    """The names of all experiments."""
    return options("experiment")


def training_checks(scope: Scope) -> Iterator[Check]:
    """Every experiment with the optimizer it is about, and every optimizer with a recipe once."""
    first_losses: dict[str, float] = {}
    for experiment in scope.experiments:
        names = optimizers_with_recipe(experiment)
        subjects = list(names) if experiment == COMMON else [_subject(experiment)]
        for subject in subjects:
            for precision in scope.precisions:
                yield _check(scope, experiment, subject, precision, first_losses)


def compile_check(scope: Scope) -> Check:
    """The same under `torch.compile`, once."""
    precision = "bfloat16" if "bfloat16" in scope.precisions else scope.precisions[0]

    def run() -> Details:
        overrides = _overrides(scope, COMMON, "optimizer=mlbfgs", precision)
        return _train([*overrides, "train.compile=true"], scope, "compiled")

    return Check(f"compiled/{COMMON}/{precision}", run)


def _subject(experiment: str) -> str:
    """The last of its optimizers in the papers' order, or an arm."""
    names, settings = optimizers_with_recipe(experiment), arms(experiment)
    if names:
        return names[-1]
    return f"arm={'mlbfgs' if 'mlbfgs' in settings else settings[0]}"


def _check(
    scope: Scope, experiment: str, subject: str, precision: str, first_losses: dict[str, float]
) -> Check:
    choice = subject if subject.startswith("arm=") else f"optimizer={subject}"
    name = f"{experiment}/{subject.removeprefix('arm=')}"

    def run() -> Details:
        overrides = _overrides(scope, experiment, choice, precision)
        try:
            details = _train(overrides, scope, f"{name}/{precision}".replace("/", "-"))
        except UserError as error:
            if precision != "float32" and "train.precision" in str(error):
                raise RefusedError(str(error)) from error
            raise
        first = details["first_loss"]
        expected = first_losses.setdefault(name, first)
        if not abs(first - expected) <= TOLERANCE * abs(expected):
            raise AssertionError(
                f"the first loss is {first:.4f} in {precision}, not {expected:.4f} as at first"
            )
        return details

    return Check(f"train/{name}/{precision}", run)


def _overrides(scope: Scope, experiment: str, choice: str, precision: str) -> list[str]:
    chosen = [f"experiment={experiment}", choice, f"scale={scope.scale}"]
    config, on_gpu = compose_config(chosen), scope.device.type == "cuda"
    more = [
        f"results_dir={scope.folder}",
        f"train.device={scope.device.type}",
        f"train.precision={precision}",
        "train.log_interval=1",
        # So small that a recipe's rate does no harm at other intervals than its own.
        "optimizer.lr=1e-3",
    ]
    if "min_lr" in config.schedule:
        more.append("schedule.min_lr=0")  # below that rate
    dataset, images = config.dataset.name, STEPS * int(config.train.batch_size)
    if dataset in ("cifar10", "cifar100"):
        more.append("dataset.synthetic=true")
    if dataset == "imagenet":
        more += ["dataset.synthetic=true", f"dataset.workers={4 if on_gpu else 0}"]
        more.append(f"dataset.root={scope.folder / 'images'}-{scope.scale}-{images}")
        tests = max(int(config.dataset.num_classes), 100)
        more += [f"dataset.train_images={images}", f"dataset.test_images={tests}"]
        if scope.scale == "full":
            more.append("train.micro_batch=128")
    else:
        more += [f"dataset.train_limit={images}", "dataset.test_limit=200"]
    if "update_interval" in config.optimizer and config.optimizer.get("name") != "slbfgs":
        more.append("optimizer.update_interval=1")  # so that H is used from the third step on
    return [*chosen, *more]


def _train(overrides: list[str], scope: Scope, name: str) -> Details:
    spec = RunSpec.from_config(compose_config(overrides))
    path = scope.folder / "runs" / name
    try:
        Trainer(spec, path, on_epoch=_stop_after_steps).run()
    except SystemExit:  # as it was asked to
        logger.debug("%s has taken its steps", path)
    records = read_metrics(path / "metrics.jsonl")
    status = read_status(path)
    assert status is not None
    steps = [record for record in records if record["kind"] == "step"]
    (*_, epoch) = [record for record in records if record["kind"] == "epoch"] or [{}]
    overflows = sum(record["kind"] == "overflow" for record in records)
    losses = [record["loss"] for record in steps] + [epoch.get("test_loss")]
    if not all(map(_is_finite, losses)):
        raise AssertionError(f"losses {losses} of a run that is {status.status}: {status.message}")
    if overflows >= status.step:
        raise AssertionError(f"all of the {overflows} steps overflowed")
    return {
        "steps": status.step,
        "first_loss": losses[0],
        "test_loss": losses[-1],
        "overflows": overflows,
        "seconds_per_step": epoch["train_time_s"] / status.step,
        "batch_size": int(spec.config.train.batch_size),
    }


def _stop_after_steps(record: EpochRecord) -> None:
    if record.step >= STEPS:
        raise SystemExit(0)


def _is_finite(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)
