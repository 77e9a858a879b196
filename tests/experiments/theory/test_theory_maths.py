"""The closed forms and oracles of the theory room against facts found another way."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from experiments.theory import damping_bound, exact, lemmas, linear_rate, noise, quadratic
from mlbfgs.reference import hessian_vector, minimise

DOUBLE = torch.float64


def coefficients(beta, t):
    """Of n_0 ... n_t in the average, by its definition."""
    c = np.zeros(t + 1)
    c[0] = 1.0
    for step in range(1, t + 1):
        c *= beta
        c[step] += 1 - beta
    return c


@pytest.mark.parametrize(("beta", "t", "interval"), [(0.5, 1, 1), (0.9, 12, 5), (0.99, 40, 20)])
def test_noise_variances_are_the_sums_of_squared_coefficients(beta, t, interval):
    new, old = coefficients(beta, t), np.zeros(t + 1)
    old[: t - interval + 1] = coefficients(beta, t - interval)
    assert noise.average_variance(beta, t) == pytest.approx((new**2).sum(), rel=1e-12)
    expected = ((new - old) ** 2).sum()
    assert noise.difference_variance(beta, t, interval) == pytest.approx(expected, rel=1e-12)


def test_noise_variances_have_the_printed_limits():
    assert noise.average_variance(0.9, 1000) == pytest.approx(0.1 / 1.9, rel=1e-12)
    limit = noise.stationary_difference_variance(0.9, 5)
    assert noise.difference_variance(0.9, 1000, 5) == pytest.approx(limit, rel=1e-12)
    assert limit <= 4 * 0.1 / 1.9


def test_exact_two_loop_gives_a_matrix_found_by_hand():
    # s = (1, 0), ŷ = (1, 1): γ = 1/2, V = I - ŷ sᵀ, H = Vᵀ V / 2 + s sᵀ
    h = exact.dense([(exact.vector(1, 0), exact.vector(1, 1))])
    assert h == (exact.vector("3/2", "-1/2"), exact.vector("-1/2", "1/2"))
    assert exact.rayleigh(h, exact.vector(1, 2)) == Fraction(3, 10)


def test_exact_two_loop_equals_the_printed_algorithm():
    rng = np.random.default_rng(0)
    draws = rng.integers(-5, 6, (4, 3))
    pairs = [(exact.vector(*map(int, s)), exact.vector(*map(int, 3 * s + d)))
             for s, d in zip(draws[:2], draws[2:], strict=True)]  # fmt: skip
    g = exact.vector(1, -2, 3)
    ours = [float(v) for v in exact.two_loop(g, pairs)]
    ss, ys = ([torch.tensor([float(v) for v in p[i]], dtype=DOUBLE) for p in pairs] for i in (0, 1))
    theirs = hessian_vector(torch.tensor([1.0, -2, 3], dtype=DOUBLE), ss, ys)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_damping_bound_holds_and_would_be_seen_broken(monkeypatch):
    found = damping_bound.run().quantities
    assert found["smallest_slack"].value == 0.0  # attained: a threshold returns its own bound
    assert found["undefined_at_1"].value == len(damping_bound.TAU0)
    assert found["optimizer_rule"].value < 1e-15
    monkeypatch.setattr(damping_bound, "damping_coefficient", lambda mu, tau0, low, high: tau0)
    assert damping_bound.run().quantities["smallest_slack"].value < 0


def test_lemma_2_pairs_satisfy_the_secant_equation_with_one_beta_only():
    rows, path, gradients = lemmas.random_path(3, n=3, steps=6)
    same = lemmas.averaged_pairs(path, gradients, Fraction(1, 3), Fraction(1, 3), 2)
    assert len(same) == 3 and lemmas.secant_gap(rows, same) == 0
    mixed = lemmas.averaged_pairs(path, gradients, Fraction(1, 3), Fraction(1, 2), 2)
    assert lemmas.secant_gap(rows, mixed) > 0


def test_averaged_pair_of_three_points_by_hand():
    points = [exact.vector(0), exact.vector(8), exact.vector(4)]
    (s, y), (s2, _) = lemmas.averaged_pairs(points, points, Fraction(1, 2), Fraction(0), 1)
    assert (s, y) == (exact.vector(4), exact.vector(8))  # averages 0, 4, 4 and 0, 8, 4
    assert s2 == exact.vector(0)


def test_theorem_1_counter_example_reaches_the_optimum():
    assert lemmas._newton_step()[0] == 0.0


def test_selection_that_nothing_passes_is_gradient_descent():
    losses, used = lemmas.loss_with_selected_pairs(0, 0.5, 1.0, 0.0, 1e9, steps=20)
    assert used == 0 or losses == sorted(losses, reverse=True)
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("batch", [1, 2])
def test_expected_decrease_is_the_mean_over_every_batch(batch):
    task = linear_rate.problem(0)
    task = linear_rate.LeastSquares(
        task.a[:8], task.target[:8], task.solution, task.pl, task.smoothness
    )
    generator = torch.Generator().manual_seed(1)
    theta = torch.randn(linear_rate.DIMENSION, generator=generator, dtype=DOUBLE)
    root = torch.randn(linear_rate.DIMENSION, linear_rate.DIMENSION, generator=generator).to(DOUBLE)
    h, lr = root @ root.T, 0.05
    after = []
    for rows in itertools.product(range(8), repeat=batch):
        a, residual = task.a[list(rows)], (task.a @ theta - task.target)[list(rows)]
        after.append(task.loss(theta - lr * h @ (a.T @ residual) / batch))
    expected = (task.loss(theta) - sum(after) / len(after)) / task.loss(theta)
    assert task.expected_decrease(theta, h, lr, batch) == pytest.approx(expected, rel=1e-10)


def test_constants_of_least_squares_hold_everywhere():
    task = linear_rate.problem(2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        theta = task.solution + torch.randn(linear_rate.DIMENSION, generator=generator).to(DOUBLE)
        gradient = task.a.T @ (task.a @ theta - task.target) / len(task.a)
        assert float(gradient @ gradient) >= task.pl * task.loss(theta)
    assert task.smoothness == pytest.approx(float((task.a**2).sum(1).max()))


def test_promise_is_largest_at_the_best_rate():
    constants = (0.5, 2.0, 0.25, 4.0)  # λ, Λ, ξ, Ξ: η = 0.125 / (2 · 64), 1 - α = η λξ / 2
    rate = linear_rate.best_rate(*constants)
    assert rate == 0.125 / 128
    assert linear_rate.promise(rate, *constants) == pytest.approx(rate * 0.125 / 2)
    assert linear_rate.promise(rate, *constants) > linear_rate.promise(0.9 * rate, *constants)


def test_blocks_of_the_real_optimizer_keep_apart():
    trace = linear_rate.follow(linear_rate.problem(0), 0, lr=0.01, blocks=3, steps=25)
    assert trace.off_block == 0.0 and trace.block_gap < 1e-12
    assert min(trace.own) >= 1.0
    assert len(trace.losses) == 26


def test_newton_on_the_unit_quadratic_is_sgd():
    setting = quadratic.Setting(steps=20)
    sgd, newton = (quadratic.trajectory(m, setting, 3) for m in ("sgd", "newton"))
    assert torch.equal(sgd, newton)
    skewed = quadratic.Setting(steps=20, diagonal=(1.0, 0.1))
    assert not torch.equal(*(quadratic.trajectory(m, skewed, 3) for m in ("sgd", "newton")))


@pytest.mark.parametrize("method", ["momentum", "momentum_damped"])
def test_figure_1_runs_the_printed_algorithm(method):
    setting = quadratic.Setting(steps=20, interval=2)
    ours = quadratic.trajectory(method, setting, 5)
    generator = torch.Generator().manual_seed(5)
    draws = setting.sigma * torch.randn(20, 2, generator=generator, dtype=DOUBLE)
    damped = method.endswith("damped")
    theirs = minimise(
        torch.tensor(setting.start, dtype=DOUBLE), lambda theta, t: theta + draws[t - 1],
        steps=20, lr=0.1, T=2, M=10, beta1=0.9, beta2=0.9, tau0=0.99 if damped else 1.0,
        sigma_l=0.01 if damped else -math.inf, sigma_h=1.5 if damped else math.inf,
    )  # fmt: skip
    # 20 steps: later the recursion amplifies rounding without limit
    torch.testing.assert_close(ours[1:], torch.stack(theirs), rtol=1e-6, atol=1e-6)


def test_goal_is_the_first_step_below_it():
    loss = torch.tensor([10.0, 1.0, 0.09, 0.2, 0.05])
    assert quadratic.steps_to_goal(loss, 0.01) == 2.0
    assert quadratic.steps_to_goal(loss, 0.001) == math.inf
