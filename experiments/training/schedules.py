"""The learning rate as a pure function of the step.

With `base` the optimizer's learning rate, E epochs in total and W warm-up epochs:

    warm-up   base * (f + (1 - f) * t / w)       at step t < w, w = round(W * steps per epoch),
                                                 f = `warmup_start_factor`
    cosine    min + (base - min) * (1 + cos(pi * (e - W) / (E - W))) / 2
    steps     base * gamma ** (number of milestones <= e)
    constant  base
    replay    cosine * multiplier of the last of `multipliers` whose step is <= t

The warm-up is linear per step. The cosine spans the epochs *after* the warm-up, so that it starts
at `base` where the warm-up ends and is the plain one where there is none; `e` is the epoch
(`interval: epoch`, torch's CosineAnnealingLR stepped once an epoch) or the fractional epoch
(`interval: step`). Milestones are epochs counted from the start of training, warm-up included.
Each equals the torch schedulers CosineAnnealingLR, MultiStepLR and LinearLR (tested); `replay` is
ours (`experiments.runs.replay`).
"""

from __future__ import annotations

import bisect
import itertools
import logging
import math
from dataclasses import dataclass
from typing import Literal

from experiments.errors import UserError
from experiments.settings import Node, node_name, read_settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Constant:
    """The base learning rate throughout, after an optional linear warm-up."""

    name: str
    warmup_epochs: float = 0.0
    warmup_start_factor: float = 0.1

    def after_warmup(
        self, base_lr: float, step: int, warmup_steps: int, steps_per_epoch: int, epochs: int
    ) -> float:
        """Learning rate at a step that is not in the warm-up."""
        return base_lr


@dataclass(frozen=True, kw_only=True)
class Cosine(Constant):
    """Half a cosine from the base learning rate down to `min_lr`."""

    min_lr: float
    interval: Literal["epoch", "step"] = "epoch"

    def after_warmup(
        self, base_lr: float, step: int, warmup_steps: int, steps_per_epoch: int, epochs: int
    ) -> float:
        """Learning rate at a step that is not in the warm-up."""
        if self.interval == "step":
            done, span = float(step - warmup_steps), float(epochs * steps_per_epoch - warmup_steps)
        else:
            # A warm-up that ends inside an epoch leaves the base rate until the next one.
            done = max(0.0, step // steps_per_epoch - self.warmup_epochs)
            span = epochs - self.warmup_epochs
        progress = min(1.0, done / span)
        return self.min_lr + (base_lr - self.min_lr) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True, kw_only=True)
class Steps(Constant):
    """Multiplied by `gamma` at each milestone, an epoch counted from the start of training."""

    milestones: tuple[int, ...]
    gamma: float

    def after_warmup(
        self, base_lr: float, step: int, warmup_steps: int, steps_per_epoch: int, epochs: int
    ) -> float:
        """Learning rate at a step that is not in the warm-up."""
        epoch = step // steps_per_epoch
        return base_lr * self.gamma ** sum(milestone <= epoch for milestone in self.milestones)


@dataclass(frozen=True, kw_only=True)
class Replay(Cosine):
    """A cosine times multipliers that change at given steps, such as the γ of another run.

    Attributes:
        source: the contestant whose multipliers they are.
        source_key: key of its run; None before they are filled in.
        multipliers: (step, multiplier) pairs, steps from 0 and increasing.
    """

    source: str
    source_key: str | None = None
    multipliers: tuple[tuple[float, ...], ...] = ()

    def after_warmup(
        self, base_lr: float, step: int, warmup_steps: int, steps_per_epoch: int, epochs: int
    ) -> float:
        """Learning rate at a step that is not in the warm-up."""
        plain = super().after_warmup(base_lr, step, warmup_steps, steps_per_epoch, epochs)
        place = bisect.bisect_right(self.multipliers, (step, math.inf))
        return plain * self.multipliers[place - 1][1]


SCHEDULES: dict[str, type[Constant]] = {
    "cosine": Cosine,
    "steps": Steps,
    "constant": Constant,
    "replay": Replay,
}


def read_schedule(cfg: Node | Constant) -> Constant:
    """The schedule that a config node names, its keys and types checked.

    Args:
        cfg: the node `schedule`, or a schedule already read (returned as it is).

    Raises:
        UserError: unknown name, unknown or missing key, wrong type.
    """
    if isinstance(cfg, Constant):
        return cfg
    return read_settings(SCHEDULES[node_name(cfg, "schedule", SCHEDULES)], cfg, "schedule")


