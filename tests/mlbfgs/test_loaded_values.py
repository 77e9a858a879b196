"""States that others wrote, under other names or with values that make no sense, are loaded."""

import copy
import logging
import re

import pytest
import torch

from mlbfgs import MLBFGS, SLIMQN
from mlbfgs.loading import plain_name
from tests.gloo import run_ranks

SETTINGS = {"lr": 0.05, "betas": 0.5, "update_interval": 2, "history_size": 3}
SIZES = {"first.weight": 4, "first.bias": 3, "second.weight": 2}


def named(prefix="", order=None):
    values = {name: torch.linspace(-1, 2, n) for name, n in SIZES.items()}
    return [(prefix + name, torch.nn.Parameter(values[name])) for name in order or SIZES]


def make(params=None, **settings):
    return MLBFGS(named() if params is None else params, **{**SETTINGS, **settings})


def walk(optimizer, steps=7):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(steps):
        for p in params:
            p.grad = (0.3 + 0.1 * p.numel()) * p.detach()
        optimizer.step()
    return {p.numel(): p.detach().clone() for p in params}


def trained(params=None, make=make, **settings):
    optimizer = make(params, **settings)
    walk(optimizer, 9)
    return optimizer


def saved_state(**settings):
    return copy.deepcopy(trained(**settings).state_dict())


def loaded(state, params=None, **settings):
    optimizer = make(params, **settings)
    optimizer.load_state_dict(copy.deepcopy(state))
    return optimizer


def same(first, second):
    return all(torch.equal(first[n], second[n]) for n in first)


@pytest.fixture
def warned(caplog):
    caplog.set_level(logging.WARNING, logger="mlbfgs")
    return caplog


# --- another optimizer's -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "RMSprop", "Adagrad", "NAdam"])
def test_of_another_optimizer_nothing_is_taken_over_and_one_warning_says_what(kind, warned):
    extra = {"momentum": 0.7} if kind == "RMSprop" else {}
    other = getattr(torch.optim, kind)(named(), lr=0.3, weight_decay=0.4, **extra)
    walk(other, 3)
    ours = loaded(other.state_dict())
    (said,) = warned.messages
    told = {key for entry in other.state.values() for key in entry} | {"lr", "weight_decay"}
    assert all(re.search(rf"\b{key}\b", said.partition("dropped are")[2]) for key in told)
    assert {**ours.param_groups[0], "params": 0} == {**make().param_groups[0], "params": 0}
    assert same(walk(ours), walk(make()))


def test_of_sgd_the_momentum_and_the_settings_of_the_same_meaning_are_taken_over(warned):
    sgd = torch.optim.SGD(named(), lr=0.3, momentum=0.8, weight_decay=0.01, dampening=0.5)
    torch.optim.lr_scheduler.StepLR(sgd, 5)
    walk(sgd, 3)
    ours = loaded(sgd.state_dict())
    assert warned.messages == [
        "the loaded state is not of MLBFGS: momentum buffers, lr, momentum, weight_decay and "
        "maximize are taken over; dropped are dampening; averages and pairs start anew"
    ]
    group, known = ours.param_groups[0], make().param_groups[0]
    assert group.keys() - known.keys() == {"initial_lr"}
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.3, 0.8, 0.01)
    for p, q in zip(group["params"], sgd.param_groups[0]["params"], strict=True):
        assert torch.equal(ours.state[p]["momentum_buffer"], sgd.state[q]["momentum_buffer"])
        assert ours.state[p]["step"] == ours.state[p]["pairs"] == 0
    plain = torch.optim.SGD(named(), lr=0.3)  # torch once wrote None for a buffer that is not there
    state = plain.state_dict()
    state["state"] = {i: {"momentum_buffer": None} for i in range(3)}
    assert loaded(state).param_groups[0]["momentum"] == 0


def test_a_state_of_slimqn_is_one_of_ours(warned):
    slimqn = SLIMQN(named(), **{**SETTINGS, "damping": 0.9})
    walk(slimqn, 9)
    ours = loaded(slimqn.state_dict())
    assert not warned.messages and ours.param_groups[0]["damping"] == 0.9
    assert same(walk(ours), walk(loaded(slimqn.state_dict())))


# --- keys and names ------------------------------------------------------------------------------


