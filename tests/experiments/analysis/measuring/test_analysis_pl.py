"""The PL condition: records whose λ, fall and slope are known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from experiments.analysis.measuring.measures import measure_named
from experiments.analysis.measuring.runs import load_run
from tests.experiments.analysis.run_factory import FakeRun


def measured(tmp_path, *points):
    records = tuple(
        {"epoch": epoch, "step": epoch, "loss": loss, "squared_norm": norm}
        for epoch, (loss, norm) in enumerate(points)
    )
    run = replace(load_run(FakeRun().write(tmp_path)), gradients=records)
    return [measure_named(f"pl_{name}")(run) for name in ("constant", "fall", "exponent")]


def test_proportional_norm_has_one_lambda_and_slope_1(tmp_path):
    assert measured(tmp_path, (2.0, 6.0), (1.0, 3.0), (0.5, 1.5)) == pytest.approx([3, 1, 1])


def test_norm_that_falls_as_the_square_has_slope_2(tmp_path):
    # Ratios 4, 2, 1: the smallest is the last, four times below the first.
    assert measured(tmp_path, (4.0, 16.0), (2.0, 4.0), (1.0, 1.0)) == pytest.approx([1, 4, 2])


def test_smallest_ratio_may_come_first(tmp_path):
    # Slope: x = ln 4, ln 2, 0 and y = 0, ln 2, ln 4: minus 1.
    assert measured(tmp_path, (4.0, 1.0), (2.0, 2.0), (1.0, 4.0)) == pytest.approx([0.25, 1, -1])


def test_what_is_not_finite_or_has_no_loss_does_not_count_and_a_vanished_gradient_does(tmp_path):
    kept = ((2.0, 6.0), (1.0, 3.0), (0.5, 1.5))
    found = measured(tmp_path / "a", *kept, (None, 3.0), (1.0, None), (0.0, 0.0))
    assert found == pytest.approx([3, 1, 1])
    assert measured(tmp_path / "b", (2.0, 6.0), (1.0, 0.0)) == [0.0, math.inf, None]
    assert measured(tmp_path / "c") == [None, None, None]
    assert measured(tmp_path / "d", (1.0, 1.0), (1.0, 2.0), (1.0, 3.0))[2] is None


def test_slope_needs_three_records_with_a_gradient(tmp_path):
    points = ((2.0, 4.0), (1.0, 1.0), (0.5, 0.25), (0.25, 0.0))
    assert measured(tmp_path / "a", *points)[2] == pytest.approx(2)
    assert measured(tmp_path / "b", *points[1:])[2] is None
