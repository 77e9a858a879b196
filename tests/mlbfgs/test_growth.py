"""The guarded step: its formula, the optimizer against a plain transcription, its state."""

import copy
import logging
import math

import numpy as np
import pytest
import torch

from mlbfgs import MLBFGS, SLIMQN
from mlbfgs.checkpoint import checkpoint_state, load_checkpoint_state
from mlbfgs.growth import AVERAGE, MEMORY, limit_growth_
from tests.mlbfgs.oracles import dense_bfgs

SETTINGS = {"lr": 0.05, "betas": 0.6, "update_interval": 3, "history_size": 3}
SHAPES = {"a": (3, 2), "b": (4,), "bias": (5,)}


def tensor(value):
    return torch.tensor(value, dtype=torch.float64)


def growth(average, promise, first, limit):
    held = tensor([average, average])
    factor = limit_growth_(held, tensor(promise), tensor(first), limit)
    assert held[0] == held[1]
    return float(factor), float(held[0])


def test_a_promise_is_bounded_by_its_average_and_enters_it_as_allowed():
    factor, average = growth(2.0, 10.0, 7.0, 1.5)
    assert factor == pytest.approx(0.3)
    assert average == pytest.approx(2 * MEMORY + 3 * (1 - MEMORY))
    assert growth(2.0, 1.0, 7.0, 1.5) == (1.0, pytest.approx(2 * MEMORY + 1 - MEMORY))
    # in the warm-up it is averaged and not bounded; it begins with the gradient
    assert growth(0.0, 10.0, 10.0, None) == (1.0, pytest.approx(10.0))
    assert growth(2.0, 10.0, 10.0, None)[0] == 1.0
    assert growth(0.0, 100.0, 10.0, 1.5)[0] == pytest.approx(0.15)


def test_a_bound_has_no_unit():
    for unit in (1e-8, 1e8):
        factor, average = growth(2 * unit, 10 * unit, 7 * unit, 1.5)
        assert (factor, average / unit) == (
            pytest.approx(0.3),
            pytest.approx(2 * MEMORY + 3 * (1 - MEMORY)),
        )


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("limit", [1.2, None])
def test_what_is_not_finite_and_nothing_at_all_leave_the_average(bad, limit):
    assert growth(2.0, bad, bad, limit) == (1.0, 2.0)
    assert growth(0.0, bad, bad, limit) == (1.0, 0.0)


def network(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        for name, shape in SHAPES.items()
    }


def set_gradients(named, t, scale=1.0, sign=1.0):
    generator = torch.Generator().manual_seed(t)
    for i, p in enumerate(named.values()):
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        curvature = torch.linspace(0.02, 1.0 + i, p.numel(), dtype=p.dtype).reshape(p.shape)
        p.grad = sign * scale * (curvature * p.detach() + 0.3 * noise)


def by_name(names, sizes):
    return [["a", "b"].index(name) for name in names]


def textbook(optimizer, named, blocks, kind):
    """(d, |gᵀd|) of each block from the pairs in the state, as lists of arrays."""
    directions, promises = {}, []
    for names in blocks:
        state = [optimizer.state[named[name]] for name in names]
        pairs, m = state[0]["pairs"], SETTINGS["history_size"]
        g = np.concatenate([named[name].grad.numpy().reshape(-1) for name in names])
        order = [i % m for i in range(max(0, pairs - m), pairs)]
        s, y = (
            [np.concatenate([v[key][i].numpy().reshape(-1) for v in state]) for i in order]
            for key in ("s_history", "y_history")
        )
        d = g
        if pairs:
            d = dense_bfgs(s, y) @ g
            if kind == "gamma_gradient":
                d = float(s[-1] @ y[-1] / (y[-1] @ y[-1])) * g
            if kind == "norm_matched_gradient":
                d = g * np.linalg.norm(d) / np.linalg.norm(g)
        promises.append(abs(g @ d))
        sizes = np.cumsum([named[name].numel() for name in names])[:-1]
        directions.update(zip(names, np.split(d, sizes), strict=True))
    return directions, sum(promises)


