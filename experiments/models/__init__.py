"""Networks, one builder: `build_model` turns the config node `model` into a module.

The caller seeds torch before the call, so that the initial weights are a function of the seed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from experiments.errors import UserError, one_line
from experiments.models.mlp import mlp
from experiments.models.pretrained import load_pretrained
from experiments.models.resnet import cifar_resnet, resnet18, resnet50
from experiments.models.transformer import Enlarged, vision_transformer
from experiments.settings import Node, node_name, read_settings

__all__ = ["build_model"]


@dataclass(frozen=True, kw_only=True)
class ResNetSettings:
    """Keys of `model` for ResNet-18 and ResNet-50."""

    name: str
    width: int = 64
    zero_init_residual: bool = False


@dataclass(frozen=True, kw_only=True)
class CifarResNetSettings:
    """Keys of `model` for the thin ResNets of depth 6n + 2."""

    name: str
    depth: int
    width: int = 16
    zero_init_residual: bool = False


@dataclass(frozen=True, kw_only=True)
class MLPSettings:
    """Keys of `model` for the multilayer perceptron."""

    name: str
    hidden: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TransformerSettings:
    """Keys of `model` for the vision transformer of the SLIM-QN paper."""

    name: str
    layers: int = 6
    heads: int = 8
    width: int = 512
    mlp_width: int = 512
    patch: int = 16


@dataclass(frozen=True, kw_only=True)
class DeiTTinySettings:
    """Keys of `model` for DeiT-Tiny.

    Attributes:
        name: `deit_tiny`.
        layers: 12 in DeiT-Tiny.
        mlp_width: 192 as printed, 768 as published.
        patch: pixels of a token's side.
        image_size: images are enlarged to so many pixels; null: as the data set gives them.
        pretrained: start from ImageNet's weights.
        weights: the file with them; null: from timm's hub.
    """

    name: str
    layers: int = 12
    mlp_width: int = 192
    patch: int = 4
    image_size: int | None = None
    pretrained: bool = False
    weights: str | None = None


DEIT_TINY = "deit_tiny_patch16_224"  # timm's name
ModelSettings = (
    ResNetSettings | CifarResNetSettings | MLPSettings | TransformerSettings | DeiTTinySettings
)
SETTINGS: dict[str, type[ModelSettings]] = {
    "resnet18": ResNetSettings,
    "resnet50": ResNetSettings,
    "vit": TransformerSettings,
    "deit_tiny": DeiTTinySettings,
    "cifar_resnet": CifarResNetSettings,
    "mlp": MLPSettings,
}


def build_model(cfg: Node, *, num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """The network that a config node names, freshly initialised.

    Args:
        cfg: the node `model`.
        num_classes: classes, at least 2; the network returns as many logits.
        input_shape: (C, H, W) of one image; the first layer takes C channels.

    Returns:
        A module from images (b, C, H, W) float32 to logits (b, num_classes) float32.

    Raises:
        UserError: unknown name or key, or a value that no such network has.
    """
    settings: ModelSettings = read_settings(
        SETTINGS[node_name(cfg, "model", SETTINGS)], cfg, "model"
    )
    try:
        return _built(settings, num_classes, input_shape)
    except (RuntimeError, MemoryError, OverflowError) as error:  # torch's words for too large
        raise UserError(
            f"model={settings.name} cannot be built in these sizes ({one_line(error)}): use "
            "smaller ones"
        ) from error


def _built(
    settings: ModelSettings, num_classes: int, input_shape: tuple[int, int, int]
) -> nn.Module:
    if num_classes < 2:
        raise UserError(f"the data set has {num_classes} classes; a classifier needs at least 2")
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise UserError(f"input shape {input_shape} must be (channels, height, width), each >= 1")
    if isinstance(settings, MLPSettings):
        if not settings.hidden or min(settings.hidden) < 1:
            raise UserError(f"model.hidden = {list(settings.hidden)} must be sizes of 1 or more")
        return mlp(settings.hidden, num_classes=num_classes, input_shape=input_shape)

    if isinstance(settings, TransformerSettings):
        return _vit(settings, num_classes, input_shape)
    if isinstance(settings, DeiTTinySettings):
        return _deit_tiny(settings, num_classes, input_shape)
    if settings.width < 1:
        raise UserError(f"model.width = {settings.width} must be 1 or more")
    if isinstance(settings, ResNetSettings):
        build = resnet18 if settings.name == "resnet18" else resnet50
        return build(
            width=settings.width,
            num_classes=num_classes,
            in_channels=input_shape[0],
            zero_init_residual=settings.zero_init_residual,
        )
    if settings.depth < 8 or (settings.depth - 2) % 6:
        raise UserError(f"model.depth = {settings.depth} must be 6n + 2: 8, 14, 20, 32, 44, 56 ...")
    return cifar_resnet(
        depth=settings.depth,
        width=settings.width,
        num_classes=num_classes,
        in_channels=input_shape[0],
        zero_init_residual=settings.zero_init_residual,
    )


def _vit(
    settings: TransformerSettings, num_classes: int, input_shape: tuple[int, int, int]
) -> nn.Module:
    _check_sizes(settings, input_shape[1:])
    for key in ("heads", "width"):
        if getattr(settings, key) < 1:
            raise UserError(f"model.{key} = {getattr(settings, key)} must be 1 or more")
    if settings.width % settings.heads:
        raise UserError(
            f"model.heads = {settings.heads} must divide model.width = {settings.width}"
        )
    return vision_transformer(
        layers=settings.layers,
        heads=settings.heads,
        width=settings.width,
        mlp_width=settings.mlp_width,
        patch=settings.patch,
        image_size=input_shape[1],
        num_classes=num_classes,
        in_channels=input_shape[0],
    )


def _deit_tiny(
    settings: DeiTTinySettings, num_classes: int, input_shape: tuple[int, int, int]
) -> nn.Module:
    size = settings.image_size
    if size is not None and size <= max(input_shape[1:]):
        raise UserError(
            f"model.image_size = {size} must be more than the {max(input_shape[1:])} pixels of the "
            "images; null leaves them as they are"
        )
    if settings.weights is not None and not settings.pretrained:
        raise UserError(
            f"model.weights = {settings.weights!r} has no effect: set model.pretrained=true"
        )
    pixels = input_shape[1:] if size is None else (size, size)
    _check_sizes(settings, pixels)
    model = vision_transformer(
        layers=settings.layers,
        heads=3,
        width=192,
        mlp_width=settings.mlp_width,
        patch=settings.patch,
        image_size=pixels[0],
        num_classes=num_classes,
        in_channels=input_shape[0],
    )
    if settings.pretrained:
        load_pretrained(model, hub_name=DEIT_TINY, path=settings.weights)
    return model if size is None else Enlarged(model, size)


def _check_sizes(settings: TransformerSettings | DeiTTinySettings, pixels: tuple[int, int]) -> None:
    """Check what both transformers have.

    Raises:
        UserError: a size is below 1, or images do not consist of whole patches.
    """
    for key in ("layers", "mlp_width", "patch"):
        if getattr(settings, key) < 1:
            raise UserError(f"model.{key} = {getattr(settings, key)} must be 1 or more")
    height, width = pixels
    if height != width:
        raise UserError(f"images of {height}x{width} pixels: this network needs square ones")
    if height % settings.patch:
        raise UserError(
            f"model.patch = {settings.patch} must divide the {height} pixels of the images"
        )
