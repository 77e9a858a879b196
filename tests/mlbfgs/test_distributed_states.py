"""What people do with a state that ranks share: two gloo processes, beside AdamW."""

import copy
import io
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from mlbfgs import MLBFGS
from tests.gloo import run_ranks

SETTINGS = {"lr": 0.02, "betas": 0.5, "update_interval": 2, "history_size": 3}
STEPS = 9
FULL = StateDictOptions(full_state_dict=True)
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def make_model(channels_last):
    """A convolution, a single number, and a linear layer of odd size."""
    torch.manual_seed(0)
    order = torch.channels_last if channels_last else torch.contiguous_format
    layers = {
        "conv": torch.nn.Conv2d(3, 4, 3).to(memory_format=order),
        "flatten": torch.nn.Flatten(),
        "scale": torch.nn.PReLU(),
        "last": torch.nn.Linear(16, 3),
    }
    return torch.nn.Sequential(OrderedDict(layers))


class Subject:
    """A model and its optimizer, in the middle of training, under one way to share them."""

    def __init__(self, how, steps=STEPS, first=0):
        self.how = how
        kind, _, mode = how.partition(" ")
        self.model = make_model(channels_last=kind != "fsdp2")  # which refuses that order
        if kind == "fsdp2":
            for layer in (self.model.conv, self.model.last):
                fully_shard(layer)
            fully_shard(self.model)
        elif kind == "ddp":
            self.model = DistributedDataParallel(self.model)
        if mode == "adamw":
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.02)
        else:
            where = {"distribution": mode} if mode else {}
            named = self.model.named_parameters()
            self.optimizer = MLBFGS(named, blocks=2, **where, **SETTINGS)
        self.train(first, first + steps)

    def train(self, first, last):
        """Take steps on this rank's half of each batch."""
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if self.how != "alone" else (0, 1)
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            batch = torch.randn(6, 3, 4, 4, generator=generator)
            share = batch[rank * 6 // ranks : (rank + 1) * 6 // ranks]
            self.optimizer.zero_grad()
            (self.model(share) ** 2).mean().backward()
            self.optimizer.step()

    def other(self):
        """Another one, that went elsewhere."""
        return Subject(self.how, 4, first=100)

    def get(self, options=None):
        return get_optimizer_state_dict(self.model, self.optimizer, options=options)

    def set(self, state, options=None):
        set_optimizer_state_dict(self.model, self.optimizer, state, options=options)

    def state(self):
        """Everything, whole, on every rank."""
        return whole(copy.deepcopy(self.optimizer.state_dict()))


def whole(value):
    return tree_map_only(DTensor, lambda t: t.full_tensor(), value)


def assert_same(ours, theirs, path=""):
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), path
        for key in ours:
            assert_same(ours[key], theirs[key], f"{path}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), path
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, f"{path}.{i}")
    elif torch.is_tensor(ours):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), path
    else:
        assert ours == theirs, path


WAYS = ("ddp adamw", "ddp replicated", "ddp blocks", "ddp sharded", "fsdp2 adamw", "fsdp2 sharded")


# --- copies and files ----------------------------------------------------------------------------


def bytes_here(value):
    """Bytes of the numbers that this rank has."""
    found = []

    def count(t):
        t = t.local if hasattr(t, "local") else t.to_local() if isinstance(t, DTensor) else t
        found.append(t.nbytes)

    tree_map_only(torch.Tensor, count, value)
    return sum(found)


def copies(rank, how):
    subject = Subject(how)
    before = subject.state()
    state = subject.optimizer.state_dict()
    detached = tree_map_only(torch.Tensor, lambda t: t.detach().cpu(), state)
    for given in (state, detached):
        buffer = io.BytesIO()
        torch.save(given, buffer)
        buffer.seek(0)
        for again in (
            torch.load(buffer),
            pickle.loads(pickle.dumps(given)),
            copy.deepcopy(given),
            tree_map_only(torch.Tensor, torch.clone, given),
        ):
            assert_same(whole(again), before)
            twin = subject.other()
            twin.optimizer.load_state_dict(again)
            assert_same(twin.state(), before)
    part = state["state"][0]
    overhead = 4000 * len(part)  # a DTensor is saved with its mesh
    buffer = io.BytesIO()
    torch.save(part, buffer)
    sizes = (buffer.tell(), len(pickle.dumps(part)), bytes_here(part))
    if not how.startswith("fsdp2"):  # parameters of FSDP2 cannot be copied, whatever the optimizer
        copied = copy.deepcopy(subject.optimizer)
        assert_same(whole(copy.deepcopy(copied.state_dict())), before)
    again = pickle.loads(pickle.dumps(subject.optimizer))
    assert_same(whole(copy.deepcopy(again.state_dict())), before)
    subject.train(STEPS, STEPS + 3)  # what was copied is no part of it
    moved = subject.state()
    assert not torch.equal(
        next(iter(moved["state"][0].values())), next(iter(before["state"][0].values()))
    ) or how.endswith("adamw")
    return sizes, overhead


