"""ResNets (He et al. 2016), with torchvision's names of modules.

For 32 x 32 images: one 3 x 3 convolution of stride 1 and no max-pool. `resnet18` then has four
stages of two basic blocks with `width` * (1, 2, 4, 8) channels (Table 1 of He et al. with the usual
CIFAR stem; neither paper of this suite states its stem). `cifar_resnet` has three stages of
n = (depth - 2) / 6 basic blocks with `width` * (1, 2, 4) channels (their section 4.2). Where the
shape changes the shortcut is a 1 x 1 convolution with BatchNorm (their option B), in both: the
parameter-free option A of their section 4.2 would make ResNet-20 1 % smaller.

For ImageNet: `resnet50`, a 7 x 7 convolution of stride 2 and a max-pool, then four stages of 3, 4,
6 and 3 bottlenecks whose stride is in the 3 x 3 convolution. It is torchvision's network (tested)
with a width that can be made smaller.

Names: conv1, bn1, layer1.0.conv1, layer1.0.bn1, ..., layer2.0.downsample.0, ..., fc.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A 3 x 3 convolution that keeps the size (at stride 1); BatchNorm follows, so no bias."""
    return nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)


class _Pointwise(nn.Conv2d):
    """A 1 x 1 convolution without bias.

    With a stride it sees only the pixels that count: the same sums. oneDNN's own way there (torch
    2.14.1, processors with AVX2 and without AVX-512) writes beyond its buffers in the backward pass
    where the channels do not fill its registers of 8, and the process ends with "free(): invalid
    next size".
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(inputs, outputs, kernel_size=1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs, h, w) to (b, outputs, h / stride, w / stride)."""
        if self.in_channels % 8 == 0:
            return super().forward(x)
        rows, columns = self.stride
        return functional.conv2d(x[..., ::rows, ::columns], self.weight)


def _downsample(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    """The shortcut where the shape changes; None for the identity."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(
        _Pointwise(inputs, outputs, stride),
        nn.BatchNorm2d(outputs),
    )


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut: relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut)."""

    expansion = 1

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        """Build the block.

        Args:
            inputs: channels in.
            outputs: channels out.
            stride: of the first convolution and the shortcut.
        """
        super().__init__()
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = _downsample(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs, h, w) to (b, outputs, h / stride, w / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(x)) + shortcut)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The BatchNorm before the sum with the shortcut."""
        return self.bn2


class Bottleneck(nn.Module):
    """Convolutions of 1 x 1, 3 x 3 and 1 x 1, BatchNorm and ReLU after each, and a shortcut."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        """Build the block.

        Args:
            inputs: channels in.
            width: channels of the 3 x 3 convolution; four times as many come out.
            stride: of the 3 x 3 convolution and the shortcut.
        """
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = _downsample(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs, h, w) to (b, 4 * width, h / stride, w / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = functional.relu(self.bn1(self.conv1(x)))
        x = functional.relu(self.bn2(self.conv2(x)))
        return functional.relu(self.bn3(self.conv3(x)) + shortcut)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The BatchNorm before the sum with the shortcut."""
        return self.bn3


class ResNet(nn.Module):
    """Stem, stages `layer1`, `layer2`, ... that halve the image from the second on, classifier."""

    def __init__(
        self,
        blocks: Sequence[int],
        *,
        width: int,
        num_classes: int,
        in_channels: int = 3,
        zero_init_residual: bool = False,
        block: type[BasicBlock | Bottleneck] = BasicBlock,
        large_images: bool = False,
    ) -> None:
        """Build and initialise as torchvision's ResNet does.

        Args:
            blocks: blocks of each stage.
            width: channels of the first stage; each further stage has twice as many.
            num_classes: logits.
            in_channels: channels of the images.
            zero_init_residual: start each block as its shortcut (the last BatchNorm's weight 0).
            block: what the stages are made of.
            large_images: start with ImageNet's stem, which makes images four times smaller.
        """
        super().__init__()
        self.conv1 = (
            nn.Conv2d(in_channels, width, kernel_size=7, stride=2, padding=3, bias=False)
            if large_images
            else _conv3x3(in_channels, width)
        )
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if large_images else nn.Identity()
        self.stages = [f"layer{index + 1}" for index in range(len(blocks))]
        channels = width
        for index, (name, count) in enumerate(zip(self.stages, blocks, strict=True)):
            of_stage = width * 2**index
            outputs = of_stage * block.expansion
            first = block(channels, of_stage, stride=1 if index == 0 else 2)
            rest = [block(outputs, of_stage, stride=1) for _ in range(count - 1)]
            self.add_module(name, nn.Sequential(first, *rest))
            channels = outputs
        self.fc = nn.Linear(channels, num_classes)
        self._initialise(zero_init_residual)

    def _initialise(self, zero_init_residual: bool) -> None:
        """He et al. (2015) by fan-out for convolutions; the classifier keeps torch's default."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BasicBlock | Bottleneck) and zero_init_residual:
                nn.init.zeros_(module.last_norm.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (b, num_classes) of images (b, C, H, W)."""
        x = self.maxpool(functional.relu(self.bn1(self.conv1(images))))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


def resnet18(
    *, width: int = 64, num_classes: int, in_channels: int = 3, zero_init_residual: bool = False
) -> ResNet:
    """ResNet-18 with the CIFAR stem; 11,173,962 parameters at width 64 and 10 classes."""
    return ResNet(
        [2, 2, 2, 2],
        width=width,
        num_classes=num_classes,
        in_channels=in_channels,
        zero_init_residual=zero_init_residual,
    )


def resnet50(
    *, width: int = 64, num_classes: int, in_channels: int = 3, zero_init_residual: bool = False
) -> ResNet:
    """ResNet-50 with ImageNet's stem; 25,557,032 parameters at width 64 and 1000 classes."""
    return ResNet(
        [3, 4, 6, 3],
        width=width,
        num_classes=num_classes,
        in_channels=in_channels,
        zero_init_residual=zero_init_residual,
        block=Bottleneck,
        large_images=True,
    )


def cifar_resnet(
    *,
    depth: int,
    width: int = 16,
    num_classes: int,
    in_channels: int = 3,
    zero_init_residual: bool = False,
) -> ResNet:
    """The thin ResNet of `depth` = 6n + 2 layers; depth 20 and width 16 is ResNet-20."""
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth = {depth} is not 6n + 2")
    return ResNet(
        [(depth - 2) // 6] * 3,
        width=width,
        num_classes=num_classes,
        in_channels=in_channels,
        zero_init_residual=zero_init_residual,
    )
