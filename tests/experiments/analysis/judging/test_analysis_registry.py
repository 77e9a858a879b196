"""The whole registry judged: no claim missing, numbers found by hand, the same bytes every time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.analysis.__main__ import main
from experiments.analysis.judging.claims import DEFAULT_CLAIMS, load_claims
from experiments.analysis.showing.registry_page import write_registry
from experiments.errors import UserError
from tests.experiments.analysis.run_factory import FakeRun, write_runs

CLAIMS = """
ordering: &base
  {row: X-T1, paper: mL-BFGS, place: Table 1, statement: better than SGD, experiment: toy,
   metric: final_top1, kind: ordering, optimizer: mlbfgs, reference: sgd, rule: above,
   contradicts: [mine]}
speed:
  {<<: *base, contradicts: [], row: X-F2, paper: SLIM-QN, metric: steps_to_target, kind: speedup}
other: {<<: *base, contradicts: [], row: X-T1, reference: adam}
mine: {<<: *base, row: C, paper: ours, experiment: never, contradicts: [ordering]}
exact:
  {row: X-L1, paper: SLIM-QN, place: Lemma 1, statement: a bound, experiment: theory,
   metric: bounds/low, kind: theory, printed: 1.0, margin: 0.0, rule: above}
"""
QUANTITY = {"value": 2.0, "low": 2.0, "high": 2.0, "n": 1, "about": "smallest"}
FINDINGS = {
    "settings": {},
    "quantities": {"low": QUANTITY},
    "tables": [],
    "series": {},
    "notes": [],
}
WORK = {"epochs": 2, "steps": 10}


def registry_in(folder: Path) -> Path:
    """A registry with the findings and predictions beside it; one prediction is the double."""
    (folder / "theory").mkdir(parents=True)
    (folder / "theory" / "bounds.json").write_text(json.dumps(FINDINGS))
    runs = {
        "toy": {
            scale: {
                "sgd": {**WORK, "flops": 1e9, "seconds": 10.0},
                "mlbfgs": {**WORK, "flops": 1e9, "seconds": 11.0},
                "adam": {**WORK, "flops": 2e9, "seconds": 20.0, "lower_bound": True},
            }
            for scale in ("full", "reduced")
        }
    }
    (folder / "predictions.json").write_text(json.dumps({"machine": "one GPU", "runs": runs}))
    (folder / "claims.yaml").write_text(CLAIMS)
    return folder / "claims.yaml"


def toy_runs():
    """Final top-1 of mL-BFGS minus SGD: -1, 1, 3, mean 1, s = 2; steps to 90: missed twice."""
    for seed, (ours, theirs) in enumerate(((91.0, 92.0), (92.0, 91.0), (94.0, 91.0))):
        yield FakeRun("mlbfgs", seed=seed, top1=(80.0, ours), loss=(2.0, 1.0))
        yield FakeRun("sgd", seed=seed, top1=(91.0, theirs), loss=(2.0, 1.0))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    claims = registry_in(root)
    write_runs(root, *toy_runs())
    page, listing, _ = write_registry(root, claims)
    return root, page.read_text(), {entry["id"]: entry for entry in json.loads(listing.read_text())}


def at(written, claim, scale):
    (judgement,) = [j for j in written[2][claim]["judgements"] if j["scale"] == scale]
    return judgement


def test_inconclusive_ordering_has_the_seeds_and_seconds_found_by_hand(written):
    found = at(written, "ordering", "reduced")
    # t_2 = 4.3027, half width 4.3027 x 2 / sqrt(3) = 4.968.
    assert found["outcome"] == "inconclusive" and found["paired"] and found["n"] == 3
    assert [found["low"], found["high"]] == pytest.approx([-3.968, 5.968], abs=1e-3)
    # 1 from the edge: t_17 x 2 / sqrt(18) = 2.1098 x 0.4714 = 0.995 < 1 < t_16 x 2 / sqrt(17).
    assert found["more_seeds"] == 15
    assert found["more_seeds_cost_s"] == 15 * (
        20.0 + 20.0
    )  # two epochs of 10 s for each of the two
    assert (
        "--seeds 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17 --scale reduced"
        in (found["more_seeds_command"])
    )
    assert found["runs"][0].startswith("runs/toy/mlbfgs/reduced-seed0-") and len(found["runs"]) == 6


def test_speedup_of_a_subject_that_is_slower_is_not_reproduced(written):
    found = at(written, "speed", "reduced")  # 200 steps against 100, in every seed
    assert found["outcome"] == "not reproduced"
    assert [found["centre"], found["low"], found["high"]] == pytest.approx([0.5, 0.5, 0.5])
    assert found["more_seeds"] is None and found["more_seeds_command"] == ""


def test_claims_not_run_have_command_and_cost(written):
    full = at(written, "ordering", "full")
    assert full["outcome"] == "not run" and full["command"].endswith("--scale full")
    assert full["predicted_cost_s"] == 3 * (10.0 + 11.0)
    assert full["predicted_from"] == "predicted for one GPU"
    assert at(written, "other", "full")["predicted_from"] == (
        "predicted for one GPU, at least: without all that Adam computes"
    )
    # Adam was not run at reduced scale: 20 s for 1e9 FLOPs, so 40 s for its 2e9, three seeds.
    scaled = at(written, "other", "reduced")
    assert scaled["outcome"] == "not run" and scaled["reason"] == "no ended run of Adam"
    assert scaled["predicted_cost_s"] == 3 * 40.0
    assert "scaled by FLOPs" in scaled["predicted_from"]
    assert at(written, "mine", "full")["predicted_cost_s"] is None


def test_theory_is_judged_from_its_findings(written):
    found = at(written, "exact", "full")
    assert found["outcome"] == "reproduced" and found["centre"] == 2.0
    assert written[2]["exact"]["zone"] == {"low": 1.0, "high": "inf"}


def test_page_has_every_claim_once_and_no_path_of_the_machine(written):
    root, page, entries = written
    assert list(entries) == ["ordering", "speed", "other", "mine", "exact"]
    for name in entries:
        assert page.count(f"| `{name}` |") == 1
    assert page.count("### X-T1") == page.count("### X-F2") == page.count("### C\n") == 1
    assert "15 more seeds (about 10 min 00 s of training)" in page
    excluding = "- `ordering` (not run, inconclusive at reduced scale) and `mine` (not run)"
    assert excluding in page and "- `mine`" not in page  # each names the other
    assert str(root) not in page and str(root) not in json.dumps(entries)


def test_the_short_page_has_the_settled_claims_and_counts_the_open_ones(written):
    text = (written[0] / "summary" / "verdicts.md").read_text()
    counts, rest = text.split("**What training has settled**")
    settled, trained = rest.split("**What was trained, and what was not**")
    # two contestants, three seeds, two epochs of 10 s each; the ordering and the speed-up
    verdicts = "1 not reproduced, 1 inconclusive"
    assert f"| `toy` | reduced | 2 | 6 | 2 min 00 s | {verdicts} |" in trained
    assert "| `never` | not run |  |  |  |  |" in trained
    assert "| together | 5 |" in counts
    (row,) = [line for line in settled.splitlines() if line.startswith("| better")]
    assert row.startswith("| better than SGD (SLIM-QN, Table 1) | reduced | above 1 | 0.500 [")
    assert row.endswith("| not reproduced at reduced scale |")
    assert "Inconclusive so far: 1 of what training judged." in settled


def test_what_was_trained_holds_runs_that_no_claim_is_about_to_their_last_step(tmp_path):
    claims = registry_in(tmp_path)
    run = FakeRun("sgd", experiment="unclaimed", top1=(80.0, 10.0), loss=(2.0, 9.0))
    step = {"kind": "step", "epoch": 2, "step": 250, "loss": 9.0, "lr": 0.1, "train_time_s": 25.0}
    with (run.write(tmp_path) / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps(step) + "\n")
    (tmp_path / "runs" / "empty").mkdir()
    trained = write_registry(tmp_path, claims)[2].read_text().partition("What was trained")[2]
    assert "| `unclaimed` | reduced | 1 | 1 | 25 s | – |" in trained
    assert "| `toy`, `never` | not run |" in trained and "empty" not in trained


def test_same_runs_give_the_same_bytes(tmp_path):
    texts = []
    for name, runs in (("a", list(toy_runs())), ("b", list(toy_runs())[::-1])):
        claims = registry_in(tmp_path / name)
        write_runs(tmp_path / name, *runs)
        texts.append([path.read_bytes() for path in write_registry(tmp_path / name, claims)])
    assert texts[0] == texts[1]


def test_committed_registry_is_complete_without_any_run(tmp_path):
    page, listing, _ = write_registry(tmp_path)
    entries = json.loads(listing.read_text())
    claims = load_claims(DEFAULT_CLAIMS)
    assert [entry["id"] for entry in entries] == [claim.id for claim in claims]
    for entry in entries:
        for found in entry["judgements"]:
            assert found["outcome"] != "not run" or found["command"]
    text = page.read_text()
    assert all(text.count(f"### {row}\n") >= 1 for row in {claim.row for claim in claims})


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--all", "--scale", "smoke"], "--all judges every scale"),
        (["--all"], "does not exist"),
    ],
)
def test_mistakes_of_the_command_are_told(tmp_path, capsys, arguments, wanted):
    assert main([str(tmp_path / "absent"), *arguments]) == 2
    assert wanted in capsys.readouterr().err


def test_broken_predictions_and_strange_papers_are_named(tmp_path):
    claims = registry_in(tmp_path)
    (tmp_path / "predictions.json").write_text('{"machine": "one"}')
    with pytest.raises(UserError, match=r"predictions\.json is no file of predictions"):
        write_registry(tmp_path, claims)
    (tmp_path / "predictions.json").unlink()
    claims.write_text(CLAIMS.replace("paper: ours", "paper: other"))
    with pytest.raises(UserError, match="claim mine: paper 'other' is none of mL-BFGS"):
        write_registry(tmp_path, claims)
