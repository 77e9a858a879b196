"""Which rank keeps what: borders, owners, and boxes of tensors, without any rank."""

import copy
import itertools
import math
import pickle

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from mlbfgs import plan
from mlbfgs.distributed_state import StateShard
from mlbfgs.exchange import Route, buckets_of
from mlbfgs.layout import Layout, Spread
from mlbfgs.sharding import boxes, even_ranges, overlap, owners_of_blocks, ranges_of_owners

SIZES = st.lists(st.integers(0, 50), min_size=1, max_size=8)
RANKS = st.integers(1, 6)


@given(SIZES, RANKS)
def test_owners_are_balanced_and_their_ranges_cover_everything(sizes, world_size):
    owners = owners_of_blocks(sizes, world_size)
    ranges = ranges_of_owners(sizes, owners, world_size)
    assert list(itertools.chain(*ranges)) == list(range(sum(sizes)))
    if world_size ** len(sizes) <= 4096:
        best = min(
            max(
                sum(s for s, o in zip(sizes, way, strict=True) if o == r) for r in range(world_size)
            )
            for way in itertools.product(range(world_size), repeat=len(sizes))
        )
        assert max(map(len, ranges)) <= (4 / 3 - 1 / (3 * world_size)) * best + 1e-9  # Graham


def test_owners_go_longest_first():
    assert owners_of_blocks([3, 10, 4, 4], 2) == [1, 0, 1, 1]
    assert owners_of_blocks([5, 5], 4) == [0, 1]


@given(st.integers(0, 200), RANKS)
def test_even_ranges_differ_by_one_at_most(n, world_size):
    ranges = even_ranges(n, world_size)
    assert list(itertools.chain(*ranges)) == list(range(n))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


def test_a_border_in_an_uncut_stretch_moves_to_the_nearer_end():
    assert even_ranges(100, 2, [range(45, 90)]) == [range(45), range(45, 100)]
    assert even_ranges(100, 2, [range(10, 55)]) == [range(55), range(55, 100)]
    assert even_ranges(9, 3, [range(9)]) == [range(0), range(0, 9), range(9, 9)]


@settings(max_examples=300)
@given(st.data())
def test_boxes_cover_a_stretch_once_and_lie_in_memory_as_they_say(data):
    shape = data.draw(st.lists(st.integers(1, 4), max_size=4))
    order = data.draw(st.permutations(range(len(shape))))
    inverse = [order.index(d) for d in range(len(shape))]
    strides = torch.empty([shape[d] for d in order]).permute(inverse).stride() if shape else ()
    n = math.prod(shape)
    start, stop = sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))
    memory = torch.arange(n)
    tensor = memory.as_strided(shape, strides)
    found = boxes(shape, strides, range(start, stop))
    assert len(found) <= max(1, 2 * len(shape) - 1)
    seen = []
    for box in found:
        part = memory[box.start : box.start + math.prod(box.sizes)]
        shaped = part.view(box.memory_sizes).permute(box.to_shape)
        where = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
        assert torch.equal(shaped, tensor[where])
        seen += shaped.flatten().tolist()
    assert sorted(seen) == list(range(start, stop))


def parameters():
    conv = torch.randn(3, 2, 2, 2).to(memory_format=torch.channels_last)
    gaps = torch.randn(4, 6)[:, ::2]
    return [conv, gaps, torch.randn(()), torch.randn(0, 3), torch.randn(9).bfloat16()]


