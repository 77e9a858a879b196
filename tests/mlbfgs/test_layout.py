"""The flat vector: blocks and rows at 64-byte borders, so that a block's bits know no place."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlbfgs import MLBFGS
from mlbfgs.layout import Layout, Spread

SIZES = st.lists(st.integers(0, 300), min_size=2, max_size=5)


@given(
    sizes=SIZES,
    dtype=st.sampled_from([torch.float32, torch.float64]),
    mode=st.sampled_from(["replicated", "blocks", "sharded"]),
    world_size=st.integers(1, 4),
)
def test_every_block_begins_at_a_border_and_ranks_keep_each_number_once(
    sizes, dtype, mode, world_size
):
    params = [torch.zeros(n, dtype=dtype) for n in sizes]
    numbers = list(range(len(sizes)))
    layouts = [
        Layout(params, [0] * len(sizes), numbers, Spread(mode, rank, world_size))
        for rank in range(world_size)
    ]
    for layout in layouts:
        assert all(offset * dtype.itemsize % 64 == 0 for offset in layout.offsets)
        assert layout.numel * dtype.itemsize % 64 == 0
        assert all(block.start * dtype.itemsize % 64 == 0 for block in layout.blocks)
        assert layout.length - sum(sizes) < len(sizes) * layout.unit
    kept = [sum(len(s) for s in layout.stretches) for layout in layouts]
    assert sum(kept) == sum(sizes) * (world_size if mode == "replicated" else 1)


def rows_and_steps(sizes, chosen):
    """Train some of several blocks of parameters; what each block's numbers became."""
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(n, generator=generator) for n in sizes]
    noise = [[torch.randn(n, generator=generator) for n in sizes] for _ in range(8)]
    params = [torch.nn.Parameter(starts[i].clone()) for i in chosen]
    optimizer = MLBFGS(
        params, lr=0.05, betas=0.5, update_interval=1, history_size=3, blocks=len(params),
        variant="paper",  # the growth limit is one of all blocks
    )  # fmt: skip
    for step in noise:
        for p, i in zip(params, chosen, strict=True):
            p.grad = p.detach() * (1 + i) + 0.1 * step[i]
        optimizer.step()
    return {
        i: (p.detach().clone(), optimizer.state[p]["y_history"].clone())
        for p, i in zip(params, chosen, strict=True)
    }


def blocks_that_depend_on_their_place(sizes):
    """Blocks whose bits differ between one optimizer of all of them and one of each alone."""
    together = rows_and_steps(sizes, range(len(sizes)))
    alone = {i: rows_and_steps(sizes, [i])[i] for i in range(len(sizes))}
    return [i for i in alone if not all(map(torch.equal, alone[i], together[i]))]


@settings(max_examples=15, deadline=None)
@given(sizes=SIZES.filter(all))
def test_a_block_gives_the_same_bits_wherever_it_lies(sizes):
    assert blocks_that_depend_on_their_place(sizes) == []


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch was built without MKL")
def test_a_block_gives_the_same_bits_where_mkl_sums_by_place():
    """MKL's code for old processors: without padding, every second block differed in it."""
    code = (
        "from tests.mlbfgs.test_layout import blocks_that_depend_on_their_place as found\n"
        "cases = [[121, 7, 25], [13, 200, 77], [1, 3, 299, 60]]\n"
        "print([found(sizes) for sizes in cases])"
    )
    environment = {**os.environ, "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[[], [], []]"
