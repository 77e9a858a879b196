"""Kinds of parameters: frozen, strided, empty, shared, sparse, complex, of every dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from mlbfgs.testing.compare import first_difference, tensors_in
from mlbfgs.testing.outcome import expect, unless_refused
from mlbfgs.testing.problems import (
    NoisyQuadratic,
    Run,
    decay,
    is_finite,
    make_params,
    normal,
    start,
)
from mlbfgs.testing.registry import Registry
from mlbfgs.testing.subject import Subject

CHECKS = Registry()

DTYPES = {
    "float32": (torch.float32,),
    "float64": (torch.float64,),
    "bfloat16": (torch.bfloat16,),
    "float16": (torch.float16,),
    "mixed bfloat16 and float32": (torch.bfloat16, torch.float32),
    "mixed float64, float32 and float16": (torch.float64, torch.float32, torch.float16),
}


@CHECKS.check("Interface")
def frozen_then_unfrozen(subject: Subject) -> None:
    """A frozen parameter stays; unfrozen, it is trained."""
    params = make_params()
    params[1].requires_grad_(False)
    run = start(subject, params)
    before = run.values()
    run.advance(subject.steps("with a part-filled history"), without={1})
    expect(torch.equal(before[1], params[1]), "the frozen parameter moved")
    params[1].requires_grad_(True)
    run.advance(subject.horizon)
    expect(not torch.equal(before[1], params[1]), "unfrozen, it does not move")
    expect(is_finite(params), "the parameters are not finite")


def _strided(p: Tensor) -> Tensor:
    return torch.stack([p, p], dim=-1)[..., 0]


def _transposed(p: Tensor) -> Tensor:
    return p.transpose(0, -1).contiguous().transpose(0, -1)


def _channels_last(p: Tensor) -> Tensor:
    return p.contiguous(memory_format=torch.channels_last)


def _same(p: Tensor) -> Tensor:
    return p


LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "strided parameters": (_strided, _same),
    "transposed parameters": (_transposed, _same),
    "channels-last parameters": (_channels_last, _channels_last),
    "channels-last parameters and contiguous gradients": (_channels_last, _same),
    "strided gradients": (_same, _strided),
    "transposed gradients": (_same, _transposed),
}


@CHECKS.for_each("Interface", LAYOUTS, "Trains {} as contiguous ones")
def layout(
    subject: Subject, arrange: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
) -> None:
    """See the title."""
    of_params, of_gradients = arrange
    shapes = ((4, 3, 2, 5), (2, 6, 3, 1))
    plain = start(subject, make_params(shapes))
    params = [Parameter(of_params(p.detach())) for p in make_params(shapes)]
    strides = [p.stride() for p in params]
    run = start(subject, params)
    for step in range(subject.horizon):
        run.problem.set_gradients(step)
        for p in params:
            assert p.grad is not None
            p.grad = of_gradients(p.grad)
        run.optimizer.step()
    plain.advance(subject.horizon)
    expect([p.stride() for p in params] == strides, "the strides of the parameters changed")
    # Sums run through memory in another order: 20 steps apart by rounding only.
    for a, b in zip(plain.values(), params, strict=True):
        gap = (a - b).abs().max().item()
        expect(gap <= 1e-4, f"parameters differ by {gap:.2g}")


@CHECKS.for_each(
    "Interface",
    {
        "0-dim": ((), (3,), ()),
        "empty": ((0,), (3,), (2, 0)),
        "only empty": ((0,),),
        "single-number": ((1,), (1, 1)),
    },
    "Trains {} parameters",
)
def shape(subject: Subject, shapes: Sequence[tuple[int, ...]]) -> None:
    """See the title."""
    run = start(subject, make_params(shapes))
    before = run.values()
    run.advance(subject.steps("with a full history"))
    expect([tuple(p.shape) for p in run.params] == list(shapes), "a shape changed")
    moved = [not torch.equal(a, b) for a, b in zip(before, run.params, strict=True)]
    expect(moved == [b.numel() > 0 for b in before], f"moved are {moved}")
    expect(is_finite(run.params), "the parameters are not finite")


@CHECKS.check("Interface")
def shared_parameter(subject: Subject) -> None:
    """A parameter that two modules share is updated once, with the sum of both gradients."""
    encoder, decoder = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    decoder.weight = encoder.weight
    tied = nn.Sequential(encoder, nn.Tanh(), decoder)
    weight = Parameter(encoder.weight.detach().clone())
    optimizer, alone = subject.make(tied.parameters()), subject.make([weight])
    for step in range(subject.horizon):
        inputs = normal((5, 4), torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss: Any = tied(inputs).square().sum()
        loss.backward()
        first, second = (weight.detach().clone().requires_grad_() for _ in range(2))
        loss = torch.tanh(inputs @ first.T).matmul(second.T).square().sum()
        weight.grad = sum(torch.autograd.grad(loss, (first, second)), torch.zeros(4, 4))
        optimizer.step()
        alone.step()
    gap = (encoder.weight - weight).abs().max().item()
    expect(gap <= 1e-4, f"differs from the summed gradient by {gap:.2g}")


@CHECKS.check("Interface")
def sparse_gradients(subject: Subject) -> None:
    """Sparse gradients: trained like dense ones, or refused by name with nothing changed."""

    def gradient(step: int) -> Tensor:
        rows = torch.arange(5) % 2 == step % 2
        return torch.where(rows[:, None], torch.ones(5, 3), torch.zeros(5, 3))

    dense, sparse = (
        start(subject, make_params(((5, 3),)), weight_decay=0.0)
        if subject.has("weight_decay")
        else start(subject, make_params(((5, 3),)))
        for _ in range(2)
    )
    before = sparse.values()
    state = first_state = [t.clone() for _, t in tensors_in(sparse.optimizer.state_dict())]
    for step in range(subject.horizon):
        dense.params[0].grad = gradient(step)
        sparse.params[0].grad = gradient(step).to_sparse(1)
        dense.optimizer.step()
        try:
            unless_refused(sparse.optimizer.step, "sparse")
        finally:
            if step == 0:
                state = [t for _, t in tensors_in(sparse.optimizer.state_dict())]
                touched = first_difference(first_state, state, "state") if first_state else None
                refused = torch.equal(before[0], sparse.params[0])
                expect(not (refused and touched is not None), f"refused, yet changed: {touched}")
    gap = (dense.params[0] - sparse.params[0]).abs().max().item()
    expect(gap <= 1e-5, f"differs from dense gradients by {gap:.2g}")


@CHECKS.check("Interface")
def complex_parameters(subject: Subject) -> None:
    """Complex parameters: trained like pairs of real ones, or refused by name."""
    generator = torch.Generator().manual_seed(0)
    values = normal((6,), generator, torch.complex64)
    p, q = Parameter(values.clone()), Parameter(torch.view_as_real(values).clone())
    optimizer = unless_refused(lambda: subject.make([p]), "complex")
    real = subject.make([q])
    for step in range(subject.horizon):
        g = normal((6,), generator, torch.complex64) + p.detach()
        p.grad, q.grad = g, torch.view_as_real(g).clone()
        unless_refused(optimizer.step, "complex")
        real.step()
        gap = (torch.view_as_real(p.detach()) - q).abs().max().item()
        expect(gap <= 1e-4, f"step {step}: differs from pairs of real numbers by {gap:.2g}")


@CHECKS.for_each("Interface", DTYPES, "Trains {} parameters as close to float64 as they can be")
def dtype(subject: Subject, dtypes: Sequence[torch.dtype]) -> None:
    """See the title."""
    shapes = ((4, 3), (5,), (2, 2, 3))
    exact = start(subject, make_params(shapes, dtype=torch.float64))
    params = [
        Parameter(p.detach().to(dtypes[i % len(dtypes)]))
        for i, p in enumerate(make_params(shapes, dtype=torch.float64))
    ]
    kinds = [p.dtype for p in params]
    run = start(subject, params)
    for one in (exact, run):
        one.advance(subject.steps("with a full history"))
    expect([p.dtype for p in params] == kinds, "the dtype of a parameter changed")
    # Every step rounds to the parameter's dtype: allow half a unit in the last place for every
    # step, at numbers up to 4. Differences of averages over a few steps are about a hundred times
    # smaller than the averages, so curvature pairs in float32 may be that much coarser.
    roundings = max(4 * run.step * max(torch.finfo(k).eps for k in kinds) / 2, 1e-4)
    for a, b in zip(exact.params, params, strict=True):
        gap = (a.detach() - b.detach().double()).abs().max().item()
        expect(gap <= roundings, f"differs from float64 by {gap:.2g}, allowed are {roundings:.2g}")


@CHECKS.for_each(
    "Interface",
    {"bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64},
    "Averages and history of {} parameters are float32 or better",
)
def precision_of_state(subject: Subject, kind: torch.dtype) -> None:
    """See the title; and what enters them is rounded to no coarser dtype on its way."""
    run = start(subject, make_params(dtype=kind), lr=0.0)
    wide = torch.promote_types(kind, torch.float32)
    copies = [Parameter(p.detach().to(wide)) for p in run.params]
    twin = subject.make(copies, **decay(subject, {"lr": 0.0}))
    for _ in range(2):
        run.problem.set_gradients(run.step)
        for p, q in zip(run.params, copies, strict=True):
            assert p.grad is not None
            q.grad = p.grad.to(wide)
        run.optimizer.step()
        twin.step()
        run.step += 1
    states = (run.optimizer.state_dict()["state"], twin.state_dict()["state"])
    for (path, t), (_, exact) in zip(*map(tensors_in, states), strict=True):
        if t.dim() > 0 and t.is_floating_point():
            coarse = torch.finfo(t.dtype).bits < torch.finfo(wide).bits
            expect(not coarse, f"{path} is {t.dtype}")
            # the same values and gradients, widened by the caller: float32 rounding alone is left
            gap = (t - exact).abs().max().item() if t.numel() else 0.0
            expect(gap <= 1e-5, f"{path} differs by {gap:.2g} from that of {wide} parameters")


@CHECKS.check("Interface")
def gradient_of_zeros(subject: Subject) -> None:
    """Zero gradients in every step keep parameters and state finite."""
    params = make_params()
    run = Run(NoisyQuadratic(params), subject.make(params))
    for _ in range(subject.steps("with a full history")):
        for p in params:
            p.grad = torch.zeros_like(p)
        run.optimizer.step()
    expect(is_finite(params), "the parameters are not finite")
    for path, t in tensors_in(run.optimizer.state_dict()["state"]):
        finite = not t.is_floating_point() or bool(t.isfinite().all())
        expect(finite, f"{path} is not finite")
