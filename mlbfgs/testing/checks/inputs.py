"""What people put in: tensors of odd kinds, names of wrappers, states of other optimizers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from mlbfgs.testing.compare import first_difference
from mlbfgs.testing.outcome import expect, one_line
from mlbfgs.testing.problems import NoisyQuadratic, Run, is_finite, make_params, start
from mlbfgs.testing.registry import Registry
from mlbfgs.testing.subject import Subject

CHECKS = Registry()


@CHECKS.check("Interface")
def refuses_negative_lr_in_a_tensor(subject: Subject) -> None:
    """Refuses a negative learning rate in a tensor, as one that is a number."""
    subject.make_with(make_params(), lr=torch.tensor(0.1))
    try:
        subject.make(make_params(), lr=torch.tensor(-0.1))
    except ValueError as error:
        expect("learning rate" in str(error), f"refused, but not by name: {one_line(error)}")
    else:
        expect(False, "lr=tensor(-0.1) was accepted")


@CHECKS.check("Interface")
def made_in_inference_mode(subject: Subject) -> None:
    """Made in `inference_mode`, it trains outside of it as ever."""
    params = make_params()
    with torch.inference_mode():
        optimizer = subject.make(params, **_plain(subject))
    inside = Run(NoisyQuadratic(params), optimizer)
    plain = start(subject, **_plain(subject))
    for run in (inside, plain):
        run.advance(subject.horizon)
    difference = first_difference(plain.values(), inside.values(), "parameters")
    expect(difference is None, f"unlike one that was made outside: {difference}")


def _plain(subject: Subject) -> dict[str, Any]:
    return {"weight_decay": 0.0} if subject.has("weight_decay") else {}


@CHECKS.for_each(
    "Interface",
    {
        "an integer": lambda: torch.arange(6),
        "a complex": lambda: torch.ones(3, dtype=torch.complex64),
        "an absent": lambda: torch.ones(4, device="meta"),
    },
    "Leaves {} parameter alone that needs no gradient",
)
def frozen(subject: Subject, make: Callable[[], Tensor]) -> None:
    """See the title; the absent one is on torch's device meta."""
    odd = Parameter(make(), requires_grad=False)
    params, alone = make_params(), start(subject, **_plain(subject))
    run = Run(NoisyQuadratic(params), subject.make([odd, *params], **_plain(subject)))
    for one in (run, alone):
        one.advance(subject.horizon)
    for a, b in zip(alone.values(), run.values(), strict=True):
        gap = (a - b).abs().max().item()
        expect(gap <= 1e-5, f"the others differ by {gap:.2g} from training without it")


@CHECKS.check("Interface")
def infinite_number_that_never_moves(subject: Subject) -> None:
    """A number that is -inf and has no slope, as in a mask, does not disturb the others."""
    runs = []
    for value in (-float("inf"), 0.0):
        params = make_params()
        with torch.no_grad():
            params[0][0, 0] = value
        runs.append(Run(NoisyQuadratic(params), subject.make(params, **_plain(subject))))
    for run in runs:
        for _ in range(subject.horizon):
            run.problem.set_gradients(run.step)
            gradient = run.params[0].grad
            assert gradient is not None
            gradient[0, 0] = 0.0
            run.optimizer.step()
            run.step += 1
    masked, plain = ([p.detach().clone() for p in run.params] for run in runs)
    expect(bool(masked[0][0, 0] == -float("inf")), f"-inf became {masked[0][0, 0].item()}")
    masked[0][0, 0] = plain[0][0, 0]
    gap = max((a - b).abs().max().item() for a, b in zip(masked, plain, strict=True))
    expect(gap <= 1e-5, f"the others differ by {gap:.2g} from training with 0 in its place")


@CHECKS.check("Interface")
def reshaped_before_the_first_step(subject: Subject) -> None:
    """A parameter that gets another size before the first step is trained in it."""
    params = make_params()
    optimizer = subject.make(params, **_plain(subject))
    with torch.no_grad():
        params[1].data = torch.linspace(-1, 1, 9)
    run = Run(NoisyQuadratic(params), optimizer)
    before = run.problem.loss()
    run.advance(subject.horizon)
    expect(params[1].shape == (9,) and is_finite(params), "its numbers are not finite")
    expect(run.problem.loss() != before, "nothing moves")


@CHECKS.for_each(
    "State",
    {word: word for word in ("module.", "_orig_mod.")},
    "A state under names with `{}`, in another order, goes to the parameters of these names",
)
def names_of_a_wrapper(subject: Subject, word: str) -> None:
    """See the title."""
    params = make_params([(4,), (4,), (4,)])
    named = [(f"layer{i}.weight", p) for i, p in enumerate(params)]
    run = Run(NoisyQuadratic(params), subject.make(named, **_plain(subject)))
    run.advance(subject.steps("with a part-filled history"))
    twins = [(word + name, Parameter(p.detach().clone())) for name, p in named]
    other = subject.make(twins[::-1], **_plain(subject))
    other.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    resumed = Run(NoisyQuadratic([p for _, p in twins]), other, run.step)
    for _ in range(subject.update_interval):
        for one in (run, resumed):
            one.advance()
        pairs = zip(run.values(), resumed.values(), strict=True)
        gap = max((a - b).abs().max().item() for a, b in pairs)
        expect(gap <= 1e-5, f"training goes another way: by {gap:.2g}")


@CHECKS.check("State")
def state_of_another_optimizer(subject: Subject) -> None:
    """A state of another optimizer is refused, or leaves one that trains with its own settings."""
    others = make_params()
    other = torch.optim.Adagrad(others, lr=0.123)
    Run(NoisyQuadratic(others), other).advance(3)
    run = start(subject)
    settings = {key: run.optimizer.param_groups[0].get(key) for key in run.optimizer.defaults}
    try:
        run.optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    except (ValueError, RuntimeError, KeyError):
        pass
    try:
        run.advance(subject.horizon)
    except Exception as error:
        expect(False, f"loaded, and then a step fails: {one_line(error)}")
    expect(is_finite(run.params), "loaded, and then parameters are not finite")
    now = {key: run.optimizer.param_groups[0].get(key) for key in settings}
    changed = [key for key in settings if now[key] != settings[key]]
    expect(not changed, f"its {', '.join(changed)} became the other's")
