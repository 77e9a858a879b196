"""The bound of adaptive damping (S Lemma 1, M A.2.4), at every branch and border."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlbfgs import reference
from mlbfgs.damping import damp, damping_coefficient

BOUNDS = [(0.01, 1.5), (0.01, 1.0), (0.5, 1.0), (-1.0, 3.0)]
ratios = st.floats(-1e12, 1e12)


@given(mu=ratios, tau0=st.floats(0.01, 1.0), bounds=st.sampled_from(BOUNDS))
def test_damped_curvature_ratio_lies_within_the_bounds(mu, tau0, bounds):
    low, high = bounds
    tau = damping_coefficient(mu, tau0, bounds)
    damped = tau * mu + (1 - tau)
    slack = 1e-12 * (1 + abs(tau * mu))  # rounding of tau * mu, nothing else
    assert 0 <= tau <= tau0
    # with τ = τ0 inside the thresholds the ratio is pulled towards 1, which lies between them
    assert low - slack <= damped <= high + slack


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("tau0", [0.3, 0.95, 1.0])
def test_borders_of_the_branches(bounds, tau0):
    low, high = bounds
    border = [low, math.nextafter(low, -9), math.nextafter(low, 9), 1.0, high]
    for mu in [*border, math.nextafter(high, -9), math.nextafter(high, 9)]:
        tau = damping_coefficient(mu, tau0, bounds)
        assert 0 <= tau <= tau0
        assert low - 1e-12 <= tau * mu + 1 - tau <= high + 1e-12


@given(mu=ratios, tau0=st.floats(0.01, 1.0), bounds=st.sampled_from(BOUNDS))
def test_coefficient_equals_the_reference(mu, tau0, bounds):
    assert damping_coefficient(mu, tau0, bounds) == reference.damping_coefficient(mu, tau0, *bounds)


def test_without_bounds_only_the_constant_coefficient_acts():
    assert damping_coefficient(-50.0, 0.9, None) == 0.9
    assert damping_coefficient(50.0, 1.0, None) == 1.0


EPS = 1.2e-7


def decide(ss, sy, yy, tau0=1.0, bounds=None):
    return damp(ss, sy, yy, tau0=tau0, bounds=bounds, eps=EPS)


@pytest.mark.parametrize(
    ("ss", "sy", "yy"),
    [
        (math.nan, 1, 1),
        (1, math.inf, 1),
        (1, 1, math.nan),
        (0, 0, 1),  # s = 0: nothing moved
        (1, 0, 0),  # y = 0 and nothing mixed in
        (1, 1e-9, 1),  # sᵀŷ is rounding error
    ],
)
def test_unusable_pairs_are_refused(ss, sy, yy):
    assert not decide(ss, sy, yy).accepted


def test_damping_rescues_a_zero_gradient_change():
    pair = decide(1.0, 0.0, 0.0, tau0=0.99, bounds=(0.01, 1.5))
    assert pair.accepted
    assert pair.mu_damped == pytest.approx(0.01)


def test_negative_curvature_is_kept_without_thresholds():
    # the papers' ablation "no damping" needs it: Algorithm 1 has no acceptance rule
    pair = decide(1.0, -0.5, 1.0)
    assert pair.accepted and pair.mu_damped == -0.5 and not pair.damped


def test_gamma_is_that_of_the_damped_pair():
    pair = decide(2.0, 6.0, 20.0, tau0=0.5, bounds=(0.01, 10.0))
    # ŷ = (y + s)/2: sᵀŷ = 4, ŷᵀŷ = (20 + 12 + 2)/4
    assert pair.gamma == pytest.approx(4 / 8.5)
