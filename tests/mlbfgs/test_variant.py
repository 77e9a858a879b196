"""The switches as settings: what is accepted, refused, saved and loaded."""

import copy
import math
import re

import pytest
import torch

from mlbfgs import MLBFGS, SLIMQN, Variant, plan
from mlbfgs.damping import damp
from mlbfgs.variant import GUARDED, PAPER, RELEASED_BLOCKWISE, RELEASED_FULL

SETTINGS = {"update_interval": 3, "history_size": 3, "betas": 0.8, "weight_decay": 0.01}


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))


def train(model, optimizer, steps, first=0):
    for t in range(first, first + steps):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(t))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
        optimizer.step()


def switches_of(optimizer):
    return Variant(**optimizer.param_groups[0]["variant"])


def test_variants_by_name_mapping_and_value():
    params = list(network().named_parameters())
    settings = {**SETTINGS, "outside_blocks": ["2.bias"]}
    for make, released in ((MLBFGS, RELEASED_BLOCKWISE), (SLIMQN, RELEASED_FULL)):
        assert switches_of(make(params)) == GUARDED
        assert switches_of(make(params, variant="paper")) == PAPER == Variant()
        assert switches_of(make(params, variant="released")) == released
        assert switches_of(make(params, variant=released, **settings)) == released
        assert switches_of(make(params, variant={"base": "released"})) == released
        one = make(params, variant={"same_step": True})
        assert switches_of(one) == Variant(same_step=True)
    less = MLBFGS(params, variant={"base": "released", "normalize_direction": False})
    assert switches_of(less) == Variant(
        **{**RELEASED_BLOCKWISE.switches(), "normalize_direction": False}
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"variant": "relased"},
            "Invalid variant: 'relased' (one of guarded, paper, released); did you",
        ),
        ({"variant": {"base": "papers"}}, "Invalid variant.base: 'papers'"),
        ({"variant": {"samestep": True}}, "did you mean 'same_step'?"),
        ({"variant": {"averaging": "mean"}}, "Invalid variant.averaging: 'mean' (one of ema, sum)"),
        ({"variant": {"averaged_gradient": "scale"}}, "did you mean 'scaled'?"),
        ({"variant": {"same_step": 1}}, "Invalid variant.same_step: 1 (True or False)"),
        ({"variant": {"pair_momentum": 1.0}}, "Invalid variant.pair_momentum: 1.0 (in [0, 1))"),
        ({"variant": {"pair_momentum": True}}, "Invalid variant.pair_momentum: True"),
        ({"variant": {"ratio_epsilon": -1e-5}}, "Invalid variant.ratio_epsilon: -1e-05"),
        ({"variant": {"recursion_epsilon": math.inf}}, "Invalid variant.recursion_epsilon: inf"),
        ({"variant": {"pair_threshold": math.nan}}, "Invalid variant.pair_threshold: nan"),
        ({"variant": {"kl_clip": 0}}, "Invalid variant.kl_clip: 0"),
        ({"variant": {"base": "released", "kl_clip": 0.1}}, "contradicts variant.normalize_dir"),
        ({"variant": {"reset_grad_average": True}, "betas": (0.9, 0.0)}, "has no effect: the grad"),
        ({"variant": {"averaging": "sum"}, "betas": 0.0}, "has no effect: betas=0 keeps no"),
        (
            {"variant": {"averaged_gradient": "plain"}, "weight_decay": 0},
            "there is no weight_decay",
        ),
        ({"variant": {"decay_outside_blocks": False}}, "no parameter outside the blocks"),
        (
            {"variant": {"drop_oldest_first": True}, "history_size": 1},
            "variant.drop_oldest_first=True needs a history_size of at least 2",
        ),
        (
            {"variant": {"drop_oldest_first": True, "pair_threshold": -math.inf}},
            "has no effect: pair_threshold=-inf refuses no pair",
        ),
        (
            {"variant": {"recursion_epsilon": 1e-5}, "direction": "gamma_gradient"},
            "direction='gamma_gradient' has no recursion",
        ),
        ({"outside_blocks": "0.bias"}, "expected a list of regular expressions, as ['0.bias']"),
        ({"outside_blocks": ["0.bais"]}, "'0.bais' matches no parameter, such as '0.weight'"),
        ({"outside_blocks": ["."]}, "match every parameter"),
    ],
)
def test_bad_input_is_one_line_that_says_what_would_do(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        MLBFGS(network().named_parameters(), **{**SETTINGS, **settings})
    assert "\n" not in str(error.value)


def test_outside_blocks_needs_names():
    with pytest.raises(ValueError, match=r"give the optimizer model.named_parameters\(\)"):
        MLBFGS(network().parameters(), outside_blocks=["bias"])


def test_a_named_variant_is_not_refused_for_a_part_without_effect():
    MLBFGS(network().named_parameters(), variant="released", betas=0.0)


def test_parameters_outside_the_blocks_step_along_their_gradient():
    model = network()
    optimizer = MLBFGS(
        model.named_parameters(),
        **{**SETTINGS, "momentum": 0.0, "lr": 0.1, "outside_blocks": ["^2"], "blocks": 1},
        variant="paper",
    )
    assert optimizer.plan().outside == 1 and optimizer.plan().block_sizes == [25, 18]
    assert "none" in str(plan(model, 1, outside_blocks=["^2"]))
    train(model, optimizer, 20)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, 1, 20)
    for i, (p, b) in enumerate(zip(model.parameters(), before, strict=True)):
        along = torch.allclose(p.detach(), b - 0.1 * (p.grad + 0.01 * b), rtol=0, atol=1e-7)
        assert along == (i >= 2)
    assert [optimizer.state[p]["pairs"] > 0 for p in model.parameters()] == [True] * 2 + [False] * 2
    assert len(optimizer.curvature_records()) == 1


