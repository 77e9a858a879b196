"""Saving, loading, and the memory that the state takes."""

from __future__ import annotations

import copy
import gc
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from mlbfgs.testing.compare import first_difference, tensors_in
from mlbfgs.testing.outcome import UnsupportedError, expect, one_line
from mlbfgs.testing.problems import Run, continued, make_params, start, through_file
from mlbfgs.testing.registry import Registry
from mlbfgs.testing.subject import PHASES, Subject

CHECKS = Registry()


@CHECKS.for_each(
    "State",
    {phase: phase for phase in PHASES},
    "Saved and loaded {}, the next 2T + M T steps are bit-equal",
)
def resume(subject: Subject, phase: str) -> None:
    """See the title."""
    run = start(subject)
    run.advance(subject.steps(phase))
    resumed = continued(run, subject, through_file(run.optimizer.state_dict()))
    for _ in range(subject.horizon):
        run.advance()
        resumed.advance()
        difference = first_difference(run.values(), resumed.values(), "parameters")
        expect(difference is None, f"step {run.step}: {difference}")
    states = (run.optimizer.state_dict(), resumed.optimizer.state_dict())
    difference = first_difference(*states, "state_dict")
    expect(difference is None, difference or "")


@CHECKS.check("State")
def resume_with_groups_and_missing_gradients(subject: Subject) -> None:
    """A resume with two groups and a parameter that has had no gradient yet is bit-equal."""
    for phase in PHASES:
        params = make_params()
        run = start(subject, params)
        fresh_params = [Parameter(p.detach().clone()) for p in params]
        groups = [
            [{"params": ps[:2], "lr": 0.02}, {"params": ps[2:]}] for ps in (params, fresh_params)
        ]
        run.optimizer = subject.make(groups[0])
        run.advance(subject.steps(phase), without={1})
        saved = through_file(run.optimizer.state_dict())
        resumed = Run(type(run.problem)(fresh_params), subject.make(groups[1]), run.step)
        resumed.optimizer.load_state_dict(saved)
        with torch.no_grad():
            for p, q in zip(fresh_params, params, strict=True):
                p.copy_(q)
        for one in (run, resumed):
            one.advance(2, without={1})
            one.advance(subject.horizon)
        difference = first_difference(run.values(), resumed.values(), "parameters")
        expect(difference is None, f"saved {phase}: {difference}")


@CHECKS.check("State")
def load_copies(subject: Subject) -> None:
    """The loaded dict is not changed, and later steps do not write into it."""
    run = start(subject)
    run.advance(subject.steps("with a full history"))
    saved = through_file(run.optimizer.state_dict())
    pristine = copy.deepcopy(saved)
    resumed = continued(run, subject, saved)
    difference = first_difference(pristine, saved, "state_dict")
    expect(difference is None, f"loading changes {difference}")
    resumed.advance(subject.horizon)
    difference = first_difference(pristine, saved, "state_dict")
    expect(difference is None, f"steps after loading change {difference}")


@CHECKS.check("State")
def failed_load_leaves_no_trace(subject: Subject) -> None:
    """A load that fails leaves the optimizer as it was."""
    run = start(subject)
    run.advance(subject.steps("with a part-filled history"))
    other = subject.make([{"params": [p]} for p in make_params()])
    before = copy.deepcopy(run.optimizer.state_dict())
    error = None
    try:
        run.optimizer.load_state_dict(other.state_dict())
    except ValueError as refused:
        error = refused
    expect(error is not None, "groups that do not fit were accepted")
    difference = first_difference(before, run.optimizer.state_dict(), "state_dict")
    expect(difference is None, f"the failed load changed {difference}")


@CHECKS.check("State")
def load_onto_another_device(subject: Subject) -> None:
    """State saved on one device loads onto another, wherever the parameters are."""
    run = start(subject)
    run.advance(subject.steps("with a full history"))
    # Parameters on "meta" stand for a device that the state did not come from.
    devices = ["meta"]
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        devices += [accelerator.type] if accelerator is not None else []
    for device in devices:
        params = [Parameter(p.detach().to(device)) for p in run.params]
        optimizer = subject.make(params)
        optimizer.load_state_dict(through_file(run.optimizer.state_dict(), map_location="cpu"))
        for path, t in tensors_in(optimizer.state_dict()["state"]):
            # torch keeps counters on the CPU on purpose
            expect(t.device.type == device or t.dim() == 0, f"{path} stayed on {t.device}")


@CHECKS.check("State")
def load_from_older_groups(subject: Subject) -> None:
    """A state whose groups lack switches that came later (off by default) loads and goes on."""
    run = start(subject)
    run.advance(subject.steps("with a part-filled history"))
    saved = through_file(run.optimizer.state_dict())
    switches = [k for k, v in run.optimizer.defaults.items() if v is False or v is None]
    for key in switches:
        older = copy.deepcopy(saved)
        for group in older["param_groups"]:
            group.pop(key, None)
        twins = [continued(run, subject, copy.deepcopy(d)) for d in (saved, older)]
        for twin in twins:
            twin.advance(subject.horizon)
        difference = first_difference(twins[0].values(), twins[1].values(), "parameters")
        expect(difference is None, f"without {key!r} in the groups: {difference}")