@pytest.mark.parametrize("distribution", ["blocks", "sharded"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("limit", [16, 40, 1 << 20])
def test_buckets_carry_every_number_once_from_the_rank_that_keeps_it(
    distribution, world_size, limit
):
    params = parameters()
    blocks, groups = [0, 1, 0, 2, 1], [0, 0, 1, 0, 1]
    carried = [torch.zeros(p.numel(), dtype=torch.int64) for p in params]
    layouts = [
        Layout(params, groups, blocks, Spread(distribution, rank, world_size))
        for rank in range(world_size)
    ]
    layout = layouts[0]
    n = sum(p.numel() for p in params)
    kept = [sum(len(stretch) for stretch in one.stretches) for one in layouts]
    assert sum(kept) == n and sum(len(r) for r in layout.ranges) == layout.length
    dtypes = [p.dtype for p in layout.params]
    number = {id(p): i for i, p in enumerate(params)}
    buckets = buckets_of(layout, dtypes, limit)
    for bucket in buckets:
        for parcel in bucket.parcels:
            stretch = layouts[bucket.rank].stretches[parcel.param]
            assert stretch.start <= parcel.start < parcel.stop <= stretch.stop
            carried[number[id(layout.params[parcel.param])]][parcel.start : parcel.stop] += 1
        assert bucket.nbytes <= limit + 8 or len(bucket.parcels) == 1
    assert all(bool((count == 1).all()) for count in carried)
    assert [b.rank for b in buckets if b.tagged] == list(range(world_size))
    assert sum(b.nbytes for b in buckets) == 8 * world_size + sum(p.nbytes for p in params)


def test_an_exchange_goes_through_two_small_buffers_however_many_numbers_there_are():
    layout = Layout([torch.empty(10_000)], [0], [0], Spread("sharded", 0, 2))
    route = Route(layout, [torch.float32], 1024)
    messages = [route.message(k) for k in range(len(route.buckets))]
    assert len(messages) == 40 and max(message.nbytes for message in messages) == 1024 + 8
    assert len({message.data_ptr() for message in messages}) == 2


def test_segments_of_all_ranks_cover_the_blocks():
    params = parameters()
    covered = {0: 0, 1: 0, 2: 0}
    for rank in range(3):
        layout = Layout(params, [0] * 5, [0, 1, 0, 2, 1], Spread("sharded", rank, 3))
        for s in layout.segments:
            covered[s.block] += s.stop - s.start
            assert layout.blocks[s.block].start <= s.start < s.stop <= layout.blocks[s.block].stop
    assert covered == {0: 25, 1: 21, 2: 0}


def test_overlap_is_empty_where_there_is_none():
    assert overlap(range(2, 5), range(4, 9)) == range(4, 5)
    assert not overlap(range(0, 2), range(4, 9)) and not overlap(range(10, 12), range(4, 9))


def make_shard(rows=()):
    local = torch.arange(5 * math.prod(rows), dtype=torch.float32).view(*rows, 5)
    return StateShard(local, (3, 4), (4, 1), [(0, 7), (7, 12)], 1)


def test_a_state_shard_has_the_whole_shape_copies_moves_and_works_on_each_number():
    shard = make_shard((2,))
    assert shard.shape == (2, 3, 4) and shard.local.shape == (2, 5)
    for twin in (copy.deepcopy(shard), shard.clone(), pickle.loads(pickle.dumps(shard))):
        assert twin.local.data_ptr() != shard.local.data_ptr() and twin.lies_as(shard)
        assert torch.equal(twin.local, shard.local)
    assert shard.detach().local.data_ptr() == shard.local.data_ptr()
    assert shard.to(torch.float64).local.dtype == torch.float64
    other = make_shard((2,))
    other.local.zero_()
    other.copy_(shard)
    assert torch.equal(other.local, shard.local)
    elsewhere = StateShard(torch.zeros(2, 7), (3, 4), (4, 1), [(0, 7), (7, 12)], 0)
    with pytest.raises(ValueError, match="divided between the ranks in different ways"):
        StateShard(torch.zeros(2, 6), (3, 4), (4, 1), [(0, 6), (6, 12)], 1).copy_(shard)
    assert "numbers 7 to 12 of 12, rank 1 of 2" in repr(shard) and elsewhere.lies_as(shard)
    assert torch.equal((2 * shard + shard).local, 3 * shard.local) and shard.isfinite().local.all()
    whole = torch.arange(24.0).view(2, 3, 4)
    assert torch.equal((shard + whole).local, shard.local + whole.view(2, 12)[:, 7:])
    other.copy_(whole.mT.contiguous().mT)
    assert torch.equal(other.local, whole.view(2, 12)[:, 7:])
    for change in (lambda: shard[0].zero_(), lambda: shard.cumsum_(0)):
        with pytest.raises(NotImplementedError, match="one rank's part of a tensor"):
            change()
    with pytest.raises(ValueError, match="one rank's part of 2, and here are 0 ranks"):
        shard.sum()


def test_the_plan_of_a_network_prints_who_keeps_what():
    with torch.device("meta"):
        model = torchvision.models.resnet18()
    n = sum(p.numel() for p in model.parameters())
    even = plan(model, distribution="sharded", world_size=8)
    assert -(-n // 8) <= max(even.kept) < -(-n // 8) + 16  # parts are cut at 64-byte borders
    assert even.history_bytes == 20 * 4 * max(even.kept)
    owned = plan(model, "resblocks:2", distribution="blocks", world_size=8)
    padded_sizes = [-(-size // 16) * 16 for size in owned.block_sizes]
    assert sorted(owned.kept) == sorted([*padded_sizes, 0, 0, 0, 0])
    assert owned.owners[3] == 0 and owned.kept[0] == max(padded_sizes)
    assert owned.padding == sum(padded_sizes) - n > 0
    assert f"{owned.padding} of padding in every vector" in str(owned)
    assert f"rank 0: {owned.kept[0]:,} numbers ({owned.kept[0] / n:.1%}), blocks 3" in str(owned)
    assert "rank 7: 0 numbers (0.0%), blocks none" in str(owned)
    assert "rank" not in str(plan(model))
    with pytest.raises(ValueError, match="Invalid distribution: 'even'"):
        plan(model, distribution="even")
    with pytest.raises(ValueError, match="Invalid world_size: 0"):
        plan(model, world_size=0)
