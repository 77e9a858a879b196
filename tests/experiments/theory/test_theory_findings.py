"""From findings to a page: the file, the verdicts, the reasons, the committed page."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from experiments.analysis.judging.claims import load_claims
from experiments.analysis.judging.theory import judge_theory, likely_reason, load_subjects
from experiments.analysis.measuring.comparison import compare
from experiments.analysis.measuring.statistics import median_interval
from experiments.analysis.showing.theory_page import PARTS, write_page
from experiments.errors import UserError
from experiments.theory import __main__ as command
from experiments.theory.findings import Findings, compared, exact, share

RESULTS = Path(__file__).resolve().parents[3] / "results"
CLAIM = {
    "row": "M-T2", "paper": "mL-BFGS", "place": "Table 9", "statement": "a cell",
    "experiment": "theory", "kind": "theory", "metric": "toy/cell", "printed": 100.0, "margin": 2.0,
}  # fmt: skip


def found(value=100.0, readings=()):
    findings = Findings("toy")
    findings.add("cell", exact(value, "a number"))
    findings.series["readings"] = {"cell": [list(entry) for entry in readings]}
    return findings


def judged(tmp_path, findings, **changes):
    findings.write(tmp_path)
    (tmp_path / "paper").mkdir(exist_ok=True)
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump({"X": {**CLAIM, **changes}}))
    subjects = load_subjects(tmp_path)
    (verdict,) = judge_theory(load_claims(tmp_path / "claims.yaml"), subjects)
    return verdict, subjects


@pytest.mark.parametrize(
    ("value", "rule", "outcome"),
    [
        (102.0, "within", "reproduced"),
        (102.1, "within", "not reproduced"),
        (98.1, "above", "reproduced"),
        (98.0, "above", "inconclusive"),
        (97.9, "above", "not reproduced"),
        (101.9, "below", "reproduced"),
        (102.1, "below", "not reproduced"),
        (math.inf, "below", "not reproduced"),
    ],
)
def test_exact_quantity_is_judged_by_the_rule(tmp_path, value, rule, outcome):
    verdict, _ = judged(tmp_path, found(value), rule=rule)
    assert verdict.outcome == outcome
    assert verdict.effect.centre == value


def test_interval_across_the_border_is_inconclusive(tmp_path):
    findings = Findings("toy")
    findings.add("cell", share(95, 100, "hits"))  # [0.887, 0.984]
    verdict, _ = judged(tmp_path, findings, printed=0.9, margin=0.0, rule="above")
    assert verdict.outcome == "inconclusive"


def test_missing_subject_is_not_run_and_names_the_command(tmp_path):
    verdict, _ = judged(tmp_path, found(), metric="other/cell")
    assert (verdict.outcome, verdict.command) == ("not run", "make theory")


def test_missing_quantity_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="claim X: toy has no quantity 'cel': did you mean 'cell'"):
        judged(tmp_path, found(), metric="toy/cel")


def test_likely_reason_is_the_first_reading_that_gives_the_number(tmp_path):
    readings = [("half", 50.0), ("summed", 101.0), ("also", 100.0)]
    verdict, subjects = judged(tmp_path, found(10.0, readings))
    assert likely_reason(verdict, subjects) == "summed: 101"
    verdict, subjects = judged(tmp_path, found(10.0, readings[:1]))
    reason = likely_reason(verdict, subjects)
    assert reason == "none of 1 other readings gives it; nearest, half: 50"
    verdict, subjects = judged(tmp_path, found(100.0, readings))
    assert likely_reason(verdict, subjects) == ""


def test_broken_file_is_named(tmp_path):
    (tmp_path / "toy.json").write_text('{"settings": {}}')
    with pytest.raises(UserError, match=r"toy\.json: not a file of findings .*run make theory"):
        load_subjects(tmp_path)
    (tmp_path / "toy.json").unlink()
    with pytest.raises(UserError, match="no findings in"):
        write_page(tmp_path)


def test_infinities_survive_the_file(tmp_path):
    found(math.inf).write(tmp_path)
    assert json.loads((tmp_path / "toy.json").read_text())["quantities"]["cell"]["value"] == "inf"
    assert load_subjects(tmp_path)["toy"].quantities["cell"].centre == math.inf


def test_share_has_the_interval_of_clopper_and_pearson():
    # the rule of three: no hit in n gives 1 - 0.025^(1/n)
    none = share(0, 10, "")
    assert (none.low, none.high) == (0.0, pytest.approx(1 - 0.025**0.1))
    half = share(5, 10, "")
    assert (half.low, half.high) == (
        pytest.approx(0.1871, abs=1e-4),
        pytest.approx(0.8129, abs=1e-4),
    )


def test_median_interval_is_that_of_order_statistics():
    # n = 10: P(Bin(10, 1/2) <= 1) = 0.0107 < 0.025 < P(<= 2), so [x_(2), x_(9)]
    middle, bounds = median_interval([*range(1, 10), math.inf])
    assert (middle, bounds.low, bounds.high) == (5.5, 2, 9)
    with pytest.raises(ValueError, match="six values"):
        median_interval([1.0] * 5)


def test_comparison_with_a_miss_is_open():
    ratio = compare({0: math.inf, 1: 2.0}, {0: 1.0, 1: 1.0}, logarithmic=True)
    quantity = compared(ratio, "steps")
    assert (quantity.low, quantity.high) == (-math.inf, math.inf)
    assert "1 of 2 missed" in quantity.about


def test_every_claim_of_theory_has_a_place_on_the_page():
    rows = {claim.row for claim in load_claims() if claim.kind == "theory"}
    assert rows == {row for part in PARTS for row in part[1]}
    assert {name for part in PARTS for name in part[2]} == set(command.SUBJECTS)


def test_committed_page_is_what_the_committed_findings_give(tmp_path):
    for path in (RESULTS / "theory").glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    page = write_page(tmp_path)
    assert (tmp_path / "README.md").read_text() == (RESULTS / "theory/README.md").read_text()
    assert {path.stem for path in tmp_path.glob("*.json")} == set(command.SUBJECTS)
    assert all(verdict.outcome != "not run" for verdict in page.verdicts)
    for name in ("figure1", "floor", "bounds", "rate"):
        assert (RESULTS / f"theory/{name}.png").stat().st_size < 200_000
    assert max(len(line) for line in page.terminal().splitlines()) <= 100


def test_command_names_what_would_do(tmp_path, capsys):
    assert command.main(["nois", "--out", str(tmp_path)]) == 2
    assert "did you mean 'noise'" in capsys.readouterr().err


def test_command_settles_and_judges(tmp_path):
    # as it is typed: its processes must find their work when the command is __main__
    command_line = [sys.executable, "-m", "experiments.theory", "damping_bound", "lemmas"]
    done = subprocess.run(
        [*command_line, "--out", str(tmp_path)],
        cwd=RESULTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "M-A24-bound" in done.stdout and "reproduced" in done.stdout
    for name in ("README.md", "damping_bound.json", "lemmas.json"):
        assert (tmp_path / name).exists()
