"""What a constructor and `add_param_group` take and refuse, in torch's own words."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import SGD, Optimizer

from mlbfgs.testing.compare import first_difference
from mlbfgs.testing.outcome import expect, one_line
from mlbfgs.testing.problems import NoisyQuadratic, Run, decay, is_finite, make_params, start
from mlbfgs.testing.registry import Registry
from mlbfgs.testing.subject import PHASES, Subject

CHECKS = Registry()


def _plain(params: list[Parameter]) -> Any:
    return params


def _generator(params: list[Parameter]) -> Any:
    return (p for p in params)


def _groups(params: list[Parameter]) -> Any:
    return [{"params": params[:1]}, {"params": iter(params[1:])}]


def _named(params: list[Parameter]) -> Any:
    return ((f"layer{i}.weight", p) for i, p in enumerate(params))


def _named_groups(params: list[Parameter]) -> Any:
    named = list(_named(params))
    return [{"params": named[:2]}, {"params": named[2:]}]


@CHECKS.for_each(
    "Interface",
    {
        "a generator": _generator,
        "a list of dicts": _groups,
        "named parameters": _named,
        "dicts of named parameters": _named_groups,
    },
    "Takes {} and trains as with a list",
)
def takes(subject: Subject, arrange: Callable[[list[Parameter]], Any]) -> None:
    """See the title."""
    results = []
    for form in (_plain, arrange):
        params = make_params()
        optimizer = subject.make(form(params), **decay(subject, {}))
        run = Run(NoisyQuadratic(params), optimizer)
        run.advance(subject.horizon)
        results.append(run.values())
        if arrange in (_named, _named_groups) and form is arrange:
            names = [n for g in optimizer.param_groups for n in g.get("param_names", [])]
            expected = [f"layer{i}.weight" for i in range(len(params))]
            expect(names == expected, f"param_names are {names}")
            saved = optimizer.state_dict()["param_groups"]
            kept = [n for g in saved for n in g.get("param_names", [])]
            expect(kept == expected, f"param_names of the state dict are {kept}")
    # A group's border may change the order of sums, nothing else.
    for a, b in zip(*results, strict=True):
        gap = (a - b).abs().max().item()
        expect(gap <= 1e-5, f"parameters differ by {gap:.2g}")


def _error_of(make: Callable[..., Optimizer], params: Any, **kwargs: Any) -> BaseException | None:
    try:
        make(params, **kwargs)
    except Exception as error:
        return error
    return None


def _expect_torchs_error(subject: Subject, params: Callable[[], Any], **kwargs: Any) -> None:
    theirs = _error_of(SGD, params(), **{"lr": 0.1, **kwargs})
    ours = _error_of(subject.make, params(), **kwargs)
    assert theirs is not None
    expect(ours is not None, f"accepted; torch says {one_line(theirs)!r}")
    assert ours is not None
    same = type(ours) is type(theirs) and str(ours) == str(theirs)
    expect(same, f"says {one_line(ours)!r}, torch says {one_line(theirs)!r}")


def _one() -> Parameter:
    return Parameter(torch.zeros(2))


def _shared_between_groups() -> Any:
    p = _one()
    return [{"params": [p]}, {"params": [p]}]


@CHECKS.for_each(
    "Interface",
    {
        "an empty list": list,
        "a bare tensor": _one,
        "a set": lambda: [{"params": {_one()}}],
        "something that is no tensor": lambda: [3.0],
        "a tensor with a history": lambda: [_one() * 2],
        "a parameter in two groups": _shared_between_groups,
        "names for some parameters only": lambda: [("weight", _one()), _one()],
    },
    "Refuses {} with torch's own message",
)
def refuses(subject: Subject, params: Callable[[], Any]) -> None:
    """See the title."""
    _expect_torchs_error(subject, params)


@CHECKS.for_each(
    "Interface",
    {key: key for key in ("lr", "momentum", "weight_decay")},
    "Refuses a negative {} with torch's own message",
)
def refuses_negative(subject: Subject, key: str) -> None:
    """See the title."""
    subject.require(key)
    _expect_torchs_error(subject, lambda: [_one()], **{key: -1.0})


@CHECKS.check("Interface")
def refuses_lr_tensor_of_two(subject: Subject) -> None:
    """Refuses a learning rate of two elements with torch's own message."""
    _expect_torchs_error(subject, lambda: [_one()], lr=torch.tensor([0.1, 0.1]))