def test_state_goes_into_and_out_of_blocks():
    model = network()
    optimizer = MLBFGS(model.named_parameters(), **SETTINGS)
    train(model, optimizer, 12)
    part = MLBFGS(model.named_parameters(), outside_blocks=["^2"], **SETTINGS)
    part.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [part.state[p]["pairs"] for p in model.parameters()] == [3, 3, 0, 0]
    g = [torch.ones_like(p) for p in model.parameters()]
    h = part.hessian_vector(g)
    assert torch.equal(h[2], g[2]) and not torch.equal(h[0], g[0])
    back = MLBFGS(model.named_parameters(), **SETTINGS)
    back.load_state_dict(part.state_dict())
    train(model, back, 12, 12)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_switches_are_saved_and_an_older_state_has_the_papers():
    model = network()
    optimizer = MLBFGS(model.named_parameters(), variant="released", **SETTINGS)
    train(model, optimizer, 8)
    saved = copy.deepcopy(optimizer.state_dict())
    fresh = MLBFGS(model.named_parameters(), **SETTINGS)
    fresh.load_state_dict(saved)
    assert switches_of(fresh) == RELEASED_BLOCKWISE
    del saved["param_groups"][0]["variant"]["same_step"]
    fresh.load_state_dict(copy.deepcopy(saved))
    assert not switches_of(fresh).same_step
    del saved["param_groups"][0]["variant"]
    fresh = MLBFGS(model.named_parameters(), **SETTINGS)
    fresh.load_state_dict(saved)
    assert switches_of(fresh) == PAPER


def test_records_of_a_pair_used_at_once_tell_the_direction_taken():
    model = network()
    optimizer = MLBFGS(
        model.named_parameters(), variant="released", **{**SETTINGS, "momentum": 0.0, "lr": 0.1}
    )
    train(model, optimizer, 11)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, 1, 11)
    moved = zip(before, model.parameters(), strict=True)
    d = torch.cat([((b - p.detach()) / 0.1).reshape(-1) for b, p in moved])
    pairs = zip(model.parameters(), before, strict=True)
    g = torch.cat([(p.grad + 0.01 * b).reshape(-1) for p, b in pairs])
    copied = copy.deepcopy(optimizer).curvature_records()
    (record,) = optimizer.curvature_records()
    assert record == copied[0] and record["step"] == 12
    assert float(d.norm()) == pytest.approx(1, rel=1e-4)  # normalised; float32 differences
    assert record["direction_over_gradient"] == pytest.approx(float(1 / g.norm()), rel=1e-4)
    cosine = float(d @ g / d.norm() / g.norm())
    assert record["cos_direction_gradient"] == pytest.approx(cosine, rel=1e-4)


def test_pair_threshold_replaces_the_rounding_rule():
    numbers = {"tau0": 1.0, "bounds": None, "eps": 1e-7}
    for threshold, accepted in ((None, False), (-math.inf, True), (1e-10, False), (1e-12, True)):
        variant = Variant(pair_threshold=threshold)
        assert damp(1.0, 1e-11, 1.0, **numbers, variant=variant).accepted == accepted
    everything = Variant(pair_threshold=-math.inf)
    assert not damp(
        0.0, 0.0, 1.0, **numbers, variant=everything
    ).accepted  # no division survives it
    assert not damp(1.0, math.nan, 1.0, **numbers, variant=everything).accepted
