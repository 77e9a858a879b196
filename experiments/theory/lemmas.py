"""M Lemma 2 (averages keep the secant equation) and M Theorem 1 (the floor of the loss).

Lemma 2 is checked in rational arithmetic: with gradients g_t = B θ_t + c and one β, s and y of
averages satisfy y = B s exactly, whatever the path. The lemma's words are that averages give "the
same Hessian approximation"; that is another matter, measured by the distance of the two matrices H.

Theorem 1: if every pair that is used has <s, y> >= α ε ‖s‖ with α > 2, then
L(θ_t) >= (α-2)² λ / (2Λ²) ε² "at any iteration t". What the proof shows for noise of length at most
ε is ‖s‖ >= (α-2) ε / Λ; it then sets L(θ_t+1) = 0, below the floor. Since the ends of s are ‖s‖
apart, one of them has at least λ/2 (‖s‖/2)², a quarter of the floor.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from random import Random

import numpy as np
from numpy.typing import NDArray

from experiments.theory.exact import Vector, combine, dense, dot, two_loop, vector
from experiments.theory.findings import Findings, exact, share

FloatArray = NDArray[np.float64]
Pair = tuple[Vector, Vector]


def run(cases: int = 20, seeds: int = 20) -> Findings:
    """Settle M-L2 and M-Th1.

    Args:
        cases: random quadratics and paths for the lemma.
        seeds: runs for the theorem.
    """
    found = Findings("lemmas", settings={"cases": cases, "seeds": seeds})
    _lemma2(found, cases)
    _theorem1(found, seeds)
    return found


def averaged_pairs(
    path: list[Vector], gradients: list[Vector], beta1: Fraction, beta2: Fraction, interval: int
) -> list[Pair]:
    """Pairs from averages every T steps, the averages seeded with the first values (M Eq. (6))."""
    points, slopes = path[0], gradients[0]
    snapshots = [(points, slopes)]
    for t in range(1, len(path)):
        points = combine(beta1, points, 1 - beta1, path[t])
        slopes = combine(beta2, slopes, 1 - beta2, gradients[t])
        if t % interval == 0:
            snapshots.append((points, slopes))
    one = Fraction(1)
    return [
        (combine(one, new[0], -one, old[0]), combine(one, new[1], -one, old[1]))
        for old, new in pairwise(snapshots)
    ]


def random_path(seed: int, n: int, steps: int) -> tuple[list[Vector], list[Vector], list[Vector]]:
    """A symmetric B (its rows), a path and its noise-free gradients, in small fractions."""
    rng = Random(seed)
    half = [[Fraction(rng.randint(-3, 3)) for _ in range(n)] for _ in range(n)]
    rows = [
        tuple(half[i][j] + half[j][i] + (Fraction(8) if i == j else 0) for j in range(n))
        for i in range(n)
    ]
    linear = vector(*(rng.randint(-5, 5) for _ in range(n)))
    path = [vector(*(rng.randint(-9, 9) for _ in range(n))) for _ in range(steps + 1)]
    gradients = [tuple(dot(row, x) + c for row, c in zip(rows, linear, strict=True)) for x in path]
    return rows, path, gradients


def secant_gap(rows: list[Vector], pairs: list[Pair]) -> Fraction:
    """Largest |y - B s| of any entry."""
    gaps = [abs(a - dot(row, s)) for s, y in pairs for row, a in zip(rows, y, strict=True)]
    return max(gaps)


def _lemma2(found: Findings, cases: int) -> None:
    n, steps, beta = 4, 12, Fraction(9, 10)
    gaps: list[Fraction] = []
    mixed: list[Fraction] = []
    distances: list[float] = []
    newest: list[Fraction] = []
    for seed in range(cases):
        rows, path, gradients = random_path(seed, n, steps)
        for interval in (1, 3):
            pairs = averaged_pairs(path, gradients, beta, beta, interval)
            gaps.append(secant_gap(rows, pairs))
            other = averaged_pairs(path, gradients, beta, Fraction(1, 2), interval)
            mixed.append(secant_gap(rows, other))
            plain = averaged_pairs(path, gradients, Fraction(0), Fraction(0), interval)
            distances.append(_distance(pairs[-3:], plain[-3:]))
            s, y = pairs[-1]
            newest.append(
                max(abs(v) for v in combine(Fraction(1), two_loop(y, pairs), Fraction(-1), s))
            )
    count = len(gaps)
    words = "largest |y - B s| of averaged pairs, rational arithmetic"
    found.add("secant_gap", exact(float(max(gaps)), words, count))
    words = "largest |H y - s| of the newest averaged pair, rational arithmetic"
    found.add("newest_secant_gap", exact(float(max(newest)), words, count))
    words = "smallest relative distance of H from three averaged and three plain pairs, n = 4"
    found.add("distance_of_h", exact(min(distances), words, count))
    words = "smallest over the cases of the largest |y - B s| where β1 = 0.9, β2 = 0.5"
    found.add("secant_gap_two_betas", exact(float(min(mixed)), words, count))
    found.notes.append(
        "M Lemma 2's proof shows y = B s for averages, and that is exact. Its statement, the same "
        "approximation H, does not follow: the pairs are others, so H is another matrix that "
        "satisfies other secant equations. S has two coefficients; with β1 ≠ β2 even y = B s fails."
    )


def _distance(a: list[Pair], b: list[Pair]) -> float:
    left, right = (np.array([[float(v) for v in row] for row in dense(p)]) for p in (a, b))
    return float(np.linalg.norm(left - right) / np.linalg.norm(right))


def _theorem1(found: Findings, seeds: int) -> None:
    low, high, epsilon, alpha = 0.5, 1.0, 0.1, 3.0
    floor = (alpha - 2) ** 2 * low / (2 * high**2) * epsilon**2
    found.settings["theorem1"] = {"λ": low, "Λ": high, "ε": epsilon, "α": alpha, "floor": floor}
    found.add("exact_counterexample", exact(*_newton_step()))
    _pair_lengths(found, low, high, epsilon, alpha)
    runs = [loss_with_selected_pairs(seed, low, high, epsilon, alpha) for seed in range(seeds)]
    below = sum(min(losses) < floor for losses, _ in runs)
    words = "share of L-BFGS runs with selected pairs that come below the floor at some iteration"
    found.add("runs_below_floor", share(below, seeds, words))
    tails = sorted(float(np.mean(losses[-50:])) / floor for losses, _ in runs)
    words = "median over runs of the mean loss of the last 50 iterations, over the floor"
    found.add("tail_over_floor", exact(tails[len(tails) // 2], words, seeds))
    used = sum(pairs for _, pairs in runs) / len(runs)
    found.add("pairs_used", exact(used, "mean number of pairs that pass the selection", seeds))
    found.series["theorem1"] = [losses for losses, _ in runs[:5]]
    found.notes.append(
        "M Theorem 1's floor is not one of every iteration: its proof assumes an iterate at the "
        "optimum. What holds, for noise of length at most ε, is that a pair that passes the "
        "selection is long, ‖s‖ >= (α-2) ε/Λ, so that at one of its two ends the loss is at least "
        "a quarter of the floor. Iterations that use no new pair go on below it."
    )


def _newton_step() -> tuple[float, str]:
    """L = ½θ² in one dimension, θ_0 = 1, noise 0 (variance at most ε²), ε = 1/10, α = 3.

    s = -1, y = -1: <s, y> = 1 >= α ε ‖s‖ = 3/10, so the pair may be used; H = 1, and the step
    θ_1 = θ_0 - H g = 0 has L = 0.
    """
    theta, epsilon, alpha = Fraction(1), Fraction(1, 10), Fraction(3)
    s = y = vector(-1)
    assert dot(s, y) >= alpha * epsilon * 1
    after = theta - two_loop((theta,), [(s, y)])[0]
    loss, floor = after**2 / 2, (alpha - 2) ** 2 / 2 * epsilon**2
    words = "L after one step over the floor: ½θ², θ_0 = 1, no noise, η = 1, rational arithmetic"
    return float(loss / floor), words


def _pair_lengths(
    found: Findings, low: float, high: float, epsilon: float, alpha: float, count: int = 100_000
) -> None:
    """Random pairs with noise of length at most ε: what of the proof holds."""
    rng = np.random.default_rng(0)
    spectrum = np.array([low, high])
    ends = rng.uniform(-0.6, 0.6, (2, count, 2))
    angles = rng.uniform(0, 2 * np.pi, (2, count))
    noise = epsilon * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    s = ends[1] - ends[0]
    y = spectrum * s + noise[1] - noise[0]
    length = np.linalg.norm(s, axis=1)
    used = (s * y).sum(1) >= alpha * epsilon * length
    worse = np.max(0.5 * (spectrum * ends**2).sum(2), axis=0)
    floor = (alpha - 2) ** 2 * low / (2 * high**2) * epsilon**2
    n = int(used.sum())
    shortest = float((length[used] / ((alpha - 2) * epsilon / high)).min())
    found.add("pair_length", exact(shortest, "smallest ‖s‖ of a used pair over (α-2) ε/Λ", n))
    words = "smallest over used pairs of the larger loss at the two ends, over a quarter floor"
    found.add("worse_end", exact(float((4 * worse[used] / floor).min()), words, n))


def loss_with_selected_pairs(
    seed: int, low: float, high: float, epsilon: float, alpha: float, steps: int = 300
) -> tuple[list[float], int]:
    """L-BFGS in ten dimensions that uses a pair only if <s, y> >= α ε ‖s‖.

    Noise is normal with E‖n‖² = ε², η = 0.2, pairs from iterates five steps apart, M = 5.

    Returns:
        The losses without noise, and how many pairs were used.
    """
    rng = np.random.default_rng(seed)
    n, lr, interval, m = 10, 0.2, 5, 5
    spectrum = np.linspace(low, high, n)
    theta = rng.standard_normal(n)
    pairs: list[tuple[FloatArray, FloatArray]] = []
    previous: tuple[FloatArray, FloatArray] | None = None
    losses, used = [], 0
    for t in range(steps):
        g = spectrum * theta + epsilon / np.sqrt(n) * rng.standard_normal(n)
        if t % interval == 0:
            if previous is not None:
                s, y = theta - previous[0], g - previous[1]
                if s @ y >= alpha * epsilon * np.linalg.norm(s):
                    pairs, used = [*pairs, (s, y)][-m:], used + 1
            previous = (theta, g)
        theta = theta - lr * _float_two_loop(g, pairs)
        losses.append(float(0.5 * (spectrum * theta**2).sum()))
    return losses, used


def _float_two_loop(g: FloatArray, pairs: list[tuple[FloatArray, FloatArray]]) -> FloatArray:
    alphas = []
    for s, y in reversed(pairs):
        alphas.append(float(s @ g / (s @ y)))
        g = g - alphas[-1] * y
    if pairs:
        s, y = pairs[-1]
        g = float(s @ y / (y @ y)) * g
    for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
        g = g + (alpha - float(y @ g / (s @ y))) * s
    return g
