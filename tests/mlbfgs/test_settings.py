"""Settings in every form that users give them, and what is said about those that make no sense."""

import copy
import re
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from mlbfgs import MLBFGS
from mlbfgs.testing.host_reads import HostReads

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


NAN, INF = float("nan"), float("inf")
LR, MOMENTUM, DECAY = "Invalid learning rate: ", "Invalid momentum value: ", "Invalid weight_decay "
WHOLE = " (a whole number, at least 1)"


def everywhere(given, message):
    """Refused as argument, in a group, in a group added later, in a state and in the next step."""
    loaded, later = MLBFGS([parameter()]), MLBFGS([parameter()], **SETTINGS)
    state = loaded.state_dict()
    state["param_groups"][0].update(given)
    before = walk(later, 5)
    later.param_groups[0].update(given)
    for make in (
        lambda: MLBFGS([parameter()], **given),
        lambda: MLBFGS([{"params": [parameter()], **given}]),
        lambda: MLBFGS([parameter()]).add_param_group({"params": [parameter()], **given}),
        lambda: loaded.load_state_dict(state),
        lambda: walk(later),
        lambda: walk(later),
    ):
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            make()
        assert "\n" not in str(error.value)
    moved = torch.cat([p.detach() for g in later.param_groups for p in g["params"]])
    assert torch.equal(moved, before)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": -0.1}, LR + "-0.1"),
        ({"lr": NAN}, LR + "nan"),
        ({"lr": INF}, LR + "inf"),
        ({"lr": True}, LR + "True (expected a number)"),
        ({"lr": "0.1"}, LR + "'0.1' (expected a number)"),
        ({"lr": None}, LR + "None (expected a number)"),
        ({"lr": 1j}, LR + "1j (expected a number)"),
        ({"lr": [0.1]}, LR + "[0.1] (expected a number)"),
        ({"lr": Decimal("0.1")}, LR + "Decimal('0.1') (expected a number)"),
        ({"lr": 10**400}, LR + "1000"),
        ({"lr": np.float32(-1)}, LR + "-1.0"),
        ({"lr": np.array([0.1])}, LR + "array([0.1]) (expected a number)"),
        ({"lr": torch.tensor(-0.5)}, LR + "-0.5"),
        ({"lr": torch.tensor([NAN])}, LR + "nan"),
        ({"lr": torch.tensor(INF)}, LR + "inf"),
        ({"lr": torch.tensor(True)}, LR + "tensor(True) (a tensor of a real number)"),
        ({"lr": torch.tensor(1j)}, LR + "tensor(0.+1.j) (a tensor of a real number)"),
        ({"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
        ({"momentum": NAN}, MOMENTUM + "nan"),
        ({"momentum": INF}, MOMENTUM + "inf"),
        ({"momentum": True}, MOMENTUM + "True (expected a number)"),
        ({"momentum": torch.tensor(-0.5)}, MOMENTUM + "-0.5"),
        ({"momentum": torch.ones(2)}, MOMENTUM + "tensor([1., 1.]) (expected a number)"),
        ({"weight_decay": INF}, DECAY + "value: inf"),
        ({"weight_decay": "1"}, DECAY + "value: '1' (expected a number)"),
        ({"maximize": "no"}, "Invalid maximize: 'no' (True or False)"),
        ({"maximize": 2}, "Invalid maximize: 2 (True or False)"),
        ({"betas": (2, 2)}, "Invalid beta parameter at index 0: 2"),
        ({"betas": (True, 0.9)}, "Invalid betas: (True, 0.9) (two numbers"),
        ({"betas": {0.9, 0.8}}, "(two numbers, or one for both)"),
        ({"betas": {0.9: 1, 0.8: 2}}, "(two numbers, or one for both)"),
        ({"betas": (0.9, NAN)}, "Invalid beta parameter at index 1: nan"),
        ({"update_interval": 0}, "Invalid update_interval: 0" + WHOLE),
        ({"update_interval": True}, "Invalid update_interval: True" + WHOLE),
        ({"update_interval": 2.5}, "Invalid update_interval: 2.5" + WHOLE),
        ({"update_interval": NAN}, "Invalid update_interval: nan" + WHOLE),
        ({"damping": 7}, "Invalid damping: 7 (τ0 in (0, 1]"),
        ({"damping": True}, "Invalid damping: True (τ0 in (0, 1]"),
        ({"damping": "0.5"}, "Invalid damping: '0.5' (τ0 in (0, 1]"),
        ({"damping": NAN}, "Invalid damping: nan (τ0 in (0, 1]"),
        ({"curvature_bounds": (True, 2.0)}, "Invalid curvature_bounds: (True, 2.0)"),
        ({"curvature_bounds": "ab"}, "Invalid curvature_bounds: 'ab'"),
        ({"direction": "hesian"}, "did you mean 'hessian'?"),
        ({"direction": ["hessian"]}, "Invalid direction: ['hessian'] (one of "),
        ({"variant": {"kl_clip": -1}}, "Invalid variant.kl_clip: -1"),
        ({"variant": None}, "Invalid variant: None (one of guarded, paper, released)"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused_wherever_they_enter(given, message):
    everywhere(given, message)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (0, "Invalid history_size: 0"),
        ("3", "Invalid history_size: '3'"),
        (True, "Invalid history_size: True"),
        (torch.tensor([1, 2]), "Invalid history_size: tensor"),
    ],
)
def test_a_history_size_that_makes_no_sense_is_refused_as_such(given, message):
    everywhere({"history_size": given}, message)


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"lr": Fraction(1, 20)}, {"lr": 0.05}),
        ({"lr": np.float64(0.05)}, {"lr": 0.05}),
        ({"lr": np.array(0.05)}, {"lr": 0.05}),
        ({"lr": np.int64(1)}, {"lr": 1}),
        ({"momentum": np.float32(0.5)}, {"momentum": 0.5}),
        ({"momentum": torch.tensor(0.5)}, {"momentum": 0.5}),
        ({"momentum": Fraction(1, 2)}, {"momentum": 0.5}),
        ({"weight_decay": np.int32(1)}, {"weight_decay": 1}),
        ({"maximize": np.bool_(True)}, {"maximize": True}),
        ({"maximize": 1}, {"maximize": True}),
        ({"betas": np.array([0.5, 0.25])}, {"betas": (0.5, 0.25)}),
        ({"betas": torch.tensor([0.5, 0.25])}, {"betas": (0.5, 0.25)}),
        ({"betas": (Fraction(1, 2), 0)}, {"betas": (0.5, 0)}),
        ({"betas": OmegaConf.create([0.5, 0.25])}, {"betas": (0.5, 0.25)}),
        ({"history_size": np.int64(3)}, {"history_size": 3}),
        ({"update_interval": np.uint8(2)}, {"update_interval": 2}),
        ({"update_interval": torch.tensor(2)}, {"update_interval": 2}),
        ({"damping": np.float16(0.5)}, {"damping": 0.5}),
        ({"curvature_bounds": OmegaConf.create([0, 2])}, {"curvature_bounds": (0, 2)}),
        ({"curvature_bounds": (0.0, INF)}, {"curvature_bounds": (0.0, INF)}),
        ({"variant": {"pair_momentum": np.float32(0.5)}}, {"variant": {"pair_momentum": 0.5}}),
        ({"variant": {"same_step": np.bool_(True)}}, {"variant": {"same_step": True}}),
        (
            {"variant": OmegaConf.create({"base": "released", "pair_momentum": 0.5})},
            {"variant": {"base": "released", "pair_momentum": 0.5}},
        ),
    ],
    ids=str,
)
def test_numbers_of_any_library_become_plain_ones_and_load_safely(given, plain, tmp_path):
    settings = {**SETTINGS, "weight_decay": 0.1}
    expected = MLBFGS([parameter()], **{**settings, **plain})
    (key,) = given
    wanted = expected.param_groups[0][key]
    path = walk(expected, 9)
    at_once = MLBFGS([parameter()], **{**settings, **given})
    later = MLBFGS([parameter()], **{**settings, **plain})
    later.param_groups[0].update(given)
    for optimizer in (at_once, later):
        assert torch.equal(walk(optimizer, 9), path)
        found = optimizer.param_groups[0][key]
        assert found == wanted and type(found) is type(wanted)
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        torch.load(tmp_path / "state.pt", weights_only=True)


