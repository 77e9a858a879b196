"""The complexity tables: formulas by hand, ResNet-50 by published facts, twins by exact counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from experiments.theory import complexity, cost_formulas, networks, twins
from experiments.theory.cost_formulas import Workload

# one layer of 2 inputs and 3 outputs: d = 6, Σ (8 + 27) = 35, Σ (2 + 3) 6 = 30, Σ (4 + 9) = 13
SMALL = Workload(((2, 3),), d=6, c_fb=10, m_fb=7, b=4, b_h=8, T=5, M=3, gamma=2, p=2)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        # sgd, kfac: 6 + (2-1)·4·10 + 35/5, slbfgs: 6 + 4·10 + 8·10/5, mlbfgs: 6/2
        (cost_formulas.curvature_compute, (0, 53, 62, 3)),
        (cost_formulas.forward_backward_compute, (40, 93, 102, 43)),
        (cost_formulas.optimizer_compute, (6, 66, 42, 24)),
        (cost_formulas.forward_backward_memory, (28, 34, 28 + 6 + 8 * 7 / 5, 31)),
        (cost_formulas.curvature_memory, (0, 26, 36, 18)),
        (cost_formulas.optimizer_memory, (6, 32, 42, 24)),
    ],
)
def test_formulas_give_numbers_found_by_hand(function, expected):
    assert tuple(function(SMALL, name) for name in cost_formulas.OPTIMIZERS) == expected


@pytest.fixture(scope="module")
def resnet50():
    return networks.resnet50_workload()


def test_resnet50_has_its_published_size_and_cost(resnet50):
    w = resnet50
    assert w.d == 25_557_032  # torchvision's model card
    assert len(w.layers) == 54  # 53 convolutions and the classifier
    stem = 64 * 3 * 7 * 7 * 112 * 112  # no gradient with respect to the images
    forward = (w.c_fb + stem) / 3
    assert forward / 1e9 == pytest.approx(4.09, abs=0.005)  # the same card: GFLOPS, counted as MACs


def test_saved_numbers_are_the_inputs_of_a_linear_chain():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False))
    # the ReLU's output is kept once, by it and by the last layer; the images for the first
    assert networks.saved_numbers(model, (4,)) == 4 + 3


def test_counter_counts_products_and_writes():
    a, b, v = torch.ones(2, 3), torch.ones(3, 4), torch.ones(3)
    with twins.OperationCounter() as counter:
        _ = a @ b
        _ = a @ v
        _ = torch.dot(v, v)
        v.add_(1.0)
        torch._foreach_mul_([a, v], 2.0)
        torch.linalg.eigh(torch.eye(5))
    assert counter.work == {"products": 24 + 6 + 3, "elementwise": 3 + 6 + 3, "factorisations": 125}


def test_history_of_the_real_optimizers_grows_by_two_numbers_a_pair():
    d = twins.workload(2, 8).d
    for name in ("mlbfgs", "slbfgs"):
        sizes = [twins.measure(name, m, 8).state_numbers for m in (2, 3)]
        assert sizes[1] - sizes[0] == 2 * d


def test_kfac_computes_what_its_definition_says():
    w, twin = twins.workload(2, 8), twins.measure("kfac", 2, 8)
    assert twin.factorisations * 8 == w.inversion
    factor_updates = twins.BATCH * w.factors / 8  # A += aᵀa, G += gᵀg, once in T steps
    # into the eigenbasis and back, each (l + o) d
    assert twin.products == 2 * w.products + factor_updates


def test_tables_follow_the_settings(capsys, monkeypatch, resnet50):
    monkeypatch.setattr(complexity, "resnet50_workload", lambda: resnet50)
    assert complexity.main(["--T", "50", "--M", "20", "--p", "1"]) == 0
    printed = capsys.readouterr().out
    assert "T = 50, M = 20" in printed
    assert f"{25557032 * 41:.4g}" in printed  # d + 2Md


def test_every_reading_belongs_to_a_cell():
    assert set(cost_formulas.READINGS) <= set(cost_formulas.CELLS)
