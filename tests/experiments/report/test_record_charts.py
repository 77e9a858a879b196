"""Drawings of what is recorded along a run, and the page that shows them."""

from __future__ import annotations

import re

import pytest

from experiments.analysis.measuring.groups import group_runs
from experiments.analysis.measuring.runs import load_runs
from experiments.analysis.showing.registry_page import write_registry
from experiments.report import record_charts, svg
from experiments.report.site import build
from tests.experiments.analysis.run_factory import FakeRun, write_runs
from tests.experiments.report.report_toys import write_results


def gradients(first: float) -> list[dict[str, float]]:
    """L, L / 2, L / 4 and ‖∇L‖² = L²: the ratio falls by 4, the slope in logarithms is 2."""
    losses = (first, first / 2, first / 4)
    return [
        {"epoch": epoch, "step": epoch, "loss": loss, "squared_norm": loss**2}
        for epoch, loss in enumerate(losses)
    ]


@pytest.fixture(scope="module")
def results_dir(tmp_path_factory):
    root = write_results(tmp_path_factory.mktemp("results"))
    runs = [
        FakeRun("mlbfgs", seed, experiment="never", gradients=gradients(2.0 + seed))
        for seed in range(2)
    ]
    write_runs(root, *runs, FakeRun("sgd", experiment="never"))
    write_registry(root, root / "claims.yaml")
    return root


def test_every_seed_of_a_gradient_record_is_a_line_with_its_numbers(results_dir):
    (results,) = group_runs(load_runs(results_dir, "never"))
    panels = {panel.metric: panel.svg for panel in record_charts.gradient_panels(results, "a")}
    assert list(panels) == ["loss", "squared_norm", "ratio"]
    for text in panels.values():
        assert text.count('class="line"') == 2 and text.count("<title>") == 6
        assert "SGD" not in text  # it recorded none
    assert "mL-BFGS, seed 0: 0.25 after 2 epochs" in panels["squared_norm"]
    assert "mL-BFGS, seed 1, from 3 to 0.75" in panels["ratio"]


def test_no_gradient_records_no_panels(results_dir):
    (*_, results) = group_runs(load_runs(results_dir, "toy"))
    assert record_charts.gradient_panels(results, "a") == []


def test_page_shows_gradient_records_and_what_they_say(results_dir):
    written = {path.name: path for path in build(results_dir, results_dir / "report")}
    text = written["never.html"].read_text("utf-8")
    assert "Gradient of the whole training set" in text and "reduced-gradient-ratio" in text
    (row,) = re.findall(r"smallest ‖∇L‖² / L.*?mL-BFGS(.*?)</tr>", text, re.S)
    # smallest ratios 0.5 and 0.75: mean 0.625, half width 12.7062 x 0.125; then 4 and 2 for both
    cells = re.findall(r"\d+(?:\.\d+)? ± \d+(?:\.\d+)?", row)
    assert cells == ["0.6250 ± 1.5883", "4 ± 0", "2 ± 0"]  # the slopes differ by rounding alone
    assert "Gradient of the whole training set" not in written["toy.html"].read_text("utf-8")


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.5, 20.0, [0.5, 1, 2, 5, 10, 20]),
        (0.82, 1.3, [0.9, 1.0, 1.1, 1.2, 1.3]),  # of 1, 2, 5 it has 1 alone
        (2.1, 9.9, [4, 6, 8]),
    ],
)
def test_a_short_logarithmic_axis_has_even_steps(low, high, ticks):
    axis = svg.Scale(low, high, 0.0, 100.0, logarithmic=True)
    assert axis.ticks() == pytest.approx(ticks)