def learning_rate(
    cfg: Node | Constant, *, base_lr: float, step: int, steps_per_epoch: int, epochs: int
) -> float:
    """Learning rate of one step; the equations stand at the top of this module.

    Args:
        cfg: the node `schedule` of the config; `read_schedule(cfg)` gives an object that saves
            reading the node again at every step.
        base_lr: the optimizer's learning rate, reached at the end of the warm-up.
        step: steps finished before this one, from 0.
        steps_per_epoch: steps of one epoch, at least 1.
        epochs: epochs of the whole run, at least 1.

    Raises:
        UserError: the node cannot be read.
        ValueError: a count is out of range.
    """
    if step < 0 or steps_per_epoch < 1 or epochs < 1:
        raise ValueError(
            f"step = {step}, steps_per_epoch = {steps_per_epoch}, epochs = {epochs}: "
            "need step >= 0 and at least one step per epoch and one epoch"
        )
    schedule = read_schedule(cfg)
    warmup_steps = round(schedule.warmup_epochs * steps_per_epoch)
    if step < warmup_steps:
        start = schedule.warmup_start_factor
        return base_lr * (start + (1 - start) * step / warmup_steps)
    return schedule.after_warmup(base_lr, step, warmup_steps, steps_per_epoch, epochs)


def check_schedule(cfg: Node | Constant, *, base_lr: float, epochs: int) -> None:
    """Refuse settings that make no sense or have no effect, before a run starts.

    A milestone that lies beyond the last epoch is logged as a warning only: a paper prints one.

    Args:
        cfg: the node `schedule` of the config.
        base_lr: the optimizer's learning rate.
        epochs: epochs of the whole run.

    Raises:
        UserError: the first such setting.
    """
    schedule = read_schedule(cfg)
    if not (math.isfinite(base_lr) and base_lr > 0):
        raise UserError(f"optimizer.lr = {base_lr} must be a positive number")
    if epochs < 1:
        raise UserError(f"epochs = {epochs} must be at least 1")
    _check_warmup(schedule, epochs)
    if isinstance(schedule, Cosine):
        _check_cosine(schedule, base_lr)
    if isinstance(schedule, Steps):
        _check_steps(schedule, epochs)
    if isinstance(schedule, Replay):
        _check_replay(schedule)


def _check_warmup(schedule: Constant, epochs: int) -> None:
    warmup, start = schedule.warmup_epochs, schedule.warmup_start_factor
    if not (math.isfinite(warmup) and warmup >= 0):
        raise UserError(f"schedule.warmup_epochs = {warmup:g} must be 0 (none) or more")
    if warmup >= epochs:
        raise UserError(
            f"schedule.warmup_epochs = {warmup:g} leaves nothing of the run's {epochs} epochs; "
            "it must be smaller"
        )
    if not 0 < start < 1:
        raise UserError(
            f"schedule.warmup_start_factor = {start:g} must lie between 0 and 1; for no warm-up "
            "set schedule.warmup_epochs to 0"
        )


def _check_cosine(schedule: Cosine, base_lr: float) -> None:
    if not schedule.min_lr >= 0:
        raise UserError(f"schedule.min_lr = {schedule.min_lr:g} must be 0 or more")
    if schedule.min_lr >= base_lr:
        raise UserError(
            f"schedule.min_lr = {schedule.min_lr:g} must be smaller than optimizer.lr = "
            f"{base_lr:g}; for a learning rate that stays choose schedule=constant"
        )


def _check_steps(schedule: Steps, epochs: int) -> None:
    milestones, shown = schedule.milestones, list(schedule.milestones)
    if not milestones:
        raise UserError("schedule.milestones is empty; for no step choose schedule=constant")
    if milestones[0] < 1 or any(a >= b for a, b in itertools.pairwise(milestones)):
        raise UserError(f"schedule.milestones = {shown} must be epochs from 1, increasing")
    if not 0 < schedule.gamma < 1:
        raise UserError(f"schedule.gamma = {schedule.gamma:g} must lie between 0 and 1")
    if milestones[0] < schedule.warmup_epochs:
        raise UserError(
            f"schedule.milestones = {shown} has a step inside the warm-up of "
            f"{schedule.warmup_epochs:g} epochs (schedule.warmup_epochs)"
        )
    beyond = [milestone for milestone in milestones if milestone >= epochs]
    if beyond:
        logger.warning(
            "schedule.milestones: %s never reached, the run has %d epochs", beyond, epochs
        )


def _check_replay(schedule: Replay) -> None:
    pairs = schedule.multipliers
    if not pairs:
        raise UserError(
            f"schedule.multipliers is empty: they are the γ of a finished run of {schedule.source}"
            " with the same scale and seed; python -m experiments.reproduce runs it first"
        )
    if schedule.warmup_epochs > 0:
        raise UserError(
            f"schedule.warmup_epochs = {schedule.warmup_epochs:g} must be 0 in a replay: its"
            " multipliers are the warm-up"
        )
    if any(len(pair) != 2 for pair in pairs):
        raise UserError(f"schedule.multipliers = {_shown(pairs)} must be [step, multiplier] pairs")
    steps = [pair[0] for pair in pairs]
    if steps[0] != 0 or any(a >= b for a, b in itertools.pairwise(steps)):
        shown = ", ".join(f"{step:g}" for step in steps)
        raise UserError(f"schedule.multipliers has steps {shown}: they must increase from 0 on")
    if not all(math.isfinite(value) and value > 0 for _, value in pairs):
        raise UserError(
            f"schedule.multipliers = {_shown(pairs)}: every multiplier must be a positive number"
        )


def _shown(pairs: tuple[tuple[float, ...], ...]) -> str:
    return str([list(pair) for pair in pairs])