@pytest.mark.parametrize("how", WAYS)
def test_a_shared_state_is_copied_saved_and_loaded_as_adamws_is(how):
    for (saved, pickled, own), overhead in run_ranks(copies, 2, how, time_limit_s=120):
        assert max(saved, pickled) < own + overhead


def numbers(rank, how):
    subject = Subject(how)
    before = subject.state()
    params = [p for group in subject.optimizer.param_groups for p in group["params"]]
    for i, p in enumerate(params):
        for key, value in subject.optimizer.state[p].items():
            if not torch.is_tensor(value) or not value.dim():
                continue
            expected = before["state"][i][key]
            found = value.norm()
            found = found.full_tensor() if isinstance(found, DTensor) else found
            torch.testing.assert_close(found, expected.norm())
            assert torch.equal(value, value.clone()) and not torch.equal(value, value + 1)
            finite = torch.isfinite(value)
            assert (finite.full_tensor() if isinstance(finite, DTensor) else finite).all()
            assert_same(whole(value.double().half() * 2), expected.double().half() * 2)
            assert_same(whole(torch.zeros_like(value)), torch.zeros_like(expected))
            assert value.share_memory_() is value if "adamw" not in how else True
            value.mul_(2)
    for i, p in enumerate(params):
        for key, value in subject.optimizer.state[p].items():
            if torch.is_tensor(value) and value.dim():
                assert_same(whole(value), 2 * before["state"][i][key])
    subject.train(STEPS, STEPS + 3)
    return True


@pytest.mark.parametrize("how", WAYS)
def test_a_shared_state_can_be_computed_with(how):
    assert run_ranks(numbers, 2, how, time_limit_s=120) == [True, True]


# --- torch.distributed.checkpoint ----------------------------------------------------------------


def saved_while_training(rank, how, folder):
    subject = Subject(how)
    before = subject.state()
    writers = dist.new_group()  # which writes while the others train
    for i, stager in enumerate((None, BlockingAsyncStager())):
        where = f"{folder}/{i}"
        options = {"process_group": writers, **({} if stager is None else {"async_stager": stager})}
        pending = dcp.async_save({"optimizer": subject.get()}, checkpoint_id=where, **options)
        twin = subject.other()
        pending.result()
        state = {"optimizer": twin.get()}
        dcp.load(state, checkpoint_id=where)
        twin.set(state["optimizer"])
        assert_same(twin.state(), before)
    pending = dcp.async_save(
        {"optimizer": subject.get()}, checkpoint_id=f"{folder}/moved", process_group=writers
    )
    subject.train(STEPS, STEPS + 3)  # not what is saved
    pending.result()
    state = {"optimizer": twin.get()}
    dcp.load(state, checkpoint_id=f"{folder}/moved")
    twin.set(state["optimizer"])
    assert_same(twin.state(), before)
    flat = subject.get(FLAT)
    dcp.save({"optimizer": flat}, checkpoint_id=f"{folder}/flat")
    state = {"optimizer": twin.get(FLAT)}
    dcp.load(state, checkpoint_id=f"{folder}/flat")
    twin.set(state["optimizer"], FLAT)
    assert_same(twin.state(), subject.state())
    return True


@pytest.mark.slow
@pytest.mark.parametrize("how", WAYS)
def test_a_shared_state_is_saved_while_training_goes_on(how, tmp_path):
    found = run_ranks(saved_while_training, 2, how, str(tmp_path), time_limit_s=120)
    assert found == [True, True]


def gathered(rank, how):
    subject = Subject(how)
    before = subject.state()
    full = subject.get(FULL)
    types = {type(t) for entry in full["state"].values() for t in entry.values()}
    assert not any(issubclass(t, DTensor) for t in types)
    assert_same({i: full["state"][name] for i, name in enumerate(full["state"])}, before["state"])
    on_cpu = subject.get(StateDictOptions(full_state_dict=True, cpu_offload=True))
    assert bool(on_cpu.get("state")) == (rank == 0)
    from_zero = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    for given, options in (
        (full, FULL),
        (on_cpu, from_zero),
        (full if rank == 0 else {}, from_zero),
        (subject.get(StateDictOptions(cpu_offload=True)), None),
    ):
        twin = subject.other()
        twin.set(dict(given), options)
        if how != "ddp adamw" or options is not from_zero:  # torch sends channels-last memory raw
            assert_same(twin.state(), before)
    return copy.deepcopy(full["state"]) if rank == 0 else {}


