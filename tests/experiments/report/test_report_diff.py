"""What changed between two sets of results, and what the exit status says of it."""

from __future__ import annotations

import json
import shutil

import pytest

from experiments.analysis.showing.registry_page import write_registry
from experiments.report.__main__ import main
from tests.experiments.analysis.run_factory import FakeRun
from tests.experiments.report.report_toys import write_results


@pytest.fixture
def pair(tmp_path):
    """Two equal sets of results."""
    before = write_results(tmp_path / "before")
    return before, shutil.copytree(before, tmp_path / "after")


def compared(pair, capsys, *more):
    status = main(["diff", *map(str, pair), *more])
    return status, capsys.readouterr().out


def edit(folder, run, **values):
    """Change fields of the last epoch record of a run."""
    (path,) = folder.glob(f"runs/toy/{run}-*/metrics.jsonl")
    lines = path.read_text().splitlines()
    place = max(i for i, line in enumerate(lines) if '"epoch"' in line.split(",")[0])
    lines[place] = json.dumps({**json.loads(lines[place]), **values})
    path.write_text("\n".join(lines) + "\n")


def test_equal_sets_differ_in_nothing(pair, capsys):
    status, out = compared(pair, capsys)
    assert status == 0
    assert "claims: no differences" in out and "runs: no differences" in out
    assert "(11 with the same numbers, seconds and memory aside)" in out


def test_seconds_and_memory_are_no_difference(pair, capsys):
    edit(pair[1], "sgd/reduced-seed0", train_time_s=99.0, peak_memory_bytes=1)
    write_registry(pair[1], pair[1] / "claims.yaml")
    assert compared(pair, capsys)[0] == 0


def test_a_verdict_that_changed_is_told_with_both_numbers(pair, capsys):
    FakeRun("mlbfgs", 3, top1=(80.0, 92.0, 60.0)).write(pair[1])
    FakeRun("sgd", 3, top1=(70.0, 80.0, 91.0)).write(pair[1])
    shutil.rmtree(pair[1] / "runs" / "toy" / "adam")
    write_registry(pair[1], pair[1] / "claims.yaml")
    status, out = compared(pair, capsys)
    assert status == 1
    assert "~ ordering at reduced: reproduced, 2.33333 [1.61622, 3.05044] (n = 3) -> inconc" in out
    assert "(1 with another verdict)" in out
    assert "+ toy/mlbfgs/reduced-seed3-" in out and "- toy/adam/reduced-seed0-" in out
    assert "runs: 3 differences" in out


def test_an_infinite_number_is_worded_as_everywhere_else(pair, capsys):
    FakeRun("mlbfgs", 3, status="diverged").write(pair[1])
    status, out = compared(pair, capsys, "--experiment", "toy")
    (line,) = [line for line in out.splitlines() if "+ toy/mlbfgs/reduced-seed3-" in line]
    assert status == 1
    assert line.endswith(": diverged, final_top1 91, final_train_loss ∞")


def test_the_first_record_that_differs_is_named(pair, capsys):
    edit(pair[1], "sgd/reduced-seed0", test_loss=0.25)
    status, out = compared(pair, capsys, "--experiment", "toy")
    assert status == 1
    assert "epochs differ from step 300 on: test_loss 0.5 -> 0.25" in out


def test_a_set_without_verdicts_is_compared_by_its_runs(pair, capsys):
    shutil.rmtree(pair[1] / "summary")
    status, out = compared(pair, capsys)
    assert status == 0 and f"no summary/claims.json in {pair[1]}" in out


def test_a_folder_without_runs_is_a_mistake(pair, tmp_path, capsys):
    assert main(["diff", str(pair[0]), str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("error: no runs in")
