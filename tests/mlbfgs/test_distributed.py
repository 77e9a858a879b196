"""Several ranks against one process: real gloo processes, see `tests.gloo`."""

import copy
import itertools
import pickle
from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from mlbfgs import MLBFGS, SLIMQN, collectives
from mlbfgs.checkpoint import StateShard, checkpoint_state, load_checkpoint_state, own_part
from tests.gloo import run_ranks
from tests.mlbfgs.problems import LOADED, state_of_one_block

SETTINGS = {"lr": 0.02, "betas": 0.9, "update_interval": 3, "history_size": 3, "damping": 0.95}
STEPS = 21  # six pairs: the ring of three is full and has turned
#: One has gaps in its memory, one is channels-last; shards are cut inside the latter.
SHAPES = {"gaps": (4, 3), "conv": (3, 2, 4, 5), "scalar": (), "bias": (7,), "none": (0, 3), "v": 13}
GROUPS = (("conv", "scalar"), ("gaps", "bias", "none", "v"))


def make_parameters(dtype=torch.float64, channels_last=True):
    generator = torch.Generator().manual_seed(0)
    values = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in SHAPES.items()
    }
    values["gaps"] = torch.empty(4, 6, dtype=dtype)[:, ::2].copy_(values["gaps"])
    if channels_last:
        values["conv"] = values["conv"].to(memory_format=torch.channels_last)
    return {name: torch.nn.Parameter(value) for name, value in values.items()}


def make_optimizer(named, cls=MLBFGS, **settings):
    rates = ({"lr": 0.02, "momentum": 0.9}, {"lr": 0.03, "momentum": 0.5, "maximize": True})
    groups = [
        {"params": [(name, named[name]) for name in names], "weight_decay": 0.01, **rate}
        for names, rate in zip(GROUPS, rates, strict=True)
    ]
    return cls(groups, **{**SETTINGS, "blocks": by_name, **settings})


def by_name(names, sizes):
    wanted = [{"conv": 0, "scalar": 0, "bias": 1, "none": 2}.get(name, 3) for name in names]
    return [sorted(set(wanted)).index(block) for block in wanted]


def set_gradients(named, step):
    """Gradients of a noisy quadratic, the same wherever the parameters are."""
    generator = torch.Generator().manual_seed(step)
    for i, (name, p) in enumerate(named.items()):
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        sign = -1 if name in GROUPS[1] else 1  # the group that ascends
        p.grad = (sign * (0.5 + 0.3 * i) * p.detach() + 0.05 * noise).to(p.dtype)
        if name == "bias" and step in (2, 11, 12):
            p.grad = None


def flat_of(named):
    return torch.cat([p.detach().reshape(-1).double() for p in named.values()])


def walk(named, optimizer, first=1, last=STEPS):
    path = []
    for step in range(first, last + 1):
        set_gradients(named, step)
        optimizer.step()
        path.append(flat_of(named))
    return torch.stack(path)


def assert_equal_on_all_ranks(tensor, group=None):
    everywhere = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everywhere, tensor, group=group)
    assert all(torch.equal(tensor, other) for other in everywhere)


def groups_of(rank, world_size):
    """This rank's group of one, of neighbours two by two, and of all."""
    mine = {world_size: dist.group.WORLD}
    for size in (s for s in (1, 2) if s < world_size):
        for start in range(0, world_size, size):
            group = dist.new_group(list(range(start, start + size)))
            if start <= rank < start + size:
                mine[size] = group
    return mine


RELEASED = {"variant": "released"}
CASES = (  # ranks, distribution, class, dtype, settings
    (4, "blocks", MLBFGS, torch.float64, {}),
    (4, "sharded", MLBFGS, torch.float64, {}),
    (2, "sharded", SLIMQN, torch.float32, {}),
    (2, "blocks", SLIMQN, torch.float32, {}),
    (2, "blocks", MLBFGS, torch.float64, {**RELEASED, "outside_blocks": ["bias"]}),
    (2, "sharded", SLIMQN, torch.float64, RELEASED),
    (2, "sharded", MLBFGS, torch.float64, {"direction": "norm_matched_gradient"}),
    (2, "blocks", MLBFGS, torch.float64, {"variant": "paper"}),
    (2, "sharded", MLBFGS, torch.float64, {"variant": "paper"}),
    (1, "blocks", MLBFGS, torch.float32, {}),
    (1, "sharded", SLIMQN, torch.float64, {}),
)


