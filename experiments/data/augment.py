"""Random crop with zero padding, horizontal flip and normalisation, a whole batch at a time.

The same distribution as torchvision's RandomCrop(size, padding) and RandomHorizontalFlip(0.5) on
the raw pixels followed by ToTensor and Normalize, each image with its own draw. The draws of a
whole epoch are made at once on the CPU and moved to the device, so that a batch costs no transfer.

Shapes: b images of a batch, n of an epoch, (C, H, W) of an image, p padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from experiments.data.randomness import stream


@dataclass(frozen=True)
class Draws:
    """The random choices for n images; None where there is nothing to choose.

    Attributes:
        flips: (n,) bool, whether the image is mirrored.
        rows: (n,) int64, first row of the crop in the padded image, 0 to 2p.
        columns: (n,) int64, first column of the crop in the padded (mirrored) image, 0 to 2p.
    """

    flips: Tensor | None
    rows: Tensor | None
    columns: Tensor | None

    def __getitem__(self, images: slice) -> Draws:
        """The choices for a slice of the images."""
        return Draws(*(None if x is None else x[images] for x in self._all()))

    def to(self, device: torch.device) -> Draws:
        """The same choices on a device."""
        return Draws(*(None if x is None else x.to(device) for x in self._all()))

    def _all(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.flips, self.rows, self.columns


def draw(
    seed: int,
    epoch: int,
    count: int,
    *,
    padding: int,
    flip: bool,
    purpose: str = "augmentation",
) -> Draws:
    """Choose crop and flip for every place in an epoch's order.

    Args:
        seed: the run's seed.
        epoch: from 0.
        count: images of the epoch.
        padding: p; 0 for no crop.
        flip: whether images are mirrored with probability 1/2.
        purpose: what the images are for; each purpose has draws of its own.

    Returns:
        The choices, on the CPU.
    """
    rows = columns = flips = None
    if padding:
        offsets = torch.randint(
            2 * padding + 1, (2, count), generator=stream(seed, epoch, f"{purpose}/crop")
        )
        rows, columns = offsets[0], offsets[1]
    if flip:
        generator = stream(seed, epoch, f"{purpose}/flip")
        flips = torch.randint(2, (count,), generator=generator).bool()
    return Draws(flips, rows, columns)


def flip_and_crop(images: Tensor, draws: Draws, padding: int) -> Tensor:
    """Mirror the chosen images, then cut every one out of its zero-padded self.

    Args:
        images: (b, C, H, W) uint8.
        draws: the choices for these b images.
        padding: p, as in `draw`.

    Returns:
        (b, C, H, W) uint8.
    """
    if draws.flips is not None:
        images = _mirror(images, draws.flips)
    if draws.rows is not None and draws.columns is not None:
        images = _crop(images, draws.rows, draws.columns, padding)
    return images


def _mirror(images: Tensor, flips: Tensor) -> Tensor:
    """Mirror the images (b, C, H, W) where `flips` (b,) is true.

    Whole images are copied out of both versions: seven times as fast on a CPU as `where` on uint8.
    """
    b = len(images)
    both = torch.cat([images, images.flip(3)])
    return both.index_select(0, torch.arange(b, device=images.device) + b * flips)


def _crop(images: Tensor, rows: Tensor, columns: Tensor, padding: int) -> Tensor:
    """Cut (H, W) out of each padded image (H + 2p, W + 2p), at its own row and column.

    Every row of the output is W neighbouring bytes of the padded batch, so the whole batch is one
    `index_select` among all windows of W bytes (a strided view, nothing is copied for it). That is
    five to fifteen times as fast on a CPU as gathering pixels.
    """
    b, channels, height, width = images.shape
    padded = functional.pad(images, (padding,) * 4)
    padded_height, padded_width = padded.shape[2:]
    planes = torch.arange(b * channels, device=images.device).view(b, channels, 1)
    lines = rows[:, None, None] + torch.arange(height, device=images.device)
    starts = (planes * padded_height + lines) * padded_width + columns[:, None, None]
    windows = padded.view(-1).unfold(0, width, 1)
    return windows.index_select(0, starts.view(-1)).view(b, channels, height, width)


class Normalise:
    """From raw pixels to what the network sees: (pixel / pixel_max - mean) / std, per channel."""

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], *, pixel_max: int, device: torch.device
    ) -> None:
        """Precompute the one multiplication and the one addition per pixel.

        Args:
            mean: C means of pixels scaled to [0, 1].
            std: C standard deviations of the same.
            pixel_max: the raw value that stands for 1.
            device: where the batches are.
        """
        mean64, std64 = (torch.tensor(x, dtype=torch.float64) for x in (mean, std))
        self.scale = (1 / (pixel_max * std64)).to(device, torch.float32)
        self.shift = (-mean64 / std64).to(device, torch.float32)

    def __call__(self, images: Tensor) -> Tensor:
        """(b, C, H, W) uint8 to float32."""
        scale, shift = self.scale.view(1, -1, 1, 1), self.shift.view(1, -1, 1, 1)
        return images.to(torch.float32).mul_(scale).add_(shift)

    def channels_last(self, images: Tensor) -> Tensor:
        """(b, H, W, C) uint8 to (b, C, H, W) float32 in torch's memory format channels_last.

        The numbers of a line of pixels are one dimension meanwhile: torch's loops over three
        channels only would take twice as long on a CPU. There every image stays in the cache from
        its conversion to its last addition, a third faster again; a GPU has the batch at once.
        """
        width = images.shape[2]
        scale, shift = self.scale.repeat(width), self.shift.repeat(width)
        lines = torch.empty_like(images.flatten(2), dtype=torch.float32)
        parts = (
            zip(lines, images.flatten(2), strict=True)
            if images.device.type == "cpu"
            else ((lines, images.flatten(2)),)
        )
        for out, pixels in parts:
            out.copy_(pixels).mul_(scale).add_(shift)
        return lines.view(images.shape).permute(0, 3, 1, 2)