@CHECKS.check("State")
def load_from_older_state(subject: Subject) -> None:
    """A state without one of its keys loads and goes on, or is refused by the key's name."""
    run = start(subject)
    run.advance(subject.steps("with a part-filled history"))
    saved = through_file(run.optimizer.state_dict())
    keys = {key: None for values in saved["state"].values() for key in values}
    for key in keys:
        older = copy.deepcopy(saved)
        for values in older["state"].values():
            values.pop(key)
        try:
            resumed = continued(run, subject, older)
        except Exception as error:
            expect(key in str(error), f"without {key!r}: {one_line(error)}")
            continue
        try:
            resumed.advance(subject.horizon)
        except Exception as error:
            expect(False, f"without {key!r} the load passes, a step raises {one_line(error)}")
        finite = all(bool(p.isfinite().all()) for p in resumed.values())
        expect(finite, f"without {key!r} the parameters are not finite")


@CHECKS.check("State")
def load_into_another_block_plan(subject: Subject) -> None:
    """A state of one block loads under two, and back without loss; one of two trains as one."""
    subject.make_with(make_params(), blocks=2)
    for phase in PHASES:
        run = start(subject, blocks=None)
        run.advance(subject.steps(phase))
        saved = through_file(run.optimizer.state_dict())
        halved = continued(run, subject, saved, blocks=2)
        between = through_file(halved.optimizer.state_dict())
        difference = first_difference(saved, between, "state_dict")
        expect(difference is None, f"{phase}: {difference}")
        back = continued(run, subject, between, blocks=None)
        for one in (run, back, halved):
            one.advance(subject.horizon)
        difference = first_difference(run.values(), back.values(), "parameters")
        expect(difference is None, f"{phase}, back again: {difference}")
        joined = continued(halved, subject, halved.optimizer.state_dict(), blocks=None)
        joined.advance(subject.horizon)
        for name, one in (("two blocks", halved), ("two blocks joined", joined)):
            finite = all(bool(p.isfinite().all()) for p in one.params)
            expect(finite, f"{phase}, {name}: the parameters are not finite")


def _state_numbers(run: Run) -> int:
    """Numbers kept per number of the parameters: counters and 0-dim tensors do not count."""
    tensors = [t for _, t in tensors_in(run.optimizer.state_dict()["state"]) if t.dim() > 0]
    return sum(t.numel() for t in tensors)


@CHECKS.check("State")
def memory_is_as_documented(subject: Subject) -> None:
    """The state of M pairs is (4 + 2M) n float32 numbers, plus n with momentum."""
    if not subject.has("history_size"):
        raise UnsupportedError("keeps no pairs: there is no 'history_size' in the settings")
    for momentum in (0.9, 0.0) if subject.has("momentum") else (0.0,):
        options: dict[str, Any] = {"momentum": momentum} if subject.has("momentum") else {}
        run = start(subject, **options)
        n = sum(p.numel() for p in run.params)
        expected = (4 + 2 * subject.history_size + (momentum != 0)) * n
        for phase in PHASES:
            run.advance(subject.steps(phase) - run.step)
            numbers = _state_numbers(run)
            expect(numbers == expected, f"{phase}: {numbers} numbers, not {expected}")
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for _, t in tensors_in(run.optimizer.state_dict()["state"])
            if t.dim() > 0
        }
        held = sum(storages.values())
        # less than 64 bytes of every block in every vector and row of the history
        padding = 64 * len(run.params) * (expected // n)
        expect(
            4 * expected <= held < 4 * expected + padding,
            f"the storages hold {held} bytes, not {4 * expected} and up to {padding} more",
        )


def _live_bytes() -> tuple[int, int]:
    """Number and bytes of all tensor storages that Python can reach."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        # exact types, with storage: torch.compile and fake tensors leave others behind
        plain = type(item) in (Tensor, Parameter) and item.device.type == "cpu"
        if plain and torch._C._has_storage(item):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return len(storages), sum(storages.values())


@CHECKS.check("State")
def memory_does_not_grow(subject: Subject) -> None:
    """After the first step the bytes of the state and of all live tensors stay the same."""
    run = start(subject)
    run.advance()

    def measure() -> dict[str, Any]:
        for p in run.params:
            p.grad = None
        tensors, live = _live_bytes()
        state = sum(t.numel() * t.element_size() for _, t in tensors_in(run.optimizer.state_dict()))
        return {"live tensors": tensors, "live bytes": live, "bytes of state": state}

    first = measure()
    for phase in ("on the step of a pair", "with a full history"):
        run.advance(subject.steps(phase) - run.step)
        now = measure()
        grown = {k: f"{first[k]} -> {now[k]}" for k in now if now[k] != first[k]}
        expect(not grown, f"{phase}: {grown}")