def trajectories(rank):
    found = []
    groups = groups_of(rank, 4)
    for size, mode, cls, dtype, settings in CASES:
        # four ranks through buffers of eight float64, so that they take turns
        collectives.BUFFER_BYTES = 64 if size == 4 else 1 << 24
        named = make_parameters(dtype)
        optimizer = make_optimizer(
            named, cls, distribution=mode, process_group=groups[size], **settings
        )
        path = walk(named, optimizer)
        assert_equal_on_all_ranks(path, groups[size])
        found.append((path, optimizer.curvature_records()))
    return found


@pytest.mark.slow
def test_every_mode_and_world_size_follows_one_process_bit_equal_on_all_ranks():
    # four ranks, four blocks of 121, 7, 0 and 25 numbers: uneven, and an empty rank
    (found, *_) = run_ranks(trajectories, 4)
    for case, (path, records) in zip(CASES, found, strict=True):
        size, mode, cls, dtype, settings = case
        named = make_parameters(dtype)
        optimizer = make_optimizer(named, cls, **settings)
        expected = walk(named, optimizer)
        # the sums are the same sums, unless the release's clip adds up over blocks
        if size == 1 or (mode == "blocks" and settings.get("variant") != "released"):
            assert torch.equal(path, expected)
            tolerance = 0.0
        else:  # their order differs
            tolerance = 1e-10 if dtype == torch.float64 else 2e-4
            torch.testing.assert_close(path, expected, rtol=tolerance, atol=tolerance)
        for ours, theirs in zip(records, optimizer.curvature_records(), strict=True):
            assert ours == pytest.approx(theirs, rel=10 * tolerance, nan_ok=True)
        assert path.isfinite().all() and not torch.equal(path[-1], path[0])


# --- checkpoints ---------------------------------------------------------------------------------

SAVED = 14  # in the middle of an interval, the ring full
#: Who reads: ranks, distribution, whether conv is channels-last as it was where it was written.
READERS = (
    (1, "replicated", True),
    (1, "sharded", False),
    (2, "blocks", True),
    (2, "sharded", False),
    (3, "sharded", True),
    (3, "blocks", False),
)


def save(folder, named, optimizer, group=None):
    with torch.no_grad():
        model = {name: p.detach().contiguous() for name, p in named.items()}
    state = {"model": model, "optimizer": checkpoint_state(optimizer)}
    dcp.save(state, checkpoint_id=folder, process_group=group)


def load(folder, named, optimizer, group=None):
    model = {name: torch.empty(p.shape, dtype=p.dtype) for name, p in named.items()}
    state = {"model": model, "optimizer": checkpoint_state(optimizer)}
    dcp.load(state, checkpoint_id=folder, process_group=group)
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(model[name])
    load_checkpoint_state(optimizer, state["optimizer"])


def kept_bytes(optimizer):
    """Bytes of the state's tensors on this rank; of views, what they show."""
    entries = [item for s in optimizer.state.values() for item in s.items()]
    # one number for all parameters, which every rank knows
    tensors = [v for k, v in entries if torch.is_tensor(v) and k != "growth_average"]
    return sum((t.local if isinstance(t, StateShard) else t).nbytes for t in tensors)


def write_and_reread(rank, folder):
    written, read = {}, {}
    for mode in ("blocks", "sharded"):
        named = make_parameters()
        optimizer = make_optimizer(named, distribution=mode)
        walk(named, optimizer, 1, SAVED)
        before = optimizer.communication()
        save(f"{folder}/{mode}", named, optimizer)
        assert optimizer.communication() == before  # no rank asked for another's part
        written[mode] = (walk(named, optimizer, SAVED + 1), kept_bytes(optimizer))
    for size in (1, 2, 3):
        group = dist.new_group(list(range(size)))
        for mode in (m for s, m, _ in READERS if s == size and rank < size):
            channels_last = (size, mode, True) in READERS
            for writer in written:
                named = make_parameters(channels_last=channels_last)
                shared = {} if mode == "replicated" else {"process_group": group}
                optimizer = make_optimizer(named, distribution=mode, **shared)
                load(f"{folder}/{writer}", named, optimizer, group)
                read[writer, size, mode] = walk(named, optimizer, SAVED + 1)
                assert_equal_on_all_ranks(read[writer, size, mode], group)
        dist.barrier()
    return written, read


