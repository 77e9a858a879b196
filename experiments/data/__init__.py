"""Data sets, augmentation and batches; `build_data` is the way in.

The images of a small data set stay in memory, on the training device, as raw pixels; a batch is
cropped, mirrored and normalised when it is asked for. Those of ImageNet are read meanwhile.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from experiments.data import cifar, digits
from experiments.data.batches import Batch, Data, ImageSet, InMemoryData, RawData
from experiments.data.holdout import hold_out
from experiments.data.part import WHOLE, Part
from experiments.data.settings import CifarSettings, InputSettings, read_dataset
from experiments.settings import Node, node_name

__all__ = ["Batch", "Data", "ImageSet", "InMemoryData", "Part", "RawData", "build_data"]


def build_data(
    cfg: Node, *, batch_size: int, seed: int, device: torch.device | str, part: Part = WHOLE
) -> Data:
    """The data set that a config node names, ready to train on.

    Args:
        cfg: the node `dataset`.
        batch_size: images of a training batch, over all ranks.
        seed: the run's seed; decides order and augmentation, not the split.
        device: where the batches shall be.
        part: what of every batch, and of the test images, this rank asks for.

    Returns:
        Batches as a pure function of (seed, epoch, batch index).

    Raises:
        UserError: a setting that makes no sense; data that are absent, incomplete or corrupt.
    """
    settings: InputSettings
    name = node_name(cfg, "dataset", ["digits", "imagenet", *cifar.VERSIONS])
    if name == "imagenet":
        from experiments.data import imagenet  # only here: it imports torchvision, which takes long

        return imagenet.build(
            read_dataset(imagenet.ImageNetSettings, cfg),
            batch_size=batch_size,
            seed=seed,
            device=torch.device(device),
            part=part,
        )
    if name == "digits":
        settings = read_dataset(InputSettings, cfg)
        raw = digits.load()
    else:
        settings = read_dataset(CifarSettings, cfg)
        raw = cifar.load(settings)
    if settings.holdout is not None:
        raw = hold_out(raw, settings.holdout)
        settings = replace(settings, test_limit=None)
    return InMemoryData(
        raw, settings, batch_size=batch_size, seed=seed, device=torch.device(device), part=part
    )