@pytest.mark.parametrize("kind", ["hessian", "gamma_gradient", "norm_matched_gradient"])
@pytest.mark.parametrize("maximize", [False, True])
def test_every_step_is_the_textbook_direction_times_one_factor(kind, maximize):
    """Two blocks and a parameter in none; at step 2T = 6 the warm-up ends."""
    named, limit, t_warm = network(), 1.1, 6
    optimizer = MLBFGS(
        named.items(),
        **{**SETTINGS, "momentum": 0.0, "blocks": by_name, "outside_blocks": ["bias"]},
        direction=kind,
        maximize=maximize,
        variant={"growth_limit": limit},
    )
    average, bounded = None, 0
    for t in range(1, 41):
        # louder from step 20 on, so that there is something to bound
        set_gradients(
            named, t, scale=8.0 if t == 4 or t >= 20 else 1.0, sign=-1.0 if maximize else 1.0
        )
        directions, promise = textbook(optimizer, named, [["a"], ["b"], ["bias"]], kind)
        before = {name: p.detach().clone() for name, p in named.items()}
        optimizer.step()
        factor = 1.0
        if average is None:
            average = promise
        if t > t_warm:
            factor = min(1.0, limit * average / promise)
            bounded += factor < 0.9
        average = MEMORY * average + (1 - MEMORY) * promise * factor
        for name, p in named.items():
            moved = (before[name] - p.detach()).numpy().reshape(-1) / SETTINGS["lr"]
            expected = factor * directions[name] * (-1.0 if maximize else 1.0)
            np.testing.assert_allclose(moved, expected, rtol=1e-7, atol=1e-9)
        held = {float(optimizer.state[p][AVERAGE]) for p in named.values()}
        assert len(held) == 1 and held.pop() == pytest.approx(average, rel=1e-9)
    assert bounded > 5


@pytest.mark.parametrize("make", [MLBFGS, SLIMQN])
def test_it_is_the_default_and_the_papers_have_no_state_of_it(make):
    named = network()
    assert all(AVERAGE in make(named.items()).state[p] for p in named.values())
    for variant in ("paper", "released"):
        printed = make(named.items(), variant=variant)
        assert not any(AVERAGE in printed.state[p] for p in named.values())


def walk(named, optimizer, first, last, scale=1.0):
    for t in range(first, last):
        set_gradients(named, t, scale)
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in named.values()])


def test_a_gradient_that_is_not_finite_does_not_stay_in_the_average():
    named, twin = network(), network()
    optimizer, other = (MLBFGS(n.items(), momentum=0.0, **SETTINGS) for n in (named, twin))
    walk(named, optimizer, 1, 12), walk(twin, other, 1, 12)
    held = float(optimizer.state[named["a"]][AVERAGE])
    kept = copy.deepcopy([p.detach() for p in named.values()])
    averages = {p: v["param_progress"].clone() for p, v in optimizer.state.items()}
    set_gradients(named, 12)
    named["b"].grad[0] = math.nan
    optimizer.step()
    assert float(optimizer.state[named["a"]][AVERAGE]) == held
    with torch.no_grad():  # as a user does who goes back to the weights of before
        for p, value in zip(named.values(), kept, strict=True):
            p.copy_(value)
            optimizer.state[p]["param_progress"].copy_(averages[p])
            optimizer.state[p]["grad_average"].zero_()
    walk(named, optimizer, 13, 20)
    assert 0 < float(optimizer.state[named["a"]][AVERAGE]) < 100 * held


def test_switching_it_off_and_on_in_the_groups_lays_the_state_out_anew():
    named = network()
    optimizer = MLBFGS(named.items(), **SETTINGS)
    walk(named, optimizer, 1, 12)
    history = optimizer.state[named["a"]]["s_history"].clone()
    optimizer.param_groups[0]["variant"] = {
        **optimizer.param_groups[0]["variant"],
        "growth_limit": None,
    }
    walk(named, optimizer, 12, 13)
    assert AVERAGE not in optimizer.state[named["a"]]
    optimizer.param_groups[0]["variant"] = {
        **optimizer.param_groups[0]["variant"],
        "growth_limit": 1.2,
    }
    walk(named, optimizer, 13, 14)
    state = optimizer.state[named["a"]]
    assert float(state[AVERAGE]) > 0 and state["step"] == 13
    assert not torch.equal(state["s_history"], history)  # a pair came in at step 12


def test_a_state_without_it_begins_with_the_gradient():
    named = network()
    optimizer = MLBFGS(named.items(), variant="paper", **SETTINGS)
    walk(named, optimizer, 1, 12)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["variant"]["growth_limit"] = 1.2
    later = MLBFGS(named.items(), **SETTINGS)
    later.load_state_dict(saved)
    assert float(later.state[named["a"]][AVERAGE]) == 0
    set_gradients(named, 12)
    squares = sum(float((p.grad**2).sum()) for p in named.values())
    later.step()
    assert 0.95 * squares < float(later.state[named["a"]][AVERAGE]) < 1.01 * squares