@pytest.mark.slow
def test_what_four_ranks_wrote_one_two_and_three_continue(tmp_path):
    results = run_ranks(write_and_reread, 4, str(tmp_path), time_limit_s=240)
    named = make_parameters()
    alone = make_optimizer(named)
    expected = walk(named, alone)[SAVED:]
    written, read = results[0]
    assert len(read) == 2 * len(READERS)
    for (writer, size, mode), path in read.items():
        continued = written[writer][0]
        if writer == "blocks" and mode != "sharded" and (size, mode, True) in READERS:
            # the same sums: only shards and another order of memory add up in another order
            assert torch.equal(path, continued) and torch.equal(path, expected)
        torch.testing.assert_close(path, continued, rtol=1e-10, atol=1e-10)
    # each rank's share of 4 vectors, the momentum and 6 rows of 153 numbers in float64
    n = sum(p.numel() for p in named.values())
    for mode, numbers in (("blocks", [121, 25, 7, 0]), ("sharded", [38, 38, 38, 39])):
        assert sorted(numbers) == sorted(r[0][mode][1] // (11 * 8) for r in results)
        assert sum(r[0][mode][1] for r in results) == 11 * 8 * n == kept_bytes(alone)


def read_by_all(rank, folder):
    """One process wrote; four ranks read, and hand their state on without a file."""
    found = {}
    for mode in ("blocks", "sharded"):
        named = make_parameters()
        optimizer = make_optimizer(named, distribution=mode)
        load(folder, named, optimizer)
        # the same ranks under the other plan, from memory: stretches move between ranks
        others = make_parameters()
        other_mode = "sharded" if mode == "blocks" else "blocks"
        other = make_optimizer(others, distribution=other_mode)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        with torch.no_grad():
            for name, p in others.items():
                p.copy_(named[name])
        found[mode] = walk(named, optimizer, SAVED + 1)
        torch.testing.assert_close(walk(others, other, SAVED + 1), found[mode], rtol=0, atol=1e-10)
    return found


def test_what_one_process_wrote_four_ranks_continue(tmp_path):
    named = make_parameters()
    optimizer = make_optimizer(named)
    walk(named, optimizer, 1, SAVED)
    save(str(tmp_path), named, optimizer)
    expected = walk(named, optimizer, SAVED + 1)
    found, *_ = run_ranks(read_by_all, 4, str(tmp_path), time_limit_s=120)
    assert torch.equal(found["blocks"], expected)
    torch.testing.assert_close(found["sharded"], expected, rtol=0, atol=1e-10)


def dropped_under_other_blocks(rank, mode):
    """One block's pairs, some of which two blocks would have refused; H and pairs afterwards."""
    named, state = state_of_one_block([0.8, -0.4, float("nan"), 0.6])
    where = {} if mode is None else {"distribution": mode}
    optimizer = MLBFGS(named, blocks=["u", "v"], **LOADED, **where)
    optimizer.load_state_dict(state)
    params = [p for _, p in named]
    product = optimizer.hessian_vector([torch.linspace(1, 2, 3).double() for _ in params])
    return [optimizer.state[p]["pairs"] for p in params], torch.cat(product)


@pytest.mark.parametrize("mode", ["blocks", "sharded"])
def test_ranks_drop_the_same_pairs_as_one_process(mode):
    pairs, product = dropped_under_other_blocks(0, None)
    assert pairs == [6, 2]
    for found, ours in run_ranks(dropped_under_other_blocks, 2, mode):
        assert found == pairs
        torch.testing.assert_close(ours, product, rtol=1e-12, atol=0)


def loaded_from_rank_zero(rank):
    """All ranks load what rank 0 saved with torch.save; then each its own, under other shards."""
    said = {}
    named = make_parameters()
    optimizer = make_optimizer(named, distribution="sharded")
    walk(named, optimizer, 1, 8)
    box = [pickle.dumps(optimizer.state_dict()) if rank == 0 else None]
    dist.broadcast_object_list(box, src=0)
    for mode in ("sharded", "blocks"):
        other = make_optimizer(make_parameters(), distribution=mode)
        try:
            other.load_state_dict(pickle.loads(box[0]))
        except ValueError as error:
            said[mode] = str(error)
        other.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    shard = pickle.loads(box[0])["state"][0]["param_average"]
    for use in ("whole", "own_part"):
        if rank == 1:  # alone: refused before anybody waits
            flat = optimizer._built
            i = next(i for i, p in enumerate(flat.layout.params) if p is named["conv"])
            like = optimizer.state[named["conv"]]["param_average"]
            try:
                if use == "whole":
                    shard.whole(flat.collectives)
                else:
                    own_part(shard, like, flat.layout, i, flat.collectives)
            except ValueError as error:
                said[use] = str(error)
    return said


def test_another_ranks_part_is_refused_on_all_ranks():
    first, second = run_ranks(loaded_from_rank_zero, 2)
    theirs = "the state is rank 0's part of 2, but loaded by rank 1: each rank loads what it saved"
    assert set(second) == {"sharded", "blocks", "whole", "own_part"}
    assert all(text.startswith(theirs) for text in second.values())
    assert set(first) == {"sharded", "blocks"}
    assert all("another rank was given the state of a rank" in text for text in first.values())


# --- what ranks tell each other -------------------------------------------------------------------


def counted_bytes(rank, mode, dtype, variant):
    """Bytes of every tensor that a collective was called with, beside what the optimizer counts."""
    sent = Counter()

    def counting(name):
        call = getattr(dist, name)

        def wrapper(*args, **kwargs):
            for given in args[:1]:
                tensors = given if isinstance(given, list) else [given]
                sent[name] += sum(t.nbytes for t in tensors)
            return call(*args, **kwargs)

        return wrapper

    for name in ("all_reduce", "broadcast", "all_gather"):
        setattr(dist, name, counting(name))
    named = make_parameters(dtype)
    optimizer = make_optimizer(named, distribution=mode, variant=variant)
    walk(named, optimizer, 1, 2)
    before_pairs = optimizer.communication()
    walk(named, optimizer, 3, STEPS - 1)
    ordinary = optimizer.communication()
    walk(named, optimizer, STEPS, STEPS)
    return sent, before_pairs["last_step"], ordinary["last_step"], optimizer.communication()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mode", ["blocks", "sharded"])
@pytest.mark.parametrize("variant", ["guarded", "paper"])
def test_bytes_are_counted_as_sent_and_follow_the_formula(variant, mode, dtype):
    ranks, blocks, m = 2, 4, SETTINGS["history_size"]
    n = sum(p.numel() for p in make_parameters().values())
    sharded = mode == "sharded"
    for sent, warm, ordinary, end in run_ranks(counted_bytes, ranks, mode, dtype, variant):
        total = end["total"]
        assert end["steps"] == STEPS
        assert sent["broadcast"] == total["all_gather_parameters"]
        assert sent["all_gather"] == total["all_gather_layout"] == 8 * ranks
        reduced = {key: total[key] for key in total if key.startswith("all_reduce")}
        assert sent["all_reduce"] == sum(reduced.values())
        # docs/distributed.md
        step = {"all_gather_parameters": n * dtype.itemsize + 8 * ranks}
        sums = {"all_reduce_step": blocks * (2 * m + 1) * 8} if sharded else {}
        if variant == "guarded" and not sharded:
            sums = {"all_reduce_step": blocks * 16}
        pairs = {"all_reduce_products": blocks * 8 * 8}
        if sharded:  # the empty block has no pairs
            pairs["all_reduce_gram"] = (blocks - 1) * 2 * 2 * m * 8
        assert warm == ({**step, **sums} if variant == "guarded" else step)
        assert ordinary == {**step, **sums}
        assert end["last_step"] == {**step, **sums, **pairs}


def refusals(rank, variant):
    said = {}
    for mode in ("blocks", "sharded"):
        for missing, step in itertools.product((["v"], list(SHAPES)), (8, 9)):  # 9: of a pair
            named = make_parameters()
            optimizer = make_optimizer(named, distribution=mode, variant=variant)
            walk(named, optimizer, 1, step - 1)
            set_gradients(named, step)
            if rank == 1:
                for name in missing:
                    named[name].grad = None
            try:
                optimizer.step()
            except RuntimeError as error:
                said[mode, len(missing), step] = str(error)
    # no gradient anywhere: nothing happens, as in one process
    named = make_parameters()
    optimizer = make_optimizer(named, distribution="sharded", variant=variant)
    walk(named, optimizer, 1, 8)
    before = flat_of(named), optimizer.state[named["v"]]["step"]
    for _ in range(2):  # both would be due for a pair
        optimizer.zero_grad()
        optimizer.step()
    assert torch.equal(flat_of(named), before[0])
    said["after"] = walk(named, optimizer, 9)
    said["step"] = optimizer.state[named["v"]]["step"]
    for key, settings in {
        "blocks": {"blocks": lambda names, sizes: [0] * 5 + [rank]},
        "group": {"distribution": "replicated", "process_group": dist.group.WORLD},
        "name": {"distribution": "shards"},
    }.items():
        try:
            make_optimizer(make_parameters(), **{"distribution": "sharded", **settings})
        except ValueError as error:
            said[key] = str(error)
    return said


@pytest.mark.parametrize("variant", ["paper", {"same_step": True}])
def test_what_ranks_disagree_about_is_named_and_no_gradient_at_all_is_no_step(variant):
    named = make_parameters()
    expected = walk(named, make_optimizer(named, variant=variant))[8:]
    for said in run_ranks(refusals, 2, variant):
        for mode, step in itertools.product(("blocks", "sharded"), (8, 9)):
            assert "v has a gradient on ranks [0] but none on ranks [1]" in said[mode, 1, step]
            assert "and so have 5 others" in said[mode, len(SHAPES), step]
        torch.testing.assert_close(said["after"], expected, rtol=0, atol=1e-10)
        assert said["step"] == STEPS
        assert "ranks [1] have other parameters than rank 0, or in other groups" in said["blocks"]
        assert "process_group has no effect" in said["group"]
        assert "Invalid distribution: 'shards'" in said["name"]


def test_ranks_are_asked_for_where_there_are_none():
    with pytest.raises(ValueError, match="init_process_group before building the optimizer"):
        make_optimizer(make_parameters(), distribution="sharded")


# --- what else an optimizer must do ---------------------------------------------------------------


def odds_and_ends(rank, mode):
    """Everything a single process does, in the middle of training."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        extra = torch.nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    named = make_parameters()
    where = {} if mode is None else {"distribution": mode}
    optimizer = make_optimizer(named, **where)
    walk(named, optimizer, 1, 10)
    optimizer.add_param_group({"params": [("extra", extra)], "lr": 0.01})
    named["extra"] = extra
    path = [walk(named, optimizer, 11, 15)]
    named["conv"].data = named["conv"].data.contiguous()  # another order of memory
    path.append(walk(named, optimizer, 16, 18))
    twin = copy.deepcopy(optimizer)
    twins = [p for group in twin.param_groups for p in group["params"]]
    ours = [p for group in optimizer.param_groups for p in group["params"]]
    set_gradients(named, 19)
    for p, q in zip(ours, twins, strict=True):
        q.grad = p.grad
    twin.step()
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, twins, strict=True))
    if mode is not None:
        again = pickle.loads(pickle.dumps(optimizer))
        assert again.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    product = optimizer.hessian_vector([torch.ones_like(p) for p in ours])
    assert [v.shape for v in product] == [p.shape for p in ours]
    return [*path, torch.cat([v.reshape(-1) for v in product])], str(optimizer.plan())


@pytest.mark.parametrize("mode", ["blocks", "sharded"])
def test_groups_layouts_copies_and_products_in_the_middle_of_training(mode):
    expected, plan = odds_and_ends(0, None)
    for found, printed in run_ranks(odds_and_ends, 2, mode):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        assert printed.splitlines()[:5] != plan and "rank 1" in printed


# --- with DDP and FSDP2 ---------------------------------------------------------------------------

BATCH, FEATURES = 8, 6


def make_model():
    torch.manual_seed(0)
    layers = (torch.nn.Linear(FEATURES, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    return torch.nn.Sequential(*layers).double()


def make_batch(step):
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(BATCH, FEATURES, generator=generator, dtype=torch.float64)
    return inputs, torch.randn(BATCH, 3, generator=generator, dtype=torch.float64)


def train(model, optimizer, share, first=1, last=STEPS):
    for step in range(first, last + 1):
        inputs, targets = make_batch(step)
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(inputs[share]), targets[share]).backward()
        optimizer.step()
    return torch.cat(
        [
            (p.full_tensor() if isinstance(p, DTensor) else p).detach().reshape(-1)
            for p in model.parameters()
        ]
    )


def ddp_and_fsdp(rank, folder):
    share = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    found = {}
    for mode in ("replicated", "blocks", "sharded"):
        model = DistributedDataParallel(make_model())
        optimizer = MLBFGS(model.named_parameters(), blocks=2, distribution=mode, **SETTINGS)
        found[mode] = train(model, optimizer, share)

    def sharded_model():
        model = make_model()
        for layer in (model[0], model[2]):
            fully_shard(layer)
        fully_shard(model)
        return model, MLBFGS(model.named_parameters(), blocks=2, distribution="sharded", **SETTINGS)

    model, optimizer = sharded_model()
    train(model, optimizer, share, 1, SAVED)
    assert isinstance(optimizer.state[next(model.parameters())]["s_history"], DTensor)
    n = sum(p.numel() for p in make_model().parameters())
    local = sum(p.to_local().numel() for p in model.parameters())
    assert optimizer.plan().state_bytes == 11 * 8 * local < 11 * 8 * n
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder)
    weights = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    found["fsdp"] = train(model, optimizer, share, SAVED + 1)
    assert "all_gather_parameters" not in optimizer.communication()["total"]

    def restored(model, optimizer):
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=folder)
        set_optimizer_state_dict(model, optimizer, state["optimizer"])

    model, optimizer = sharded_model()
    restored(model, optimizer)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(distribute_tensor(weights[name], p.device_mesh))
    found["fsdp, restored"] = train(model, optimizer, share, SAVED + 1)

    model = DistributedDataParallel(make_model())
    model.module.load_state_dict(weights)
    optimizer = MLBFGS(model.named_parameters(), blocks=2, distribution="sharded", **SETTINGS)
    restored(model, optimizer)
    found["fsdp, restored under ddp"] = train(model, optimizer, share, SAVED + 1)
    # as Accelerate does: the optimizer is made first, then gets the sharded parameters
    model = make_model()
    optimizer = MLBFGS(model.named_parameters(), blocks=2, distribution="sharded", **SETTINGS)
    fully_shard(model)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    found["fsdp, exchanged"] = train(model, optimizer, share)
    assert isinstance(optimizer.state[next(model.parameters())]["s_history"], DTensor)
    assert "all_gather_parameters" not in optimizer.communication()["total"]
    try:
        MLBFGS(sharded_model()[0].parameters())
    except ValueError as error:
        assert "pass distribution='sharded' and no process_group" in str(error)
    else:
        raise AssertionError("DTensors were taken for whole tensors")
    return found


@pytest.mark.slow
def test_ddp_and_fsdp2_with_half_a_batch_each_follow_one_process(tmp_path):
    model = make_model()
    optimizer = MLBFGS(model.named_parameters(), blocks=2, **SETTINGS)
    expected = train(model, optimizer, slice(None))
    first, second = run_ranks(ddp_and_fsdp, 2, str(tmp_path), time_limit_s=180)
    assert len(first) == 7
    for mode, found in first.items():
        assert torch.equal(found, second[mode]), mode
        # the mean over halves is added up in another order
        torch.testing.assert_close(
            found, expected, rtol=1e-9, atol=1e-9, msg=lambda m, w=mode: w + m
        )