def test_a_learning_rate_in_a_tensor_is_checked_wherever_it_changes():
    lr = torch.tensor(0.1)
    optimizer = MLBFGS([parameter()], **{**SETTINGS, "lr": lr})
    before = walk(optimizer, 5)
    for bad in (-0.1, NAN, INF):
        lr.fill_(bad)
        for _ in range(2):
            with pytest.raises(ValueError, match=f"Invalid learning rate: {bad}"):
                walk(optimizer)
        assert torch.equal(optimizer.param_groups[0]["params"][0].detach(), before)
    lr.fill_(0.05)
    optimizer.param_groups[0]["lr"] = torch.tensor(-1.0)
    with pytest.raises(ValueError, match=r"Invalid learning rate: -1.0"):
        walk(optimizer)
    optimizer.param_groups[0]["lr"] = lr
    walk(optimizer)


def test_a_learning_rate_on_a_device_is_read_with_the_next_pair_alone():
    # "meta" stands for an accelerator: every read is answered with 1
    p = torch.nn.Parameter(torch.ones(3, device="meta"))
    lr = torch.tensor(0.1, device="meta")
    optimizer = MLBFGS([p], lr=lr, update_interval=4, history_size=3)
    asked = []
    original = optimizer._settings.take
    optimizer._settings.take = lambda rates: (asked.append(list(rates)), original(rates))
    reads = []
    for step in range(1, 21):
        if step in (6, 7, 13):
            lr.fill_(0.1)
        p.grad = torch.ones_like(p)
        with HostReads() as host:
            optimizer.step()
        reads.append(len(host.reads))
    assert reads == [int(step % 4 == 0 and step > 4) for step in range(1, 21)]
    assert asked == [[1.0], [], [1.0], []]  # steps 8, 12, 16 and 20
    with pytest.raises(ValueError, match=r"Invalid learning rate: -1.0"):
        original([-1.0])
    assert optimizer._settings.shared(optimizer.param_groups) and optimizer._settings.pending == [
        lr
    ]