def test_entries_under_keys_that_the_groups_do_not_name(warned):
    state = saved_state()
    state["state"] = {str(i): entry for i, entry in state["state"].items()}
    ours = make()
    with pytest.raises(ValueError, match=r"the state has entries '0', '1', '2', and its groups'"):
        ours.load_state_dict(state)
    assert same(walk(ours), walk(make()))  # a refused load leaves no trace
    state["param_groups"][0]["params"] = ["0", "1", "2"]
    assert same(walk(loaded(state)), walk(loaded(saved_state())))
    assert not warned.messages
    state["state"]["9"] = {}
    loaded(state)
    assert warned.messages == ["entries '9' of the loaded state belong to no parameter: dropped"]
    loaded({**state, "state": {}})
    assert "has nothing of any parameter" in warned.messages[1]


def test_plain_names():
    for name in ("module._orig_mod.a.b", "_orig_mod.module.a.b", "a._orig_mod.b", "module.a.b"):
        assert plain_name(name) == "a.b"
    assert plain_name("a.module.b") == "a.module.b" and plain_name("module") == "module"


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("order", [list(SIZES), list(reversed(SIZES))])
def test_parameters_are_matched_by_name_in_whatever_order(prefix, order, warned):
    settings = {"outside_blocks": [r"^second\."], "lr": 0.02}  # patterns of our names
    there = trained(named(prefix), outside_blocks=[r"second\."])
    here = named(order=order)
    ours = loaded(there.state_dict(), here, **settings)
    assert ours.param_groups[0]["param_names"] == order and not warned.messages
    assert ours.plan().outside == 1
    theirs = {p.numel(): there.state[p] for p in there.state}
    for _, p in here:
        for key, value in theirs[p.numel()].items():
            if key != "block":
                assert torch.equal(torch.as_tensor(ours.state[p][key]), torch.as_tensor(value))
    back = loaded(ours.state_dict(), named(prefix))
    assert back.param_groups[0]["param_names"] == [prefix + name for name in SIZES]


def test_equal_shapes_do_not_go_by_their_order():
    pair = [(name, torch.nn.Parameter(torch.full((3,), v))) for name, v in (("a", 1.0), ("b", 2.0))]
    state = trained(pair).state_dict()
    ours = loaded(state, pair[::-1])
    assert torch.equal(ours.state[pair[0][1]]["grad_average"], state["state"][0]["grad_average"])
    unnamed = loaded(state, [p for _, p in pair[::-1]])  # names on one side only: by order
    assert torch.equal(unnamed.state[pair[1][1]]["grad_average"], state["state"][0]["grad_average"])


def test_groups_are_matched_by_the_names_in_them():
    def grouped(*groups):
        values = dict(named())
        made = [{"params": [(n, values[n]) for n in names], "lr": lr} for names, lr in groups]
        return make(made)

    first, second, third = SIZES
    there = grouped(([first, second], 0.01), ([third], 0.02))
    walk(there, 9)
    here = grouped(([third], 0.5), ([second, first], 0.5))
    here.load_state_dict(there.state_dict())
    assert [group["lr"] for group in here.param_groups] == [0.02, 0.01]
    assert [group["param_names"] for group in here.param_groups] == [[third], [second, first]]
    other = grouped(([first], 0.5), ([second, third], 0.5))
    with pytest.raises(
        ValueError, match="the groups of the state divide the parameters in another"
    ):
        other.load_state_dict(there.state_dict())


