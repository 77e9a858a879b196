"""Kernel launches of a step on a GPU, counted on fake CUDA tensors; the same sums on a CPU."""

import pytest
import torch
import torchvision
from torch._subclasses import FakeTensorMode

from mlbfgs import MLBFGS, curvature, layout
from mlbfgs.flat_state import FlatState
from mlbfgs.testing.launches import Launches


def launches(make_params, monkeypatch, *, step=1003, **settings):
    """Launches of step `step` + 1 with a full history, weight decay and momentum."""

    def numbers(flat, products):  # of any pair: a fake tensor has none
        return [[1.0] * products.shape[1] for _ in range(len(products))]

    monkeypatch.setattr(FlatState, "read", numbers)
    with FakeTensorMode(allow_non_fake_inputs=True):
        params = make_params()
        optimizer = MLBFGS(params, lr=0.1, weight_decay=1e-4, **{"variant": "paper", **settings})
        for p in params:
            p.grad = torch.empty_like(p)
        flat = optimizer._built
        flat.step, flat.seeded = step, [True] * len(flat.seeded)
        flat.history.pairs = [12] * len(flat.history.pairs)
        with Launches() as counted:
            optimizer.step()
    return counted


def resnet50():
    with torch.device("cuda"):
        return list(torchvision.models.resnet50().parameters())


def of_a_million_numbers(count):
    size = 1_000_000 // count
    return lambda: [torch.nn.Parameter(torch.empty(size, device="cuda")) for _ in range(count)]


@pytest.mark.parametrize(("variant", "most"), [("paper", 40), ("guarded", 50)])
def test_an_ordinary_step_of_resnet50_is_some_dozens_of_launches(variant, most, monkeypatch):
    counted = launches(resnet50, monkeypatch, variant=variant)
    assert 10 < counted.total <= most, counted.counts


def test_a_step_with_a_pair_of_resnet50_is_at_most_a_hundred_and_twenty_launches(monkeypatch):
    counted = launches(resnet50, monkeypatch, step=1049)
    assert 40 < counted.total <= 120, counted.counts


@pytest.mark.slow
def test_launches_do_not_depend_on_the_number_of_parameters(monkeypatch):
    few, thousands = (
        launches(of_a_million_numbers(count), monkeypatch).total for count in (160, 10_000)
    )
    assert few == thousands


@pytest.mark.parametrize("blocks", [None, 3])
@pytest.mark.parametrize("history_dtype", [None, torch.bfloat16])
def test_the_cut_for_accelerators_gives_the_same_step_up_to_rounding(
    blocks, history_dtype, monkeypatch
):
    """The form that a GPU gets, taken on a CPU."""

    def walk():
        generator = torch.Generator().manual_seed(0)
        shapes = ((70, 30), (900,), (31, 7))
        params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
        optimizer = MLBFGS(
            params, lr=0.02, betas=0.9, update_interval=3, history_size=3, blocks=blocks,
            history_dtype=history_dtype, variant="paper", weight_decay=1e-3,
        )  # fmt: skip
        for _ in range(24):
            for i, p in enumerate(params):
                p.grad = p.detach() * (1 + i) + 0.05 * torch.randn(p.shape, generator=generator)
            optimizer.step()
        return optimizer, torch.cat([p.detach().reshape(-1) for p in params])

    _, expected = walk()
    monkeypatch.setattr(layout, "IN_CACHE", ())
    monkeypatch.setattr(curvature, "SUM_TILE_NUMEL", 128)
    monkeypatch.setattr(curvature, "WIDENED_NUMEL", 500)
    optimizer, found = walk()
    assert len(optimizer._built.layout.segments) == (blocks or 1)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)
