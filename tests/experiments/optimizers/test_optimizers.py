"""The builder of optimizers: what reaches the callable, and what is refused in one line."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from experiments.composition import compose_config, options
from experiments.errors import UserError
from experiments.optimizers import build_optimizer
from mlbfgs import variant

HERE = "tests.experiments.optimizers.test_optimizers"


class Recording(torch.optim.SGD):
    """Remembers what it was called with."""

    def __init__(self, params: Any, lr: float, *, nested: Any = None, text: str = ""):
        self.received = {"params": params, "lr": lr, "nested": nested, "text": text}
        super().__init__(params.parameters() if isinstance(params, nn.Module) else params, lr=lr)


def not_an_optimizer(params: Iterator[Any]) -> str:
    return "text"


VARIANTS = {
    "lbfgs": variant.PAPER,
    "mlbfgs": variant.PAPER,
    "mlbfgs_released": variant.RELEASED_BLOCKWISE,
    "slimqn": variant.PAPER,
    "slimqn_released": variant.RELEASED_FULL,
}


def build(**values: Any) -> torch.optim.Optimizer:
    return build_optimizer(OmegaConf.create({"name": "x", **values}), nn.Linear(3, 2))


@pytest.mark.parametrize("name", options("optimizer"))
def test_every_config_builds_with_its_settings(name: str) -> None:
    config = compose_config([f"optimizer={name}"]).optimizer
    # a ResNet's names: the released optimizers leave three of these layers out of their blocks
    layers = {"conv1": (3, 2), "bn1": (2, 2), "layer1": (2, 2), "fc": (2, 1)}
    net = nn.Sequential(OrderedDict({key: nn.Linear(*size) for key, size in layers.items()}))
    optimizer = build_optimizer(config, net)
    for key, value in config.items():
        if key in optimizer.defaults:
            wanted = tuple(value) if OmegaConf.is_list(value) else value
            if key == "variant":
                wanted = VARIANTS[name].switches()
            assert optimizer.defaults[key] == wanted, key
    count = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert count == 8 + 6 + 6 + 3


def test_resnet_blocks_are_the_papers_four() -> None:
    from experiments.models import build_model

    config = compose_config(["experiment=cifar10_resnet18", "optimizer=mlbfgs", "scale=smoke"])
    model = build_model(config.model, num_classes=10, input_shape=(3, 32, 32))
    optimizer: Any = build_optimizer(config.optimizer, model)
    for _ in range(3 * config.optimizer.update_interval):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    assert len(optimizer.curvature_records()) == 4


def test_parameters_arrive_named_and_lists_as_tuples() -> None:
    optimizer: Any = build(_target_=f"{HERE}.Recording", lr=0.1, nested=[1, [2, 3]], text="ab")
    assert optimizer.received["nested"] == (1, (2, 3))
    assert optimizer.received["text"] == "ab"
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


def test_takes_model_hands_over_the_model() -> None:
    optimizer: Any = build(_target_=f"{HERE}.Recording", takes_model=True, lr=0.1)
    assert isinstance(optimizer.received["params"], nn.Linear)


def test_plain_mapping_will_do() -> None:
    optimizer = build_optimizer(
        {"name": "sgd", "_target_": "torch.optim.SGD", "lr": 0.5}, nn.Linear(3, 2)
    )
    assert optimizer.defaults["lr"] == 0.5


def test_a_frozen_config_from_before_there_were_variants_means_the_papers_algorithm() -> None:
    """Not the default of the class: a run that is resumed goes on as it began."""
    for target in ("mlbfgs.MLBFGS", "mlbfgs.SLIMQN"):
        optimizer = build_optimizer({"name": "old", "_target_": target, "lr": 0.5}, nn.Linear(3, 2))
        assert variant.Variant(**optimizer.param_groups[0]["variant"]) == variant.PAPER


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"_target_": "torch.optim.SGD", "lr": 0.1, "momentun": 0.9}, "did you mean 'momentum'"),
        ({"_target_": "torch.optim.SGD", "lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"_target_": "torch.optim.SGD", "lr": "big"}, "lr='big'"),
        ({"_target_": "torch.optim.SDG", "lr": 0.1}, "did you mean 'SGD'"),
        ({"_target_": "no_such_package.SGD", "lr": 0.1}, "cannot be imported"),
        ({"_target_": "SGD", "lr": 0.1}, "cannot be imported"),
        ({"lr": 0.1}, "_target_=None"),
        ({"_target_": f"{HERE}.not_an_optimizer"}, "made a str"),
        ({"_target_": "mlbfgs.MLBFGS", "damping": 2.0}, "damping"),
        ({"_target_": "mlbfgs.MLBFGS", "blocks": "resblocks:2"}, "resblocks:2"),
    ],
)
def test_mistakes_are_told_in_one_line(values: dict[str, Any], wanted: str) -> None:
    with pytest.raises(UserError) as told:
        build(**values)
    assert wanted in str(told.value)
    assert "\n" not in str(told.value)
