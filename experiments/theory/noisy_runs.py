"""H as the real optimizer has it, along runs on a quadratic with known curvature.

L(θ) = ½ θᵀBθ, B diagonal in a random basis with eigenvalues spread evenly in logarithm between two
bounds, gradients Bθ + n, n ~ N(0, σ²) for each number.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from mlbfgs import MLBFGS

DIMENSION = 10
STEPS = 300
INTERVAL = 10
SEEDS = 5


def dense_inverse_hessian(optimizer: MLBFGS, n: int) -> Tensor:
    """H of an optimizer over one flat parameter: (n, n) float64."""
    columns = [optimizer.hessian_vector([row])[0] for row in torch.eye(n, dtype=torch.float64)]
    return torch.stack(columns, dim=1)


def quadratic(low: float, high: float, generator: torch.Generator, n: int = DIMENSION) -> Tensor:
    """B with eigenvalues from `low` to `high`: (n, n) float64."""
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    spectrum = torch.logspace(0, 1, n, base=high / low, dtype=torch.float64) * low
    b: Tensor = (q * spectrum) @ q.T
    return b


def inverse_hessians_of_runs(
    low: float, high: float, sigma: float, seeds: int = SEEDS
) -> list[tuple[Tensor, int]]:
    """H after every pair update, with the number of pairs in it.

    Args:
        low: smallest eigenvalue of B, and σ_L.
        high: largest eigenvalue of B, and σ_H.
        sigma: noise in each number of the gradient.
        seeds: runs.

    Returns:
        One entry per pair update; a run ends where its parameters are no longer finite.
    """
    logging.getLogger("mlbfgs").setLevel(logging.ERROR)
    found = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        b = quadratic(low, high, generator)
        theta = nn.Parameter(torch.randn(DIMENSION, generator=generator, dtype=torch.float64))
        optimizer = MLBFGS(
            [theta],
            lr=0.1,
            momentum=0.0,
            betas=0.9,
            variant="paper",
            history_size=10,
            update_interval=INTERVAL,
            damping=0.99,
            curvature_bounds=(low, high),
        )
        for step in range(1, STEPS + 1):
            noise = torch.randn(DIMENSION, generator=generator, dtype=torch.float64)
            theta.grad = b @ theta.detach() + sigma * noise
            optimizer.step()
            if not torch.isfinite(theta).all() or float(theta.detach().norm()) > 1e6:
                break
            if step % INTERVAL == 0 and step > INTERVAL:
                pairs = step // INTERVAL - 1
                h = dense_inverse_hessian(optimizer, DIMENSION)
                found.append(((h + h.T) / 2, min(pairs, 10)))
    return found
