"""The README's code runs, and its tables are those of the committed results."""

import re
from pathlib import Path

import torch

from experiments.analysis import documents

ROOT = Path(__file__).resolve().parents[1]


def test_the_example_runs_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    optimizer = names["optimizer"]
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["pairs"] == 5
    assert float(names["loss"].detach()) < 0.1  # it has learned the labels
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("loss")]
    assert [re.findall(r"'step': (\d+), 'mu': -?\d", line) for line in shown] == [
        ["100"],
        ["200"],
        ["300"],
    ]


def test_the_tables_are_those_of_the_committed_results():
    assert documents.main(["--check"]) == 0
