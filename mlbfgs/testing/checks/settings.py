"""Settings of parameter groups, closures, gradients that are not there, and switches by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from mlbfgs.testing.compare import first_difference
from mlbfgs.testing.outcome import expect, unless_refused
from mlbfgs.testing.problems import NoisyQuadratic, Run, make_params, start
from mlbfgs.testing.registry import Registry
from mlbfgs.testing.subject import PHASES, Subject

CHECKS = Registry()


def _two_groups(subject: Subject, key: str, values: tuple[float, float], **others: Any) -> Run:
    params = make_params(((6,), (7,)))
    groups = [{"params": [p], key: v} for p, v in zip(params, values, strict=True)]
    return Run(NoisyQuadratic(params), subject.make(groups, **others))


def _expect_as_uniform(
    subject: Subject, key: str, values: tuple[float, float], steps: int, **others: Any
) -> None:
    """In warm-up parameters do not influence each other: each group is as if alone."""
    mixed = _two_groups(subject, key, values, **others)
    mixed.advance(steps)
    for i, value in enumerate(values):
        uniform = _two_groups(subject, key, (value, value), **others)
        uniform.advance(steps)
        difference = first_difference(uniform.values()[i], mixed.values()[i], f"group {i}")
        expect(difference is None, f"{key}={value}: {difference}")


@CHECKS.check("Interface")
def lr_of_each_group(subject: Subject) -> None:
    """The learning rate of each group is honoured, in every phase."""
    _expect_as_uniform(subject, "lr", (0.01, 0.002), steps=2)
    for phase in PHASES:
        run = _two_groups(subject, "lr", (0.01, 0.01))
        run.advance(subject.steps(phase))
        run.optimizer.param_groups[1]["lr"] = 0.0
        before = run.values()
        run.advance()
        still = [torch.equal(a, b) for a, b in zip(before, run.values(), strict=True)]
        expect(still == [False, True], f"{phase}, lr 0.01 and 0: unmoved are {still}")


@CHECKS.check("Interface")
def weight_decay_of_each_group(subject: Subject) -> None:
    """The weight decay of each group is honoured."""
    subject.require("weight_decay")
    others = {"lr": 0.01}
    _expect_as_uniform(subject, "weight_decay", (0.5, 0.0), steps=2, **others)
    run = _two_groups(subject, "weight_decay", (0.5, 0.0), **others)
    before = run.values()
    for p in run.params:
        p.grad = torch.zeros_like(p)
    run.optimizer.step()
    shrunk = bool((run.params[0].abs() < before[0].abs()).all())
    expect(shrunk, "a zero gradient and weight decay 0.5 do not shrink a parameter")
    expect(torch.equal(run.params[1], before[1]), "no gradient, no weight decay, yet a move")


@CHECKS.check("Interface")
def momentum_of_each_group(subject: Subject) -> None:
    """The momentum of each group is honoured, also one given in the middle of training."""
    subject.require("momentum")
    _expect_as_uniform(subject, "momentum", (0.9, 0.0), steps=4)
    runs = [_two_groups(subject, "momentum", (0.0, 0.0)) for _ in range(2)]
    for run, momentum in zip(runs, (0.9, 0.0), strict=True):
        run.advance(2)
        run.optimizer.param_groups[0]["momentum"] = momentum
        run.advance(3)
    same = [torch.equal(a, b) for a, b in zip(runs[0].values(), runs[1].values(), strict=True)]
    expect(same == [False, True], "momentum given to one group later: unchanged are " + str(same))


@CHECKS.check("Interface")
def closure_is_called_once(subject: Subject) -> None:
    """A closure is called once, with gradients enabled, and its loss returned."""
    plain, run = start(subject), start(subject)
    for step in range(subject.horizon):
        calls: list[bool] = []
        loss = torch.tensor(float(step))

        def closure(step: int = step, calls: list[bool] = calls, loss: Tensor = loss) -> Any:
            calls.append(torch.is_grad_enabled())
            run.problem.set_gradients(step)
            return loss

        with torch.no_grad():
            returned: Any = run.optimizer.step(closure)
        expect(calls == [True], f"calls of the closure, with gradients enabled or not: {calls}")
        expect(returned is loss, f"returned {returned!r}, not the closure's loss")
        expect(torch.is_grad_enabled(), "the step leaves gradients disabled")
        plain.advance()
        expect(plain.optimizer.step.__name__ == "step", "the step has lost its name")
        difference = first_difference(plain.values(), run.values(), "parameters")
        expect(difference is None, f"step {step}, unlike without a closure: {difference}")


@CHECKS.check("Interface")
def gradients_are_never_changed(subject: Subject) -> None:
    """`p.grad` stays the same tensor with the same numbers."""
    for maximize in (False, True):
        if maximize and not subject.has("maximize"):
            continue
        options: dict[str, Any] = {"maximize": True, "lr": 1e-4} if maximize else {}
        run = start(subject, **options)
        for _ in range(subject.steps("with a full history") + 1):
            run.problem.set_gradients(run.step)
            given = [p.grad for p in run.params if p.grad is not None]
            before = [g.clone() for g in given]
            run.optimizer.step()
            run.step += 1
            kept = all(p.grad is g for p, g in zip(run.params, given, strict=True))
            expect(kept, f"step {run.step} replaces a gradient")
            difference = first_difference(before, given, "gradients")
            expect(difference is None, f"step {run.step}: {difference}")


@CHECKS.check("Interface")
def no_gradient_no_move(subject: Subject) -> None:
    """A parameter without a gradient does not move, weight decay included, and moves later."""
    for phase in PHASES:
        run = start(subject)
        run.advance(subject.steps(phase))
        for _ in range(subject.update_interval + 1):
            before = run.values()
            run.advance(without={1})
            still = [torch.equal(a, b) for a, b in zip(before, run.values(), strict=True)]
            expect(still == [False, True, False], f"{phase}: unmoved are {still}")
        before = run.values()
        run.advance()
        still = [torch.equal(a, b) for a, b in zip(before, run.values(), strict=True)]
        expect(not any(still), f"{phase}, all gradients are back: unmoved are {still}")


@CHECKS.check("Interface")
def late_gradient_starts_late(subject: Subject) -> None:
    """A parameter whose first gradient comes late starts then: its training stays finite."""
    run = start(subject)
    run.advance(subject.steps("with a full history"), without={2})
    before = run.values()[2]
    run.advance(subject.horizon)
    expect(not torch.equal(before, run.params[2]), "it never moves")
    distance = (run.params[2].detach() - run.problem.targets[2]).norm()
    started = (before - run.problem.targets[2]).norm()
    expect(bool(distance < started), f"distance to the minimum: {started:.3g}, then {distance:.3g}")


@CHECKS.check("Interface")
def without_any_gradient_nothing_happens(subject: Subject) -> None:
    """Without any gradient nothing happens, the step counter included."""
    for phase in PHASES:
        idle, run = start(subject), start(subject)
        for one in (idle, run):
            one.advance(subject.steps(phase))
        for _ in range(subject.update_interval):
            idle.problem.set_gradients(0, without=range(len(idle.params)))
            idle.optimizer.step()
        states = (run.optimizer.state_dict()["state"], idle.optimizer.state_dict()["state"])
        difference = first_difference(run.values(), idle.values(), "parameters")
        difference = difference or first_difference(*states, "state")
        expect(difference is None, f"{phase}: {difference}")


@CHECKS.check("Interface")
def maximize_ascends(subject: Subject) -> None:
    """`maximize` is right: f ascends as -f descends, bit for bit."""
    ascending = make_params()
    optimizer = subject.make_with(ascending, maximize=True)
    descending = start(subject, weight_decay=0.0) if subject.has("weight_decay") else start(subject)
    if subject.has("weight_decay"):
        optimizer = subject.make(ascending, maximize=True, weight_decay=0.0)
    for step in range(subject.horizon):
        descending.problem.set_gradients(step)
        for p, q in zip(ascending, descending.params, strict=True):
            assert q.grad is not None
            p.grad = -q.grad
        optimizer.step()
        descending.optimizer.step()
        difference = first_difference(descending.values(), [p.detach() for p in ascending])
        expect(difference is None, f"step {step}: {difference}")


@CHECKS.for_each(
    "Interface",
    {key: key for key in ("foreach", "fused", "capturable")},
    "`{}=True` trains like False, or is refused by name",
)
def switch(subject: Subject, key: str) -> None:
    """See the title."""
    params = make_params()
    optimizer = subject.make_with(params, **{key: True})
    run = Run(NoisyQuadratic(params), optimizer)
    unless_refused(run.advance, key)
    run.advance(subject.horizon - 1)
    plain_params = make_params()
    plain = Run(NoisyQuadratic(plain_params), subject.make(plain_params, **{key: False}))
    plain.advance(subject.horizon)
    for a, b in zip(plain.values(), run.values(), strict=True):
        expect(torch.allclose(a, b, rtol=1e-4, atol=1e-5), f"{key}=True goes another way")


@CHECKS.check("Interface")
def differentiable_step(subject: Subject) -> None:
    """`differentiable=True` lets gradients through the step, or is refused by name."""

    def after_two_steps(scale: Tensor) -> Tensor:
        p = Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64)).clone()
        optimizer: Optimizer = subject.make_with([p], differentiable=True)
        for step in range(2):
            p.grad = scale * torch.cos(torch.arange(5, dtype=torch.float64) + step)
            optimizer.step()
        return p.sum()

    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(after_two_steps(scale), scale)
    h = 1e-5
    with torch.no_grad():
        numeric = (after_two_steps(scale + h) - after_two_steps(scale - h)) / (2 * h)
    # central differences are good to h² plus rounding / h
    close = torch.allclose(slope, numeric, rtol=1e-4, atol=1e-8)
    expect(close, f"derivative {slope.item():.6g}, by differences {numeric.item():.6g}")
