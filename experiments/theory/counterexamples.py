"""The smallest histories whose H lies outside the stated bounds, proved in rational arithmetic.

A history is a counter-example if every pair satisfies the damping bound and some x has xᵀHx / xᵀx
below 1/σ_H or above (M+1)/σ_L. In one dimension H = s/ŷ lies inside, and one pair keeps the upper
bound in any dimension: the eigenvalues that differ from γ <= 1/μ are (1 ± sqrt(1 - γμ))/μ, at most
2/μ <= 2/σ_L. So two dimensions, one pair (lower) or two pairs (upper) are the smallest there can
be; among those, integer vectors with the smallest largest entry are searched exhaustively. For
pairs of one quadratic (ŷ = Bs, σ_L I <= B <= σ_H I) B is diagonal with entries σ_L and σ_H.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np

from experiments.theory import exact
from experiments.theory.exact import Vector
from experiments.theory.findings import Findings
from experiments.theory.findings import exact as exact_quantity

TAU0 = Fraction(99, 100)
_LARGEST = 20  # entry that is tried before giving up
_TRIED = 50  # histories of the largest traces that a proof is tried for


@dataclass(frozen=True)
class CounterExample:
    """A history with its proof.

    Attributes:
        pairs: (s, ŷ), oldest first.
        low: σ_L.
        high: σ_H.
        x: a vector whose Rayleigh quotient is outside.
        b_diagonal: of the quadratic that the pairs come from; None if of none.
        side: the bound that it disproves, lower or upper.
    """

    pairs: tuple[tuple[Vector, Vector], ...]
    low: Fraction
    high: Fraction
    x: Vector
    b_diagonal: Vector | None = None
    side: str = "lower"

    @property
    def quotient(self) -> Fraction:
        """xᵀHx / xᵀx."""
        return exact.rayleigh(exact.dense(self.pairs), self.x)

    def violation(self) -> Fraction:
        """The factor by which the quotient is outside; above 1 proves the counter-example."""
        return _violation(self.quotient, self.side, len(self.pairs), self.low, self.high)

    def check(self) -> None:
        """Prove everything that is claimed of it.

        Raises:
            AssertionError: a pair breaks the damping bound, the damping rule does not return it,
                it does not come from the quadratic, or H is inside.
        """
        for s, y in self.pairs:
            assert self.low <= exact.curvature_ratio(s, y) <= self.high
            raw = self.before_damping(s, y)
            tau = exact.damping_coefficient(
                exact.curvature_ratio(s, raw), TAU0, self.low, self.high
            )
            assert exact.combine(tau, raw, 1 - tau, s) == y
            if self.b_diagonal is not None:
                assert all(self.low <= b <= self.high for b in self.b_diagonal)
                assert y == tuple(b * v for b, v in zip(self.b_diagonal, s, strict=True))
        assert self.violation() > 1

    def before_damping(self, s: Vector, y: Vector) -> Vector:
        """A y that the damping rule turns into ŷ: at τ = τ0, (ŷ - (1-τ0) s) / τ0.

        At μ̂ = σ_L that is y with μ = (σ_L - (1-τ0))/τ0, for which the rule returns τ0 or less.
        """
        return exact.combine(1 / TAU0, y, -(1 - TAU0) / TAU0, s)

    def as_dict(self) -> dict[str, Any]:
        """Everything as exact strings, so that the file can be checked without rounding."""
        return {
            "sigma_L": str(self.low),
            "sigma_H": str(self.high),
            "tau0": str(TAU0),
            "B_diagonal": None if self.b_diagonal is None else [*map(str, self.b_diagonal)],
            "pairs": [
                {
                    "s": [*map(str, s)],
                    "y": [*map(str, self.before_damping(s, y))],
                    "y_damped": [*map(str, y)],
                }
                for s, y in self.pairs
            ],
            "H": [[str(v) for v in row] for row in exact.dense(self.pairs)],
            "x": [*map(str, self.x)],
            "rayleigh_quotient": str(self.quotient),
            "stated_lower": str(1 / self.high),
            "stated_upper": str(Fraction(len(self.pairs) + 1) / self.low),
        }


def run() -> Findings:
    """Find and prove the smallest counter-examples."""
    low, high = Fraction(1, 100), Fraction(3, 2)
    found = Findings("counterexamples", settings={"sigma_L": str(low), "sigma_H": str(high)})
    cases = {
        "lower": (smallest_lower(low, high), "damped pairs"),
        "upper": (smallest_upper(low, high), "damped pairs"),
        "lower_quadratic": (quadratic_lower(low, high), "exact gradients of a quadratic"),
    }
    of_quadratic = quadratic_upper(low, high)
    assert of_quadratic is not None
    cases["upper_quadratic"] = (of_quadratic, "exact gradients of a quadratic")
    rows = []
    for name, (example, origin) in cases.items():
        example.check()
        found.series[name] = example.as_dict()
        factor = example.violation()
        words = f"factor by which the smallest counter-example ({name}) is outside, exact"
        found.add(f"{name}_violation", exact_quantity(float(factor), words))
        side = "≥ 2/3" if name.startswith("lower") else f"≤ {(len(example.pairs) + 1) * 100}"
        rows.append(
            [
                f"{name.split('_')[0]} ({origin})",
                len(example.x),
                len(example.pairs),
                "; ".join(f"s = {_words(s)}, ŷ = {_words(y)}" for s, y in example.pairs),
                f"{example.quotient} at x = {_words(example.x)}, stated {side}",
            ]
        )
    columns = ("bound", "n", "M", "pairs, oldest first", "xᵀHx / xᵀx")
    found.table("Smallest counter-examples, σ_L = 1/100, σ_H = 3/2, τ0 = 99/100", columns, rows)
    return found


def smallest_lower(low: Fraction, high: Fraction) -> CounterExample:
    """One pair of integer vectors in the plane with an eigenvalue below 1/σ_H."""
    for size in range(1, _LARGEST):
        for s, y in product(_half(_vectors(size, 2)), _vectors(size, 2)):
            found = _prove([(s, y)], "lower", low, high) if _inside(s, y, low, high) else None
            if found is not None:
                return found
    raise AssertionError("no counter-example to the lower bound")


def quadratic_lower(low: Fraction, high: Fraction) -> CounterExample:
    """One pair of ½ θᵀBθ, B = diag(σ_L, σ_H), with an eigenvalue below 1/σ_H."""
    b = (low, high)
    for size in range(1, _LARGEST):
        for s in _half(_vectors(size, 2)):
            found = _prove([(s, _times(b, s))], "lower", low, high, b)
            if found is not None:
                return found
    raise AssertionError("no counter-example to the lower bound among quadratics")


def smallest_upper(low: Fraction, high: Fraction) -> CounterExample:
    """Two pairs of integer vectors in the plane with an eigenvalue above 3/σ_L."""
    for size in range(1, _LARGEST):
        pairs = list(product(_half(_vectors(size, 2)), _vectors(size, 2)))
        pairs = [(s, y) for s, y in pairs if _inside(s, y, low, high)]
        found = _worst_two(pairs, low, high, None)
        if found is not None:
            return found
    raise AssertionError("no counter-example to the upper bound")


def quadratic_upper(low: Fraction, high: Fraction, n: int = 3) -> CounterExample | None:
    """Two pairs of ½ θᵀBθ, B diagonal of σ_L and σ_H, with an eigenvalue above 3/σ_L.

    Args:
        low: σ_L.
        high: σ_H.
        n: dimension.

    Returns:
        The one with the smallest integers, or None if integers up to 8 give none.
    """
    for size in range(1, 9):
        steps = _half(_vectors(size, n))
        for ones in range(1, n):
            b = (low,) * ones + (high,) * (n - ones)
            found = _worst_two([(s, _times(b, s)) for s in steps], low, high, b)
            if found is not None:
                return found
    return None


def _worst_two(
    pairs: Sequence[tuple[Vector, Vector]], low: Fraction, high: Fraction, b: Vector | None
) -> CounterExample | None:
    """The two of these pairs whose H has the largest trace, if that proves the upper bound wrong.

    With V_i = I - ŷ_i s_iᵀ/ρ_i the trace of H is
    <γ_2 V_1ᵀV_1 + s_1 s_1ᵀ/ρ_1, V_2 V_2ᵀ> + s_2ᵀs_2/ρ_2, so that all combinations of an older and a
    newer pair are two matrix products.
    """
    s, y = (np.array([[float(v) for v in pair[i]] for pair in pairs]) for i in (0, 1))
    rho = (s * y).sum(1)
    v = np.eye(s.shape[1]) - y[:, :, None] * s[:, None, :] / rho[:, None, None]
    older = (v.swapaxes(1, 2) @ v).reshape(len(s), -1)
    rank_one = (s[:, :, None] * s[:, None, :] / rho[:, None, None]).reshape(len(s), -1)
    newer = (v @ v.swapaxes(1, 2)).reshape(len(s), -1)
    gamma, last = rho / (y * y).sum(1), (s * s).sum(1) / rho
    trace = (older @ newer.T) * gamma + rank_one @ newer.T + last
    for index in np.argsort(-trace, axis=None, kind="stable")[:_TRIED]:
        i, j = np.unravel_index(index, trace.shape)
        if trace[i, j] <= 3 / low:
            return None
        found = _prove([pairs[int(i)], pairs[int(j)]], "upper", low, high, b)
        if found is not None:
            return found
    return None


def _prove(
    pairs: Sequence[tuple[Vector, Vector]],
    side: str,
    low: Fraction,
    high: Fraction,
    b: Vector | None = None,
) -> CounterExample | None:
    """The counter-example with the short integer x that is outside the most; None without one."""
    matrix = exact.dense(pairs)
    best: CounterExample | None = None
    for x in _half(_vectors(3, len(matrix))):
        candidate = CounterExample(tuple(pairs), low, high, x, b, side)
        quotient = exact.rayleigh(matrix, x)
        factor = _violation(quotient, side, len(pairs), low, high)
        if factor > 1 and (best is None or factor > best.violation()):
            best = candidate
    return best


def _violation(quotient: Fraction, side: str, m: int, low: Fraction, high: Fraction) -> Fraction:
    return 1 / (high * quotient) if side == "lower" else quotient * low / (m + 1)


def _inside(s: Vector, y: Vector, low: Fraction, high: Fraction) -> bool:
    return low < exact.curvature_ratio(s, y) < high


def _times(b: Vector, s: Vector) -> Vector:
    return tuple(p * v for p, v in zip(b, s, strict=True))


def _vectors(size: int, n: int) -> list[Vector]:
    """Integer vectors with entries up to `size`, the shortest first; the origin left out."""
    found = [v for v in product(range(-size, size + 1), repeat=n) if any(v)]
    found.sort(key=lambda v: (sum(map(abs, v)), [-x for x in v]))
    return [exact.vector(*v) for v in found]


def _half(vectors: Sequence[Vector]) -> list[Vector]:
    """One of v and -v: the one whose first entry that is not zero is positive."""
    return [v for v in vectors if next(x for x in v if x) > 0]


def _words(v: Vector) -> str:
    return "(" + ", ".join(map(str, v)) + ")"