@pytest.mark.slow
@pytest.mark.parametrize("how", WAYS)
def test_a_full_state_is_gathered_and_given_back(how):
    full, _ = run_ranks(gathered, 2, how, time_limit_s=120)
    if how.endswith("adamw"):
        return
    alone = Subject("alone")
    for name, p in alone.model.named_parameters():
        for key, value in alone.optimizer.state[p].items():
            if torch.is_tensor(value):
                torch.testing.assert_close(full[name][key], value, rtol=1e-3, atol=1e-4)
            else:
                assert full[name][key] == value


def saved_by(rank, ranks, how, source, target):
    """Read what others saved, compare, and save."""
    group = dist.group.WORLD
    assert dist.get_world_size(group) == ranks
    subject = Subject(how, 0 if source else STEPS)
    if source:
        state = {"optimizer": subject.get()}
        dcp.load(state, checkpoint_id=source)
        subject.set(state["optimizer"])
    dcp.save({"optimizer": subject.get()}, checkpoint_id=target)
    return subject.state()["state"]


@pytest.mark.slow
@pytest.mark.parametrize("ways", [("ddp sharded", "fsdp2 sharded", "ddp blocks")])
def test_two_three_and_one_rank_read_each_others_checkpoints(ways, tmp_path):
    source, states = None, []
    for i, (ranks, how) in enumerate(zip((2, 3, 1), ways, strict=True)):
        target = str(tmp_path / str(i))
        found = run_ranks(saved_by, ranks, ranks, how, source, target, time_limit_s=120)
        states.append(found[0])
        source = target
    for entry in states[0].values():  # in which block its pairs came in, and nothing else, is new
        assert entry["pairs"] > 0
    for state in states[1:]:
        assert_same(state, states[0])


# --- FSDP1 ---------------------------------------------------------------------------------------


def flat_parameters(rank, strategy, original):
    def wrap(model):
        return FullyShardedDataParallel(
            model,
            use_orig_params=original,
            sharding_strategy=ShardingStrategy[strategy],
            device_id=torch.device("cpu"),
        )

    def layers():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))

    said = []

    def attempt(action):
        try:
            action()
        except ValueError as error:
            said.append(str(error))

    for mode in ("replicated", "blocks", "sharded"):
        model = wrap(layers())
        weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        attempt(lambda: MLBFGS(model.parameters(), distribution=mode))  # noqa: B023
        now = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        assert torch.equal(weights, now)
        # an optimizer that was there before, and gets the parameters then
        plain = layers()
        optimizer = MLBFGS(plain.parameters(), distribution=mode)
        model = wrap(plain)
        model(torch.ones(2, 4)).sum().backward()
        optimizer.param_groups[0]["params"] = list(model.parameters())
        attempt(optimizer.step)
        if original:  # the very same parameters, in another form
            plain = layers()
            optimizer = MLBFGS(plain.parameters(), distribution=mode)
            wrap(plain)(torch.ones(2, 4)).sum().backward()
            attempt(optimizer.step)
    return said


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("strategy", ["FULL_SHARD", "SHARD_GRAD_OP"])
def test_flat_shards_of_fsdp1_are_refused_with_the_way_out(strategy, original):
    for said in run_ranks(flat_parameters, 2, strategy, original, time_limit_s=120):
        assert len(said) == 3 * (2 + original)
        assert all("fully_shard) and pass distribution='sharded'" in text for text in said)


def unsharded(rank, original, mode):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4))
    if mode is not None:
        model = FullyShardedDataParallel(
            model,
            use_orig_params=original,
            sharding_strategy=ShardingStrategy.NO_SHARD,
            device_id=torch.device("cpu"),
        )
    where = {"distribution": mode} if mode else {}
    optimizer = MLBFGS(model.parameters(), **where, **SETTINGS)
    for step in range(STEPS):
        batch = torch.linspace(-1, 1, 32).view(8, 4) * (1 + 0.1 * step)
        optimizer.zero_grad()
        share = batch if mode is None else batch[rank::2]
        (model(share) ** 2).mean().backward()
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("original", [False, True])
def test_fsdp1_without_sharding_is_trained_as_by_one_process(original):
    expected = unsharded(0, original, None)
    for mode in ("replicated", "sharded"):
        first, second = run_ranks(unsharded, 2, original, mode, time_limit_s=120)
        assert torch.equal(first, second)
        torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-4)
