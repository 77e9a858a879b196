"""ImageNet, or any tree of images, read from disk while the network trains; `build` is the way in.

The images are in one of three layouts (`find.py`): as folders, as Hugging Face's parquet shards, or
prepared by `python -m experiments.data.prepare`. All give the same batches: the originals bit by
bit, the prepared form up to the JPEG it was written as (bit by bit with raw pixels).
"""

from __future__ import annotations

import os

import torch

from experiments.data.imagenet.find import find_splits
from experiments.data.imagenet.loader import StreamedData
from experiments.data.imagenet.settings import ImageNetSettings
from experiments.data.part import WHOLE, Part

__all__ = ["ImageNetSettings", "StreamedData", "build", "find_splits"]


def build(
    settings: ImageNetSettings,
    *,
    batch_size: int,
    seed: int,
    device: torch.device,
    part: Part = WHOLE,
) -> StreamedData:
    """Find the images and get ready to read them.

    Args:
        settings: the node `dataset`.
        batch_size: images of a training batch, over all ranks.
        seed: the run's seed.
        device: where the batches shall be.
        part: what of every batch, and of the test images, this rank asks for.

    Raises:
        UserError: images are absent, incomplete or not what the settings say.
    """
    return StreamedData(
        find_splits(settings),
        settings,
        batch_size=batch_size,
        seed=seed,
        device=device,
        part=part,
        workers=worker_count(settings, part.count),
    )


def worker_count(settings: ImageNetSettings, ranks: int) -> int:
    """Processes that load: as configured, or each rank's share of the processors.

    Args:
        settings: the node `dataset`.
        ranks: that load beside each other, on this machine or elsewhere.
    """
    if settings.workers is not None:
        return settings.workers
    here = min(ranks, int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))
    return max(1, len(os.sched_getaffinity(0)) // here)
