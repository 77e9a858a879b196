"""The opponents that come by config: they step as defined, train, and survive being cut.

Tolerances: 1e-10 relative where float64 results differ by the order of summation.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.composition import compose_config
from experiments.errors import UserError
from experiments.optimizers import build_optimizer
from experiments.optimizers.muon import Muon
from experiments.optimizers.normalized_sgd import NormalizedSGD
from experiments.runs.metrics import read_metrics
from experiments.training.trainer import Trainer
from tests.experiments.run_configs import (
    assert_same_bits,
    assert_same_run,
    newest_state,
    run_spec,
    stop_at,
)

EXACT = {"rtol": 1e-10, "atol": 1e-13}
# What a short run on digits needs beside the config's own settings, to pass through all its phases.
SHORT: dict[str, dict[str, Any]] = {
    "adagrad": {},
    "adadelta": {},
    "lbfgs": {"lr": 0.02, "update_interval": 8, "history_size": 2},
    "muon": {"weight_decay": 1e-3},
    "sgd_normalized": {"weight_decay": 1e-4},
    "shampoo": {"lr": 0.02, "preconditioning_compute_steps": 4},
    "soap": {"precondition_frequency": 4},
}
EXTRA = ("shampoo", "soap")


def settings(name: str, **changes: Any) -> dict[str, Any]:
    config = OmegaConf.to_container(compose_config([f"optimizer={name}"]).optimizer)
    assert isinstance(config, dict)
    return {**config, **changes}


def with_extra(name: str) -> None:
    if name in EXTRA:
        pytest.importorskip("pytorch_optimizer", reason="the optional extra shampoo is absent")


def small_net(*, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)]
    return nn.Sequential(*layers).to(dtype)


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    body = [nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 5, 2), nn.BatchNorm2d(5), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(45, 3))


def batch_gradients(net: nn.Module, step: int, *shape: int) -> None:
    """Gradients of a batch that depends on the step alone."""
    generator = torch.Generator().manual_seed(step)
    dtype = next(net.parameters()).dtype
    images = torch.randn(8, *shape, dtype=dtype, generator=generator)
    labels = torch.randint(3, (8,), generator=generator)
    net.zero_grad()
    cross_entropy(net(images), labels).backward()


def values(tensors: Any) -> np.ndarray[Any, Any]:
    return np.concatenate([t.detach().numpy().reshape(-1) for t in tensors])


# --- through a run --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHORT)
def test_run_that_is_cut_ends_with_the_same_bits(tmp_path: Any, name: str) -> None:
    """22 steps an epoch, two epochs; cut at step 25."""
    with_extra(name)
    changes = {
        "optimizer": settings(name, **SHORT[name]),
        "model": {"name": "mlp", "hidden": [32, 16]},
        "train.checkpoint_interval": 5,
    }
    whole, cut = run_spec(tmp_path / "whole", **changes), run_spec(tmp_path / "cut", **changes)
    assert Trainer(whole).run() == "done"
    stop_at(25, Trainer(cut))
    assert newest_state(cut)["position"]["step"] == 25
    assert Trainer(cut).run() == "done"
    assert_same_run(cut, whole)
    losses = [r["loss"] for r in read_metrics(whole.directory / "metrics.jsonl") if "loss" in r]
    assert losses[-1] < 0.9 * losses[0]


# --- Shampoo --------------------------------------------------------------------------------------


def test_shampoo_moves_from_the_first_step_and_computes_roots_once_an_interval() -> None:
    with_extra("shampoo")
    package = pytest.importorskip(
        "pytorch_optimizer", reason="the optional extra shampoo is absent"
    )
    wanted = settings("shampoo")
    assert wanted["preconditioning_compute_steps"] == 10

    def train(optimizer: torch.optim.Optimizer, net: nn.Module, steps: int) -> list[int]:
        """The steps in which the inverse roots changed."""
        rooted = []
        for step in range(1, steps + 1):
            state = [dict(entry) for entry in optimizer.state.values()]
            before = [v.clone() for e in state for k, v in e.items() if k.startswith("inv_")]
            batch_gradients(net, step, 6)
            optimizer.step()
            state = [dict(entry) for entry in optimizer.state.values()]
            after = [v for e in state for k, v in e.items() if k.startswith("inv_")]
            if not before or not all(map(torch.equal, before, after)):
                rooted.append(step)
        return rooted

    net, every = small_net(), small_net()
    start = [p.detach().clone() for p in net.parameters()]
    assert train(build_optimizer(OmegaConf.create(wanted), net), net, 1) == [1]
    assert not any(torch.equal(a, b) for a, b in zip(start, net.parameters(), strict=True))
    # as the package with roots in every step, in its first
    train(package.Shampoo(every.parameters(), lr=wanted["lr"]), every, 1)
    np.testing.assert_array_equal(values(net.parameters()), values(every.parameters()))
    net = small_net()
    assert train(build_optimizer(OmegaConf.create(wanted), net), net, 22) == [1, 11, 21]


# --- normalised SGD -------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("groups", [1, 2])
def test_normalized_sgd_divides_by_one_norm(groups: int, momentum: float) -> None:
    net = small_net()
    params = list(net.parameters())
    split: Any = [{"params": params[:3]}, {"params": params[3:]}] if groups == 2 else params
    optimizer = NormalizedSGD(split, lr=0.3, momentum=momentum, weight_decay=0.02)
    theta, buffer = values(params), 0.0
    for step in range(5):
        batch_gradients(net, step, 6)
        gradient = values(p.grad for p in params) + 0.02 * theta
        kept = [p.grad.clone() for p in params if p.grad is not None]
        optimizer.step()
        buffer = momentum * buffer + gradient / np.sqrt(np.sum(gradient**2))
        theta = theta - 0.3 * buffer
        np.testing.assert_allclose(values(params), theta, **EXACT)
        assert_same_bits([p.grad for p in params], kept)


def test_normalized_sgd_stays_where_the_gradient_is_zero() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = NormalizedSGD([p, nn.Parameter(torch.ones(2))])
    optimizer.step()  # no gradient at all
    p.grad = torch.zeros(3)
    optimizer.step()
    assert torch.equal(p, torch.ones(3))


def test_normalized_sgd_does_not_hide_a_gradient_that_is_not_finite() -> None:
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.tensor([1.0, float("inf")])
    NormalizedSGD([p]).step()
    assert not torch.isfinite(p).all()


# --- Muon -----------------------------------------------------------------------------------------


def test_muon_is_torchs_muon_and_adamw() -> None:
    net, twin = (small_net(dtype=torch.float32) for _ in range(2))
    ours = Muon(net, lr=0.05, weight_decay=0.1, adamw_lr_ratio=0.2, betas=(0.8, 0.9), eps=1e-6)
    hidden, others = twin[2].weight, [p for p in twin.parameters() if p is not twin[2].weight]
    muon = torch.optim.Muon([hidden], lr=0.05, weight_decay=0.1, momentum=0.95)
    adamw = torch.optim.AdamW(others, lr=0.05 * 0.2, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6)
    for step in range(5):
        for model in (net, twin):
            batch_gradients(model, step, 6)
        ours.step()
        muon.step()
        adamw.step()
        assert_same_bits(dict(net.state_dict()), dict(twin.state_dict()))


@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw", "spectral_unclamped"])
def test_muon_flattens_a_convolution(adjust_lr: Any) -> None:
    net = conv_net()
    weight: Tensor = net[2].weight
    matrix = nn.Parameter(weight.detach().clone().reshape(5, 16))
    optimizer = Muon(net, adjust_lr=adjust_lr)
    reference = torch.optim.Muon(
        [matrix], lr=0.02, weight_decay=0.0, momentum=0.95, adjust_lr_fn=adjust_lr
    )
    for step in range(3):
        batch_gradients(net, step, 2, 6, 6)
        assert weight.grad is not None
        matrix.grad = weight.grad.reshape(5, 16).clone()
        optimizer.step()
        reference.step()
        assert torch.equal(weight.reshape(5, 16), matrix)


def test_muon_steps_the_same_in_channels_last() -> None:
    plain = conv_net()
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    assert last[2].weight.stride() != plain[2].weight.stride()
    optimizers = Muon(plain), Muon(last)
    for step in range(3):
        batch_gradients(plain, step, 2, 6, 6)
        for p, q in zip(plain.parameters(), last.parameters(), strict=True):
            assert p.grad is not None
            q.grad = torch.empty_like(q).copy_(p.grad)
        for optimizer in optimizers:
            optimizer.step()
    assert_same_bits(list(last.parameters()), list(plain.parameters()))
    assert_same_bits(optimizers[1].state_dict()["state"], optimizers[0].state_dict()["state"])


def test_muon_takes_the_layers_between_the_first_and_the_last() -> None:
    net = conv_net()
    muon, adamw = Muon(net).param_groups
    assert muon["param_names"] == ["2.weight"]
    assert adamw["param_names"] == [
        *("0.weight", "0.bias", "2.bias", "3.weight", "3.bias", "5.weight", "5.bias")
    ]
    with pytest.raises(ValueError, match=r"Sequential has 2 such layers: use a deeper model"):
        Muon(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))


# --- classical L-BFGS -----------------------------------------------------------------------------


def test_lbfgs_is_the_recursion_on_plain_differences() -> None:
    net = small_net()
    interval, size, lr, decay = 3, 2, 0.05, 5e-4
    changes = {"update_interval": interval, "history_size": size, "lr": lr}
    optimizer = build_optimizer(settings("lbfgs", **changes), net)
    theta = values(net.parameters())
    pairs: list[tuple[Any, Any]] = []
    last: tuple[Any, Any] | None = None
    for step in range(1, 16):
        batch_gradients(net, step, 6)
        gradient = values(p.grad for p in net.parameters()) + decay * theta
        optimizer.step()
        # The pair of a step is used from the next one on (mL-BFGS, Algorithm 1: t > 2T).
        theta_before = theta
        theta = theta - lr * (two_loops(gradient, pairs) if step > 2 * interval else gradient)
        np.testing.assert_allclose(values(net.parameters()), theta, rtol=1e-8, atol=1e-10)
        if step % interval == 0:
            if last is not None:
                pairs = [*pairs, (theta_before - last[0], gradient - last[1])][-size:]
            last = theta_before, gradient
    assert len(pairs) == size


def two_loops(g: Any, pairs: list[tuple[Any, Any]]) -> Any:
    """The two-loop recursion (Nocedal & Wright 2006, Algorithm 7.4)."""
    alphas = []
    for s, y in reversed(pairs):
        alphas.append(s @ g / (s @ y))
        g = g - alphas[-1] * y
    s, y = pairs[-1]
    r = g * (s @ y) / (y @ y)
    for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
        r = r + s * (alpha - y @ r / (s @ y))
    return r


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "wanted"),
    [
        ("sgd_normalized", {"lr": -1.0}, "Invalid learning rate: -1.0"),
        ("sgd_normalized", {"momentum": -0.5}, "Invalid momentum value: -0.5"),
        ("sgd_normalized", {"nesterov": True}, "optimizer.nesterov is no argument"),
        ("muon", {"lr": -1.0}, "Invalid learning rate: -1.0"),
        ("muon", {"weight_decay": -1.0}, "Invalid weight_decay value: -1.0"),
        ("muon", {"momentum": 1.0}, "Invalid momentum value: 1.0"),
        ("muon", {"ns_steps": 0}, "Invalid ns_steps: 0"),
        ("muon", {"adjust_lr": "rms"}, "one of original, match_rms_adamw, spectral_unclamped"),
        ("muon", {"betas": [0.9, 1.0]}, "Invalid betas: (0.9, 1.0)"),
        ("shampoo", {"matrix_ep": 1e-6}, "did you mean 'matrix_eps'"),
        ("soap", {"betas": [2.0, 0.9]}, "betas"),
    ],
)
def test_mistakes_are_told_in_one_line(name: str, changes: dict[str, Any], wanted: str) -> None:
    with_extra(name)
    with pytest.raises(UserError) as told:
        build_optimizer(settings(name, **changes), small_net())
    assert wanted in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize("name", EXTRA)
def test_absent_extra_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)  # import finds nothing
    with pytest.raises(UserError, match=r"not installed: python -m pip install .*'\.\[shampoo\]'"):
        build_optimizer(settings(name), small_net())
