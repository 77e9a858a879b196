"""Tables against golden files, their width, and how numbers are put into words.

`UPDATE_GOLDEN=1 pytest ...` rewrites the golden files; read the difference before committing it.
"""

from __future__ import annotations

import csv
import io
import math
import os
from pathlib import Path

import pytest

from experiments.analysis.measuring import quantities
from experiments.analysis.measuring.comparison import compare
from experiments.analysis.measuring.groups import group_runs
from experiments.analysis.measuring.runs import load_runs
from experiments.analysis.measuring.statistics import Estimate, Interval
from experiments.analysis.showing.summary import summarise
from experiments.analysis.showing.tables import TERMINAL_WIDTH, Table, result_tables
from tests.experiments.analysis.run_factory import FakeRun, curvature_record, write_runs

GOLDEN = Path(__file__).parent / "golden"
CLAIMS = GOLDEN / "claims.yaml"


def comparison_runs():
    """Four optimizers, three seeds: one that diverges, one that misses, one seed cut by time."""
    for seed in range(3):
        shift = 0.1 * seed
        yield FakeRun(seed=seed, top1=(60.0, 85.0, 89.5, 93.0 + shift), loss=(2.0, 1.0, 0.5, 0.2))
        yield FakeRun(
            "adam", seed=seed, top1=(70.0, 84.0, 88.0, 89.0 + shift), loss=(1, 0.9, 0.5, 1)
        )
        lost = seed == 1
        yield FakeRun(
            "slimqn",
            seed=seed,
            status="diverged" if lost else "done",
            message="loss is not finite at step 210" if lost else "",
            top1=(65.0, 88.0) if lost else (65.0, 88.0, 91.0 + shift, 93.5),
            loss=(1.5, 0.9) if lost else (1.5, 0.9, 0.4, 0.1),
            seconds_per_epoch=11.0,
        )
        yield FakeRun(
            "mlbfgs",
            seed=seed,
            top1=(66.0, 87.0, 91.0, 92.8 + 1.1 * shift),
            loss=(1.4, 0.8, 0.3, 0.1 + 0.01 * seed),
            seconds_per_epoch=10.4 + shift,
            curvature=[curvature_record(step, damped=step == 100) for step in (100, 200)],
        )
    yield FakeRun("sgd", seed=3, status="timeout", message="1 h", top1=(60.0,), loss=(2.0,))


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    write_runs(root, *comparison_runs())
    return summarise(root, "toy", root / "out", claims_path=CLAIMS)


def by_name(summary):
    return {path.name: path for path in summary.paths}


@pytest.mark.parametrize("name", ["summary.md", "headline.md", "table.csv", "comparison.csv"])
def test_file_is_the_golden_one(summary, name):
    written = by_name(summary)[name].read_text()
    if os.environ.get("UPDATE_GOLDEN"):
        (GOLDEN / name).write_text(written)
    assert written == (GOLDEN / name).read_text()


def test_terminal_is_the_golden_text_and_fits(summary):
    text = summary.terminal()
    if os.environ.get("UPDATE_GOLDEN"):
        (GOLDEN / "terminal.txt").write_text(text)
    assert text == (GOLDEN / "terminal.txt").read_text()
    assert max(map(len, text.splitlines())) <= TERMINAL_WIDTH


def test_golden_numbers_are_right(summary):
    rows = {row["optimizer"]: row for row in read_csv(by_name(summary)["table.csv"])}
    # Mean of 93.0, 93.1, 93.2; s = 0.1; t(2) = 4.302653: half width 0.2484138.
    assert float(rows["sgd"]["final_top1_mean"]) == pytest.approx(93.1)
    assert float(rows["sgd"]["final_top1_half_width"]) == pytest.approx(0.248414, abs=1e-6)
    # SGD reaches 90 % after 400 steps in three seeds and never in the one that ran out of time.
    assert (rows["sgd"]["steps_to_target_n"], rows["sgd"]["steps_to_target_misses"]) == ("4", "1")
    assert rows["sgd"]["steps_to_target_median"] == "400"
    # Paired over the seeds 0, 1, 2: 400 / 300 steps.
    assert float(rows["mlbfgs"]["speedup_steps_to_target_ratio"]) == pytest.approx(4 / 3, abs=1e-5)
    assert rows["slimqn"]["speedup_steps_to_target_ratio"] == ""
    assert rows["slimqn"]["speedup_steps_to_target_reason"] == "not computable: 1 of 3 missed"