def test_a_name_on_one_side_only_is_refused_and_other_names_throughout_go_by_order(warned):
    state = saved_state()
    here = named()
    here[2] = ("head.weight", here[2][1])
    message = (
        "names do not match: 'second.weight' of the state is no parameter; 'head.weight' has no "
        "state. Rename them in the state's 'param_names', or remove"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        loaded(state, here)
    for group in state["param_groups"]:
        del group["param_names"]
    loaded(state, here)
    assert not warned.messages
    ours = loaded(saved_state(), named("model."))  # as a LightningModule calls them
    (said,) = warned.messages
    assert "(first.weight there, model.first.weight here): they are matched by their order" in said
    assert same(walk(ours), walk(loaded(saved_state())))


# --- values --------------------------------------------------------------------------------------


def change(state, key, value, entries=(0, 1, 2)):
    for i in entries:
        entry = state["state"][i]
        if torch.is_tensor(entry[key]) and not torch.is_tensor(value):
            entry[key].fill_(value)
        else:
            entry[key] = value
    return state


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["s_history", "y_history"])
def test_pairs_that_are_zero_or_not_finite_are_dropped(key, value, warned):
    ours = loaded(change(saved_state(blocks=2), key, value, [2]), blocks=2)
    assert warned.messages == [
        "of block 1, 3 pairs of the loaded state are zero or not finite, and are dropped"
    ]
    params = [p for group in ours.param_groups for p in group["params"]]
    assert [ours.state[p]["pairs"] for p in params] == [3, 3, 0]
    assert torch.equal(ours.state[params[2]][key], torch.zeros(3, 2))
    assert all(p.isfinite().all() for p in walk(ours).values())
    # one pair of three, of one of the block's parameters
    state = saved_state()
    state["state"][0][key][1, 0] = float("nan")
    ours = loaded(state)
    assert "of block 0, 1 pairs of the loaded state" in warned.messages[1]
    assert {entry["pairs"] for entry in ours.state.values()} == {2}
    assert all(p.isfinite().all() for p in walk(ours).values())


def test_slots_without_a_pair_do_not_count():
    state = saved_state()
    for entry in state["state"].values():
        entry["pairs"] = 1
        for key in ("s_history", "y_history"):
            entry[key][1:] = float("nan")
    assert all(p.isfinite().all() for p in walk(loaded(state), 1).values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["param_progress", "grad_snapshot", "momentum_buffer"])
def test_averages_that_are_not_finite_start_anew(key, value, warned):
    state = saved_state()
    state["state"][1][key][2] = value
    ours = loaded(state)
    assert warned.messages == [
        f"the loaded state has numbers that are not finite in {key} of first.bias: starts anew "
        "there"
    ]
    params = [p for group in ours.param_groups for p in group["params"]]
    begun = key == "momentum_buffer"
    assert [ours.state[p]["seeded"] for p in params] == [1, begun, 1]
    assert torch.equal(ours.state[params[1]][key], torch.zeros(3))
    before = params[1].detach().clone()
    assert all(p.isfinite().all() for p in walk(ours).values())
    if not begun:
        again = loaded(state)
        walk(again, 1)
        p = again.param_groups[0]["params"][1]
        assert torch.equal(again.state[p]["param_snapshot"], before)
        assert not again.state[p]["param_progress"].any()
    skipped = ours.curvature_records()[0]["skipped"]
    assert skipped == loaded(saved_state()).state[params[0]].get("skipped", 0)


@pytest.mark.parametrize("key", ["step", "pairs", "skipped", "damped", "seeded", "block"])
@pytest.mark.parametrize(
    "value", [-2, 2.5, float("nan"), 10**20, "3", [3], torch.tensor([1, 2]), torch.tensor(2.5)]
)
def test_counters_that_count_nothing_are_refused(key, value):
    ours = make()
    with pytest.raises(
        ValueError, match=rf"loaded state '{key}' of first.weight is .*expected a wh"
    ):
        ours.load_state_dict(change(saved_state(), key, value, [0]))
    assert same(walk(ours), walk(make()))


