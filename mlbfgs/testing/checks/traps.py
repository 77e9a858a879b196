"""Four traps of torch's own machinery (observed on torch 2.14.1).

1. `get_optimizer_state_dict` of torch's distributed checkpoint calls `step()` with zero gradients
   when the state is empty: state that is created lazily then starts from a zero gradient.
2. `Optimizer.load_state_dict` casts every state tensor but `step` to its parameter's dtype.
3. Containers in the state are rebuilt by their type: a `deque(maxlen=3)` returns without maxlen.
4. Whatever is kept outside `state` and `param_groups` is lost on resume.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from mlbfgs.testing.compare import first_difference, tensors_in
from mlbfgs.testing.outcome import UnsupportedError, expect
from mlbfgs.testing.problems import (
    Run,
    continued,
    decay,
    make_params,
    small_network,
    start,
    through_file,
    train,
)
from mlbfgs.testing.registry import Registry
from mlbfgs.testing.subject import PHASES, Subject

CHECKS = Registry()


def shapes_of_state(optimizer: Optimizer) -> list[dict[str, Any]]:
    """For every parameter the names in its state, with the shapes of tensors."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [
        {
            key: tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            for key, value in optimizer.state.get(p, {}).items()
        }
        for p in params
    ]


def _expect_no_new_state(run: Run, before: list[dict[str, Any]]) -> None:
    after = shapes_of_state(run.optimizer)
    new = sorted({key for b, a in zip(before, after, strict=True) for key in a if key not in b})
    expect(not new, f"{', '.join(new)} exists only after a step")
    expect(before == after, f"the state changes its form: {before} became {after}")


@CHECKS.check("Traps")
def state_exists_after_construction(subject: Subject) -> None:
    """All state exists after construction."""
    run = start(subject)
    before = shapes_of_state(run.optimizer)
    run.advance(subject.horizon)
    _expect_no_new_state(run, before)


@CHECKS.check("Traps")
def state_exists_after_add_param_group(subject: Subject) -> None:
    """All state of new parameters exists after `add_param_group`."""
    params = make_params()
    run = start(subject, params[:2])
    run.advance(subject.update_interval + 1)
    run.optimizer.add_param_group({"params": [params[2]]})
    before = shapes_of_state(run.optimizer)
    run = Run(type(run.problem)(params), run.optimizer)
    run.advance(subject.horizon)
    _expect_no_new_state(run, before)


@CHECKS.check("Traps")
def checkpoint_before_the_first_step_leaves_no_trace(subject: Subject) -> None:
    """`get_optimizer_state_dict` before the first step changes nothing."""
    losses, states = [], []
    for look in (False, True):
        model = small_network()
        optimizer = subject.make(model.parameters(), **decay(subject, {}))
        if look:
            get_optimizer_state_dict(model, optimizer)
        losses.append(train(model, optimizer, subject.horizon))
        states.append(optimizer.state_dict()["state"])
    difference = first_difference(losses[0], losses[1], "loss")
    difference = difference or first_difference(states[0], states[1], "state")
    expect(difference is None, f"training goes another way: {difference}")


@CHECKS.check("Traps")
def distributed_checkpoint_round_trip(subject: Subject) -> None:
    """`get_optimizer_state_dict` and `set_optimizer_state_dict` in every phase, then bit-equal."""
    for phase in PHASES:
        steps = subject.steps(phase)
        model, other = small_network(), small_network(seed=1)
        optimizer = subject.make(model.parameters(), **decay(subject, {}))
        fresh = subject.make(other.parameters(), **decay(subject, {}))
        train(model, optimizer, steps)
        saved = through_file(get_optimizer_state_dict(model, optimizer))
        other.load_state_dict(model.state_dict())
        expected = train(model, optimizer, subject.horizon, steps)
        set_optimizer_state_dict(other, fresh, saved)
        difference = first_difference(
            expected, train(other, fresh, subject.horizon, steps), "loss"
        ) or first_difference(list(model.parameters()), list(other.parameters()), "parameters")
        expect(difference is None, f"saved {phase}: {difference}")


@CHECKS.for_each(
    "Traps",
    {"bfloat16": torch.bfloat16, "float16": torch.float16},
    "`load_state_dict` keeps float32 state of {} parameters, and counters, bit for bit",
)
def low_precision_load(subject: Subject, dtype: torch.dtype) -> None:
    """See the title."""
    run = start(subject, make_params(dtype=dtype))
    run.advance(subject.steps("with a full history"))
    saved = through_file(run.optimizer.state_dict())
    precise = [
        path
        for path, t in tensors_in(saved["state"])
        if t.dim() > 0 and t.dtype in (torch.float32, torch.float64)
    ]
    if not precise:
        raise UnsupportedError(f"state of {dtype} parameters is {dtype} itself: nothing to keep")
    loaded = continued(run, subject, copy.deepcopy(saved)).optimizer.state_dict()
    difference = first_difference(saved["state"], loaded["state"], "state")
    expect(difference is None, f"loading changes {difference}")


@CHECKS.check("Traps")
def state_holds_tensors_and_numbers(subject: Subject) -> None:
    """State holds tensors and plain numbers only."""
    run = start(subject)
    for phase in PHASES:
        run.advance(subject.steps(phase) - run.step)
        for i, values in run.optimizer.state_dict()["state"].items():
            for key, value in values.items():
                expect(
                    isinstance(value, (Tensor, int, float)),
                    f"{key!r} of parameter {i} is a {type(value).__name__} {phase}",
                )


@CHECKS.check("Traps")
def nothing_lives_outside_state_and_groups(subject: Subject) -> None:
    """Whatever training depends on is in `state` and `param_groups`, changed settings too."""
    run = start(subject)
    for group in run.optimizer.param_groups:
        group["lr"] = group["lr"] / 2
        if subject.has("momentum"):
            group["momentum"] = 0.5
    run.advance(subject.steps("with a full history"))
    saved = through_file(run.optimizer.state_dict())
    resumed = continued(run, subject, saved)
    difference = first_difference(saved, resumed.optimizer.state_dict(), "state_dict")
    expect(difference is None, f"after a load, {difference}")
    for one in (run, resumed):
        one.advance(subject.horizon)
    difference = first_difference(run.values(), resumed.values(), "parameters")
    expect(difference is None, f"{subject.horizon} steps after a load, {difference}")
