"""The stated bounds on H by search: (1/σ_H) I <= H <= (M+1)/σ_L I (S Lemma 2; M Lemma 4).

Three classes of pair histories, each smaller than the one before:

* `damped`: σ_L <= sᵀŷ/sᵀs <= σ_H, which is all that damping promises and the lemma assumes; the
  part of ŷ across s is at most `SIDEWAYS` ‖s‖, since without a limit it makes H as large as wanted;
* `secant`: ŷ_k = B_k s_k with σ_L I <= B_k <= σ_H I, which the lemma's proof says follows from
  damping (it does not). Such a B_k exists if and only if ŷ lies in the ball of radius
  (σ_H - σ_L)/2 ‖s‖ around (σ_L + σ_H)/2 s;
* `quadratic`: one B for all pairs, so the exact gradients of a quadratic within the bounds.

H is scale-free in every pair, so s has length 1. The search ascends the violation by gradients in
float64 from many starts at once. The smallest eigenvalue is sought as the largest of H⁻¹, from the
direct BFGS formula, because rounding hides a small eigenvalue beside a large one.

Legend: `R` starts; `M` history size; `n` dimension; s, y: (R, M, n).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from experiments.theory.findings import Findings, exact, share
from experiments.theory.noisy_runs import inverse_hessians_of_runs
from mlbfgs.damping import damping_coefficient

PairClass = Literal["damped", "secant", "quadratic"]
Side = Literal["lower", "upper"]
CLASSES: tuple[PairClass, ...] = ("damped", "secant", "quadratic")
SIDEWAYS = 10.0
_DOUBLE = torch.float64


@dataclass(frozen=True)
class Bounds:
    """Damping thresholds.

    Attributes:
        low: σ_L.
        high: σ_H.
    """

    low: float
    high: float


def inverse_hessian(s: Tensor, y: Tensor) -> Tensor:
    """H of (R, M, n) pairs by M Eq. (4), from H_0 = sᵀy / yᵀy of the newest pair: (R, n, n)."""
    identity = torch.eye(s.shape[-1], dtype=s.dtype)
    sy = (s * y).sum(-1)
    gamma = sy[:, -1] / y[:, -1].square().sum(-1)
    h = gamma[:, None, None] * identity
    for k in range(s.shape[1]):
        v = identity - _outer(y[:, k], s[:, k]) / sy[:, k, None, None]
        h = v.mT @ h @ v + _outer(s[:, k], s[:, k]) / sy[:, k, None, None]
    return h


def hessian(s: Tensor, y: Tensor) -> Tensor:
    """H⁻¹ of the same pairs by the direct BFGS formula: (R, n, n)."""
    identity = torch.eye(s.shape[-1], dtype=s.dtype)
    sy = (s * y).sum(-1)
    b = (y[:, -1].square().sum(-1) / sy[:, -1])[:, None, None] * identity
    for k in range(s.shape[1]):
        bs = (b @ s[:, k, :, None]).squeeze(-1)
        sbs = (s[:, k] * bs).sum(-1)
        b = b - _outer(bs, bs) / sbs[:, None, None]
        b = b + _outer(y[:, k], y[:, k]) / sy[:, k, None, None]
    return b


def lower_ratio(s: Tensor, y: Tensor, bounds: Bounds) -> Tensor:
    """Smallest eigenvalue of H over 1/σ_H; below 1 is outside: (R,)."""
    largest: Tensor = torch.linalg.eigvalsh(hessian(s, y))[:, -1]
    return bounds.high / largest


def upper_ratio(s: Tensor, y: Tensor, bounds: Bounds) -> Tensor:
    """Largest eigenvalue of H over (M+1)/σ_L; above 1 is outside: (R,)."""
    largest: Tensor = torch.linalg.eigvalsh(inverse_hessian(s, y))[:, -1]
    return largest * bounds.low / (s.shape[1] + 1)


def make_pairs(raw: dict[str, Tensor], kind: PairClass, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """Pairs of a class from unconstrained numbers.

    Args:
        raw: `s`, `w` (R, M, n), `a`, `b` (R, M) and `q` (R, n, n), `d` (R, n).
        kind: the class.
        bounds: thresholds.

    Returns:
        s and y, (R, M, n), inside the class whatever `raw` is.
    """
    s = raw["s"] / raw["s"].norm(dim=-1, keepdim=True)
    if kind == "quadratic":
        q, _ = torch.linalg.qr(raw["q"])
        spectrum = bounds.low * (bounds.high / bounds.low) ** torch.sigmoid(raw["d"])
        return s, ((s @ q) * spectrum[:, None, :]) @ q.mT
    if kind == "secant":
        middle, radius = (bounds.high + bounds.low) / 2, (bounds.high - bounds.low) / 2
        z = raw["w"] / raw["w"].norm(dim=-1, keepdim=True)
        return s, middle * s + radius * torch.sigmoid(raw["b"])[..., None] * z
    mu = bounds.low * (bounds.high / bounds.low) ** torch.sigmoid(raw["a"])
    across = raw["w"] - (raw["w"] * s).sum(-1, keepdim=True) * s
    across = across / across.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    return s, mu[..., None] * s + SIDEWAYS * torch.sigmoid(raw["b"])[..., None] * across


def search(
    kind: PairClass, side: Side, m: int, n: int, bounds: Bounds, *, starts: int, steps: int
) -> float:
    """The worst ratio that gradient ascent finds.

    Args:
        kind: class of the pairs.
        side: which bound.
        m: number of pairs.
        n: dimension, at least 2.
        bounds: thresholds.
        starts: random starts, ascended side by side.
        steps: of Adam.

    Returns:
        The smallest `lower_ratio` or the largest `upper_ratio` seen.
    """
    generator = torch.Generator().manual_seed(1000 * m + n)
    shapes = {"s": (m, n), "w": (m, n), "a": (m,), "b": (m,), "q": (n, n), "d": (n,)}
    raw = {
        name: torch.randn(starts, *shape, generator=generator, dtype=_DOUBLE).requires_grad_()
        for name, shape in shapes.items()
    }
    ratio: Callable[[Tensor, Tensor, Bounds], Tensor]
    ratio, sign = (lower_ratio, -1.0) if side == "lower" else (upper_ratio, 1.0)
    optimizer = torch.optim.Adam(list(raw.values()), lr=0.1)
    best = -float("inf")
    for _ in range(steps):
        optimizer.zero_grad()
        score = sign * torch.log(ratio(*make_pairs(raw, kind, bounds), bounds))
        best = max(best, float(score.detach().max()))
        (-score.sum()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return float(torch.exp(torch.tensor(sign * best, dtype=_DOUBLE)))


def random_histories(
    m: int, n: int, count: int, bounds: Bounds, tau0: float, noise: float
) -> tuple[Tensor, Tensor]:
    """Histories as noise makes them: y = s + noise · N(0, I), then damped by the papers' rule.

    Args:
        m: number of pairs.
        n: dimension.
        count: histories.
        bounds: thresholds.
        tau0: τ0.
        noise: standard deviation, for s of length 1.

    Returns:
        s and ŷ, (count, m, n).
    """
    generator = torch.Generator().manual_seed(m)
    s = torch.randn(count, m, n, generator=generator, dtype=_DOUBLE)
    s = s / s.norm(dim=-1, keepdim=True)
    y = s + noise * torch.randn(count, m, n, generator=generator, dtype=_DOUBLE)
    mu = (s * y).sum(-1)
    tau = mu.clone().apply_(lambda v: damping_coefficient(v, tau0, (bounds.low, bounds.high)))
    return s, tau[..., None] * y + (1 - tau[..., None]) * s


def run(largest_m: int = 20, dimension: int = 4) -> Findings:
    """Settle S-L2 and M-L4.

    Args:
        largest_m: M = 1 ... this.
        dimension: of the search.
    """
    found = Findings("hessian_bounds")
    found.settings.update(dimension=dimension, sideways=SIDEWAYS, starts=_STARTS)
    bounds = Bounds(0.01, 1.5)  # M section 5
    worst = _search_all(found, bounds, largest_m, dimension)
    for kind in CLASSES:
        low, high = worst[kind, "lower"], worst[kind, "upper"]
        words = f"of H found, {kind} pairs, M = 1 ... {largest_m}, n = {dimension}"
        found.add(f"lower_{kind}", exact(low, f"smallest eigenvalue over 1/σ_H {words}", largest_m))
        found.add(
            f"upper_{kind}", exact(high, f"largest eigenvalue over (M+1)/σ_L {words}", largest_m)
        )
    slim = Bounds(0.01, 1.0)  # S appendix B.1
    for side in ("lower", "upper"):
        ratio = search("damped", side, 2, dimension, slim, starts=_STARTS, steps=_STEPS[0])
        words = "eigenvalue over its bound at S's σ_H = 1, M = 2"
        found.add(f"{side}_damped_slimqn", exact(ratio, words))
    _random(found, bounds)
    _runs(found, bounds)
    return found


_STARTS = 8
_STEPS = (150, 60)  # up to three pairs, and for more


def _search_all(
    found: Findings, bounds: Bounds, largest_m: int, n: int
) -> dict[tuple[PairClass, Side], float]:
    sides: tuple[Side, ...] = ("lower", "upper")
    ratios: dict[tuple[PairClass, Side], list[float]] = {}
    for kind in CLASSES:
        for side in sides:
            ratios[kind, side] = [
                search(kind, side, m, n, bounds, starts=_STARTS, steps=_STEPS[m > 3])
                for m in range(1, largest_m + 1)
            ]
    names = [f"{kind}, {side}" for kind, side in ratios]
    rows = [[m + 1, *(values[m] for values in ratios.values())] for m in range(largest_m)]
    title = "Worst eigenvalue over the stated bound (lower: below 1 is outside; upper: above 1)"
    found.table(title, ("M", *names), rows)
    found.series["search"] = {name: [row[i + 1] for row in rows] for i, name in enumerate(names)}
    # ŷᵀŷ <= σ_H sᵀŷ in the class `secant`, so H⁻¹ <= (M+1) σ_H I
    proved = min(r * (m + 1) for m, r in enumerate(ratios["secant", "lower"], start=1))
    words = "smallest eigenvalue over 1/((M+1) σ_H), secant pairs: the bound that the premise gives"
    found.add("lower_secant_corrected", exact(proved, words, largest_m))
    found.notes.append(
        "The lemma's proof bounds s sᵀ/sᵀŷ, a matrix of rank one, from below by (1/σ_H) I, takes "
        "ŷᵀŷ for bounded where damping bounds sᵀŷ alone, and calls P = QᵀQ - I negative though "
        "‖Q‖ = ‖s‖‖ŷ‖/sᵀŷ >= 1. With the premise ŷ = B s the lower bound becomes 1/((M+1) σ_H); "
        "with sᵀŷ bounded alone H has no bound that depends on σ_L, σ_H and M only."
    )
    return {
        key: min(values) if key[1] == "lower" else max(values) for key, values in ratios.items()
    }


def _random(found: Findings, bounds: Bounds, count: int = 500, n: int = 10) -> None:
    """How often noise alone makes such an H."""
    rows = []
    for noise in (0.1, 0.5, 1.0):
        for m in (1, 2, 5, 10, 20):
            s, y = random_histories(m, n, count, bounds, 0.99, noise)
            below = int((lower_ratio(s, y, bounds) < 1).sum())
            above = int((upper_ratio(s, y, bounds) > 1).sum())
            rows.append([noise, m, below / count, above / count])
            if noise == 1.0 and m == 10:
                words = f"share of random histories with H outside, noise of each entry 1, n = {n}"
                found.add("random_below", share(below, count, f"{words}, M = {m}, lower"))
                found.add("random_above", share(above, count, f"{words}, M = {m}, upper"))
    columns = ("noise / ‖s‖, each entry", "M", "share below", "share above")
    title = f"Random damped histories y = s + noise, n = {n}, {count} each: share of H outside"
    found.table(title, columns, rows)


def _runs(found: Findings, bounds: Bounds) -> None:
    """H of the real optimizer, at every pair update of runs on a quadratic within the bounds."""
    rows = []
    for sigma in (0.0, 0.02, 0.2):
        matrices = inverse_hessians_of_runs(bounds.low, bounds.high, sigma)
        spectrum = torch.linalg.eigvalsh(torch.stack([h for h, _ in matrices]))
        stated = torch.tensor([(m + 1) / bounds.low for _, m in matrices], dtype=_DOUBLE)
        below = int((spectrum[:, 0] * bounds.high < 1).sum())
        above = int((spectrum[:, -1] > stated).sum())
        n = len(matrices)
        rows.append([sigma, n, below / n, above / n, float((spectrum[:, -1] / stated).max())])
        name = f"{sigma:g}".replace(".", "_")
        words = f"share of pair updates of mL-BFGS with H outside, noise {sigma}"
        found.add(f"runs_below_{name}", share(below, n, f"{words}, lower"))
        found.add(f"runs_above_{name}", share(above, n, f"{words}, upper"))
    columns = ("noise σ", "pair updates", "share below", "share above", "largest over bound")
    title = "H of mlbfgs.MLBFGS on a noisy quadratic with eigenvalues in [σ_L, σ_H]"
    found.table(title, columns, rows)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a[:, :, None] * b[:, None, :]
