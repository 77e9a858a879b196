"""KFAC against curvlinops on one batch: the same factors, and the same damped solve.

curvlinops is an implementation of its own, after Eschenhagen et al. 2023; its `expand`
setting treats convolutions as Grosse & Martens do. Tolerances: the float32 factors differ in the
order of summation over at most 112 terms, 1e-6 relative to the largest entry; the float64 solves by
eigen-decompositions, 1e-9.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.optimizers.kfac import KFAC

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # of torch.jit.script, which a dependency uses
    from curvlinops import KFACInverseLinearOperator, KFACLinearOperator

DAMPING = 0.02
LAYERS = (0, 3, 5)  # a convolution, and a Linear behind a non-linearity each


def network(bias: bool, dtype: torch.dtype) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A strided, padded convolution and two Linear layers, with a batch."""
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=bias), nn.ReLU(), nn.Flatten()]
    head = [nn.Linear(80, 6, bias=bias), nn.Tanh(), nn.Linear(6, 4, bias=bias)]
    images = torch.randn(7, 3, 8, 8, dtype=dtype)
    return nn.Sequential(*body, *head).to(dtype), images, torch.arange(7) % 4


def of_curvlinops(net: nn.Module, images: Tensor, labels: Tensor) -> Any:
    """curvlinops' KFAC of the mean loss with these labels (the empirical Fisher)."""
    return KFACLinearOperator(
        net,
        nn.CrossEntropyLoss(),
        list(net.parameters()),
        [(images, labels)],
        fisher_type="empirical",
        kfac_approx="expand",
        separate_weight_and_bias=False,
    )


@pytest.mark.parametrize("bias", [True, False])
def test_factors_are_those_of_curvlinops(bias: bool) -> None:
    net, images, labels = network(bias, torch.float32)
    operator = of_curvlinops(net, images, labels)
    assert operator.trace > 0  # computes the factors
    wanted = operator.state_dict()
    optimizer = KFAC(net, lr=0.0)
    net.zero_grad()
    cross_entropy(net(images), labels).backward()
    optimizer.step()
    for index in LAYERS:
        state = optimizer.state[net[index].weight]
        for key, side in (("input_covariances", "inputs"), ("gradient_covariances", "outputs")):
            expected, ours = wanted[key][str(index)], state[f"{side}_factor"]
            assert expected.dtype == ours.dtype == torch.float32
            largest = expected.abs().max().item()
            torch.testing.assert_close(ours, expected, rtol=0.0, atol=1e-6 * largest)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"method": "eigen"}, {"use_exact_damping": True}),
        ({"method": "cholesky", "pi_correction": True}, {"use_heuristic_damping": True}),
    ],
    ids=["eigenvalues", "pi"],
)
@pytest.mark.parametrize("bias", [True, False])
def test_step_is_the_inverse_of_curvlinops(
    bias: bool, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    net, images, labels = network(bias, torch.float64)
    operator = of_curvlinops(net, images, labels)
    inverse = KFACInverseLinearOperator(operator, damping=DAMPING, **theirs)
    assert operator.trace > 0  # computes the factors, before our step moves the network
    optimizer = KFAC(net, lr=1.0, momentum=0.0, damping=DAMPING, kl_clip=None, **ours)
    net.zero_grad()
    cross_entropy(net(images), labels).backward()
    params = list(net.parameters())
    wanted = inverse @ [p.grad.clone() for p in params if p.grad is not None]
    before = [p.detach().clone() for p in params]
    optimizer.step()
    for p, q, v in zip(params, before, wanted, strict=True):
        torch.testing.assert_close(q - p.detach(), v, rtol=1e-9, atol=1e-12)
