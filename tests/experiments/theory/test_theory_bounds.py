"""The bounds on H: the search, and the committed counter-examples proved again without it."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from experiments.theory import counterexamples, hessian_bounds
from experiments.theory.hessian_bounds import Bounds
from mlbfgs.compact import compact_coefficients
from mlbfgs.damping import damping_coefficient
from mlbfgs.reference import hessian_vector

COMMITTED = Path(__file__).resolve().parents[3] / "results/theory/counterexamples.json"
NAMES = ("lower", "upper", "lower_quadratic", "upper_quadratic")
MATRIX = tuple[tuple[Fraction, ...], ...]
BOUNDS = Bounds(0.01, 1.5)
DOUBLE = torch.float64


def times(a, b):
    return [[sum(x * y for x, y in zip(row, col, strict=True)) for col in zip(*b, strict=True)]
            for row in a]  # fmt: skip


def bfgs(pairs):
    """H by M Eq. (4) with whole matrices of fractions, from H_0 of the newest pair."""
    n = len(pairs[0][0])
    s, y = pairs[-1]
    gamma = sum(a * b for a, b in zip(s, y, strict=True)) / sum(b * b for b in y)
    h = [[gamma * (i == j) for j in range(n)] for i in range(n)]
    for s, y in pairs:
        rho = 1 / sum(a * b for a, b in zip(s, y, strict=True))
        v = [[(i == j) - rho * y[i] * s[j] for j in range(n)] for i in range(n)]
        h = times(times([*map(list, zip(*v, strict=True))], h), v)
        h = [[h[i][j] + rho * s[i] * s[j] for j in range(n)] for i in range(n)]
    return h


@pytest.fixture(params=NAMES)
def committed(request):
    entry = json.loads(COMMITTED.read_text())["series"][request.param]
    pairs = [tuple(tuple(map(Fraction, pair[key])) for key in ("s", "y_damped"))
             for pair in entry["pairs"]]  # fmt: skip
    return request.param, entry, pairs


def test_committed_counter_example_is_one_in_rational_arithmetic(committed):
    name, entry, pairs = committed
    low, high = Fraction(entry["sigma_L"]), Fraction(entry["sigma_H"])
    for s, y in pairs:
        mu = sum(a * b for a, b in zip(s, y, strict=True)) / sum(a * a for a in s)
        assert low <= mu <= high
    h, x = bfgs(pairs), [*map(Fraction, entry["x"])]
    assert h == [[*map(Fraction, row)] for row in entry["H"]]
    value = sum(x[i] * h[i][j] * x[j] for i in range(len(x)) for j in range(len(x)))
    quotient = value / sum(v * v for v in x)
    if name.startswith("lower"):
        assert quotient < 1 / high
    else:
        assert quotient > Fraction(len(pairs) + 1) / low


def test_committed_counter_example_is_one_for_the_two_loop_recursion(committed):
    name, entry, pairs = committed
    ss, ys = ([torch.tensor([float(v) for v in p[i]], dtype=DOUBLE) for p in pairs] for i in (0, 1))
    x = torch.tensor([float(Fraction(v)) for v in entry["x"]], dtype=DOUBLE)
    quotient = float(x @ hessian_vector(x, ss, ys) / (x @ x))
    outside = quotient < 1 / 1.5 if name.startswith("lower") else quotient > (len(pairs) + 1) / 0.01
    assert outside
    w = torch.stack([*ss, *ys])
    c, gamma = compact_coefficients(w @ w.T, len(pairs))
    compact = float(x @ (gamma * x + w.T @ (c @ (w @ x))) / (x @ x))
    assert compact == pytest.approx(quotient, rel=1e-9)


def test_committed_pairs_come_out_of_the_damping_rule(committed):
    _, entry, _ = committed
    for pair in entry["pairs"]:
        s, y, damped = ([*map(Fraction, pair[key])] for key in ("s", "y", "y_damped"))
        mu = sum(a * b for a, b in zip(s, y, strict=True)) / sum(a * a for a in s)
        tau = damping_coefficient(float(mu), 0.99, (0.01, 1.5))
        made = [tau * float(a) + (1 - tau) * float(b) for a, b in zip(y, s, strict=True)]
        assert made == pytest.approx([float(v) for v in damped], abs=1e-12)


def test_nothing_smaller_is_a_counter_example():
    low, high = Fraction(1, 100), Fraction(3, 2)
    assert len(counterexamples.smallest_lower(low, high).pairs) == 1
    assert counterexamples.quadratic_upper(low, high, n=2) is None
    # one pair keeps the upper bound: eigenvalues (1 ± sqrt(1 - γμ)) / μ, at most 2 / σ_L
    s, y = hessian_bounds.random_histories(1, 3, 200, BOUNDS, 0.99, 1.0)
    mu = (s * y).sum(-1)[:, 0]
    gamma = mu / y.square().sum(-1)[:, 0]
    largest = (1 + torch.sqrt(1 - gamma * mu)) / mu
    found = hessian_bounds.upper_ratio(s, y, BOUNDS) * 2 / 0.01
    torch.testing.assert_close(found, largest, rtol=1e-8, atol=0)
    assert float((largest * 0.01 / 2).max()) <= 1


def test_inverse_hessian_and_hessian_are_inverse_and_match_the_recursion():
    s, y = hessian_bounds.random_histories(4, 5, 3, BOUNDS, 0.99, 0.1)
    h, b = hessian_bounds.inverse_hessian(s, y), hessian_bounds.hessian(s, y)
    identity = torch.eye(5, dtype=DOUBLE).expand(3, 5, 5)
    torch.testing.assert_close(h @ b, identity, rtol=0, atol=1e-9)
    g = torch.arange(5, dtype=DOUBLE)
    torch.testing.assert_close(h[1] @ g, hessian_vector(g, list(s[1]), list(y[1])))


@pytest.mark.parametrize("kind", hessian_bounds.CLASSES)
def test_every_class_keeps_to_its_definition(kind):
    generator = torch.Generator().manual_seed(0)
    shapes = {"s": (3, 4), "w": (3, 4), "a": (3,), "b": (3,), "q": (4, 4), "d": (4,)}
    raw = {k: 3 * torch.randn(20, *v, generator=generator, dtype=DOUBLE) for k, v in shapes.items()}
    s, y = hessian_bounds.make_pairs(raw, kind, BOUNDS)
    mu = (s * y).sum(-1) / s.square().sum(-1)
    assert bool(((mu >= 0.01 - 1e-12) & (mu <= 1.5 + 1e-12)).all())
    if kind != "damped":  # (ŷ - σ_L s)ᵀ(σ_H s - ŷ) >= 0: some B with that spectrum maps s to ŷ
        assert float(((y - 0.01 * s) * (1.5 * s - y)).sum(-1).min()) >= -1e-12


def test_search_finds_the_worst_single_pair_of_the_premise():
    # M = 1: smallest eigenvalue (1 - sqrt(1 - γμ)) / μ, over the half circle of ŷ around s
    angle = torch.linspace(0, torch.pi, 20001, dtype=DOUBLE)
    mu, across = 0.755 + 0.745 * torch.cos(angle), 0.745 * torch.sin(angle)
    best = ((1 - across / torch.sqrt(mu**2 + across**2)) / mu).min() * 1.5
    found = hessian_bounds.search("secant", "lower", 1, 2, BOUNDS, starts=8, steps=150)
    assert found == pytest.approx(float(best), rel=0.01)
    assert found >= float(best) - 1e-9