def test_counters_in_other_forms_are_counters():
    state = saved_state()
    for entry in state["state"].values():
        for key in ("step", "pairs", "skipped", "damped", "block"):
            entry[key] = torch.tensor(float(entry[key]))
        entry["seeded"] = bool(entry["seeded"])
    ours = loaded(state)
    assert same(walk(ours), walk(loaded(saved_state())))
    counters = [
        v for entry in ours.state.values() for v in entry.values() if not torch.is_tensor(v)
    ]
    assert all(type(value) is int for value in counters)
    for entry in state["state"].values():
        for key in ("step", "pairs", "skipped", "damped", "block"):
            del entry[key]
    assert loaded(state).state_dict()["state"][0]["pairs"] == 0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), "has torch.int64 and torch.strided"),
        (torch.zeros(4, dtype=torch.bool), "has torch.bool and torch.strided"),
        (torch.zeros(4, dtype=torch.complex64), "has torch.complex64 and torch.strided"),
        (torch.zeros(4).to_sparse(), "has torch.float32 and torch.sparse_coo"),
        ([0.0] * 4, "is a list, expected a tensor"),
        (0.0, "is a float, expected a tensor"),
        (torch.zeros(4, device="meta"), "is on meta: it has no numbers"),
        (torch.zeros(2, 2), "has shape (2, 2), expected (4,)"),
    ],
)
def test_what_is_no_vector_of_the_parameter_is_refused(value, message):
    state = saved_state()
    state["state"][0]["grad_average"] = value
    with pytest.raises(ValueError, match=re.escape(f"'grad_average' of first.weight {message}")):
        loaded(state)
    state["state"][0] = [value]
    with pytest.raises(
        ValueError, match=r"loaded state of first\.weight is a list, expected a dict"
    ):
        loaded(state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_floating_point_dtypes_are_taken_over(dtype):
    state = saved_state()
    expected = state["state"][0]["grad_average"].to(dtype)
    state["state"][0]["grad_average"] = expected
    ours = loaded(state)
    kept = ours.state[ours.param_groups[0]["params"][0]]["grad_average"]
    assert kept.dtype == torch.float32 and torch.equal(kept, expected.float())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": torch.tensor(-1.0)}, "Invalid learning rate: -1.0"),
        ({"momentum": float("nan")}, "Invalid momentum value: nan"),
        ({"betas": (2, 2)}, "Invalid beta parameter at index 0: 2"),
        ({"update_interval": 0}, "Invalid update_interval: 0"),
    ],
)
def test_settings_of_a_state_are_checked(settings, message):
    state = saved_state()
    state["param_groups"][0].update(settings)
    ours = make()
    with pytest.raises(ValueError, match=re.escape(message)):
        ours.load_state_dict(state)
    assert same(walk(ours), walk(make()))


def test_state_is_written_to_outside_inference_mode_wherever_it_was_made():
    params = named()
    with torch.inference_mode():
        made = make(params)
        walk(made, 2)
    walk(made, 7)
    assert same(walk(made, 1), walk(trained(), 1))
    state = saved_state()
    twin = loaded(state)
    with torch.inference_mode():
        made.load_state_dict(copy.deepcopy(state))
    with torch.no_grad():
        for (_, p), q in zip(params, twin.param_groups[0]["params"], strict=True):
            p.copy_(q)
    assert same(walk(made), walk(twin))


# --- several ranks -------------------------------------------------------------------------------

REFUSING = {"drop_oldest_first": True, "pair_threshold": 1e-2}


def broken_state():
    """An average that is not finite on one of two ranks, one pair of three, and block 1's pairs."""
    state = saved_state(blocks=2)
    state["state"][0]["grad_average"][0] = float("nan")
    state["state"][2]["momentum_buffer"][1] = float("inf")
    state["state"][1]["y_history"][1, 2] = float("nan")
    state["state"][2]["s_history"].zero_()
    return state


def load_and_train(rank, state):
    found = []
    for mode in ("sharded", "blocks"):
        optimizer = loaded(state, blocks=2, distribution=mode)
        counters = [
            [entry[key] for key in ("step", "seeded", "pairs", "block")]
            for entry in optimizer.state.values()
        ]
        refusing = make(blocks=2, distribution=mode, variant=REFUSING)
        found.append((counters, walk(optimizer), walk(refusing, 30), refusing.curvature_records()))
    return found


@pytest.mark.slow
def test_ranks_agree_about_what_is_dropped(caplog):
    state = broken_state()
    alone = loaded(state, blocks=2)
    counters = [[e[k] for k in ("step", "seeded", "pairs", "block")] for e in alone.state.values()]
    assert counters == [[9, 0, 2, 0], [9, 1, 2, 0], [9, 1, 0, 1]]
    refusing = make(blocks=2, variant=REFUSING)
    paths, records = (walk(alone), walk(refusing, 30)), refusing.curvature_records()
    assert any(record["skipped"] and record["pairs"] == 2 for record in records), records
    for rank in run_ranks(load_and_train, 2, state):
        for known, *walked, told in rank:
            assert known == counters
            for path, expected in zip(walked, paths, strict=True):
                for n in expected:
                    torch.testing.assert_close(path[n], expected[n], rtol=1e-4, atol=1e-5)
            assert [r["pairs"] for r in told] == [r["pairs"] for r in records]