@CHECKS.check("Interface")
def duplicates_in_a_group_warn(subject: Subject) -> None:
    """A parameter twice in one group: torch's own warning, and training goes on."""
    params = make_params()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = subject.make([*params, params[0]])
    messages = [str(w.message) for w in caught]
    expect(any("duplicate parameters" in m for m in messages), f"the warnings are {messages}")
    run = Run(NoisyQuadratic(params), optimizer)
    run.advance(subject.horizon)
    expect(is_finite(params), "the parameters are not finite")


@CHECKS.check("Interface")
def groups_are_never_rebuilt(subject: Subject) -> None:
    """The user's group dicts and their lists stay the same objects."""
    params = make_params()
    given: list[dict[str, Any]] = [{"params": params[:1]}, {"params": params[1:2]}]
    optimizer = subject.make(given)
    groups = optimizer.param_groups
    lists = [g["params"] for g in groups]
    later: dict[str, Any] = {"params": [params[2]]}
    run = Run(NoisyQuadratic(params), optimizer)
    run.advance(subject.steps("with a part-filled history"))
    optimizer.add_param_group(later)
    run.advance(subject.horizon)
    optimizer.zero_grad()
    optimizer.state_dict()
    expect(optimizer.param_groups is groups, "`param_groups` is another list")
    for i, (group, mine) in enumerate(zip(groups, [*given, later], strict=True)):
        expect(group is mine, f"group {i} is a copy of the user's dict")
    for i, (group, params_list) in enumerate(zip(groups, lists, strict=False)):
        expect(group["params"] is params_list, f"the parameter list of group {i} was replaced")


@CHECKS.check("Interface")
def add_param_group_in_every_phase(subject: Subject) -> None:
    """`add_param_group` works in every phase: old state stays, new parameters are trained."""
    for phase in PHASES:
        params = make_params()
        run = start(subject, params[:2])
        run.advance(subject.steps(phase))
        before = _copies(run.optimizer, params[:2])
        run.optimizer.add_param_group({"params": [params[2]]})
        after = _copies(run.optimizer, params[:2])
        difference = first_difference(before, after, "state of the old parameters")
        expect(difference is None, f"{phase}: {difference}")
        grown = Run(NoisyQuadratic(params), run.optimizer, run.step)
        values = grown.values()
        grown.advance(subject.horizon)
        moved = [not torch.equal(p, v) for p, v in zip(params, values, strict=True)]
        expect(
            all(moved),
            f"{phase}: parameters {moved.index(False) if not all(moved) else ''} no longer move",
        )
        expect(is_finite(params), f"{phase}: the parameters are not finite")


def _copies(optimizer: Optimizer, params: list[Parameter]) -> list[dict[str, Any]]:
    return [
        {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in optimizer.state[p].items()}
        for p in params
        if p in optimizer.state
    ]


@CHECKS.check("Interface")
def refused_group_leaves_no_trace(subject: Subject) -> None:
    """A refused `add_param_group` leaves the optimizer as it was."""
    runs = [start(subject), start(subject)]
    for run in runs:
        run.advance(2)
    error = None
    try:
        runs[0].optimizer.add_param_group({"params": [runs[0].params[0]]})
    except ValueError as refused:
        error = refused
    expect(error is not None, "the same parameter was accepted again")
    expect(len(runs[0].optimizer.param_groups) == 1, "the refused group stayed")
    for run in runs:
        run.advance(subject.horizon)
    difference = first_difference(runs[0].values(), runs[1].values(), "parameters")
    expect(difference is None, f"training goes another way: {difference}")
