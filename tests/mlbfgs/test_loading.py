"""A state is loaded under other blocks, with parts missing, and with pairs of no use there."""

import copy
import logging

import numpy as np
import pytest
import torch

from mlbfgs import MLBFGS
from tests.mlbfgs.oracles import dense_bfgs
from tests.mlbfgs.problems import (
    LOADED,
    SHAPES,
    SIZES,
    N,
    flat_of,
    noisy_quadratic,
    parameters,
    run,
    state_of_one_block,
)


def matrix(optimizer, params, i):
    """H of the block of parameter i alone, column by column."""
    columns = []
    for j in range(params[i].numel()):
        e = [torch.zeros_like(p) for p in params]
        e[i].view(-1)[j] = 1.0
        columns.append(optimizer.hessian_vector(e)[i].reshape(-1))
    return torch.stack(columns, dim=1)


def test_the_state_knows_nothing_of_blocks():
    start, gradient = noisy_quadratic()
    params = parameters(start)
    settings = {"lr": 0.01, "betas": 0.9, "update_interval": 5, "history_size": 3}
    optimizer = MLBFGS(params, blocks=None, **settings)
    run(optimizer, params, gradient, 25)
    others = parameters(flat_of(params))
    other = MLBFGS(others, blocks=4, **settings)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.plan().block_sizes == [12, 7, 12, 1]
    # what a block does with the pairs it was given: H of each block from its own columns
    g = torch.arange(1.0, N + 1, dtype=torch.float64)
    shaped = [v.reshape(s) for v, s in zip(torch.split(g, SIZES), SHAPES, strict=True)]
    directions = other.hessian_vector(shaped)
    for p, v, d in zip(params, shaped, directions, strict=True):
        s, y = (optimizer.state[p][k].reshape(3, -1).numpy() for k in ("s_history", "y_history"))
        order = [1, 2, 0]  # four pairs through a ring of three
        h = dense_bfgs([s[i] for i in order], [y[i] for i in order])
        np.testing.assert_allclose(d.reshape(-1).numpy(), h @ v.reshape(-1).numpy(), rtol=1e-8)
    # and back, with rings that came from other blocks
    back = MLBFGS(parameters(flat_of(params)), blocks=None, **settings)
    back.load_state_dict(other.state_dict())
    for a, b in zip(back.hessian_vector(shaped), optimizer.hessian_vector(shaped), strict=True):
        torch.testing.assert_close(a, b)


def test_rings_of_different_ages_meet_at_their_newest_pair():
    old = [torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2)]
    settings = {"update_interval": 1, "history_size": 3, "betas": 0.0}
    optimizer = MLBFGS(old, blocks=2, **settings)
    state = optimizer.state_dict()
    for i, pairs in enumerate((2, 4)):
        rows = torch.zeros(3, 2, dtype=torch.float64)
        for pair in range(pairs):  # pair number k holds k + 1, in slot k mod 3
            rows[pair % 3] = pair + 1
        state["state"][i].update(pairs=pairs, s_history=rows, y_history=rows.clone())
    new = [torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2)]
    merged = MLBFGS(new, blocks=None, **settings)
    merged.load_state_dict(state)
    first, second = (merged.state[p]["s_history"][:, 0].tolist() for p in new)
    assert second == [4.0, 2.0, 3.0]
    assert first == [2.0, 0.0, 1.0]  # newest beside newest; the third was never there
    assert merged.state[new[0]]["pairs"] == 4


@pytest.mark.parametrize("lost", ["param_average", "param_snapshot", "grad_snapshot"])
def test_averages_start_at_the_first_value_where_the_loaded_state_lacks_one(lost, caplog):
    settings = {"betas": 0.9, "update_interval": 4, "lr": 0.01}
    x, z = (torch.nn.Parameter(torch.full((3,), v)) for v in (1.0, 2.0))
    optimizer = MLBFGS([x, z], **settings)

    def walk(optimizer, steps):
        for _ in range(steps):
            x.grad, z.grad = x.detach().clone(), z.detach().clone()
            optimizer.step()

    walk(optimizer, 5)
    state = copy.deepcopy(optimizer.state_dict())
    del state["state"][0][lost]
    loaded = MLBFGS([x, z], **settings)
    with caplog.at_level(logging.WARNING, logger="mlbfgs"):
        loaded.load_state_dict(state)
    assert caplog.messages == [
        f"the loaded state of 2 parameters lacks {lost} of 1: starts anew there"
    ]
    assert [loaded.state[p]["seeded"] for p in (x, z)] == [0, 1]
    before = x.detach().clone()
    walk(loaded, 1)
    for key in ("param_average", "param_snapshot"):
        assert torch.equal(loaded.state[x][key], before)
    walk(loaded, 2)
    assert loaded.state[x]["s_history"][0].norm() < 0.1 * before.norm()  # not θ itself


