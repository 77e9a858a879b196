"""M_θ as snapshot and progress: what moves little beside θ is kept in float32."""

import copy
import logging

import pytest
import torch

from mlbfgs import MLBFGS, SLIMQN

N = 4000


def walk_and_compare(optimizer, p, move, steps):
    """Move θ by `move` |θ| a step; relative error of the newest s against the same in float64."""
    group = optimizer.param_groups[0]
    beta, interval = group["betas"][0], group["update_interval"]
    average = p.detach().double()
    snapshot, s = average.clone(), None
    direction = torch.linspace(0.5, 1.5, N, dtype=torch.float64)
    for step in range(1, steps + 1):
        average = beta * average + (1 - beta) * p.detach().double()
        p.grad = direction.to(p.dtype)
        group["lr"] = move
        optimizer.step()
        if step % interval == 0:
            s, snapshot = average - snapshot, average.clone()
    slot = (optimizer.state[p]["pairs"] - 1) % group["history_size"]
    ours = optimizer.state[p]["s_history"][slot].double()
    return float((ours - s).norm() / s.norm())


def start(dtype, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    theta = scale * (1 + 0.1 * torch.randn(N, generator=generator, dtype=torch.float64))
    return torch.nn.Parameter(theta.to(dtype))


@pytest.mark.parametrize("move", [1e-4, 1e-6, 3e-7, 1e-7])
@pytest.mark.parametrize("make", [MLBFGS, SLIMQN])
def test_s_is_right_within_one_percent_however_little_theta_moves(make, move):
    p = start(torch.float32)
    optimizer = make([p], lr=0.0, momentum=0.0, direction="hessian")
    steps = 2 * optimizer.param_groups[0]["update_interval"]
    assert walk_and_compare(optimizer, p, move, steps) < 0.01


@pytest.mark.parametrize("move", [4e-3, 1e-2])
def test_s_of_a_bfloat16_parameter_is_right_as_far_as_it_moves(move):
    p = start(torch.bfloat16)
    optimizer = MLBFGS([p], lr=0.0, momentum=0.0)
    assert walk_and_compare(optimizer, p, move, 100) < 0.01


def trained(steps=130, **settings):
    p = start(torch.float64)
    optimizer = MLBFGS([p], lr=0.01, betas=0.9, update_interval=10, history_size=3, **settings)
    walk(optimizer, p, range(steps))
    return p, optimizer


def walk(optimizer, p, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        noise = torch.randn(N, generator=generator, dtype=torch.float64)
        p.grad = p.detach() * torch.linspace(0.1, 2, N, dtype=torch.float64) + 0.01 * noise
        optimizer.step()


def test_the_average_is_given_on_request():
    p, optimizer = trained(0)
    average = p.detach().clone()
    for step in range(37):
        average = 0.9 * average + 0.1 * p.detach()
        walk(optimizer, p, [step])
    torch.testing.assert_close(optimizer.parameter_averages(), [average])


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_a_state_that_holds_the_average_itself_loads(variant, caplog):
    p, optimizer = trained(variant=variant)
    state = copy.deepcopy(optimizer.state_dict())
    entry = state["state"][0]
    entry["param_average"] = entry["param_snapshot"] + entry.pop("param_progress")
    other = torch.nn.Parameter(p.detach().clone())
    loaded = MLBFGS(
        [other], lr=0.01, betas=0.9, update_interval=10, history_size=3, variant=variant
    )
    with caplog.at_level(logging.WARNING, logger="mlbfgs"):
        loaded.load_state_dict(state)
    assert not caplog.messages
    for q, one in ((p, optimizer), (other, loaded)):
        walk(one, q, range(130, 200))
    torch.testing.assert_close(other, p, rtol=1e-9, atol=1e-9)