@pytest.mark.parametrize(
    "key", ["lr", "momentum", "betas", "damping", "variant", "update_interval"]
)
def test_a_group_that_lacks_a_setting_is_refused_by_its_name(key):
    optimizer = MLBFGS([{"params": [parameter()]}, {"params": [parameter()]}], **SETTINGS)
    before = walk(optimizer, 3)
    value = optimizer.param_groups[1].pop(key)
    with pytest.raises(ValueError, match=f"a parameter group has no '{key}': every group needs"):
        walk(optimizer)
    optimizer.param_groups[1][key] = value
    assert not torch.equal(walk(optimizer), before)


@pytest.mark.parametrize("key", ["blocks", "distribution", "foreach", "fused", "capturable"])
def test_what_has_no_effect_in_a_group_is_refused_there(key):
    value = 2 if key == "blocks" else True
    for build in (
        lambda: MLBFGS([{"params": [parameter()], key: value}]),
        lambda: MLBFGS([parameter()]).add_param_group({"params": [parameter()], key: value}),
    ):
        with pytest.raises(ValueError, match=f"{key}={value} in a parameter group has no effect"):
            build()
    with pytest.raises(TypeError, match="foreach"):
        MLBFGS([parameter()], foreach=True)
    MLBFGS([{"params": [parameter()], "name": "head", "lr_scale": 2, "foreach": None}])


def test_switches_changed_in_the_middle_of_training_change_the_history_too():
    start = {**SETTINGS, "weight_decay": 0.1}
    switches = {"ratio_epsilon": 1e-2, "recursion_epsilon": 1e-2, "pair_momentum": 0.5}
    optimizer = MLBFGS([parameter()], **start)
    walk(optimizer, 9)
    twin = MLBFGS([parameter()], **start)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["variant"].update(switches)
    twin.load_state_dict(state)
    with torch.no_grad():
        for p, q in zip(twin.state, optimizer.state, strict=True):
            p.copy_(q)
    optimizer.param_groups[0]["variant"].update(switches)  # in place
    assert torch.equal(walk(optimizer, 7), walk(twin, 7))
    with pytest.raises(ValueError, match=r"Invalid variant.kl_clip: 'x'"):
        optimizer.param_groups[0]["variant"]["kl_clip"] = "x"
        walk(optimizer)