def test_momentum_given_later_is_no_loaded_state_that_lacks_something(caplog):
    x = torch.nn.Parameter(torch.ones(3))
    optimizer = MLBFGS([x], momentum=0.0)
    x.grad = torch.ones(3)
    optimizer.param_groups[0]["momentum"] = 0.9
    with caplog.at_level(logging.WARNING, logger="mlbfgs"):
        optimizer.step()
    assert not caplog.messages and "momentum_buffer" in optimizer.state[x]


@pytest.mark.parametrize("unusable", [-0.4, 0.0, 1e-3, float("nan")])
@pytest.mark.parametrize("known", [True, False])
def test_pairs_that_other_blocks_would_have_refused_are_dropped(unusable, known, caplog):
    named, state = state_of_one_block([0.8, unusable, 0.6, unusable])
    if not known:  # a state written before blocks were noted
        for values in state["state"].values():
            del values["block"]
    params = [p for _, p in named]
    optimizer = MLBFGS(named, blocks=["u", "v"], **LOADED)
    with caplog.at_level(logging.WARNING, logger="mlbfgs"):
        optimizer.load_state_dict(copy.deepcopy(state))
    (said,) = caplog.messages
    assert "of block 1, 2 pairs" in said
    assert [optimizer.state[p]["pairs"] for p in params] == [6, 2]
    for i, slots in enumerate(((2, 3, 0, 1), (2, 0))):
        s, y = (state["state"][i][key].numpy() for key in ("s_history", "y_history"))
        h = dense_bfgs([s[k] for k in slots], [y[k] for k in slots])
        np.testing.assert_allclose(matrix(optimizer, params, i).numpy(), h, rtol=1e-10)
        assert np.linalg.eigvalsh(h).min() > 0
    assert torch.equal(optimizer.state[params[1]]["s_history"][2:], torch.zeros(2, 3).double())
    for _ in range(10):
        for p in params:
            p.grad = p.detach().clone()
        optimizer.step()
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_pairs_stay_to_the_last_bit_under_the_blocks_that_accepted_them(variant, caplog):
    # without thresholds a pair of negative curvature is accepted, as in the papers' ablation
    settings = {**LOADED, "damping": 1.0, "curvature_bounds": None, "variant": variant}
    settings |= {"blocks": ["u", "v"], "history_dtype": torch.bfloat16}
    named = [(n, torch.nn.Parameter(torch.linspace(1, 2, 5))) for n in "uv"]
    optimizer = MLBFGS(named, **settings)
    for _ in range(14):
        for sign, (_, p) in zip((1.0, -0.5), named, strict=True):
            p.grad = sign * p.detach() * torch.linspace(0.5, 1, 5)
        optimizer.step()
    history = optimizer._built.history
    assert history.pairs[1] >= 4 and (history.pair_products()[4:8, 1] < 0).all()
    twin = MLBFGS(named, **settings)
    with caplog.at_level(logging.WARNING, logger="mlbfgs"):
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert not caplog.messages
    assert torch.equal(twin._built.history.C, history.C)
    assert torch.equal(twin._built.history.W, history.W)


@pytest.mark.parametrize("history_dtype", [torch.float32, torch.bfloat16])
def test_pairs_at_the_threshold_stay_where_an_older_state_does_not_tell_their_blocks(
    history_dtype, caplog
):
    # a concave function: damping puts every pair at σ_L, where rounding decides on which side
    settings = {**LOADED, "lr": 1e-3, "history_dtype": history_dtype, "momentum": 0.0}
    p = torch.nn.Parameter(torch.linspace(1, 2, 5000))
    optimizer = MLBFGS([p], **settings)
    for _ in range(14):
        p.grad = -p.detach() * torch.linspace(0.5, 1, 5000)
        optimizer.step()
    assert optimizer.curvature_records()[0]["damped"] and optimizer.state[p]["pairs"] >= 4
    state = copy.deepcopy(optimizer.state_dict())
    del state["state"][0]["block"]
    twin = MLBFGS([p], **settings)
    caplog.clear()  # that curvature is at its bound was said before
    with caplog.at_level(logging.WARNING, logger="mlbfgs"):
        twin.load_state_dict(state)
    assert not caplog.messages
    assert torch.equal(twin._built.history.C, optimizer._built.history.C)
