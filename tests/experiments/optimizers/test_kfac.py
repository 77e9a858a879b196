"""KFAC against its definitions in float64, its place in a checkpoint, and its way through a run.

Tolerances: 1e-10 relative where float64 results differ by the order of summation and by an
inversion with condition numbers up to 1e4.
"""

from __future__ import annotations

import copy
import gc
import io
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.composition import compose_config
from experiments.errors import UserError
from experiments.optimizers import build_optimizer, kfac_layers, kronecker
from experiments.optimizers.kfac import KFAC
from experiments.runs.directory import read_status
from experiments.runs.metrics import read_metrics
from experiments.training.trainer import Trainer
from tests.experiments.optimizers import kfac_oracle as oracle
from tests.experiments.run_configs import (
    ROOT,
    assert_same_bits,
    assert_same_run,
    newest_state,
    run_spec,
    stop_at,
)

EXACT = {"rtol": 1e-10, "atol": 1e-13}
CONFIG = {
    "name": "kfac",
    "_target_": "experiments.optimizers.kfac.KFAC",
    "takes_model": True,
    "lr": 0.05,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "factor_update_interval": 3,
    "inverse_update_interval": 7,
}
LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (5,)),
    "linear without bias": (lambda: nn.Linear(5, 4, bias=False), (5,)),
    "linear on sequences": (lambda: nn.Linear(5, 4), (3, 5)),
    "conv": (lambda: nn.Conv2d(2, 3, 3), (2, 5, 4)),
    "conv without bias": (lambda: nn.Conv2d(2, 3, 3, padding=1, bias=False), (2, 5, 4)),
    "conv 1x1": (lambda: nn.Conv2d(3, 2, 1, stride=2), (3, 5, 4)),
    "conv strided": (lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2)), (2, 6, 4)),
    "conv dilated": (lambda: nn.Conv2d(2, 3, (2, 3), dilation=(3, 2), padding=(2, 1)), (2, 6, 5)),
    "conv same": (lambda: nn.Conv2d(2, 3, (4, 2), dilation=(1, 3), padding="same"), (2, 6, 5)),
    "conv valid": (lambda: nn.Conv2d(2, 3, 2, padding="valid"), (2, 4, 4)),
    "conv reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 4, 4)),
    "conv circular": (
        lambda: nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="circular"),
        (2, 4, 5),
    ),
}


def network(case: str, examples: int = 4) -> tuple[nn.Sequential, Tensor, Tensor]:
    """The layer, an in-place ReLU and a classifier, in float64, with a batch."""
    torch.manual_seed(0)
    build, shape = LAYERS[case]
    layer = build().double()
    images = torch.randn(examples, *shape, dtype=torch.float64)
    width = layer(images)[0].numel()
    net = nn.Sequential(layer, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(width, 3).double())
    return net, images, torch.arange(examples) % 3


