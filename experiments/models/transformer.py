"""Vision transformers (Dosovitskiy et al. 2021): timm's, in the sizes of both papers.

`vit` is that of the SLIM-QN paper, Appendix B.2: 6 layers, 8 heads, patch 16, hidden and MLP
dimension 512. `deit_tiny` is DeiT-Tiny (Touvron et al. 2021): 12 layers, 3 heads, width 192;
its MLP width is 192 in the mL-BFGS paper and 768 where it was published.

timm is imported inside the function: it takes seconds, which runs of other networks would wait.
"""

from __future__ import annotations

import typing

from torch import Tensor, nn
from torch.nn import functional


class Enlarged(nn.Module):
    """A network behind images enlarged to `size` x `size` pixels (bicubic)."""

    def __init__(self, network: nn.Module, size: int) -> None:
        """Put a network behind the enlargement.

        Args:
            network: takes images (b, C, size, size).
            size: pixels.
        """
        super().__init__()
        self.network = network
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """Logits (b, num_classes) of images (b, C, H, W)."""
        enlarged = functional.interpolate(images, size=(self.size, self.size), mode="bicubic")
        logits: Tensor = self.network(enlarged)
        return logits


def vision_transformer(
    *,
    layers: int,
    heads: int,
    width: int,
    mlp_width: int,
    patch: int,
    image_size: int,
    num_classes: int,
    in_channels: int = 3,
) -> nn.Module:
    """A vision transformer with class token and learned positions, initialised as timm does.

    Args:
        layers: of attention and MLP.
        heads: of each attention; they divide `width`.
        width: numbers of a token.
        mlp_width: numbers between the two layers of an MLP.
        patch: pixels of a token's side; they divide `image_size`.
        image_size: pixels of an image's side.
        num_classes: logits.
        in_channels: channels of the images.
    """
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=image_size,
        patch_size=patch,
        in_chans=in_channels,
        num_classes=num_classes,
        embed_dim=width,
        depth=layers,
        num_heads=heads,
        mlp_ratio=mlp_width / width,
    )
    return typing.cast(nn.Module, model)
