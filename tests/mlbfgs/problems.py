"""A noisy quadratic over parameters of four shapes, and how to walk on it; a state of pairs."""

import copy

import numpy as np
import torch

from mlbfgs import MLBFGS

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


LOADED = {"update_interval": 2, "history_size": 4, "betas": 0.5, "lr": 0.05}


def state_of_one_block(pairs_of_second, **settings):
    """u and v in one block with four pairs; the second's are given as multiples of s."""
    rng = np.random.default_rng(3)
    named = [(n, torch.nn.Parameter(torch.ones(3, dtype=torch.float64))) for n in "uv"]
    optimizer = MLBFGS(named, **{**LOADED, **settings})
    state = copy.deepcopy(optimizer.state_dict())
    s = torch.from_numpy(rng.standard_normal((2, 4, 3)))
    curvature = torch.stack([torch.linspace(0.5, 1, 4).double(), torch.tensor(pairs_of_second)])
    for i, values in state["state"].items():
        values.update(step=50, seeded=1, pairs=6, block=0)  # pairs 2 to 5, in slots 2, 3, 0, 1
        values["s_history"] = s[i]
        values["y_history"] = s[i] * curvature[i, :, None]
    return named, state
