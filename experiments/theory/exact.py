"""L-BFGS in exact rational arithmetic, an oracle that shares no code with the optimizer.

Vectors are tuples of `fractions.Fraction`, matrices tuples of rows; s_iᵀŷ_i is `rho_i`, pairs are
oldest first. What is proved here is free of rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

Vector = tuple[Fraction, ...]
Matrix = tuple[Vector, ...]
Pairs = Sequence[tuple[Vector, Vector]]


def vector(*numbers: int | str | Fraction) -> Vector:
    """Numbers as fractions; strings such as "3/2" or "0.01" are read exactly."""
    return tuple(Fraction(number) for number in numbers)


def dot(a: Vector, b: Vector) -> Fraction:
    """Inner product."""
    return sum((x * y for x, y in zip(a, b, strict=True)), Fraction(0))


def combine(alpha: Fraction, a: Vector, beta: Fraction, b: Vector) -> Vector:
    """Alpha a + beta b."""
    return tuple(alpha * x + beta * y for x, y in zip(a, b, strict=True))


def apply(matrix: Matrix, x: Vector) -> Vector:
    """Matrix times vector."""
    return tuple(dot(row, x) for row in matrix)


def two_loop(g: Vector, pairs: Pairs) -> Vector:
    """H g by the two-loop recursion (S Algorithm 1, M Algorithm 2).

    Args:
        g: the vector.
        pairs: (s, ŷ), oldest first, at least one.
    """
    one, alphas = Fraction(1), []
    for s, y in reversed(pairs):
        alphas.append(dot(s, g) / dot(s, y))
        g = combine(one, g, -alphas[-1], y)
    s, y = pairs[-1]
    scale = dot(s, y) / dot(y, y)
    g = tuple(scale * number for number in g)
    for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
        g = combine(one, g, alpha - dot(y, g) / dot(s, y), s)
    return g


def dense(pairs: Pairs) -> Matrix:
    """H as a matrix: the two-loop recursion on the unit vectors."""
    n = len(pairs[0][0])
    columns = [two_loop(tuple(Fraction(i == j) for i in range(n)), pairs) for j in range(n)]
    return tuple(zip(*columns, strict=True))


def rayleigh(matrix: Matrix, x: Vector) -> Fraction:
    """xᵀHx / xᵀx: between the extreme eigenvalues of a symmetric H."""
    return dot(x, apply(matrix, x)) / dot(x, x)


def curvature_ratio(s: Vector, y: Vector) -> Fraction:
    """μ = sᵀy / sᵀs."""
    return dot(s, y) / dot(s, s)


def damping_coefficient(mu: Fraction, tau0: Fraction, low: Fraction, high: Fraction) -> Fraction:
    """τ exactly as printed (S Eq. (4); M below Eq. (7)), for any thresholds.

    Raises:
        ZeroDivisionError: the rule divides 0 by 0 (at μ = 1 with σ_H = 1).
    """
    if mu <= low:
        return min((1 - low) / (1 - mu), tau0)
    if mu >= high:
        return min((high - 1) / (mu - 1), tau0)
    return tau0
