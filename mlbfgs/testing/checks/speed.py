"""No waiting for the device, and `torch.compile` of model and step."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from mlbfgs.testing.compare import first_difference
from mlbfgs.testing.host_reads import HostReads
from mlbfgs.testing.outcome import expect
from mlbfgs.testing.problems import (
    NoisyQuadratic,
    batch,
    decay,
    make_params,
    small_network,
    start,
    train,
)
from mlbfgs.testing.registry import Registry
from mlbfgs.testing.subject import Subject

CHECKS = Registry()


def _reads_of_steps(subject: Subject, *, lr_on_device: bool) -> list[list[str]]:
    """What each step reads from the device, from the first to one with a full history."""
    params = [Parameter(p.detach().to("meta")) for p in make_params()]
    optimizer = subject.make(params, **decay(subject, {}))
    if lr_on_device:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(0.1, device="meta")
    reads = []
    for _ in range(subject.steps("with a full history") + subject.update_interval):
        for p in params:
            p.grad = torch.empty_like(p)
        with HostReads() as step:
            optimizer.step()
        reads.append(step.reads)
    return reads


def _expect_few_reads(subject: Subject, reads: list[list[str]]) -> None:
    interval = subject.update_interval if subject.has("update_interval") else len(reads) + 1
    for step, what in enumerate(reads, start=1):
        allowed = 1 if step % interval == 0 else 0
        kind = "a pair" if allowed else "an ordinary step"
        expect(
            len(what) <= allowed,
            f"step {step} ({kind}) waits {len(what)} times: {', '.join(what[:4])}",
        )


@CHECKS.check("Speed")
def no_host_reads(subject: Subject) -> None:
    """No host synchronisation in an ordinary step, at most one every T steps."""
    _expect_few_reads(subject, _reads_of_steps(subject, lr_on_device=False))


@CHECKS.check("Speed")
def no_host_reads_with_lr_on_device(subject: Subject) -> None:
    """The same with the learning rate as a tensor on the device."""
    _expect_few_reads(subject, _reads_of_steps(subject, lr_on_device=True))


@CHECKS.check("Speed", slow=True)
def compiled_model(subject: Subject) -> None:
    """A model under `torch.compile` trains as without."""
    torch._dynamo.reset()
    losses, models = [], []
    for compiled in (False, True):
        model = small_network()
        optimizer = subject.make(model.parameters(), **decay(subject, {}))
        callable_model: Callable[[Tensor], Tensor] = (
            torch.compile(model, backend="eager") if compiled else model
        )
        losses.append(train(callable_model, optimizer, subject.horizon))
        models.append(model)
    torch._dynamo.reset()
    values = [[p.detach() for p in m.parameters()] for m in models]
    difference = first_difference(losses[0], losses[1], "loss")
    difference = difference or first_difference(values[0], values[1], "parameters")
    expect(difference is None, difference or "")


def _frames_compiled() -> int:
    """How many functions `torch.compile` has translated since the last reset of its counters."""
    return int(torch._dynamo.utils.counters["frames"]["total"])


def _expect_no_recompilation(subject: Subject, lr: float | Tensor) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = start(subject, lr=0.01)
    params = make_params()
    problem = NoisyQuadratic(params)
    optimizer = subject.make(params, **decay(subject, {"lr": lr}))

    def step() -> None:
        optimizer.step()

    compiled: Callable[[], None] = torch.compile(step, backend="eager")
    counts = []
    with torch._dynamo.config.patch(recompile_limit=64):
        for k in range(subject.horizon):
            rate = 0.01 / (1 + k)
            plain.optimizer.param_groups[0]["lr"] = rate
            if isinstance(lr, Tensor):
                lr.fill_(rate)
            else:
                optimizer.param_groups[0]["lr"] = rate
            problem.set_gradients(k)
            compiled()
            plain.advance()
            counts.append(_frames_compiled())
    torch._dynamo.reset()
    for a, b in zip(plain.values(), params, strict=True):
        gap = (a - b).abs().max().item()
        expect(gap <= 1e-5, f"parameters differ from the plain step's by {gap:.2g}")
    # State that appears in the first steps costs a compilation each; then it must be over.
    settled = counts[min(3, len(counts) - 1)]
    expect(
        counts[-1] == settled,
        f"{settled} compilations in 4 steps, {counts[-1]} in {len(counts)}",
    )


@CHECKS.check("Speed", slow=True)
def compiled_step(subject: Subject) -> None:
    """A step under `torch.compile` is not compiled again over a schedule of numbers."""
    _expect_no_recompilation(subject, 0.01)


@CHECKS.check("Speed", slow=True)
def compiled_step_with_lr_tensor(subject: Subject) -> None:
    """A step under `torch.compile` is not compiled again over a schedule in a tensor."""
    _expect_no_recompilation(subject, torch.tensor(0.01))


@CHECKS.check("Speed", slow=True)
def compiled_training_step(subject: Subject) -> None:
    """Forward, backward and step inside one compiled function train as without."""
    torch._dynamo.reset()
    losses = []
    for compiled in (False, True):
        model = small_network()
        optimizer = subject.make(model.parameters(), **decay(subject, {}))

        def one(
            x: Tensor, y: Tensor, model: nn.Module = model, optimizer: Optimizer = optimizer
        ) -> Tensor:
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        function = torch.compile(one, backend="eager") if compiled else one
        losses.append([function(*batch(k)).item() for k in range(subject.horizon)])
    torch._dynamo.reset()
    for k, (a, b) in enumerate(zip(*losses, strict=True)):
        expect(abs(a - b) <= 1e-5, f"step {k}: loss {b:.6g}, uncompiled {a:.6g}")
