"""What others do to an optimizer's groups, state and parameters behind its back is noticed."""

import collections
import copy
import pickle

import pytest
import torch

from mlbfgs import MLBFGS

SETTINGS = {"lr": 0.05, "betas": 0.5, "update_interval": 2, "history_size": 3, "weight_decay": 0.1}


def make(values=None, **settings):
    values = values or [torch.linspace(-1, 2, 6).view(2, 3), torch.linspace(1, 2, 4)]
    params = [torch.nn.Parameter(v.detach().clone()) for v in values]
    return params, MLBFGS(params, **{**SETTINGS, **settings})


def walk(params, optimizer, steps):
    for _ in range(steps):
        for i, p in enumerate(params):
            p.grad = (0.5 + 0.3 * i) * p.detach()
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in params])


def tensors_of(optimizer):
    return [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]


def after_seven_steps(**settings):
    params, optimizer = make(**settings)
    walk(params, optimizer, 7)
    twins, twin = make(params, **settings)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return params, optimizer, twins, twin


# --- parameters ----------------------------------------------------------------------------------


def test_exchanged_parameters_are_trained_from_the_start():
    params, optimizer = make()
    walk(params, optimizer, 7)
    others, fresh = make()
    new, _ = make()
    optimizer.param_groups[0]["params"] = new
    assert torch.equal(walk(new, optimizer, 9), walk(others, fresh, 9))
    assert set(optimizer.state) == set(new) and optimizer.state[new[0]]["step"] == 9


def test_one_exchanged_parameter_leaves_the_other_its_state():
    params, optimizer = make(blocks=2)
    walk(params, optimizer, 7)
    average = optimizer.state[params[0]]["param_progress"].clone()
    new = torch.nn.Parameter(torch.ones(4))
    optimizer.param_groups[0]["params"][1] = new  # in the list itself
    assert torch.equal(optimizer.state_dict()["state"][0]["param_progress"], average)
    assert [optimizer.state[p]["pairs"] for p in (params[0], new)] == [2, 0]
    walk([params[0], new], optimizer, 9)
    assert not torch.equal(new.detach(), torch.ones(4)) and new.isfinite().all()
    # a state given to its new parameter beforehand is kept
    moved = torch.nn.Parameter(new.detach().clone())
    optimizer.state[moved] = optimizer.state.pop(new)
    optimizer.param_groups[0]["params"][1] = moved
    pairs = optimizer.state_dict()["state"][1]["pairs"]
    assert pairs > 0 and optimizer.state[moved]["pairs"] == pairs


@pytest.mark.parametrize(
    "change",
    [
        lambda groups: groups.pop(0),
        lambda groups: groups.append(dict(groups[0])),
        lambda groups: groups[0]["params"].pop(),
        lambda groups: groups[0]["params"].append(torch.nn.Parameter(torch.ones(2))),
        lambda groups: groups[0].update(params=[torch.nn.Parameter(torch.ones(3))]),
    ],
)
def test_other_changes_of_the_groups_are_refused(change):
    params = [torch.nn.Parameter(torch.ones(n)) for n in (2, 4)]
    optimizer = MLBFGS([{"params": [p]} for p in params], **SETTINGS)
    walk(params, optimizer, 3)
    change(optimizer.param_groups)
    for use in (optimizer.step, optimizer.state_dict, lambda: pickle.dumps(optimizer)):
        with pytest.raises(RuntimeError, match="param_groups were changed from outside"):
            use()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_of_another_dtype_since_is_trained_in_it(dtype):
    params, optimizer = make()
    walk(params, optimizer, 7)
    average = optimizer.state[params[0]]["param_progress"].clone()
    for p in params:
        p.data = p.data.to(dtype)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    others, fresh = make(params)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    shown = optimizer.state[params[0]]["param_progress"]
    assert shown.dtype == kept and torch.equal(shown, average.to(kept))
    assert torch.equal(walk(params, optimizer, 9), walk(others, fresh, 9))
    for ours, theirs in zip(tensors_of(optimizer), tensors_of(fresh), strict=True):
        assert torch.equal(ours, theirs)