def conv_net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Two layers, one of each kind."""
    torch.manual_seed(1)
    layers = [nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)]
    return nn.Sequential(*layers).to(dtype)


def batch(step: int = 0, examples: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(examples, 2, 3, 3, dtype=torch.float64, generator=generator)
    return images, torch.randint(3, (examples,), generator=generator)


def backward(net: nn.Module, images: Tensor, labels: Tensor) -> None:
    cross_entropy(net(images), labels).backward()


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    dtype = next(net.parameters()).dtype
    for step in steps:
        images, labels = batch(step)
        optimizer.zero_grad()
        backward(net, images.to(dtype), labels)
        optimizer.step()


def layer_state(optimizer: KFAC, net: nn.Module, index: int) -> dict[str, Any]:
    weight = net[index].weight  # type: ignore[index]
    return optimizer.state[weight]


def assert_factors(state: dict[str, Any], wanted: tuple[Any, Any]) -> None:
    np.testing.assert_allclose(state["inputs_factor"].numpy(), wanted[0], **EXACT)
    np.testing.assert_allclose(state["outputs_factor"].numpy(), wanted[1], **EXACT)


# --- the maths ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("case", LAYERS)
def test_factors_equal_the_loop_over_examples(case: str) -> None:
    net, images, labels = network(case)
    twin = copy.deepcopy(net)
    optimizer = KFAC(net, lr=0.0)
    backward(net, images, labels)
    optimizer.step()
    for index in (0, 3):
        wanted = oracle.factors(twin, index, images, labels)
        assert_factors(layer_state(optimizer, net, index), wanted)


def test_factors_do_not_depend_on_the_memory_for_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kronecker, "_PATCH_NUMBERS", 1)
    test_factors_equal_the_loop_over_examples("conv strided")


@pytest.mark.parametrize("case", ["conv strided", "linear on sequences"])
def test_pauloski_scales_are_those_of_the_backward_pass(case: str) -> None:
    net, images, labels = network(case)
    A, G = oracle.factors(net, 0, images, labels)
    optimizer = KFAC(net, lr=0.0, normalization="pauloski")
    backward(net, images, labels)
    optimizer.step()
    places = net[0](images)[0].numel() // len(G)
    assert places == (21 if case == "conv strided" else 3)
    spatial = places**2 if case == "conv strided" else 1
    wanted = (A / spatial, G / (len(images) ** 2 * places * spatial))
    assert_factors(layer_state(optimizer, net, 0), wanted)


@pytest.mark.parametrize("method", ["eigen", "cholesky"])
@pytest.mark.parametrize("pi", [False, True])
@pytest.mark.parametrize("case", ["linear", "linear without bias", "conv", "conv without bias"])
def test_step_solves_the_damped_kronecker_system(case: str, pi: bool, method: Any) -> None:
    net, images, labels = network(case)
    before = [p.detach().clone() for p in net[0].parameters()]
    A, G = oracle.factors(net, 0, images, labels)
    settings: Any = {"damping": 0.03, "method": method, "pi_correction": pi}
    optimizer = KFAC(net, lr=1.0, momentum=0.0, kl_clip=None, **settings)
    backward(net, images, labels)
    gradient = oracle.weight_matrix([p.grad.numpy() for p in net[0].parameters()])
    optimizer.step()
    moved = [(b - p.detach()).numpy() for b, p in zip(before, net[0].parameters(), strict=True)]
    factored = pi or method == "cholesky"
    wanted = oracle.normal_equations(gradient, A, G, damping=0.03, factored=factored, pi=pi)
    np.testing.assert_allclose(oracle.weight_matrix(moved), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kl_clip", [1e-3, 1e9])
def test_clip_scales_all_layers_by_one_number(kl_clip: float) -> None:
    images, labels = batch()
    moved: dict[float | None, list[Any]] = {}
    pairs = []
    for clip in (None, kl_clip):
        net = conv_net()
        before = [p.detach().clone() for p in net.parameters()]
        optimizer = KFAC(net, lr=0.5, momentum=0.0, kl_clip=clip)
        backward(net, images, labels)
        gradients = [p.grad.numpy() for p in net.parameters()]  # type: ignore[union-attr]
        optimizer.step()
        after = list(net.parameters())
        moved[clip] = [(b - p.detach()).numpy() for b, p in zip(before, after, strict=True)]
        if clip is None:
            pairs = [(m / 0.5, g) for m, g in zip(moved[None], gradients, strict=True)]
    scale = oracle.kl_scale(pairs, lr=0.5, kappa=kl_clip)
    assert (scale == 1.0) == (kl_clip == 1e9)
    for clipped, free in zip(moved[kl_clip], moved[None], strict=True):
        np.testing.assert_allclose(clipped, scale * free, **EXACT)


@pytest.mark.parametrize("decay_first", [False, True])
@pytest.mark.parametrize(("method", "pi"), [("eigen", False), ("eigen", True), ("cholesky", True)])
def test_training_follows_the_algorithm(method: Any, pi: bool, decay_first: bool) -> None:
    """Nine steps: running averages every 2, inverses every 4, clip, decay, momentum."""
    net = conv_net()
    lr, momentum, decay, damping, kappa = 0.3, 0.8, 0.02, 0.01, 0.05
    optimizer = KFAC(
        net,
        lr,
        momentum,
        decay,
        damping=damping,
        factor_decay=0.6,
        factor_update_interval=2,
        inverse_update_interval=4,
        kl_clip=kappa,
        method=method,
        pi_correction=pi,
        precondition_weight_decay=decay_first,
    )
    theta = {i: matrix(net[i]) for i in (0, 3)}
    buffers = {i: np.zeros_like(m) for i, m in theta.items()}
    averages: dict[int, Any] = {}
    in_use: dict[int, Any] = {}
    scales = []
    updates = 0
    for step in range(9):
        images, labels = batch(step)
        optimizer.zero_grad()
        backward(net, images, labels)
        twin = copy.deepcopy(net)
        gradient = {
            i: oracle.weight_matrix([p.grad.numpy() for p in net[i].parameters()]) for i in (0, 3)
        }
        if step % 2 == 0:
            updates += 1
            keep = min(1 - 1 / updates, 0.6)
            for i in (0, 3):
                new = oracle.factors(twin, i, images, labels)
                old = averages.get(i, (0.0, 0.0))
                averages[i] = [keep * o + (1 - keep) * n for o, n in zip(old, new, strict=True)]
        if step % 4 == 0:
            in_use = {i: [factor.copy() for factor in averages[i]] for i in (0, 3)}
        if decay_first:
            gradient = {i: g + decay * theta[i] for i, g in gradient.items()}
        factored = pi or method == "cholesky"
        v = {
            i: oracle.normal_equations(g, *in_use[i], damping=damping, factored=factored, pi=pi)
            for i, g in gradient.items()
        }
        scale = oracle.kl_scale([(v[i], gradient[i]) for i in (0, 3)], lr, kappa)
        scales.append(scale)
        for i in (0, 3):
            d = scale * v[i] + (0.0 if decay_first else decay) * theta[i]
            buffers[i] = momentum * buffers[i] + d
            theta[i] = theta[i] - lr * buffers[i]
        optimizer.step()
        for i in (0, 3):
            # Steps build on each other, so rounding does too.
            np.testing.assert_allclose(matrix(net[i]), theta[i], rtol=1e-8, atol=1e-10)
    assert min(scales) < 1.0
    for i in (0, 3):
        assert layer_state(optimizer, net, i)["factor_updates"] == 5
        assert layer_state(optimizer, net, i)["inversions"] == 3


def matrix(layer: nn.Module) -> Any:
    return oracle.weight_matrix([p.detach().numpy().copy() for p in layer.parameters()])


def test_changed_damping_acts_at_once_on_eigenvalues() -> None:
    moved = []
    for damping in (0.1, 1e4):
        net = conv_net()
        optimizer = KFAC(net, lr=0.0, momentum=0.0, kl_clip=None, damping=0.1)
        train(net, optimizer, range(1))
        optimizer.param_groups[0].update(lr=1.0, damping=damping)
        before = net[3].weight.detach().clone()
        train(net, optimizer, range(1, 2))
        moved.append((net[3].weight.detach() - before).norm().item())
    # With so much damping V is the gradient / 1e4.
    assert moved[1] == pytest.approx(net[3].weight.grad.norm().item() / 1e4, rel=1e-3)
    assert moved[0] > 100 * moved[1]


# --- what is captured, and what is left alone -----------------------------------------------------


def test_other_parameters_move_as_with_sgd_and_gradients_stay() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 3))
    reference = [p.detach().clone().requires_grad_() for p in net[1].parameters()]
    optimizer = KFAC(net, 0.1, 0.9, 1e-2)
    sgd = torch.optim.SGD(reference, 0.1, 0.9, weight_decay=1e-2)
    for step in range(4):
        images, labels = batch(step)
        optimizer.zero_grad()
        backward(net, images.float(), labels)
        kept = [p.grad.clone() for p in net.parameters()]  # type: ignore[union-attr]
        for p, q in zip(net[1].parameters(), reference, strict=True):
            q.grad = p.grad.clone()  # type: ignore[union-attr]
        optimizer.step()
        sgd.step()
        assert_same_bits([p.grad for p in net.parameters()], kept)
        for p, q in zip(net[1].parameters(), reference, strict=True):
            assert torch.equal(p, q)


def test_only_due_training_passes_are_captured() -> None:
    net = conv_net()
    optimizer = KFAC(net, lr=0.0, factor_update_interval=2)
    images, labels = batch()
    net.eval()
    backward(net, images, labels)
    net.train()
    with torch.no_grad():
        net(images)
    cross_entropy(net(images), labels)  # never differentiated
    backward(copy.deepcopy(net), images, labels)
    optimizer.step()
    assert layer_state(optimizer, net, 0)["factor_updates"] == 0
    train(net, optimizer, range(1, 5))
    # Of steps 1 to 4, the 2nd and the 4th are due.
    assert layer_state(optimizer, net, 0)["factor_updates"] == 2


def test_first_inverse_does_not_wait_for_its_interval() -> None:
    net = conv_net()
    optimizer = KFAC(net, lr=0.0, factor_update_interval=1, inverse_update_interval=10)
    net.eval()
    train(net, optimizer, range(2))
    assert layer_state(optimizer, net, 0)["inversions"] == 0
    net.train()
    train(net, optimizer, range(2, 5))
    assert layer_state(optimizer, net, 0)["inversions"] == 1


def test_layer_without_factors_moves_as_with_sgd() -> None:
    net, twin = conv_net(), conv_net()
    net.eval()
    train(net, KFAC(net, 0.1, 0.9, 1e-2), range(3))
    train(twin, torch.optim.SGD(twin.parameters(), 0.1, 0.9, weight_decay=1e-2), range(3))
    assert_same_bits(net.state_dict(), twin.state_dict())


def test_several_backward_passes_count_as_batches() -> None:
    net = conv_net()
    twin = copy.deepcopy(net)
    optimizer = KFAC(net, lr=0.0)
    for step in range(2):
        backward(net, *batch(step))
    optimizer.step()
    for index in (0, 3):
        parts = [oracle.factors(twin, index, *batch(step)) for step in range(2)]
        wanted = tuple((a + b) / 2 for a, b in zip(*parts, strict=True))
        assert_factors(layer_state(optimizer, net, index), wanted)  # type: ignore[arg-type]


def test_factors_are_the_work_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock books it as the optimizer's; activations are kept for one batch only."""
    counted: list[str] = []

    def counting(module: Any, *arguments: Any) -> Any:
        counted.append(type(module).__name__)
        return kronecker.layer_factors(module, *arguments)

    monkeypatch.setattr(kfac_layers, "layer_factors", counting)
    net = conv_net()
    optimizer = KFAC(net, lr=0.0)
    backward(net, *batch())
    assert counted == []
    net(batch(1)[0])
    assert counted == ["Conv2d", "Linear"]
    optimizer.step()
    backward(net, *batch(2))  # no factors are due
    optimizer.step()
    assert counted == ["Conv2d", "Linear"]


