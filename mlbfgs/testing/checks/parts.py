"""What people do with the tensors of a state: save, send and copy some of them, swap states."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mlbfgs.testing.compare import first_difference, tensors_in
from mlbfgs.testing.outcome import UnsupportedError, expect
from mlbfgs.testing.problems import Run, continued, make_params, start, through_file
from mlbfgs.testing.registry import Registry
from mlbfgs.testing.subject import Subject

CHECKS = Registry()

#: Many parameters, so that what belongs to one is little of the whole.
MANY = ((30, 20),) * 12
#: Bytes that a file may spend on each tensor beside its numbers.
HEADER_BYTES = 1500


def _trained(subject: Subject, shapes: tuple[tuple[int, ...], ...] = MANY) -> Run:
    run = start(subject, make_params(shapes))
    run.advance(subject.steps("with a full history"))
    return run


def _saved(value: Any) -> int:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.tell()


def _held(value: Any) -> int:
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for _, t in tensors_in(value)
    }
    return sum(storages.values())


WAYS: Mapping[str, Callable[[Any], int]] = {
    "saved": _saved,
    "pickled": lambda value: len(pickle.dumps(value)),
    "copied": lambda value: _held(copy.deepcopy(value)),
}


def _parts(state: Mapping[int, Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Parts that people save, by what messages call them."""
    one = dict(state[3])
    yield "the state of one parameter", one
    yield "it, detached", tree_map_only(Tensor, Tensor.detach, one)
    yield "it, moved to where it is", tree_map_only(Tensor, lambda t: t.to(t.device), one)
    for key, value in one.items():
        if isinstance(value, Tensor):
            yield f"{key!r} of one parameter", {key: value}
    yield "the state of two parameters", {i: state[i] for i in (1, 5)}
    yield "the whole state", dict(state)


@CHECKS.for_each("State", WAYS, "A part of the state is, {}, as large as its numbers")
def part(subject: Subject, measure: Callable[[Any], int]) -> None:
    """See the title."""
    state = _trained(subject).optimizer.state_dict()["state"]
    if not any(True for _ in tensors_in(state)):
        raise UnsupportedError("there are no tensors in the state")
    for name, value in _parts(state):
        tensors = [t for _, t in tensors_in(value)]
        numbers = sum(t.nbytes for t in tensors)
        limit = numbers + HEADER_BYTES * (len(tensors) + 2)
        size = measure(value)
        expect(size <= limit, f"{name}: {size} bytes for {numbers} bytes of numbers")


@CHECKS.check("State")
def parts_are_plain_tensors(subject: Subject) -> None:
    """What a file, a pickle or a copy of the state holds are plain tensors of the same numbers."""
    state = _trained(subject).optimizer.state_dict()["state"]
    for name, again in {
        "torch.save": through_file(state),
        "pickle": pickle.loads(pickle.dumps(state)),
        "deepcopy": copy.deepcopy(state),
        "clone": tree_map_only(Tensor, torch.clone, state),
    }.items():
        for path, t in tensors_in(again):
            expect(type(t) is Tensor, f"{name}: {path} is a {type(t).__name__}")
        moved = tree_map_only(Tensor, Tensor.cpu, state)
        difference = first_difference(moved, tree_map_only(Tensor, Tensor.cpu, again), name)
        expect(difference is None, difference or "")


@CHECKS.check("State")
def swapped_states(subject: Subject) -> None:
    """Two states are loaded in turn, none of them copied, and neither loses its values."""
    run, other = start(subject), start(subject)
    run.advance(subject.steps("with a full history"))
    other.advance(subject.steps("with a part-filled history"))
    states = [one.optimizer.state_dict() for one in (run, other)]
    expected = copy.deepcopy(states)
    for turn in (1, 0, 1, 0):
        run.optimizer.load_state_dict(states[turn])
        now = run.optimizer.state_dict()["state"]
        difference = first_difference(expected[turn]["state"], now, "state")
        expect(difference is None, f"state {turn + 1}: {difference}")


@CHECKS.check("State")
def filled_in_place(subject: Subject) -> None:
    """Values written into the tensors of `state_dict()`, then loaded, are trained on with."""
    run = start(subject)
    run.advance(subject.steps("with a full history"))
    saved = through_file(run.optimizer.state_dict())
    resumed = continued(run, subject, copy.deepcopy(saved))
    resumed.advance(subject.horizon)
    target = resumed.optimizer.state_dict()
    with torch.no_grad():
        for (_, t), (_, value) in zip(tensors_in(target), tensors_in(saved), strict=True):
            t.copy_(value)
        for p, q in zip(resumed.params, run.params, strict=True):
            p.copy_(q)
    for i, values in target["state"].items():
        numbers = {k: v for k, v in saved["state"][i].items() if not isinstance(v, Tensor)}
        values.update(numbers)
    resumed.optimizer.load_state_dict({**target, "param_groups": saved["param_groups"]})
    resumed.step = run.step
    for one in (run, resumed):
        one.advance(subject.horizon)
    difference = first_difference(run.values(), resumed.values(), "parameters")
    expect(difference is None, difference or "")


@CHECKS.check("State")
def shared_memory(subject: Subject) -> None:
    """State that is moved to shared memory goes on, and stays there."""
    run, twin = start(subject), start(subject)
    for one in (run, twin):
        one.advance(subject.steps("with a part-filled history"))
    shared = [t for _, t in tensors_in(run.optimizer.state_dict()["state"])]
    for t in shared:
        if t.device.type == "cpu":
            t.share_memory_()  # type: ignore[no-untyped-call]
    for one in (run, twin):
        one.advance(subject.horizon)
    states = [one.optimizer.state_dict()["state"] for one in (run, twin)]
    difference = first_difference(states[1], states[0], "state")
    expect(difference is None, difference or "")
    for path, t in tensors_in(states[0]):
        inside = t.untyped_storage().is_shared()
        expect(inside, f"{path} is not in shared memory any more")