def test_a_model_on_another_device_since_takes_its_state_along():
    params, optimizer = make()
    walk(params, optimizer, 6)
    for p in params:  # the same objects, as after model.cuda()
        torch.utils.swap_tensors(p, torch.nn.Parameter(p.detach().to("meta")))
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(t.device.type == "meta" for t in tensors_of(optimizer))
    assert optimizer.state[params[0]]["step"] == 7


# --- state ---------------------------------------------------------------------------------------


def replace_tensors(optimizer):
    for entry in optimizer.state.values():
        for key, value in entry.items():
            if torch.is_tensor(value):
                entry[key] = value.to(torch.float64, copy=True)


def replace_entries(optimizer):
    optimizer.state = collections.defaultdict(dict, copy.copy(optimizer.state))
    for p in list(optimizer.state):
        optimizer.state[p] = copy.deepcopy(optimizer.state[p])


@pytest.mark.parametrize("replace", [replace_tensors, replace_entries])
def test_replaced_state_is_taken_over(replace):
    params, optimizer, twins, twin = after_seven_steps()
    replace(optimizer)
    assert torch.equal(walk(params, optimizer, 5), walk(twins, twin, 5))
    for ours, theirs in zip(tensors_of(optimizer), tensors_of(twin), strict=True):
        assert torch.equal(ours, theirs)  # what is shown is what is used
    # values changed while they were away count, also in a checkpoint and a copy
    replace(optimizer)
    for one, p in ((optimizer, params[0]), (twin, twins[0])):
        one.state[p]["grad_average"].add_(1.0)
    saved = copy.deepcopy(optimizer.state_dict())
    assert torch.equal(saved["state"][0]["grad_average"], twin.state[twins[0]]["grad_average"])
    replace(optimizer)
    copied = pickle.loads(pickle.dumps(optimizer))
    expected = walk(twins, twin, 9)
    assert torch.equal(walk(params, optimizer, 9), expected)
    assert torch.equal(walk(copied.param_groups[0]["params"], copied, 9), expected)


def test_cleared_state_starts_anew():
    params, optimizer = make()
    walk(params, optimizer, 7)
    others, fresh = make(params)
    optimizer.state.clear()
    assert len(optimizer.state_dict()["state"]) == 2
    optimizer.state = collections.defaultdict(dict)
    assert torch.equal(walk(params, optimizer, 9), walk(others, fresh, 9))
    optimizer.state[params[1]].clear()
    assert walk(params, optimizer, 9).isfinite().all()
    assert optimizer.state[params[1]]["step"] == 18


def test_nothing_is_laid_out_anew_where_nothing_changed():
    params, optimizer = make()
    flat = optimizer._built
    walk(params, optimizer, 9)
    optimizer.state_dict()
    assert optimizer.state[torch.zeros(1)] == {}  # a lookup leaves that in torch's dictionary
    walk(params, optimizer, 2)
    copy.deepcopy(optimizer)
    assert optimizer._built is flat


def test_a_pickled_optimizer_is_as_large_as_its_state():
    params, optimizer = make([torch.randn(200) for _ in range(40)])
    walk(params, optimizer, 7)
    again = pickle.loads(pickle.dumps(optimizer))
    size = optimizer.plan().state_bytes
    assert size < len(pickle.dumps(optimizer)) < 2 * size
    twins = again.param_groups[0]["params"]
    assert torch.equal(walk(twins, again, 5), walk(params, optimizer, 5))


def test_history_size_changed_since_is_refused_however_often_one_asks():
    params, optimizer = make(momentum=0.0)
    walk(params, optimizer, 7)
    average = optimizer.state[params[0]]["param_progress"].clone()
    # a group that was given momentum too would be laid out anew
    optimizer.param_groups[0].update(history_size=5, momentum=0.9)
    for use in (optimizer.step, optimizer.step, optimizer.state_dict):
        with pytest.raises(ValueError, match="history_size cannot change from 3 to 5"):
            use()
    optimizer.param_groups[0]["history_size"] = 3
    assert walk(params, optimizer, 1).isfinite().all()
    assert not torch.equal(optimizer.state[params[0]]["param_progress"], average)