def test_misses_stand_in_words(summary):
    markdown = by_name(summary)["summary.md"].read_text()
    assert "miss 3/3" in markdown and "miss 1/3" in markdown
    assert "inf" not in markdown.replace("information", "")
    assert "nan" not in markdown


def test_baseline_of_which_nothing_has_ended_is_no_measure_of_speed(tmp_path):
    write_runs(tmp_path, FakeRun(status="running"), FakeRun("adam"))
    (results,) = group_runs(load_runs(tmp_path, "toy"))
    (table,) = (t for t in result_tables(results) if t.title.startswith("Steps and seconds"))
    sgd, adam = table.rows
    assert sgd[-2:] == (quantities.NOTHING, quantities.NOTHING)
    assert adam[-2:] == ("no run on one side has a value",) * 2


def test_every_row_carries_its_scale(summary):
    for line in by_name(summary)["summary.md"].read_text().splitlines():
        if line.startswith(("| SGD", "| Adam", "| SLIM-QN", "| mL-BFGS")):
            assert "| reduced |" in line


def test_long_cells_wrap_within_the_terminal():
    long = "Adam [betas=[0.9, 0.999], weight_decay_that_never_ends=0.0005]"
    table = Table("t", ("a", "b"), ((long, "x" * 150),), (30, 60))
    assert max(map(len, table.terminal().splitlines())) <= TERMINAL_WIDTH
    titled = Table("a long title " * 20, ("a",), (("b",),), (9,))
    assert max(map(len, titled.terminal().splitlines())) <= TERMINAL_WIDTH


def test_pipe_in_a_cell_does_not_break_markdown():
    assert "a\\|b" in Table("t", ("c",), (("a|b",),), (9,)).markdown()


@pytest.mark.parametrize(
    ("values", "kind", "text"),
    [
        ((), "percent", "–"),
        ((93.0,), "percent", "93.00 (n = 1)"),
        ((93.0, 93.1, 93.2), "percent", "93.10 ± 0.25"),
        ((0.00500, 0.00502), "loss", "0.0050 ± 0.0001"),
        ((300.0, math.inf, 500.0), "count", "median 500, miss 1/3"),
        ((300.0, math.inf, math.inf), "count", "miss 2/3"),
        ((math.inf,) * 3, "count", "miss 3/3"),
        ((-1.5, -1.5), "loss", "−1.500 ± 0.000"),
        ((2**30, 2**30), "bytes", "1024 ± 0"),
        ((2.0, math.nextafter(2.0, 3.0)), "plain", "2 ± 0"),
        ((0.0, 1.0, 1.0), "flag", "in 2 of 3"),
    ],
)
def test_estimate_in_words(values, kind, text):
    assert quantities.estimate(Estimate(values), kind) == text


def test_comparison_in_words():
    assert quantities.comparison(compare({0: 3.0}, {0: 2.0}, logarithmic=True), "ratio") == (
        "1.500 (n = 1)"
    )
    assert quantities.interval(Interval(-1.0, 2.0), "percent") == "[−1.00, 2.00]"
    assert quantities.interval(Interval(-math.inf, 2.0), "percent") == "[−∞, 2.00]"  # one diverged
    assert quantities.interval(Interval(0.5, math.inf), "loss") == "[0.5000, ∞]"
    assert quantities.interval(Interval(-math.inf, math.inf), "count") == "[none reached it]"
    assert quantities.interval(Interval(390.0, math.inf), "count") == "[390, never]"
    assert quantities.interval(None, "percent") == "no interval"
    assert quantities.signed(0.5, "percent") == "+0.50"


@pytest.mark.parametrize("kind", ["percent", "seconds", "loss"])
def test_a_number_and_its_copy_in_a_file_are_printed_alike(kind):
    value = math.nextafter(8.085, 0) if kind != "loss" else math.nextafter(0.00125, 0)
    assert quantities.steady(value) != value
    assert quantities.number(value, kind) == quantities.number(quantities.steady(value), kind)


def read_csv(path):
    return list(csv.DictReader(io.StringIO(path.read_text())))


def test_duration_is_readable():
    seconds = (0.4, 59.4, 59.6, 125, 3599.9, 7500, 4e6)
    wanted = "0 s, 59 s, 1 min 00 s, 2 min 05 s, 1 h 00 min, 2 h 05 min, 1,111 h"
    assert ", ".join(map(quantities.duration, seconds)) == wanted