@pytest.mark.parametrize("blocks", [None, ["a", "b"]])
def test_resume_copy_and_pickle_keep_it_to_the_last_bit(blocks):
    named = network()
    optimizer = MLBFGS(named.items(), blocks=blocks, **SETTINGS)
    walk(named, optimizer, 1, 20)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(named)
    other = MLBFGS(weights.items(), blocks=blocks, **SETTINGS)
    other.load_state_dict(saved)
    assert torch.equal(
        walk(named, optimizer, 20, 30, scale=10.0), walk(weights, other, 20, 30, scale=10.0)
    )


def test_a_distributed_checkpoint_brings_it_along_and_need_not_have_it():
    named = network()
    optimizer = MLBFGS(named.items(), **SETTINGS)
    walk(named, optimizer, 1, 12)
    held = float(optimizer.state[named["a"]][AVERAGE])
    packed = copy.deepcopy(checkpoint_state(optimizer))
    printed = checkpoint_state(MLBFGS(network().items(), variant="paper", **SETTINGS))
    assert packed["tensors"].keys() == printed["tensors"].keys()  # what is asked of a checkpoint
    walk(named, optimizer, 12, 20)
    assert float(optimizer.state[named["a"]][AVERAGE]) != held
    load_checkpoint_state(optimizer, packed)
    assert float(optimizer.state[named["a"]][AVERAGE]) == held


# --- what it says ---------------------------------------------------------------------------------


def quadratic(curvature, variant, steps, caplog, **settings):
    """Walks where the averages see little curvature; returns what was logged."""
    x = torch.nn.Parameter(torch.linspace(1.0, 2.0, 6, dtype=torch.float64))
    options = {"update_interval": 3, "betas": 0.5, "lr": 0.01, "damping": 1.0, "momentum": 0.0}
    optimizer = MLBFGS([x], variant=variant, **{**options, **settings})
    with caplog.at_level(logging.WARNING, logger="mlbfgs"):
        for _ in range(steps):
            x.grad = curvature * x.detach()
            optimizer.step()
    return caplog.messages


@pytest.mark.parametrize(
    ("variant", "remedy"), [("paper", "variant='guarded'"), ("guarded", "lower lr")]
)
def test_curvature_at_its_bound_is_said_once(variant, remedy, caplog):
    messages = quadratic(-0.3, variant, 15, caplog)
    said = [m for m in messages if "at its bound 1/σ_L = 100" in m]
    assert len(said) == 1 and said[0].startswith("step 6, block 0: ")
    assert "γ = 100" in said[0] and "‖d‖/‖g‖" in said[0] and remedy in said[0]


def test_a_long_first_direction_is_said_once(caplog):
    messages = quadratic(0.02, "paper", 15, caplog)
    (said,) = [m for m in messages if "the first direction after the warm-up" in m]
    # H of an exact pair of curvature 0.02 is 50 along s
    assert said.startswith("step 9, block 0: ") and "was 50 times as long" in said
    assert "γ = 50" in said and "variant='guarded'" in said
    caplog.clear()
    assert quadratic(0.5, "paper", 15, caplog) == []  # twice as long is nothing to speak of


def test_a_run_of_refused_pairs_is_said_once(caplog):
    messages = quadratic(math.nan, "guarded", 15, caplog)
    (said,) = messages
    assert said.startswith("step 6, block 0: pair skipped") and "NaN" in said
    caplog.clear()
    messages = quadratic(0.5, "guarded", 15, caplog, lr=0.0)  # never moves: s = 0
    assert len(messages) == 1 and "pair skipped" in messages[0]


def test_a_block_that_never_has_a_pair_silences_no_other(caplog):
    params = {name: torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for name in "ab"}
    optimizer = MLBFGS(params.items(), blocks=["a", "b"], **SETTINGS)
    with caplog.at_level(logging.WARNING, logger="mlbfgs"):
        for t in range(1, 19):
            params["a"].grad = None  # never moves
            params["b"].grad = 0.5 * params["b"].detach() + (math.nan if t > 12 else 0)
            optimizer.step()
    skipped = [m.split(":")[0] for m in caplog.messages if "pair skipped" in m]
    assert skipped == ["step 6, block 0", "step 15, block 1"]


def test_a_variant_given_by_name_in_the_groups_counts_for_whoever_looks_at_the_state_first():
    named = network()
    optimizer = MLBFGS(named.items(), **SETTINGS)
    walk(named, optimizer, 1, 5)
    optimizer.param_groups[0]["variant"] = "paper"
    entries = optimizer.state_dict()["state"].values()
    assert entries and all(AVERAGE not in entry for entry in entries)
    optimizer.param_groups[0]["variant"] = "papr"
    with pytest.raises(ValueError, match="did you mean 'paper'"):
        optimizer.state_dict()
