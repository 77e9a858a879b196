"""What people do with a state of one process: save parts, copy, send, share, load. Beside AdamW."""

import collections
import copy
import io
import logging
import multiprocessing
import pickle
import weakref
import zipfile

import pytest
import torch

from mlbfgs import MLBFGS
from mlbfgs.distributed_state import StateShard
from mlbfgs.flat_state import FlatState

SETTINGS = {"lr": 0.05, "betas": 0.5, "update_interval": 2, "history_size": 3}
COUNT = 20
MAKERS = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.05),
    "MLBFGS": lambda params: MLBFGS(params, **SETTINGS),
}


def make(kind="MLBFGS", steps=9):
    """Twenty parameters, one channels-last, and their optimizer in the middle of training."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(40, 25, generator=generator) for _ in range(COUNT - 1)]
    values.append(torch.randn(5, 4, 5, 10, generator=generator))
    values[-1] = values[-1].to(memory_format=torch.channels_last)
    params = [torch.nn.Parameter(v) for v in values]
    optimizer = MAKERS[kind](params)
    walk(params, optimizer, steps)
    return params, optimizer


def walk(params, optimizer, steps):
    for _ in range(steps):
        for i, p in enumerate(params):
            p.grad = (0.5 + 0.02 * i) * p.detach()
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in params])


def tensors(entry):
    return {k: v for k, v in entry.items() if torch.is_tensor(v)}


def own_bytes(entry):
    return sum(v.nbytes for v in tensors(entry).values())


def saved_bytes(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.tell()


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        if torch.is_tensor(value):
            assert torch.equal(value, theirs[key]), key
        else:
            assert value == theirs[key], key


PARTS = {
    "one parameter": lambda state: state[3],
    "two entries": lambda state: dict(list(tensors(state[3]).items())[-2:]),
    "some parameters": lambda state: {i: state[i] for i in (1, 4, COUNT - 1)},
    "detached": lambda state: {k: v.detach() for k, v in tensors(state[3]).items()},
    "data": lambda state: {k: v.data for k, v in tensors(state[3]).items()},
    "moved": lambda state: {k: v.cpu().to(torch.float32) for k, v in tensors(state[3]).items()},
    "everything": lambda state: state,
}


@pytest.mark.parametrize("kind", list(MAKERS))
@pytest.mark.parametrize("part", list(PARTS))
def test_a_part_of_the_state_is_as_large_as_its_numbers(kind, part):
    _, optimizer = make(kind)
    chosen = PARTS[part](optimizer.state_dict()["state"])
    entries = [v for v in chosen.values() if isinstance(v, dict)] or [chosen]
    numbers = sum(own_bytes(entry) for entry in entries)
    overhead = 700 * sum(len(entry) for entry in entries) + 2000  # names, shapes, headers
    assert saved_bytes(chosen) < numbers + overhead
    assert len(pickle.dumps(chosen)) < numbers + overhead
    copied = copy.deepcopy(chosen)
    kept = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for entry in ([v for v in copied.values() if isinstance(v, dict)] or [copied])
        for t in tensors(entry).values()
    }
    assert sum(kept.values()) <= numbers
    for again in (copied, pickle.loads(pickle.dumps(chosen))):
        found = [again] if entries[0] is chosen else list(again.values())
        for ours, theirs in zip(entries, found, strict=True):
            assert_same(ours, theirs)


def test_what_is_saved_of_a_state_are_plain_tensors_in_the_order_of_their_parameters():
    _, optimizer = make()
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer)["state"]
    for i, entry in optimizer.state_dict()["state"].items():
        assert_same(entry, loaded[i])
        assert {type(v) for v in tensors(loaded[i]).values()} == {torch.Tensor}
    average = loaded[COUNT - 1]["grad_average"]
    assert average.is_contiguous(memory_format=torch.channels_last)


def test_views_of_the_state_are_views_and_results_are_plain():
    params, optimizer = make()
    average = optimizer.state[params[0]]["grad_average"]
    for alias in (average.detach(), average.data, average.cpu(), average.to("cpu")):
        assert alias.data_ptr() == average.data_ptr()
    assert type(average.clone()) is type(average + 1) is type(average.norm()) is torch.Tensor
    assert torch.isfinite(average).all() and torch.equal(average, average.clone())
    twin = copy.deepcopy(average)
    average.mul_(2)
    used = optimizer._built.flat["grad_average"]
    assert torch.equal(optimizer._built.layout.view(used, 0), average)
    assert torch.equal(average, 2 * twin) and optimizer._built.is_shown_by(optimizer.state)


def test_a_state_is_written_by_safetensors():
    safetensors = pytest.importorskip("safetensors.torch")
    _, optimizer = make()
    flat = {
        f"{i}.{key}": value.contiguous()
        for i, entry in optimizer.state_dict()["state"].items()
        for key, value in tensors(entry).items()
    }
    again = safetensors.load(safetensors.save(flat))
    assert_same(flat, again)
    size = sum(v.nbytes for v in flat.values())
    assert len(safetensors.save(flat)) < 1.1 * size


# --- other processes -----------------------------------------------------------------------------


def _mark(inbox, outbox):
    """Read a state, write into it, and tell the sum that was there."""
    state = inbox.get()
    found = sum(float(v.double().sum()) for e in state.values() for v in tensors(e).values())
    for entry in state.values():
        for value in tensors(entry).values():
            value.fill_(7)
    outbox.put(found)


@pytest.mark.parametrize("kind", list(MAKERS))
def test_a_state_sent_to_another_process_is_shared_with_it(kind):
    params, optimizer = make(kind)
    state = optimizer.state_dict()["state"]
    expected = sum(float(v.double().sum()) for e in state.values() for v in tensors(e).values())
    context = torch.multiprocessing.get_context("fork")
    inbox, outbox = context.Queue(), context.Queue()
    process = context.Process(target=_mark, args=(inbox, outbox), daemon=True)
    process.start()
    inbox.put(state)
    assert outbox.get(timeout=120) == pytest.approx(expected)
    process.join(30)
    assert process.exitcode == 0
    values = [v for e in optimizer.state.values() for v in tensors(e).values() if v.dim()]
    assert all((v == 7).all() for v in values)
    if kind == "MLBFGS":  # what is shown is still what is used
        assert (optimizer._built.history.W == 7).all()
    walk(params, optimizer, 1)


def _forked(params, optimizer):
    walk(params, optimizer, 1)


@pytest.mark.skipif(
    torch.get_num_threads() > 1,
    reason="a fork has none of OpenMP's threads and would wait for them",
)
def test_a_shared_state_is_moved_on_by_a_forked_process():
    params, optimizer = make()
    for p in params:
        p.share_memory_()
    for entry in optimizer.state.values():
        for value in tensors(entry).values():
            value.share_memory_()
    before = copy.deepcopy(optimizer.state[params[0]]["momentum_buffer"])
    process = multiprocessing.get_context("fork").Process(target=_forked, args=(params, optimizer))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert not torch.equal(optimizer.state[params[0]]["momentum_buffer"], before)


# --- loading -------------------------------------------------------------------------------------


def test_a_load_gives_back_the_old_memory_before_it_takes_new(monkeypatch):
    _, optimizer = make()
    _, other = make(steps=5)
    state = copy.deepcopy(other.state_dict())
    old = weakref.ref(optimizer._built.history.W.untyped_storage())
    alive = []
    original = FlatState.load

    def load(self, *args):
        alive.append(old() is not None)
        return original(self, *args)

    monkeypatch.setattr(FlatState, "load", load)
    optimizer.load_state_dict(state)
    assert alive == [False]
    for i, entry in other.state_dict()["state"].items():
        assert_same(entry, optimizer.state_dict()["state"][i])


def test_a_state_filled_in_place_is_loaded_without_another():
    params, optimizer = make()
    twins, twin = make()
    state = optimizer.state_dict()
    with torch.no_grad():
        for entry in state["state"].values():
            for value in tensors(entry).values():
                value.copy_(value.clone())
    flat = optimizer._built
    optimizer.load_state_dict(state)
    assert optimizer._built is flat
    assert torch.equal(walk(params, optimizer, 9), walk(twins, twin, 9))
    # a part of it, or another order, is no state filled in place
    state = optimizer.state_dict()
    state["state"] = {i: state["state"][(i + 1) % (COUNT - 1)] for i in range(COUNT - 1)}
    expected = copy.deepcopy(state["state"])
    optimizer.load_state_dict(state)
    assert optimizer._built is not flat
    for i, entry in expected.items():
        for key in ("grad_average", "momentum_buffer"):
            assert torch.equal(optimizer.state[params[i]][key], entry[key])
    assert not optimizer.state[params[-1]]["grad_average"].any()


def test_states_can_be_swapped_back_and_forth():
    _, optimizer = make()
    _, other = make(steps=4)
    first, second = optimizer.state_dict(), other.state_dict()
    expected = [copy.deepcopy(state["state"]) for state in (first, second)]
    for _ in range(2):
        for given, wanted in zip((second, first), reversed(expected), strict=True):
            optimizer.load_state_dict(given)
            for i, entry in wanted.items():
                assert_same(entry, optimizer.state_dict()["state"][i])


@pytest.mark.parametrize("key", ["grad_average", "s_history"])
def test_a_load_that_does_not_fit_leaves_the_optimizer_as_it_was(key):
    params, optimizer = make()
    twins, twin = make()
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][COUNT - 1][key] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=rf"{key}.* of parameter {COUNT - 1} has shape \(2, 2\)"):
        optimizer.load_state_dict(state)
    assert torch.equal(walk(params, optimizer, 5), walk(twins, twin, 5))


def test_after_a_load_for_which_there_was_no_memory_the_state_starts_anew(monkeypatch, caplog):
    params, optimizer = make()
    state = copy.deepcopy(optimizer.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(FlatState, "load", _no_memory)
        with pytest.raises(MemoryError):
            optimizer.load_state_dict(state)
    with caplog.at_level(logging.WARNING, logger="mlbfgs"):
        walk(params, optimizer, 1)
    assert optimizer.state[params[0]]["step"] == 1
    optimizer.load_state_dict(state)
    assert optimizer.state[params[0]]["step"] == 9


def _no_memory(*_):
    raise MemoryError


# --- shards read from files ----------------------------------------------------------------------


def make_shard():
    local = torch.arange(30, dtype=torch.float32).view(2, 15)[:, 4:9]  # with a storage of 120 bytes
    return StateShard(local, (3, 4), (4, 1), [(0, 7), (7, 12)], 1)


def test_a_shard_is_loaded_as_it_is_by_default():
    buffer = io.BytesIO()
    torch.save({"a": make_shard(), "b": [make_shard().detach()]}, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer)
    for shard in (loaded["a"], *loaded["b"]):
        assert isinstance(shard, StateShard) and shard.lies_as(make_shard())
        assert torch.equal(shard.local, make_shard().local) and shard.rank == 1
        assert shard.local.untyped_storage().nbytes() == 40


def test_a_shard_of_an_older_file_is_loaded_too():
    buffer, older = io.BytesIO(), io.BytesIO()
    torch.save(make_shard(), buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(older, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl"):
                assert content.count(b"mlbfgs.checkpoint\nrestored_shard") == 1
                content = content.replace(b"\nrestored_shard", b"\nStateShard")
            target.writestr(name, content)
    for weights_only in (True, False):
        older.seek(0)
        shard = torch.load(older, weights_only=weights_only)
        assert torch.equal(shard.local, make_shard().local) and shard.lies_as(make_shard())


def test_copies_of_an_optimizer_stand_alone():
    _, optimizer = make()
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        twins = [p for group in twin.param_groups for p in group["params"]]
        expected = copy.deepcopy(optimizer.state_dict()["state"])
        walk(twins, twin, 3)
        for i, entry in expected.items():
            assert_same(entry, optimizer.state_dict()["state"][i])
    assert isinstance(optimizer.state, collections.defaultdict)
