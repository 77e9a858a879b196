"""A noisy quadratic over parameters of four shapes, and how to walk on it."""

import numpy as np
import torch

SHAPES = [(3, 4), (7,), (2, 3, 2), ()]
SIZES = [12, 7, 12, 1]
N = sum(SIZES)


def noisy_quadratic(seed=0, noise=0.05, condition=10.0):
    """(θ, t) -> gradient of ½ θᵀAθ with the same noise for the same t."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(N, N, generator=generator, dtype=torch.float64))
    a = q @ torch.diag(torch.logspace(0, np.log10(condition), N, dtype=torch.float64) / 5) @ q.T
    kicks = noise * torch.randn(1000, N, generator=generator, dtype=torch.float64)
    start = torch.randn(N, generator=generator, dtype=torch.float64)
    return start, lambda theta, t: a @ theta + kicks[t - 1]


def parameters(flat, dtype=torch.float64):
    parts = torch.split(flat.to(dtype), SIZES)
    return [torch.nn.Parameter(p.reshape(s).clone()) for p, s in zip(parts, SHAPES, strict=True)]


def flat_of(params):
    return torch.cat([p.detach().reshape(-1) for p in params])


def set_gradients(params, g):
    for p, part in zip(params, torch.split(g, SIZES), strict=True):
        p.grad = part.reshape(p.shape).to(p.dtype).clone()


def run(optimizer, params, gradient, steps, first=1):
    iterates = []
    for t in range(first, first + steps):
        set_gradients(params, gradient(flat_of(params).double(), t))
        optimizer.step()
        iterates.append(flat_of(params))
    return iterates
