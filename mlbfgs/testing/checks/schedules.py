"""Learning rates from every scheduler of torch, as numbers and as tensors; the gradient scaler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer, lr_scheduler

from mlbfgs.testing.compare import first_difference
from mlbfgs.testing.outcome import NotRunError, expect, unless_refused
from mlbfgs.testing.problems import batch, decay, small_network, start, through_file, train
from mlbfgs.testing.registry import Registry
from mlbfgs.testing.subject import Subject

CHECKS = Registry()

BASE_LR = 0.01

Recipe = Callable[[Optimizer], Any]

RECIPES: dict[str, Recipe] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda k: 0.9**k),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda k: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [3, 7]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, BASE_LR / 10, BASE_LR, step_size_up=4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, BASE_LR, total_steps=200),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 10),
}

#: Every scheduler of the installed torch, known here or not.
SCHEDULERS = {
    name: name for name in sorted(lr_scheduler.__all__) if not name.endswith("LRScheduler")
}


def _recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise NotRunError(f"this package does not know how to make torch's {name}")
    return RECIPES[name]


def _follow(schedule: Any) -> None:
    if isinstance(schedule, lr_scheduler.ReduceLROnPlateau):
        schedule.step(1.0)  # a loss that never improves
    else:
        schedule.step()


def _settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


@CHECKS.for_each("Interface", SCHEDULERS, "Obeys {}")
def scheduler(subject: Subject, name: str) -> None:
    """See the title."""
    recipe = _recipe(name)
    scheduled, manual = start(subject, lr=BASE_LR), start(subject, lr=BASE_LR)
    # The words by which CyclicLR and OneCycleLR refuse optimizers without momentum.
    schedule = unless_refused(lambda: recipe(scheduled.optimizer), "momentum")
    torchs = SGD([nn.Parameter(torch.zeros(1))], lr=BASE_LR, momentum=0.9)
    schedule_of_torchs = recipe(torchs)
    rates = []
    for step in range(subject.horizon):
        (settings,) = _settings(scheduled.optimizer)
        rates.append(settings["lr"])
        expected = torchs.param_groups[0]["lr"]
        expect(settings["lr"] == expected, f"step {step}: lr {settings['lr']}, not {expected}")
        manual.optimizer.param_groups[0].update(settings)
        for run in (scheduled, manual):
            run.advance()
        difference = first_difference(manual.values(), scheduled.values(), "parameters")
        expect(difference is None, f"step {step}, unlike with lr set by hand: {difference}")
        torchs.step()
        for one in (schedule, schedule_of_torchs):
            _follow(one)
    expect(len(set(rates)) > 1, "the learning rate never changed")
    constant = start(subject, lr=BASE_LR)
    constant.advance(subject.horizon)
    obeyed = first_difference(constant.values(), scheduled.values()) is not None
    expect(obeyed, "the parameters move as with a constant learning rate")


@CHECKS.for_each(
    "Interface",
    {name: name for name in ("CyclicLR", "OneCycleLR")},
    "{} with its defaults cycles the momentum",
)
def momentum_cycle(subject: Subject, name: str) -> None:
    """See the title."""
    run = start(subject, lr=BASE_LR)
    schedule = unless_refused(lambda: _recipe(name)(run.optimizer), "momentum")
    before = _settings(run.optimizer)[0]
    for _ in range(3):
        run.advance()
        _follow(schedule)
    after = _settings(run.optimizer)[0]
    changed = {k for k in after if k != "lr" and after[k] != before[k]}
    momentum = "momentum" if subject.has("momentum") else "betas"
    told = ", ".join(f"{k} from {before[k]} to {after[k]}" for k in sorted(changed)) or "nothing"
    expect(momentum in changed, f"besides lr it changes {told}, not {momentum}")


@CHECKS.check("Interface")
def lr_as_tensor(subject: Subject) -> None:
    """A learning rate given as a tensor trains like a number, and may change in place."""
    runs = [start(subject, lr=lr) for lr in (BASE_LR, torch.tensor(BASE_LR))]
    schedules = [lr_scheduler.ExponentialLR(run.optimizer, 0.9) for run in runs]
    for _ in range(subject.horizon):
        for run, schedule in zip(runs, schedules, strict=True):
            run.advance()
            schedule.step()
    expect(isinstance(runs[1].optimizer.param_groups[0]["lr"], Tensor), "lr became a number")
    # A float32 learning rate is rounded once more than a number.
    for a, b in zip(runs[0].values(), runs[1].values(), strict=True):
        gap = (a - b).abs().max().item()
        expect(gap <= 1e-5, f"parameters differ by {gap:.2g}")


@CHECKS.check("Interface")
def scheduler_resumes(subject: Subject) -> None:
    """Optimizer and scheduler, saved and loaded together, continue bit for bit."""
    run, resumed = start(subject, lr=BASE_LR), start(subject, lr=BASE_LR)
    schedules = [lr_scheduler.CosineAnnealingLR(r.optimizer, 30) for r in (run, resumed)]
    for _ in range(subject.steps("in mid-interval")):
        run.advance()
        schedules[0].step()
    schedules[1].load_state_dict(schedules[0].state_dict())
    resumed.optimizer.load_state_dict(through_file(run.optimizer.state_dict()))
    resumed.step = run.step
    with torch.no_grad():
        for p, q in zip(resumed.params, run.params, strict=True):
            p.copy_(q)
    for _ in range(subject.horizon):
        for one, schedule in zip((run, resumed), schedules, strict=True):
            one.advance()
            schedule.step()
    difference = first_difference(run.values(), resumed.values(), "parameters")
    expect(difference is None, difference or "")


@CHECKS.check("Interface")
def scaler_skips_cleanly(subject: Subject) -> None:
    """A step that GradScaler skips changes nothing; its other steps are the plain ones."""
    models = [small_network(), small_network()]
    plain, scaled = (subject.make(m.parameters(), **decay(subject, {})) for m in models)
    # A power of two is scaled away without rounding.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
    overflows = {0, 2, subject.steps("on the step of a pair"), subject.horizon - 1}
    for step in range(subject.horizon):
        inputs, labels = batch(step)
        scaled.zero_grad()
        loss: Any = nn.functional.cross_entropy(models[1](inputs), labels)
        scaler.scale(loss).backward()
        if step in overflows:
            gradient = next(iter(models[1].parameters())).grad
            assert gradient is not None
            gradient[0, 0] = torch.inf
        else:
            train(models[0], plain, 1, step)
        scaler.step(scaled)
        scaler.update()
        values = [[p.detach() for p in m.parameters()] for m in models]
        states = [o.state_dict()["state"] for o in (plain, scaled)]
        difference = first_difference(values[0], values[1], "parameters")
        difference = difference or first_difference(states[0], states[1], "state")
        kind = "skipped" if step in overflows else "ordinary"
        expect(difference is None, f"{kind} step {step}: {difference}")
