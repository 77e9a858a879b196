"""KFAC against its definitions in float64.

Tolerances: 1e-10 relative where float64 results differ by the order of summation and by an
inversion with condition numbers up to 1e4.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from torch import nn

from experiments.optimizers import kronecker
from experiments.optimizers.kfac import KFAC
from tests.experiments.optimizers import kfac_oracle as oracle
from tests.experiments.optimizers.kfac_nets import (
    EXACT,
    LAYERS,
    assert_factors,
    backward,
    batch,
    conv_net,
    layer_state,
    network,
    train,
)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("case", LAYERS)
def test_factors_equal_the_loop_over_examples(case: str) -> None:
    net, images, labels = network(case)
    twin = copy.deepcopy(net)
    optimizer = KFAC(net, lr=0.0)
    backward(net, images, labels)
    optimizer.step()
    for index in (0, 3):
        wanted = oracle.factors(twin, index, images, labels)
        assert_factors(layer_state(optimizer, net, index), wanted)


def test_factors_do_not_depend_on_the_memory_for_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kronecker, "_PATCH_NUMBERS", 1)
    test_factors_equal_the_loop_over_examples("conv strided")


@pytest.mark.parametrize("case", ["conv strided", "linear on sequences"])
def test_pauloski_scales_are_those_of_the_backward_pass(case: str) -> None:
    net, images, labels = network(case)
    A, G = oracle.factors(net, 0, images, labels)
    optimizer = KFAC(net, lr=0.0, normalization="pauloski")
    backward(net, images, labels)
    optimizer.step()
    places = net[0](images)[0].numel() // len(G)
    assert places == (21 if case == "conv strided" else 3)
    spatial = places**2 if case == "conv strided" else 1
    wanted = (A / spatial, G / (len(images) ** 2 * places * spatial))
    assert_factors(layer_state(optimizer, net, 0), wanted)


@pytest.mark.parametrize("method", ["eigen", "cholesky"])
@pytest.mark.parametrize("pi", [False, True])
@pytest.mark.parametrize("case", ["linear", "linear without bias", "conv", "conv without bias"])
def test_step_solves_the_damped_kronecker_system(case: str, pi: bool, method: Any) -> None:
    net, images, labels = network(case)
    before = [p.detach().clone() for p in net[0].parameters()]
    A, G = oracle.factors(net, 0, images, labels)
    settings: Any = {"damping": 0.03, "method": method, "pi_correction": pi}
    optimizer = KFAC(net, lr=1.0, momentum=0.0, kl_clip=None, **settings)
    backward(net, images, labels)
    gradient = oracle.weight_matrix([p.grad.numpy() for p in net[0].parameters()])
    optimizer.step()
    moved = [(b - p.detach()).numpy() for b, p in zip(before, net[0].parameters(), strict=True)]
    factored = pi or method == "cholesky"
    wanted = oracle.normal_equations(gradient, A, G, damping=0.03, factored=factored, pi=pi)
    np.testing.assert_allclose(oracle.weight_matrix(moved), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kl_clip", [1e-3, 1e9])
def test_clip_scales_all_layers_by_one_number(kl_clip: float) -> None:
    images, labels = batch()
    moved: dict[float | None, list[Any]] = {}
    pairs = []
    for clip in (None, kl_clip):
        net = conv_net()
        before = [p.detach().clone() for p in net.parameters()]
        optimizer = KFAC(net, lr=0.5, momentum=0.0, kl_clip=clip)
        backward(net, images, labels)
        gradients = [p.grad.numpy() for p in net.parameters()]  # type: ignore[union-attr]
        optimizer.step()
        after = list(net.parameters())
        moved[clip] = [(b - p.detach()).numpy() for b, p in zip(before, after, strict=True)]
        if clip is None:
            pairs = [(m / 0.5, g) for m, g in zip(moved[None], gradients, strict=True)]
    scale = oracle.kl_scale(pairs, lr=0.5, kappa=kl_clip)
    assert (scale == 1.0) == (kl_clip == 1e9)
    for clipped, free in zip(moved[kl_clip], moved[None], strict=True):
        np.testing.assert_allclose(clipped, scale * free, **EXACT)


@pytest.mark.parametrize("decay_first", [False, True])
@pytest.mark.parametrize(("method", "pi"), [("eigen", False), ("eigen", True), ("cholesky", True)])
def test_training_follows_the_algorithm(method: Any, pi: bool, decay_first: bool) -> None:
    """Nine steps: running averages every 2, inverses every 4, clip, decay, momentum."""
    net = conv_net()
    lr, momentum, decay, damping, kappa = 0.3, 0.8, 0.02, 0.01, 0.05
    optimizer = KFAC(
        net,
        lr,
        momentum,
        decay,
        damping=damping,
        factor_decay=0.6,
        factor_update_interval=2,
        inverse_update_interval=4,
        kl_clip=kappa,
        method=method,
        pi_correction=pi,
        precondition_weight_decay=decay_first,
    )
    theta = {i: matrix(net[i]) for i in (0, 3)}
    buffers = {i: np.zeros_like(m) for i, m in theta.items()}
    averages: dict[int, Any] = {}
    in_use: dict[int, Any] = {}
    scales = []
    updates = 0
    for step in range(9):
        images, labels = batch(step)
        optimizer.zero_grad()
        backward(net, images, labels)
        twin = copy.deepcopy(net)
        gradient = {
            i: oracle.weight_matrix([p.grad.numpy() for p in net[i].parameters()]) for i in (0, 3)
        }
        if step % 2 == 0:
            updates += 1
            keep = min(1 - 1 / updates, 0.6)
            for i in (0, 3):
                new = oracle.factors(twin, i, images, labels)
                old = averages.get(i, (0.0, 0.0))
                averages[i] = [keep * o + (1 - keep) * n for o, n in zip(old, new, strict=True)]
        if step % 4 == 0:
            in_use = {i: [factor.copy() for factor in averages[i]] for i in (0, 3)}
        if decay_first:
            gradient = {i: g + decay * theta[i] for i, g in gradient.items()}
        factored = pi or method == "cholesky"
        v = {
            i: oracle.normal_equations(g, *in_use[i], damping=damping, factored=factored, pi=pi)
            for i, g in gradient.items()
        }
        scale = oracle.kl_scale([(v[i], gradient[i]) for i in (0, 3)], lr, kappa)
        scales.append(scale)
        for i in (0, 3):
            d = scale * v[i] + (0.0 if decay_first else decay) * theta[i]
            buffers[i] = momentum * buffers[i] + d
            theta[i] = theta[i] - lr * buffers[i]
        optimizer.step()
        for i in (0, 3):
            # Steps build on each other, so rounding does too.
            np.testing.assert_allclose(matrix(net[i]), theta[i], rtol=1e-8, atol=1e-10)
    assert min(scales) < 1.0
    for i in (0, 3):
        assert layer_state(optimizer, net, i)["factor_updates"] == 5
        assert layer_state(optimizer, net, i)["inversions"] == 3


def matrix(layer: nn.Module) -> Any:
    return oracle.weight_matrix([p.detach().numpy().copy() for p in layer.parameters()])


def test_changed_damping_acts_at_once_on_eigenvalues() -> None:
    moved = []
    for damping in (0.1, 1e4):
        net = conv_net()
        optimizer = KFAC(net, lr=0.0, momentum=0.0, kl_clip=None, damping=0.1)
        train(net, optimizer, range(1))
        optimizer.param_groups[0].update(lr=1.0, damping=damping)
        before = net[3].weight.detach().clone()
        train(net, optimizer, range(1, 2))
        moved.append((net[3].weight.detach() - before).norm().item())
    # With so much damping V is the gradient / 1e4.
    assert moved[1] == pytest.approx(net[3].weight.grad.norm().item() / 1e4, rel=1e-3)
    assert moved[0] > 100 * moved[1]
