"""Networks, one builder: `build_model` turns the config node `model` into a module.

The caller seeds torch before the call, so that the initial weights are a function of the seed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from experiments.errors import UserError
from experiments.models.mlp import mlp
from experiments.models.resnet import cifar_resnet, resnet18
from experiments.settings import Node, node_name, read_settings

__all__ = ["build_model"]


@dataclass(frozen=True, kw_only=True)
class ResNet18Settings:
    """Keys of `model` for ResNet-18."""

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


ModelSettings = ResNet18Settings | CifarResNetSettings | MLPSettings
SETTINGS: dict[str, type[ModelSettings]] = {
    "resnet18": ResNet18Settings,
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
    if num_classes < 2:
        raise UserError(f"the data set has {num_classes} classes; a classifier needs at least 2")
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise UserError(f"input shape {input_shape} must be (channels, height, width), each >= 1")
    if isinstance(settings, MLPSettings):
        if not settings.hidden or min(settings.hidden) < 1:
            raise UserError(f"model.hidden = {list(settings.hidden)} must be sizes of 1 or more")
        return mlp(settings.hidden, num_classes=num_classes, input_shape=input_shape)

    if settings.width < 1:
        raise UserError(f"model.width = {settings.width} must be 1 or more")
    if isinstance(settings, ResNet18Settings):
        return resnet18(
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