def test_input_that_is_written_over_before_the_step_is_refused() -> None:
    net = conv_net()
    optimizer = KFAC(net)
    images, labels = batch()
    backward(net, images, labels)
    images.zero_()
    with pytest.raises(RuntimeError, match=r"input of layer '0' was changed in place.*a copy"):
        optimizer.step()


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(torch.tanh(self.inner(x))))


def test_layer_called_twice_is_refused_and_can_be_skipped() -> None:
    images, labels = torch.randn(3, 4), torch.tensor([0, 1, 0])
    net = Twice()
    optimizer = KFAC(net)
    backward(net, images, labels)
    with pytest.raises(RuntimeError, match=r"'inner' was called more than once.*skip_layers"):
        optimizer.step()
    net = Twice()
    optimizer = KFAC(net, skip_layers=("inner",))
    backward(net, images, labels)
    optimizer.step()
    assert set(optimizer.state[net.inner.weight]) == {"momentum_buffer"}


def test_unsupported_layers_are_left_to_sgd_and_named(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(nn.Linear):
        pass

    tied = nn.Linear(4, 4)
    tied.weight = nn.Parameter(torch.eye(4))
    user = nn.Linear(4, 4)
    user.weight = tied.weight
    alias = nn.Linear(4, 4)
    frozen = nn.Linear(4, 4)
    frozen.bias.requires_grad_(False)
    modules = [nn.Conv2d(4, 4, 1, groups=2), Odd(4, 4), tied, user, alias, alias, frozen]
    net = nn.Sequential(*modules, nn.Linear(4, 2))
    with caplog.at_level(logging.INFO):
        optimizer = KFAC(net)
    told = caplog.text
    for words in ("0 (groups=2)", "1 (a subclass, Odd)", "2 (shared)", "3 (shared)", "4 (shared)"):
        assert words in told
    assert "6 (frozen)" in told
    with_factors = [p for p, state in optimizer.state.items() if "inputs_factor" in state]
    assert len(with_factors) == 1 and with_factors[0] is net[7].weight


def test_model_is_free_when_the_optimizer_is_gone() -> None:
    net = conv_net()
    optimizer = KFAC(net)
    calls = optimizer._layers[net[0]]._calls
    del optimizer
    gc.collect()
    backward(net, *batch())
    assert calls == []


def test_single_examples_and_keyword_inputs_are_captured() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(2, 3, 2).double(), nn.Linear(12, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(input=torch.tanh(self.conv(input=x)).flatten())

    images, labels = batch(examples=1)
    net = Keyword()
    optimizer = KFAC(net, lr=0.0)
    backward(net, images[0], labels[0])
    optimizer.step()
    twin = nn.Sequential(net.conv, nn.Tanh(), nn.Flatten(), net.fc)
    for layer, index in ((net.conv, 0), (net.fc, 3)):
        wanted = oracle.factors(twin, index, images, labels)
        assert_factors(optimizer.state[layer.weight], wanted)


# --- state ----------------------------------------------------------------------------------------


def reloaded(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


@pytest.mark.parametrize("method", ["eigen", "cholesky"])
@pytest.mark.parametrize("stop", [4, 5, 8])
def test_resume_is_bit_equal(method: Any, stop: int) -> None:
    settings: Any = {
        "weight_decay": 1e-3,
        "method": method,
        "factor_update_interval": 2,
        "inverse_update_interval": 5,
    }
    net, cut, resumed = (conv_net(torch.float32) for _ in range(3))
    whole = KFAC(net, **settings)
    train(net, whole, range(11))
    first = KFAC(cut, **settings)
    train(cut, first, range(stop))
    second = KFAC(resumed, **settings)
    resumed.load_state_dict(cut.state_dict())
    second.load_state_dict(reloaded(first))
    first.zero_grad()
    train(resumed, second, range(stop, 11))
    assert_same_bits(resumed.state_dict(), net.state_dict())
    assert_same_bits(second.state_dict(), whole.state_dict())


def test_loaded_state_is_a_copy() -> None:
    net = conv_net()
    optimizer, other = KFAC(net), KFAC(conv_net())
    train(net, optimizer, range(2))
    state = optimizer.state_dict()
    other.load_state_dict(state)
    kept = copy.deepcopy(state)
    train(net, optimizer, range(2, 7))
    assert_same_bits(other.state_dict(), kept)


def test_low_precision_parameters_have_float32_factors_also_after_a_load() -> None:
    net = conv_net(torch.bfloat16)
    optimizer, other = KFAC(net), KFAC(conv_net(torch.bfloat16))
    train(net, optimizer, range(3))
    other.load_state_dict(reloaded(optimizer))
    assert_same_bits(other.state_dict(), optimizer.state_dict())
    for p, state in other.state.items():
        assert state["momentum_buffer"].dtype == torch.bfloat16 == p.dtype
    factor = other.state[next(iter(other.state))]["inputs_factor"]
    assert factor.dtype == torch.float32
    assert not torch.equal(factor, factor.bfloat16().float())


def test_memory_is_allocated_at_construction() -> None:
    net = conv_net()
    optimizer = KFAC(net)
    tensors = {
        (id(p), key): value.data_ptr()
        for p, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }
    assert len(tensors) == 4 + 2 * 6
    train(net, optimizer, range(3))
    for p, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                assert tensors.pop((id(p), key)) == value.data_ptr()
    assert tensors == {}


@pytest.mark.parametrize("what", ["method", "shape", "sgd", "missing"])
def test_foreign_state_is_refused_and_changes_nothing(what: str) -> None:
    net = conv_net()
    optimizer = KFAC(net)
    train(net, optimizer, range(2))
    kept = copy.deepcopy(optimizer.state_dict())
    if what == "method":
        other: torch.optim.Optimizer = KFAC(conv_net(), method="cholesky", lr=0.7)
        wanted = "method='cholesky'"
    elif what == "sgd":
        other = torch.optim.SGD(conv_net().parameters(), lr=0.7)
        wanted = "method=None"
    elif what == "shape":
        layers = [nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(13, 3)]
        other = KFAC(nn.Sequential(*layers), lr=0.7)
        wanted = r"has shape \(3, 13\) in the state and \(3, 12\) here"
    else:
        other = KFAC(conv_net(), lr=0.7)
        wanted = "entries"
    state = other.state_dict()
    if what == "missing":
        del state["state"][0]["step"]
    with pytest.raises(ValueError, match=wanted):
        optimizer.load_state_dict(state)
    assert_same_bits(optimizer.state_dict(), kept)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"momentum": -0.1}, "Invalid momentum value: -0.1"),
        ({"weight_decay": -0.1}, "Invalid weight_decay value: -0.1"),
        ({"damping": 0.0}, "Invalid damping: 0.0"),
        ({"factor_decay": 1.0}, "Invalid factor_decay: 1.0"),
        ({"kl_clip": 0.0}, "Invalid kl_clip: 0.0"),
        ({"factor_update_interval": 0}, "Invalid factor_update_interval: 0"),
        ({"inverse_update_interval": 2.5}, "Invalid inverse_update_interval: 2.5"),
        ({"inverse_update_interval": 4}, "below factor_update_interval=5"),
        ({"method": "svd"}, "Invalid method: 'svd' (eigen or cholesky)"),
        ({"normalization": "x"}, "Invalid normalization: 'x' (fisher or pauloski)"),
        ({"precondition_weight_decay": True, "weight_decay": 0.0}, "there is no weight_decay"),
        ({"skip_layers": ["fc9"]}, "the model has no layer 'fc9'"),
        ({"skip_layers": "fc"}, "Invalid skip_layers: 'fc'"),
        ({"skip_layers": ["0", "3"]}, "left out: 0 (skip_layers), 3 (skip_layers)"),
        ({"dampin": 0.1}, "did you mean 'damping'"),
    ],
)
def test_mistakes_are_told_in_one_line(settings: dict[str, Any], wanted: str) -> None:
    config = {**compose_config(["optimizer=kfac"]).optimizer, **settings}
    with pytest.raises(UserError) as told:
        build_optimizer(config, conv_net())
    assert wanted in str(told.value) and "\n" not in str(told.value)


