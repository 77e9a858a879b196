"""Settings in every form that users give them, and what is said about those that make no sense."""

import copy
import re

import numpy as np
import pytest
import torch

from mlbfgs import MLBFGS

SETTINGS = {"lr": 0.05, "betas": 0.5, "update_interval": 2, "history_size": 3}


def parameter(n=3):
    return torch.nn.Parameter(torch.linspace(1, 2, n))


def walk(optimizer, steps=1):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(steps):
        for p in params:
            p.grad = p.detach().clone()
        optimizer.step()
    return torch.cat([p.detach() for p in params])


def test_a_learning_rate_may_be_a_tensor_of_one_element():
    paths = []
    for lr in (0.1, torch.tensor(0.1), torch.tensor([0.1])):
        optimizer = MLBFGS([parameter()], **{**SETTINGS, "lr": lr})
        paths.append(walk(optimizer, 9))
    assert torch.equal(paths[1], paths[2])
    torch.testing.assert_close(paths[0], paths[1])
    with pytest.raises(ValueError, match="Tensor lr must be 1-element"):
        MLBFGS([parameter()], lr=torch.tensor([0.1, 0.2]))


def test_a_group_added_later_shares_what_the_others_share_now():
    ours = MLBFGS([parameter()], **SETTINGS)
    other = MLBFGS(
        [parameter()], **{**SETTINGS, "betas": 0.9, "damping": 0.5}, variant={"same_step": True}
    )
    ours.load_state_dict(copy.deepcopy(other.state_dict()))
    ours.param_groups[0]["update_interval"] = 20
    ours.add_param_group({"params": [parameter(2)], "lr": 0.01})
    first, second = ours.param_groups
    assert second["betas"] == (0.9, 0.9) and second["update_interval"] == 20
    assert second["damping"] == 0.5 and second["variant"] == first["variant"]
    assert second["variant"] is not first["variant"] and second["lr"] == 0.01
    walk(ours, 3)
    # at construction, what a group leaves out is the argument's
    with pytest.raises(ValueError, match="betas must be the same in all parameter groups"):
        MLBFGS([{"params": [parameter()], "betas": 0.9}, {"params": [parameter()]}], betas=0.8)


@pytest.mark.parametrize(
    "given",
    [
        {"betas": 0.9},
        {"betas": [0.9, 0.9]},
        {"betas": np.float32(0.5)},
        {"curvature_bounds": [0.01, 1.5]},
        {"variant": "paper"},
    ],
)
def test_forms_of_a_setting_are_alike_as_argument_in_a_group_and_in_a_loaded_state(given):
    whole = MLBFGS([parameter()], **given)
    grouped = MLBFGS([{"params": [parameter()], **given}, {"params": [parameter()]}], **given)
    loaded = MLBFGS([parameter()])
    state = loaded.state_dict()
    state["param_groups"][0].update(given)
    loaded.load_state_dict(state)
    for key in given:
        expected = whole.param_groups[0][key]
        groups = (*grouped.param_groups, *loaded.param_groups)
        assert all(group[key] == expected for group in groups)
        assert type(expected) is (dict if key == "variant" else tuple)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"betas": (0.9,)}, "Invalid betas: (0.9,) (two numbers, or one for both)"),
        ({"betas": None}, "Invalid betas: None (two numbers, or one for both)"),
        ({"betas": "0.9"}, "Invalid betas: '0.9' (two numbers, or one for both)"),
        ({"betas": (0.9, 1.0)}, "Invalid beta parameter at index 1: 1.0"),
        ({"curvature_bounds": 0.5}, "Invalid curvature_bounds: 0.5 (σ_L < 1 <= σ_H, or None)"),
        ({"curvature_bounds": (0.01, None)}, "Invalid curvature_bounds: (0.01, None)"),
        ({"curvature_bounds": (1.0, 1.5)}, "Invalid curvature_bounds: (1.0, 1.5)"),
        ({"curvature_bounds": (float("nan"), 2.0)}, "Invalid curvature_bounds: (nan, 2.0)"),
    ],
)
def test_settings_of_no_known_form_are_refused_everywhere_in_one_line(given, message):
    loaded = MLBFGS([parameter()])
    state = loaded.state_dict()
    state["param_groups"][0].update(given)
    for make in (
        lambda: MLBFGS([parameter()], **given),
        lambda: MLBFGS([{"params": [parameter()], **given}]),
        lambda: loaded.load_state_dict(state),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            make()


def test_a_direction_that_there_is_not_is_refused_when_it_is_set_later():
    optimizer = MLBFGS([{"params": [parameter()]}, {"params": [parameter()]}], **SETTINGS)
    before = walk(optimizer, 3)
    optimizer.param_groups[1]["direction"] = "gamma_gradient"
    with pytest.raises(ValueError, match="direction must be the same in all parameter groups"):
        walk(optimizer)
    for group in optimizer.param_groups:
        group["direction"] = "gama_gradient"
    with pytest.raises(ValueError, match="did you mean 'gamma_gradient'"):
        walk(optimizer)
    assert torch.equal(torch.cat([p.detach() for p in optimizer.state]), before)
    for group in optimizer.param_groups:
        group["direction"] = "gamma_gradient"
    walk(optimizer)


@pytest.mark.parametrize("shape", [(1,), (4,), (3, 1), ()])
def test_vectors_of_another_shape_are_refused(shape):
    optimizer = MLBFGS([("a", parameter()), ("b", parameter(2))], **SETTINGS)
    with pytest.raises(ValueError, match=re.escape(f"for a has shape {shape}, expected (3,)")):
        optimizer.hessian_vector([torch.ones(shape), torch.ones(2)])
    with pytest.raises(ValueError, match="1 vectors were given for 2 parameters"):
        optimizer.hessian_vector([torch.ones(3)])
