"""The command: exit codes, one-line errors, and the wall around the analysis."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from experiments.analysis.__main__ import main

ROOT = Path(__file__).resolve().parents[3]
from tests.experiments.analysis.run_factory import FakeRun, write_runs  # noqa: E402


@pytest.fixture
def results_dir(tmp_path):
    runs = [FakeRun(optimizer=name, seed=seed) for name in ("sgd", "mlbfgs") for seed in range(3)]
    return write_runs(tmp_path / "results", *runs)


def test_command_writes_every_file_and_prints_the_summary(results_dir):
    command = [sys.executable, "-m", "experiments.analysis", str(results_dir)]
    done = subprocess.run(
        [*command, "--experiment", "toy"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert "SGD          reduced  3    3 done" in done.stdout
    assert "No claim in results/claims.yaml is about toy" in done.stdout
    written = sorted(path.name for path in (results_dir / "summary" / "toy-reduced").iterdir())
    assert written == [
        ".written",
        "comparison.csv",
        "curves-reduced.png",
        "curves-reduced.svg",
        "curves.csv",
        "headline.md",
        "summary.md",
        "table.csv",
    ]
    assert all(name in done.stdout for name in written[1:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experiment", "toi"], "did you mean 'toy'"),
        (["--experiment", "toy", "--scale", "ful"], "did you mean 'full'"),
        (["--experiment", "toy", "--scale", "full"], "no runs of experiment 'toy' at full scale"),
        (["--experiment", "toy", "--out", "/dev/null/out"], "cannot write /dev/null/out"),
        (["--summaries", "--out", "elsewhere"], "--summaries writes to <results_dir>/summary"),
    ],
)
def test_mistake_is_one_line_and_exit_2(results_dir, capsys, arguments, message):
    assert main([str(results_dir), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_each_experiment_and_scale_has_a_summary_in_a_folder_of_its_own(results_dir, capsys):
    """`toy` at two scales and another experiment: three folders, no scale in another's table."""
    write_runs(
        results_dir,
        FakeRun(optimizer="sgd", scale="full"),
        FakeRun(optimizer="adam", experiment="other"),
    )
    assert main([str(results_dir), "--summaries"]) == 0
    folders = ["other-reduced", "toy-full", "toy-reduced"]
    assert sorted(path.name for path in (results_dir / "summary").iterdir()) == folders
    tables = {
        name: (results_dir / "summary" / name / "table.csv").read_text().splitlines()
        for name in folders
    }
    assert [len(tables[name]) for name in folders] == [2, 2, 3]
    pages = [results_dir / "summary" / name / "summary.md" for name in sorted(folders)]
    assert capsys.readouterr().out.split() == [str(page) for page in pages]
    # One scale, which `other` does not have, beside a folder that holds no run.
    (results_dir / "runs" / "empty").mkdir()
    assert main([str(results_dir), "--summaries", "--scale", "full"]) == 0
    assert capsys.readouterr().out.split() == [str(pages[1])]


def test_summaries_of_no_runs_are_refused(tmp_path, capsys):
    assert main([str(tmp_path), "--summaries"]) == 2
    assert "no runs in" in capsys.readouterr().err


def test_corrupt_record_is_one_line_and_exit_2(results_dir, capsys):
    path = next(results_dir.rglob("metrics.jsonl"))
    path.write_text("{broken\n" + path.read_text())
    assert main([str(results_dir), "--experiment", "toy"]) == 2
    assert "metrics.jsonl, line 1: corrupt record" in capsys.readouterr().err


def test_nothing_heavy_is_loaded_by_the_command():
    code = (
        "import sys, experiments.analysis.__main__ as m; "
        "print([n for n in ('torch', 'pandas', 'matplotlib', 'scipy.stats') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
