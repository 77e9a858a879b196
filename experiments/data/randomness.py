"""Seeded random streams: what is drawn depends on (seed, epoch, purpose) and on nothing else."""

from __future__ import annotations

import hashlib

import torch


def stream(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """A generator on the CPU for one purpose within one epoch.

    Torch's CPU generator keeps only the low 32 bits of its seed, so neighbouring numbers are
    spread over all bits by SHA-256 first: neither (seed 0, epoch 1) and (seed 1, epoch 0) nor two
    purposes share a stream. The device of the training plays no part.

    Args:
        seed: the run's seed.
        epoch: from 0.
        purpose: what is drawn, for example `order`.
    """
    digest = hashlib.sha256(f"{purpose}/{seed}/{epoch}".encode()).digest()
    generator = torch.Generator(device="cpu")
    generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return generator
