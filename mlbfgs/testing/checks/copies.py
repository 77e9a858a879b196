"""Hooks, copies and the printed form."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from mlbfgs.testing.compare import first_difference
from mlbfgs.testing.outcome import expect
from mlbfgs.testing.problems import NoisyQuadratic, Run, start
from mlbfgs.testing.registry import Registry
from mlbfgs.testing.subject import PHASES, Subject

CHECKS = Registry()


@CHECKS.check("Interface")
def step_hooks_fire_in_order(subject: Subject) -> None:
    """Step hooks fire once, in order, before and after the move; global ones too."""
    run = start(subject)
    events: list[str] = []
    start_values = run.values()

    def event(name: str) -> None:
        moved = not torch.equal(start_values[0], run.params[0])
        events.append(f"{name} {'after' if moved else 'before'} the move")

    o = run.optimizer
    handles = [
        register_optimizer_step_pre_hook(lambda *_: event("global pre")),
        register_optimizer_step_post_hook(lambda *_: event("global post")),
        o.register_step_pre_hook(lambda *_: event("first pre")),
        o.register_step_pre_hook(lambda *_: event("second pre")),
        o.register_step_post_hook(lambda *_: event("first post")),
        o.register_step_post_hook(lambda *_: event("second post")),
    ]
    try:
        run.advance()
    finally:
        for handle in handles:
            handle.remove()
    expected = [f"{name} pre before the move" for name in ("global", "first", "second")]
    expected += [f"{name} post after the move" for name in ("first", "second", "global")]
    expect(events == expected, f"the order is {events}")


@CHECKS.check("Interface")
def state_dict_hooks_fire_in_order(subject: Subject) -> None:
    """Hooks of `state_dict` and `load_state_dict` fire in order, and their changes count."""
    run, fresh = start(subject, lr=0.01), start(subject, lr=0.01)
    run.advance(subject.steps("with a part-filled history"))
    events: list[str] = []
    o, loaded_into = run.optimizer, fresh.optimizer
    state = copy.deepcopy(o.state_dict()["state"])

    def after_state_dict(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        events.append("state_dict post")
        return {**saved, "note": 7}

    def before_load(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        events.append("load pre")
        expect(saved.get("note") == 7, "the change of the state_dict hook is lost")
        groups = [{**g, "lr": 0.005} for g in saved["param_groups"]]
        return {**saved, "param_groups": groups}

    def after_load(optimizer: Optimizer) -> None:
        difference = first_difference(state, optimizer.state_dict()["state"], "state")
        events.append("load post" if difference is None else f"load post: {difference}")

    o.register_state_dict_pre_hook(lambda *_: events.append("state_dict pre"))
    o.register_state_dict_post_hook(after_state_dict)
    loaded_into.register_load_state_dict_pre_hook(before_load)
    loaded_into.register_load_state_dict_post_hook(after_load)
    saved = o.state_dict()
    keys = list(saved)
    loaded_into.load_state_dict(saved)
    expected = ["state_dict pre", "state_dict post", "load pre", "load post"]
    expect(events == expected, f"the order is {events}")
    rate = loaded_into.param_groups[0]["lr"]
    expect(rate == 0.005, f"the load hook set lr to 0.005, it is {rate}")
    expect(list(saved) == keys and saved["param_groups"][0]["lr"] == 0.01, "the argument changed")


def _expect_same_future(run: Run, twin: Run, steps: int, phase: str) -> None:
    """Run both, the twin first, which must not move the original."""
    before, state = run.values(), copy.deepcopy(run.optimizer.state_dict())
    twin.advance(steps)
    difference = first_difference(before, run.values(), "parameters") or first_difference(
        state, run.optimizer.state_dict(), "state_dict"
    )
    expect(difference is None, f"{phase}: stepping the copy changes the original: {difference}")
    run.advance(steps)
    states = (run.optimizer.state_dict(), twin.optimizer.state_dict())
    difference = first_difference(run.values(), twin.values(), "parameters") or first_difference(
        *states, "state_dict"
    )
    expect(difference is None, f"{phase}: the copy goes another way: {difference}")


def _twin(run: Run, optimizer: Optimizer) -> Run:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return Run(NoisyQuadratic(params, seed=run.problem.seed), optimizer, run.step)


@CHECKS.check("Interface")
def deepcopy_in_every_phase(subject: Subject) -> None:
    """`copy.deepcopy` in every phase gives an independent optimizer that goes the same way."""
    for phase in PHASES:
        run = start(subject)
        run.advance(subject.steps(phase))
        _expect_same_future(run, _twin(run, copy.deepcopy(run.optimizer)), subject.horizon, phase)


@CHECKS.check("Interface")
def deepcopy_with_parameters(subject: Subject) -> None:
    """Copied together with its parameters, the copy belongs to the copied parameters."""
    run = start(subject)
    run.advance(subject.steps("with a part-filled history"))
    params, optimizer = copy.deepcopy((run.params, run.optimizer))
    kept = optimizer.param_groups[0]["params"]
    same = all(p is q for p, q in zip(params, kept, strict=True))
    expect(same, "the copied optimizer holds other parameters than the copied list")
    twin = Run(NoisyQuadratic(params, seed=run.problem.seed), optimizer, run.step)
    _expect_same_future(run, twin, subject.horizon, "with a part-filled history")


@CHECKS.check("Interface")
def pickle_in_every_phase(subject: Subject) -> None:
    """`pickle` in every phase gives an independent optimizer that goes the same way."""
    for phase in PHASES:
        run = start(subject)
        run.advance(subject.steps(phase))
        _expect_same_future(
            run, _twin(run, pickle.loads(pickle.dumps(run.optimizer))), subject.horizon, phase
        )


@CHECKS.check("Interface")
def copies_have_hooks(subject: Subject) -> None:
    """A copy can be given hooks and groups like the original."""
    run = start(subject)
    run.advance(2)
    for copied in (copy.deepcopy(run.optimizer), pickle.loads(pickle.dumps(run.optimizer))):
        twin = _twin(run, copied)
        calls: list[int] = []
        twin.optimizer.register_step_post_hook(lambda o, *_, calls=calls: calls.append(id(o)))
        twin.optimizer.add_param_group({"params": [Parameter(torch.ones(2))]})
        twin.advance()
        expect(calls == [id(copied)], f"the hook of a copy fired {len(calls)} times")


@CHECKS.check("Interface")
def repr_names_every_setting(subject: Subject) -> None:
    """`repr` names the class and every setting of every group, but no parameters."""
    run = start(subject)
    run.optimizer.add_param_group({"params": [Parameter(torch.ones(2))], "lr": 0.0123})
    text = repr(run.optimizer)
    expect(type(run.optimizer).__name__ in text, "the class is not named")
    for key in run.optimizer.defaults:
        # torch adds some keys to its defaults late, which its groups then do not have
        shown = f"{key}:" in text or key not in run.optimizer.param_groups[0]
        expect(shown, f"{key} is missing from {text!r}")
    expect("0.0123" in text, "the learning rate of the second group is missing")
    expect("tensor(" not in text and "Parameter containing" not in text, "parameters are printed")
