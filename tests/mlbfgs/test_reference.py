"""reference.py against a dense matrix and SciPy."""

import numpy as np
import pytest
import torch
from scipy.optimize import LbfgsInvHessProduct

from mlbfgs.reference import damping_coefficient, hessian_vector, minimise
from tests.mlbfgs.oracles import dense_bfgs, random_pairs


def as_tensors(rows: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(row.copy()) for row in rows]


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_two_loop_recursion_equals_the_dense_matrix(count):
    rng = np.random.default_rng(count)
    s, y = random_pairs(rng, count, 12)
    g = rng.standard_normal(12)
    ours = hessian_vector(torch.from_numpy(g), as_tensors(s), as_tensors(y)).numpy()
    np.testing.assert_allclose(ours, dense_bfgs(list(s), list(y)) @ g, rtol=1e-11, atol=1e-12)


def test_two_loop_recursion_equals_scipys():
    rng = np.random.default_rng(1)
    s, y = random_pairs(rng, 6, 12)
    # SciPy starts from H0 = I: scale the newest y so that sᵀy = yᵀy
    y[-1] *= (s[-1] @ y[-1]) / (y[-1] @ y[-1])
    g = rng.standard_normal(12)
    ours = hessian_vector(torch.from_numpy(g), as_tensors(s), as_tensors(y)).numpy()
    np.testing.assert_allclose(ours, LbfgsInvHessProduct(s, y) @ g, rtol=1e-11, atol=1e-12)


def test_damping_coefficient_at_printed_branches():
    assert damping_coefficient(0.5, 0.99, 0.01, 1.5) == 0.99
    assert damping_coefficient(-2.0, 0.99, 0.01, 1.5) == pytest.approx(0.99 / 3)
    assert damping_coefficient(3.5, 0.99, 0.01, 1.5) == pytest.approx(0.2)
    assert damping_coefficient(3.5, 0.95, 0.01, 1.0) == 0.0


def test_without_noise_averaged_pairs_are_exact_curvature_pairs():
    # M Lemma 2: on a quadratic y = B s for averaged pairs too
    rng = np.random.default_rng(0)
    a = torch.from_numpy(np.diag(rng.uniform(0.5, 2.0, 6)))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    averages = [torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)]

    def gradient(theta: torch.Tensor, t: int) -> torch.Tensor:
        g = a @ theta
        for average, x in zip(averages, (theta, g), strict=True):
            average.copy_(x if t == 1 else 0.9 * average + 0.1 * x)
        seen.append((averages[0].clone(), averages[1].clone()))
        return g

    minimise(
        torch.from_numpy(rng.standard_normal(6)),
        gradient,
        steps=40,
        lr=0.1,
        T=4,
        M=3,
        beta1=0.9,
        beta2=0.9,
        tau0=1.0,
        sigma_l=-1e9,
        sigma_h=1e9,
    )
    s, y = (seen[39][i] - seen[35][i] for i in range(2))
    torch.testing.assert_close(y, a @ s, rtol=1e-9, atol=1e-12)
