"""Oracles of the quasi-Newton mathematics: NumPy and textbook formulas, no code of the package."""

import numpy as np


def dense_bfgs(ss: list[np.ndarray], ys: list[np.ndarray]) -> np.ndarray:
    """The inverse-Hessian matrix by the textbook update (M Eq. (4)), pair after pair.

    H0 = sᵀy / yᵀy I of the newest pair; oldest pair first.
    """
    n = len(ss[0])
    h = (ss[-1] @ ys[-1]) / (ys[-1] @ ys[-1]) * np.eye(n)
    for s, y in zip(ss, ys, strict=True):
        v = np.eye(n) - np.outer(y, s) / (y @ s)
        h = v.T @ h @ v + np.outer(s, s) / (y @ s)
    return h


def two_loop(g: np.ndarray, ss: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Textbook two-loop recursion (Nocedal and Wright, Algorithm 7.4) in the dtype of its input."""
    q = g.copy()
    alphas = []
    for s, y in zip(ss[::-1], ys[::-1], strict=True):
        alpha = (s @ q) / (y @ s)
        alphas.append(alpha)
        q = q - alpha * y
    r = (ss[-1] @ ys[-1]) / (ys[-1] @ ys[-1]) * q
    for s, y, alpha in zip(ss, ys, alphas[::-1], strict=True):
        beta = (y @ r) / (y @ s)
        r = r + (alpha - beta) * s
    return r


def random_pairs(rng: np.random.Generator, count: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of a positive definite quadratic: y = A s, rows oldest first."""
    root = rng.standard_normal((n, n)) / np.sqrt(n)
    a = root @ root.T + 0.3 * np.eye(n)
    s = rng.standard_normal((count, n))
    return s, s @ a


def parallel_pairs(rng: np.random.Generator, count: int, n: int, cosine: float):
    """Pairs as averaging makes them: neighbours have about this cosine; curvatures 0.2 ... 5."""
    noise = np.sqrt(1 / cosine**2 - 1)
    direction = rng.standard_normal(n)
    curvature = np.exp(rng.uniform(np.log(0.2), np.log(5.0), n))
    s = np.empty((count, n))
    for i in range(count):
        s[i] = direction * 0.9**i
        kick = rng.standard_normal(n)
        direction = direction + noise * kick * np.linalg.norm(direction) / np.linalg.norm(kick)
    return s, s * curvature
