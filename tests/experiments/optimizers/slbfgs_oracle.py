"""Algorithm 1 of Moritz, Nishihara and Jordan (2016) in numpy, line by line.

"A linearly-convergent stochastic L-BFGS algorithm", AISTATS 2016. Their letters: w_k the point of
the full gradient, x_t the iterates, L the interval of the pairs, u_r an average of iterates, M
pairs. Two things are filled in: w_(k+1) is the last iterate of an epoch instead of a random one, so
x goes on and t counts on; and u_r needs L iterates, so the first u is that of t = L and the first
pair that of t = 2L.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


def two_loop(v: Vector, pairs: Sequence[tuple[Vector, Vector]]) -> Vector:
    """H v (Nocedal 1980), pairs (s, y) oldest first, H0 = sᵀy / yᵀy of the newest."""
    if not pairs:
        return v
    q, alphas = v.copy(), []
    for s, y in reversed(pairs):
        alpha = (s @ q) / (s @ y)
        q = q - alpha * y
        alphas.append(alpha)
    s, y = pairs[-1]
    z = (s @ y) / (y @ y) * q
    for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
        z = z + (alpha - (y @ z) / (s @ y)) * s
    return z


def minimise(
    w: Vector,
    *,
    gradient: Callable[[Vector, Indices], Vector],
    hessian: Callable[[Vector, Indices], Vector],
    everything: Indices,
    batches: Sequence[Indices],
    curvature_batches: Callable[[int], Indices],
    m: int,
    L: int,
    M: int,
    eta: float,
) -> list[Vector]:
    """Run one step for each batch.

    Args:
        w: (n,) w_0.
        gradient: (x, images) -> (n,), of the mean over the images.
        hessian: (x, images) -> (n, n), likewise.
        everything: all images.
        batches: S_t of every step.
        curvature_batches: r -> T_r, r counted from 1.
        m: steps between full gradients.
        L: steps between averages.
        M: pairs kept.
        eta: step size.

    Returns:
        x after every step.
    """
    x, r = w.copy(), 0  # lines 1-2; H = I while there are no pairs
    iterates, results = [], []
    pairs: list[tuple[Vector, Vector]] = []
    u: dict[int, Vector] = {}
    w_k = mu = x
    for t, S in enumerate(batches):  # lines 3 and 6
        if t % m == 0:
            w_k = x.copy()  # line 22, and 5
            mu = gradient(w_k, everything)  # line 4
        iterates.append(x.copy())  # x_t
        v = gradient(x, S) - gradient(w_k, S) + mu  # lines 8-10
        x = x - eta * two_loop(v, pairs)  # line 11
        if t % L == 0 and t >= L:  # line 12
            r += 1  # line 13
            u[r] = np.mean(iterates[t - L : t], axis=0)  # line 14
            if r >= 2:
                T_r = curvature_batches(r)  # line 15
                s = u[r] - u[r - 1]  # line 16
                y = hessian(u[r], T_r) @ s  # line 17
                pairs = [*pairs, (s, y)][-M:]  # line 18
        results.append(x.copy())
    return results
