"""Noise in averaged gradients: S Table 1, M Lemma 1.

With gradients v_t + n_t, n_t independent with E‖n_t‖² = ε², and the average
M_t = β M_{t-1} + (1-β)(v_t + n_t), M_0 = v_0 + n_0, the noise of M_t is Σ_i c_i n_i with
c_i = (1-β) β^{t-i} for i >= 1 and c_0 = β^t, and that of y = M_t - M_{t-T} the difference of two
such sums. So every variance is a finite sum of squares, in closed form; the simulation repeats it
by drawing the noise.

Legend: `beta` β; `t` step of the newer average; `interval` T; variances in units of ε² (or σ²).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from experiments.theory.findings import Findings, Quantity, exact

FloatArray = NDArray[np.float64]


def average_variance(beta: float, t: int) -> float:
    """Variance of the noise of M_t: β^{2t} + (1-β)² (1-β^{2t}) / (1-β²) (M A.2.1)."""
    return beta ** (2 * t) + (1 - beta) / (1 + beta) * (1 - beta ** (2 * t))


def difference_variance(beta: float, t: int, interval: int) -> float:
    """Variance of the noise of M_t - M_{t-T} at a finite t >= T.

    The noises up to t-T stand in both averages, times β^T in the newer one: their part is
    (1-β^T)² times the variance of M_{t-T}. The T newer ones add
    (1-β)² Σ_{i<T} β^{2i} = (1-β)/(1+β) (1-β^{2T}).
    """
    old = (1 - beta**interval) ** 2 * average_variance(beta, t - interval)
    return old + (1 - beta) / (1 + beta) * (1 - beta ** (2 * interval))


def stationary_difference_variance(beta: float, interval: int) -> float:
    """The limit for t to infinity: 2 (1-β)/(1+β) (1-β^T)."""
    return 2 * (1 - beta) / (1 + beta) * (1 - beta**interval)


def simulated_averages(
    beta: float, times: list[int], samples: int, rng: np.random.Generator
) -> FloatArray:
    """Noise of M_t at the given steps: (len(times), samples), one number each, ε = 1."""
    average = rng.standard_normal(samples)
    kept = {0: average}
    for t in range(1, max(times) + 1):
        average = beta * average + (1 - beta) * rng.standard_normal(samples)
        if t in times:
            kept[t] = average
    return np.stack([kept[t] for t in times])


def variance_ratio(samples: FloatArray, expected: float, about: str) -> Quantity:
    """Sample variance (the mean is known to be zero) over a closed form, with its interval.

    A variance of n independent normal numbers has the relative standard error sqrt(2 / n).
    """
    ratio = float(np.mean(samples**2)) / expected
    half = 1.96 * math.sqrt(2 / samples.size) * ratio
    return Quantity(ratio, ratio - half, ratio + half, samples.size, about)


def run(samples: int = 200_000) -> Findings:
    """Settle S-T1 and M-L1.

    Args:
        samples: of every simulated variance.
    """
    rng = np.random.default_rng(0)
    found = Findings("noise", settings={"samples": samples, "seed": 0})
    _lemma1(found, samples, rng)
    _table1(found, samples, rng)
    return found


def _lemma1(found: Findings, samples: int, rng: np.random.Generator) -> None:
    beta, interval, late = 0.9, 5, 200
    noise = simulated_averages(beta, [late - interval, late], samples, rng)
    limit = (1 - beta) / (1 + beta)
    words = f"simulated variance over (1-β)/(1+β), β = {beta}, t = {late}"
    found.add("average_over_limit", variance_ratio(noise[1], limit, words))
    words = f"simulated variance of y over 4(1-β)/(1+β), β = {beta}, T = {interval}, t = {late}"
    found.add("late_y_over_bound", variance_ratio(noise[1] - noise[0], 4 * limit, words))
    rows = []
    worst_late, worst_first = 0.0, (0.0, 0.0, 0)
    for beta in (0.5, 0.9, 0.99, 0.999):
        bound = 4 * (1 - beta) / (1 + beta)
        for interval in (1, 5, 20, 50, 100):
            first = difference_variance(beta, 2 * interval, interval) / bound
            ever = stationary_difference_variance(beta, interval) / bound
            within = next(
                k
                for k in range(2, 10**6)
                if difference_variance(beta, k * interval, interval) <= bound
            )
            worst_late = max(worst_late, ever)
            worst_first = max(worst_first, (first, beta, interval))
            rows.append([beta, interval, ever, first, within - 1])
    found.add(
        "worst_late_y_over_bound",
        exact(
            worst_late, "largest limit of var(y) over 4(1-β)/(1+β), 20 settings, closed form", 20
        ),
    )
    first, beta, interval = worst_first
    words = "largest var(y) of the first pair over 4(1-β)/(1+β), 20 settings, closed form: "
    found.add("worst_first_y_over_bound", exact(first, f"{words}β = {beta}, T = {interval}", 20))
    printed = difference_variance(0.999, 100, 50) / (4 * 0.001 / 1.999)
    found.add(
        "papers_first_y_over_bound",
        exact(printed, "var(y) of the first pair over 4(1-β)/(1+β) at M's β = 0.999, T = 50"),
    )
    columns = ("β", "T", "limit / bound", "first pair / bound", "first pair within the bound")
    found.table("Noise of y against M Lemma 1's 4(1-β)/(1+β) ε², closed form", columns, rows)
    found.notes.append(
        "M Lemma 1 holds in the limit, with a factor of at least two to spare: the limit is "
        "2(1-β)/(1+β)(1-β^T). Before the limit the first gradient, which starts the average with "
        "full noise, still stands in y: with β near 1 the first pairs are above the bound."
    )


def _table1(found: Findings, samples: int, rng: np.random.Generator) -> None:
    """S Table 1 on a path θ_0, θ_1, ... that descends ½‖θ‖² without noise, θ in one dimension.

    The table treats θ as given: the variance is that of the noise alone.
    """
    beta, sigma, eta, start = 0.9, 0.2, 0.05, 5.0
    settings = {"beta": beta, "sigma": sigma, "eta": eta, "start": start}
    found.settings["table1"] = settings
    steps = 30
    theta = start * (1 - eta) ** np.arange(steps + 1)
    averages = [theta[0]]
    for value in theta[1:]:
        averages.append(beta * averages[-1] + (1 - beta) * value)
    average = np.array(averages)
    plain, smooth = np.diff(theta), np.diff(average)
    printed_s = (1 - beta) * plain
    found.add(
        "s_first_over_printed",
        exact(smooth[0] / printed_s[0], "s of averages over (1-β)(θ_k+1 - θ_k), first pair"),
    )
    found.add(
        "s_late_over_printed",
        exact(smooth[-1] / printed_s[-1], f"the same, pair {steps}, T = 1", steps),
    )
    _relative_variances(found, plain, smooth, beta, sigma, samples, rng)
    found.notes.append(
        "S Table 1 prints s and y of averages as (1-β) times the plain differences. That is the "
        "first pair alone; later M_t+1 - M_t = (1-β)(θ_t+1 - M_t). A common factor would change "
        "nothing: H is the same for (s, y) and (c s, c y). What helps is that the average keeps "
        "the signal (it approaches the plain difference) and loses the noise."
    )


def _relative_variances(
    found: Findings,
    plain: FloatArray,
    smooth: FloatArray,
    beta: float,
    sigma: float,
    samples: int,
    rng: np.random.Generator,
) -> None:
    """RV = Var(y) / |E(y)|, as S defines it, and the scale-free Var(y) / E(y)²."""
    last = len(plain)
    noise = sigma * simulated_averages(beta, [0, 1, last - 1, last], samples, rng)
    fresh = sigma * (rng.standard_normal(samples) - rng.standard_normal(samples))
    first, late = noise[1] - noise[0], noise[3] - noise[2]
    cases = (
        ("naive, pair 1", fresh, plain[0], 2.0),
        ("averages, pair 1", first, smooth[0], 2 * (1 - beta) ** 2),
        (f"naive, pair {last}", fresh, plain[-1], 2.0),
        (f"averages, pair {last}", late, smooth[-1], difference_variance(beta, last, 1)),
    )
    rows = []
    for name, draws, mean, closed in cases:
        variance = float(np.mean(draws**2))
        rows.append([name, closed * sigma**2 / abs(mean), variance / abs(mean), variance / mean**2])
    columns = ("y", "var / mean, closed form", "var / mean, simulated", "var / mean², simulated")
    found.table(f"Relative variance of y, β = {beta}, σ = {sigma}, T = 1", columns, rows)
    naive_rv, scale = 2 * sigma**2, abs(smooth / plain)
    for name, draws, expected, about in (
        ("naive_over_printed", fresh, naive_rv, "RV of naive y over 2σ²/Δθ"),
        (
            "first_over_printed",
            first,
            (1 - beta) * naive_rv * scale[0],
            "RV of y of averages over (1-β) 2σ²/Δθ, pair 1",
        ),
        (
            "late_over_printed",
            late,
            (1 - beta) * naive_rv * scale[-1],
            f"RV of y of averages over (1-β) 2σ²/Δθ, pair {last}",
        ),
        ("late_over_naive", late, naive_rv * scale[-1], f"RV of averages over naive, pair {last}"),
        ("first_over_naive", first, naive_rv * scale[0], "RV of averages over naive, pair 1"),
        (
            "first_over_naive_squared",
            first,
            naive_rv * scale[0] ** 2,
            "var / mean² of averages over naive, pair 1",
        ),
    ):
        found.add(f"rv_{name}", variance_ratio(draws, expected, about))
