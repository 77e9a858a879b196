"""The controls beside H g: what is applied, what is reported, what is refused."""

import copy
import re

import numpy as np
import pytest
import torch

from mlbfgs import MLBFGS, SLIMQN
from tests.mlbfgs.oracles import dense_bfgs

SHAPES = [(4, 3), (6,), (2, 5)]
SIZES = [12, 6, 10]
SETTINGS = {
    **{"lr": 0.01, "betas": 0.8, "update_interval": 3, "history_size": 4},
    "variant": "paper",
}


def gradients(params, t):
    generator = torch.Generator().manual_seed(t)
    for i, p in enumerate(params):
        curvature = torch.linspace(0.2, 2.0 + i, p.numel(), dtype=p.dtype).reshape(p.shape)
        kick = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        p.grad = curvature * p.detach() + 0.1 * kick


def after(steps, direction, blocks=None, momentum=0.0):
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in SHAPES
    ]
    kind = {"direction": direction} if direction else {}
    optimizer = MLBFGS(params, momentum=momentum, blocks=blocks, **kind, **SETTINGS)
    for t in range(steps):
        gradients(params, t)
        optimizer.step()
    return params, optimizer


def matrix_of_block(optimizer, params):
    """H and γ of a block from the pairs in the state, by the textbook update."""
    state = [optimizer.state[p] for p in params]
    pairs, m = state[0]["pairs"], SETTINGS["history_size"]
    order = [i % m for i in range(max(0, pairs - m), pairs)]
    s, y = (
        [np.concatenate([v[key][i].numpy().reshape(-1) for v in state]) for i in order]
        for key in ("s_history", "y_history")
    )
    return dense_bfgs(s, y), float(s[-1] @ y[-1] / (y[-1] @ y[-1]))


@pytest.mark.parametrize("kind", ["hessian", "gamma_gradient", "norm_matched_gradient"])
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("steps", [13, 23])  # a part-filled and an overflowed history
def test_direction_is_its_definition_in_every_block(kind, blocks, steps):
    params, optimizer = after(steps, kind, blocks)
    before = [p.detach().clone() for p in params]
    members = [params] if blocks == 1 else [[p] for p in params]
    systems = [matrix_of_block(optimizer, block) for block in members]
    gradients(params, steps)
    optimizer.step()  # step number steps + 1: a multiple of 3 that ends an interval
    moved = dict(zip(params, before, strict=True))
    records = optimizer.curvature_records()
    for block, (h, gamma), record in zip(members, systems, records, strict=True):
        g = np.concatenate([p.grad.numpy().reshape(-1) for p in block])
        d = np.concatenate([((moved[p] - p.detach()) / 0.01).numpy().reshape(-1) for p in block])
        hg = h @ g
        expected = {
            "hessian": hg,
            "gamma_gradient": gamma * g,
            "norm_matched_gradient": np.linalg.norm(hg) / np.linalg.norm(g) * g,
        }[kind]
        # a difference of float64 parameters over lr: 1e-16 / 0.01, beside Gram products' rounding
        np.testing.assert_allclose(d, expected, rtol=1e-8, atol=1e-11)
        if (steps + 1) % 3 == 0:
            length = np.linalg.norm
            assert record["direction_over_gradient"] == pytest.approx(length(d) / length(g))
            assert record["cos_direction_gradient"] == pytest.approx(d @ g / length(d) / length(g))
            assert record["hessian_over_gradient"] == pytest.approx(length(hg) / length(g))
            assert record["cos_hessian_gradient"] == pytest.approx(hg @ g / length(hg) / length(g))


def test_hessian_vector_is_h_under_every_direction():
    params, optimizer = after(20, "gamma_gradient")
    h, gamma = matrix_of_block(optimizer, params)
    v = torch.arange(1.0, sum(SIZES) + 1, dtype=torch.float64)
    shaped = [part.reshape(s) for part, s in zip(torch.split(v, SIZES), SHAPES, strict=True)]
    product = np.concatenate([d.numpy().reshape(-1) for d in optimizer.hessian_vector(shaped)])
    np.testing.assert_allclose(product, h @ v.numpy(), rtol=1e-9)
    assert np.linalg.norm(product - gamma * v.numpy()) > 0.01 * np.linalg.norm(product)


@pytest.mark.parametrize("kind", ["gamma_gradient", "norm_matched_gradient"])
def test_warmup_is_the_same_for_every_direction(kind):
    for steps in (6, 7):
        papers, _ = after(steps, None, momentum=0.9)
        control, _ = after(steps, kind, momentum=0.9)
        equal = all(torch.equal(a, b) for a, b in zip(papers, control, strict=True))
        assert equal == (steps == 6)  # step 2T + 1 is the first with a pair


@pytest.mark.parametrize("kind", ["gamma_gradient", "norm_matched_gradient"])
def test_a_gradient_of_zero_moves_nothing_and_stays_finite(kind):
    params, optimizer = after(20, kind, blocks=3)
    before = params[0].detach().clone()
    gradients(params, 20)
    params[0].grad.zero_()
    optimizer.step()
    assert torch.equal(params[0].detach(), before)
    assert all(torch.isfinite(p).all() for p in params)


def test_direction_is_saved_and_missing_in_an_old_state_it_stays_as_constructed():
    params, optimizer = after(10, "gamma_gradient")
    saved = copy.deepcopy(optimizer.state_dict())
    fresh = MLBFGS(params, **SETTINGS)
    fresh.load_state_dict(saved)
    assert fresh.param_groups[0]["direction"] == "gamma_gradient"
    for group in saved["param_groups"]:
        del group["direction"]
    for direction in ("hessian", "norm_matched_gradient"):
        fresh = MLBFGS(params, direction=direction, **SETTINGS)
        fresh.load_state_dict(saved)
        assert fresh.param_groups[0]["direction"] == direction


@pytest.mark.parametrize("optimizer", [MLBFGS, SLIMQN])
def test_unknown_direction_is_refused_with_the_nearest(optimizer):
    with pytest.raises(
        ValueError, match=re.escape("'gama_gradient' (one of hessian, gamma_gradient, norm_m")
    ) as error:
        optimizer([torch.nn.Parameter(torch.zeros(2))], direction="gama_gradient")
    assert "did you mean 'gamma_gradient'?" in str(error.value)


def test_direction_cannot_differ_between_groups():
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    groups = [{"params": [params[0]]}, {"params": [params[1]], "direction": "gamma_gradient"}]
    with pytest.raises(ValueError, match="direction must be the same in all parameter groups"):
        MLBFGS(groups)
