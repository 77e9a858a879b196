"""Networks: sizes known from the literature, torchvision's names and numbers, bad settings."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torchvision.models import resnet18 as torchvision_resnet18
from torchvision.models import resnet50 as torchvision_resnet50

from experiments.errors import UserError
from experiments.models import build_model

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "model"
CIFAR = {"num_classes": 10, "input_shape": (3, 32, 32)}
DIGITS = {"num_classes": 10, "input_shape": (1, 8, 8)}
RESNET18 = {"name": "resnet18", "width": 64}
RESNET8 = {"name": "cifar_resnet", "depth": 8, "width": 16}
MLP = {"name": "mlp", "hidden": [128, 64]}
VIT = {"name": "vit"}
DEIT = {"name": "deit_tiny"}
PUBLISHED_DEIT = DEIT | {"mlp_width": 768, "patch": 16}
IMAGENET = {"num_classes": 1000, "input_shape": (3, 224, 224)}
CIFAR100 = {"num_classes": 100, "input_shape": (3, 32, 32)}


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
        # torchvision's count.
        ("resnet50", IMAGENET, 25_557_032),
        # "about 10M parameters" (S Appendix B.2): a layer has 4 w^2 + 4 w of attention,
        # 2 w^2 + 2 w of MLP and 4 w of norms; patches, class token, positions,
        # the last norm and the classifier.
        (
            "vit",
            IMAGENET,
            6 * (6 * 512**2 + 10 * 512) + 512 * (768 + 1 + 1 + 197 + 2 + 1000) + 1000,
        ),
        ("vit", CIFAR, 6 * (6 * 512**2 + 10 * 512) + 512 * (768 + 1 + 1 + 5 + 2 + 10) + 10),
        (
            "deit_tiny",
            CIFAR100,
            12 * (6 * 192**2 + 10 * 192) + 192 * (48 + 1 + 1 + 65 + 2 + 100) + 100,
        ),
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


def test_slimqn_vit_has_about_ten_million_parameters():
    assert 9.5e6 < parameters(build_model(VIT, **CIFAR)) < parameters(build_model(VIT, **IMAGENET))
    assert parameters(build_model(VIT, **IMAGENET)) < 10.5e6


def test_deit_as_published_is_timms():
    timm = pytest.importorskip("timm")
    reference = timm.create_model("deit_tiny_patch16_224", num_classes=100)
    model = build_model(PUBLISHED_DEIT | {"image_size": 224}, **CIFAR100)
    ours = [(name.removeprefix("network."), p.shape) for name, p in model.named_parameters()]
    assert ours == [(name, p.shape) for name, p in reference.named_parameters()]


def test_enlarged_images_are_those_of_the_published_size():
    cfg = PUBLISHED_DEIT | {"layers": 1, "patch": 32}
    torch.manual_seed(0)
    model = build_model(cfg | {"image_size": 64}, **CIFAR100)
    torch.manual_seed(0)
    plain = build_model(cfg, num_classes=100, input_shape=(3, 64, 64))
    images = torch.randn(2, 3, 32, 32)
    enlarged = nn.functional.interpolate(images, scale_factor=2, mode="bicubic")
    assert torch.equal(model(images), plain(enlarged))


def test_resnet50_computes_what_torchvisions_computes():
    torch.manual_seed(0)
    reference = torchvision_resnet50(num_classes=10).train()
    model = build_model({"name": "resnet50"}, **CIFAR).train()
    assert list(model.state_dict()) == list(reference.state_dict())
    model.load_state_dict(reference.state_dict())
    images = torch.randn(4, 3, 64, 64)
    # float32 through 50 layers with the statistics of few numbers; the same operations otherwise.
    torch.testing.assert_close(model(images), reference(images), rtol=1e-3, atol=1e-3)


def saved_weights(path: Path, cfg: dict, **shape) -> Path:
    torch.manual_seed(7)
    torch.save({"model": build_model(cfg, **shape).state_dict()}, path)
    return path


SMALL_DEIT = DEIT | {"layers": 1}


def test_pretrained_weights_come_from_the_file(tmp_path):
    path = saved_weights(tmp_path / "deit.pth", SMALL_DEIT, **CIFAR)
    model = build_model(SMALL_DEIT | {"pretrained": True, "weights": str(path)}, **CIFAR100)
    state = torch.load(path)["model"]
    for name, weight in model.state_dict().items():
        # The classifier of 10 classes does not fit 100 and keeps its own first weights.
        assert torch.equal(weight, state[name]) != name.startswith("head."), name


def test_weights_of_another_patch_and_image_size_are_resampled(tmp_path):
    published = SMALL_DEIT | {"patch": 16}
    path = saved_weights(
        tmp_path / "deit.pth", published, num_classes=10, input_shape=(3, 224, 224)
    )
    model = build_model(SMALL_DEIT | {"pretrained": True, "weights": str(path)}, **CIFAR)
    state = torch.load(path)["model"]
    assert torch.equal(model.blocks[0].attn.qkv.weight, state["blocks.0.attn.qkv.weight"])
    assert torch.equal(model.pos_embed[:, 0], state["pos_embed"][:, 0])
    assert model.pos_embed.shape == (1, 65, 192)
    resampled = pytest.importorskip("timm.layers").resample_patch_embed
    patches = resampled(state["patch_embed.proj.weight"], [4, 4])
    assert torch.equal(model.patch_embed.proj.weight, patches)


@pytest.mark.parametrize(
    ("content", "cfg", "message"),
    [
        (None, {}, "does not exist: expected a file of weights"),
        ("text", {}, "cannot be read"),
        ([1, 2], {}, "holds no state dict of tensors"),
        ({"fc.weight": torch.zeros(2, 2)}, {}, "holds no vision transformer"),
        (SMALL_DEIT, {"mlp_width": 768}, r"mlp.fc1.bias of shape \(192,\), .* shape \(768,\)"),
        (SMALL_DEIT, {"layers": 2}, "has no blocks.1.attn.proj.bias, which the network has"),
        (SMALL_DEIT | {"layers": 2}, {}, "has blocks.1.attn.proj.bias, which the network has not"),
    ],
)
def test_weights_that_will_not_do_are_one_line(content, cfg, message, tmp_path):
    path = tmp_path / "weights.pth"
    if content == "text":
        path.write_text("not weights")
    elif isinstance(content, dict) and "name" in content:
        saved_weights(path, content, **CIFAR)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=message) as caught:
        build_model(SMALL_DEIT | {"pretrained": True, "weights": str(path)} | cfg, **CIFAR)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_hub_out_of_reach_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("timm.models._hub._get_safe_alternatives", lambda name: iter(()))
    with pytest.raises(UserError, match=r"cannot be downloaded .*set model\.weights") as caught:
        build_model(DEIT | {"pretrained": True, "mlp_width": 768}, **CIFAR)
    assert "\n" not in str(caught.value)


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


@pytest.mark.parametrize("cfg", [RESNET18 | {"width": 4}, RESNET8 | {"width": 4}, VIT, DEIT])
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
        ({"name": "resnet50", "width": 0}, "model.width = 0 must be 1 or more"),
        (VIT | {"patch": 5}, "model.patch = 5 must divide the 32 pixels"),
        (VIT | {"heads": 7}, "model.heads = 7 must divide model.width = 512"),
        (VIT | {"heads": 0}, "model.heads = 0 must be 1 or more"),
        (VIT | {"layers": 0}, "model.layers = 0 must be 1 or more"),
        (DEIT | {"image_size": 32}, "model.image_size = 32 must be more than the 32 pixels"),
        (DEIT | {"image_size": 225}, "model.patch = 4 must divide the 225 pixels"),
        (DEIT | {"mlp_width": 0}, "model.mlp_width = 0 must be 1 or more"),
        (DEIT | {"weights": "x"}, "model.weights = 'x' has no effect: set model.pretrained=true"),
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


@pytest.mark.parametrize("width", [3, 4, 8])
def test_a_shortcut_is_the_strided_convolution_of_torch(width):
    network = build_model(OmegaConf.create(RESNET8 | {"width": width}), **CIFAR)
    shortcut = network.get_submodule("layer2.0.downsample.0").double()
    plain = nn.Conv2d(width, 2 * width, kernel_size=1, stride=2, bias=False).double()
    plain.load_state_dict(shortcut.state_dict())  # the same names
    results = []
    for module in (shortcut, plain):  # in float64, which oneDNN does not compute
        images = torch.randn(5, width, 7, 8, generator=torch.Generator().manual_seed(1))
        images = images.double().requires_grad_(True)
        output = module(images)
        output.square().sum().backward()
        results.append((output, images.grad, module.weight.grad))
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-12)  # sums of 80 terms at most
