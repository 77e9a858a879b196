"""Networks: sizes known from the literature, torchvision's names and numbers, bad settings."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torchvision.models import resnet18 as torchvision_resnet18

from experiments.errors import UserError
from experiments.models import build_model

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "model"
CIFAR = {"num_classes": 10, "input_shape": (3, 32, 32)}
DIGITS = {"num_classes": 10, "input_shape": (1, 8, 8)}
RESNET18 = {"name": "resnet18", "width": 64}
RESNET8 = {"name": "cifar_resnet", "depth": 8, "width": 16}
MLP = {"name": "mlp", "hidden": [128, 64]}


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("config", "shape", "count"),
    [
        # The count that every CIFAR ResNet-18 with this stem has.
        ("resnet18", CIFAR, 11_173_962),
        # He et al. (2016), Table 6: 0.27 M; with their option B 2,752 more than the 269,722.
        ("resnet20", CIFAR, 272_474),
        ("resnet8", CIFAR, 78_042),
        ("mlp", DIGITS, 64 * 128 + 128 + 128 * 64 + 64 + 64 * 10 + 10),
    ],
)
def test_config_gives_the_known_number_of_parameters(config, shape, count):
    model = build_model(OmegaConf.load(CONFIGS / f"{config}.yaml"), **shape)
    assert parameters(model) == count
    images = torch.randn(2, *shape["input_shape"])
    assert model(images).shape == (2, shape["num_classes"])


def test_every_config_file_builds():
    paths = sorted(CONFIGS.glob("*.yaml"))
    assert paths
    for path in paths:
        cfg = OmegaConf.load(path)
        shape = (1, 8, 8) if cfg.name == "mlp" else (3, 32, 32)
        build_model(cfg, num_classes=10, input_shape=shape)


def _with_cifar_stem(model: nn.Module) -> nn.Module:
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def test_resnet18_has_torchvisions_names_shapes_and_order():
    reference = _with_cifar_stem(torchvision_resnet18(num_classes=10))
    model = build_model(RESNET18, **CIFAR)
    ours = [(name, parameter.shape) for name, parameter in model.named_parameters()]
    assert ours == [(name, p.shape) for name, p in reference.named_parameters()]
    assert list(model.state_dict()) == list(reference.state_dict())


@pytest.mark.parametrize("training", [True, False])
def test_resnet18_computes_what_torchvisions_computes(training):
    torch.manual_seed(0)
    reference = _with_cifar_stem(torchvision_resnet18(num_classes=10)).train(training)
    model = build_model(RESNET18, **CIFAR).train(training)
    model.load_state_dict(reference.state_dict())
    images = torch.randn(4, 3, 32, 32)
    # float32 through 18 layers; only the pooling is written differently.
    torch.testing.assert_close(model(images), reference(images), rtol=1e-4, atol=1e-4)


def test_convolutions_start_as_he_by_fan_out():
    torch.manual_seed(0)
    model = build_model(RESNET18, **CIFAR)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            expected = (2 / fan_out) ** 0.5
            # The relative error of a standard deviation of n numbers is about 1 / sqrt(2 n);
            # the smallest layer has 1,728 numbers: 5 sigma are 9 %.
            assert module.weight.std().item() == pytest.approx(expected, rel=0.09)


def test_same_seed_same_weights_other_seed_other_weights():
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append(build_model(RESNET8, **CIFAR).state_dict()["conv1.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_zero_init_residual_is_off_unless_asked_for():
    for zero in (False, True):
        model = build_model(RESNET8 | {"zero_init_residual": zero}, **CIFAR)
        last = [p for name, p in model.named_parameters() if name.endswith("bn2.weight")]
        assert len(last) == 3
        assert all(bool((weight == 0).all()) == zero for weight in last)


def test_width_scales_every_stage():
    model = build_model(RESNET18 | {"width": 8}, **CIFAR)
    assert [model.get_submodule(f"layer{i}.1.conv2").out_channels for i in (1, 2, 3, 4)] == [
        8,
        16,
        32,
        64,
    ]


def test_resnets_take_the_channels_of_the_data():
    model = build_model(RESNET8, **DIGITS)
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("cfg", [RESNET18 | {"width": 4}, RESNET8 | {"width": 4}])
def test_every_parameter_gets_a_gradient(cfg):
    model = build_model(cfg, **CIFAR)
    model(torch.randn(2, 3, 32, 32)).logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"name": "resnet81"}, "unknown model.name = 'resnet81'; did you mean 'resnet18'"),
        ({}, "model.name is missing"),
        (RESNET18 | {"widht": 8}, "unknown key model.widht; did you mean 'width'"),
        (RESNET18 | {"depth": 18}, "unknown key model.depth"),
        (RESNET18 | {"width": 0}, "model.width = 0 must be 1 or more"),
        (RESNET8 | {"depth": 18}, r"model.depth = 18 must be 6n \+ 2"),
        (RESNET8 | {"depth": 2}, r"model.depth = 2 must be 6n \+ 2"),
        (RESNET8 | {"width": -1}, "model.width = -1 must be 1 or more"),
        (MLP | {"hidden": []}, r"model.hidden = \[\] must be sizes"),
        (MLP | {"hidden": [64, 0]}, r"model.hidden = \[64, 0\] must be sizes"),
        (MLP | {"hidden": 64}, "model.hidden = 64 must be a list"),
        ({"name": "mlp"}, "model.hidden is missing"),
    ],
)
def test_bad_settings_are_one_line(cfg, message):
    with pytest.raises(UserError, match=message) as caught:
        build_model(OmegaConf.create(cfg), **CIFAR)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(3, 32), (0, 32, 32)])
def test_bad_input_shape_is_refused(shape):
    with pytest.raises(UserError, match="input shape"):
        build_model(MLP, num_classes=10, input_shape=shape)


def test_one_class_is_refused():
    with pytest.raises(UserError, match="1 classes; a classifier needs at least 2"):
        build_model(MLP, num_classes=1, input_shape=(1, 8, 8))
