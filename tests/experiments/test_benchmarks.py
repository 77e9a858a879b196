"""The optimizer benchmark at a tiny network: contenders take the same step, the page is whole."""

import json

import pytest
import torch
from torch import nn

from experiments.benchmarks import optimizer_step
from experiments.benchmarks.optimizer_step import FULL_HISTORY_STEP, SETTINGS, with_history
from experiments.benchmarks.report import markdown
from experiments.benchmarks.textbook import TwoLoopStep


def tiny() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4, 10))


@pytest.fixture(scope="module")
def subject():
    torch.manual_seed(0)
    shapes = [p.shape for p in tiny().parameters()]
    values = [torch.randn(shape) for shape in shapes]
    gradients = [torch.randn(shape) for shape in shapes]
    return values, gradients, list(optimizer_step.pairs_like_training(shapes))


def parameters(values, gradients):
    params = [nn.Parameter(v.clone()) for v in values]
    for p, g in zip(params, gradients, strict=True):
        p.grad = g
    return params


@pytest.mark.parametrize("in_place", [False, True])
def test_the_textbook_step_is_the_step_of_mlbfgs(subject, in_place):
    values, gradients, pairs = subject
    ours, theirs = parameters(values, gradients), parameters(values, gradients)
    optimizer = with_history(ours, pairs, FULL_HISTORY_STEP)
    flat = [tuple(TwoLoopStep.flatten(v) for v in pair) for pair in pairs]
    textbook = TwoLoopStep(theirs, flat, **SETTINGS, betas=(0.999, 0.999), in_place=in_place)
    before = [p.detach().clone() for p in ours]
    for _ in range(3):
        optimizer.step()
        textbook.step()
    for a, b, start in zip(ours, theirs, before, strict=True):
        assert not torch.equal(a, start)
        torch.testing.assert_close(a.detach() - start, b.detach() - start, rtol=1e-3, atol=1e-7)


def test_the_whole_benchmark_at_a_tiny_network(monkeypatch, tmp_path):
    monkeypatch.setitem(optimizer_step.NETWORKS, "tiny", tiny)
    result = {
        "origin": {"git": {"commit": "abc", "dirty": False}, "hardware": {"cpu": "some CPU"}},
        "threads": 1,
        "rounds": 2,
        "floor_items": {"history, read twice": 40, **optimizer_step.FLOOR_ITEMS},
        "sizes": {"tiny": optimizer_step.measure("tiny", rounds=2)},
        "end_to_end": optimizer_step.end_to_end("tiny", 2, batch=2, pixels=8),
    }
    numbers = result["sizes"]["tiny"]
    assert json.loads(json.dumps(result)) == result
    assert numbers["floor_numbers_per_parameter"] == 51
    assert numbers["step_over_floor"] == pytest.approx(
        numbers["mlbfgs_step_s"] / numbers["floor_s"]
    )
    memory = numbers["state_bytes_per_parameter"]
    assert memory["mlbfgs"] == 4 * (4 + 2 * 10 + 1)
    assert memory["mlbfgs_bfloat16_history"] == 4 * 5 + 2 * 20
    assert memory["sgd"] == 4
    page = markdown(result)
    assert "commit abc (clean)" in page and "| **step / floor**" in page
    assert "nan" not in page and "unknown" not in page