def test_model_without_a_layer_to_precondition_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match=r"Sequential has none; left out: 0 \(groups=2\); use"):
        KFAC(net)


def test_second_parameter_group_is_refused() -> None:
    optimizer = KFAC(conv_net())
    with pytest.raises(ValueError, match="no further group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


@pytest.mark.parametrize("method", ["eigen", "cholesky"])
def test_factors_that_are_not_finite_show_in_the_weights(method: Any) -> None:
    """The run is then recorded as diverged; an exception would call it crashed."""
    net = conv_net()
    optimizer = KFAC(net, method=method, factor_update_interval=1, inverse_update_interval=1)
    images, labels = batch()
    images[0, 0, 0, 0] = math.inf
    backward(net, images, labels)
    optimizer.step()
    assert not torch.isfinite(net[0].weight).any()


def test_damping_below_the_precision_is_told() -> None:
    net = conv_net(torch.float32)
    optimizer = KFAC(net, damping=1e-30, method="cholesky")
    images, labels = batch(examples=1)  # of rank one
    backward(net, 1e3 * images.float(), labels)
    with pytest.raises(RuntimeError, match=r"layer '.*damping=1e-30 is too small"):
        optimizer.step()


# --- through a run --------------------------------------------------------------------------------


def test_run_that_is_cut_ends_with_the_same_bits(tmp_path: Path) -> None:
    """22 steps an epoch; cut at step 25, between updates of the factors and of the inverses."""
    changes = {"optimizer": CONFIG, "train.checkpoint_interval": 5}
    whole, cut = run_spec(tmp_path / "whole", **changes), run_spec(tmp_path / "cut", **changes)
    assert Trainer(whole).run() == "done"
    trainer = Trainer(cut)
    stop_at(25, trainer)
    assert newest_state(cut)["position"]["step"] == 25
    assert Trainer(cut).run() == "done"
    assert_same_run(cut, whole)
    losses = [r["loss"] for r in read_metrics(whole.directory / "metrics.jsonl") if "loss" in r]
    assert losses[-1] < 0.5 * losses[0]


def test_command_trains_in_a_worker(tmp_path: Path) -> None:
    arguments = ["optimizer=kfac", "scale=smoke", "launch=subprocess", f"results_dir={tmp_path}"]
    ended = subprocess.run(
        [sys.executable, "-m", "experiments.train", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    (directory,) = tmp_path.glob("runs/digits_mlp/kfac/smoke-seed0-*")
    status = read_status(directory)
    assert status is not None and status.status == "done"
    epochs = [r for r in read_metrics(directory / "metrics.jsonl") if r["kind"] == "epoch"]
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"]


def test_factor_that_defeats_single_precision_is_solved_in_double(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # LAPACK's failure depends on its version, so that it is played here: the rest is real.
    eigh = torch.linalg.eigh

    def fails_in_single(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        values, vectors = eigh(matrix)
        return values, vectors

    columns = torch.randn(30, 3)
    factor = columns @ columns.T
    monkeypatch.setattr(torch.linalg, "eigh", fails_in_single)
    bases = kronecker.eigenbases(kronecker.Factors(factor, factor))
    values, vectors = bases["inputs_eigenvalues"], bases["inputs_eigenvectors"]
    assert values.dtype == vectors.dtype == torch.float32
    torch.testing.assert_close(vectors @ values.diag() @ vectors.T, factor, rtol=1e-5, atol=1e-5)
