"""What KFAC captures of the passes, and what it leaves alone."""

from __future__ import annotations

import copy
import gc
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.optimizers import kfac_layers, kronecker
from experiments.optimizers.kfac import KFAC
from tests.experiments.optimizers import kfac_oracle as oracle
from tests.experiments.optimizers.kfac_nets import (
    assert_factors,
    backward,
    batch,
    conv_net,
    layer_state,
    train,
)
from tests.experiments.run_configs import (
    assert_same_bits,
)


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
