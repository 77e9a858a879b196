"""The registry: its schema, its printed cells, and room for every row of the papers."""

from __future__ import annotations

import pytest
import yaml

from experiments.analysis.judging.claims import DEFAULT_CLAIMS, OURS, load_claims, settling_commands
from experiments.contestants import arms, options
from experiments.errors import UserError

PAPER = {"table": {"task": {"a": {"top1": {"value": 93.9, "spread": 0.1, "n": 3}}}}}
PAPER["table"]["task"]["b"] = {"top1": {"value": 94.1, "spread": None, "n": None}}
CLAIM = {
    "row": "X-T1",
    "paper": "mL-BFGS",
    "place": "Table 1",
    "statement": "top-1 of A",
    "experiment": "toy",
    "metric": "final_top1",
    "kind": "value",
    "optimizer": "a",
    "cell": "paper/table/task/a/top1",
    "margin": 0.5,
}
DIFFERENCE = {"kind": "difference", "reference": "b", "reference_cell": "paper/table/task/b/top1"}


def load(tmp_path, entry):
    (tmp_path / "paper").mkdir(exist_ok=True)
    (tmp_path / "paper" / "paper.yaml").write_text(yaml.safe_dump(PAPER))
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump({"X-T1-a": entry}))
    (claim,) = load_claims(tmp_path / "claims.yaml")
    return claim


def test_printed_value_comes_from_its_cell(tmp_path):
    claim = load(tmp_path, CLAIM)
    assert (claim.printed.value, claim.printed.spread, claim.printed.n) == (93.9, 0.1, 3)
    assert str(claim.printed) == "93.9 ± 0.1"


@pytest.mark.parametrize(
    ("kind", "printed"), [("difference", -0.2), ("ratio", 0.9979), ("speedup", 1.0021)]
)
def test_printed_effect_is_computed_from_two_cells(tmp_path, kind, printed):
    assert load(tmp_path, {**CLAIM, **DIFFERENCE, "kind": kind}).printed.value == printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"margn": 1}, "did you mean 'margin'"),
        ({"place": ""}, "place missing"),
        ({"kind": "valu"}, "did you mean 'value'"),
        ({"rule": "inside"}, "'inside' is not valid"),
        ({"judged_at": ["huge"]}, "'huge' is not valid"),
        ({"metric": "final_top"}, "did you mean 'final_top1'"),
        ({"margin": None}, "margin missing: it must be fixed before the run"),
        ({"margin": -1}, "at least 0"),
        ({"reference": "b"}, "needs no reference"),
        ({"kind": "difference"}, "needs a reference optimizer"),
        ({"kind": "difference", "reference": "b"}, "needs a reference_cell"),
        ({"cell": "paper/table/tusk/a/top1"}, "at 'tusk': did you mean 'task'"),
        ({"cell": "paper/table/task"}, "is needed"),
        ({"printed": 93.9}, "stands in the cell already"),
        ({**DIFFERENCE, "kind": "ordering"}, "an ordering has no printed number"),
        ({"kind": "share"}, "needs a metric that is 1 or 0: diverged, failed"),
        ({"kind": "share", "metric": "failed"}, "needs the rule 'above' or 'below'"),
        ({"kind": "share", "metric": "failed", "reference": "b"}, "needs no reference"),
        ({"contradicts": ["X-T1-z"]}, "did you mean 'X-T1-a'"),
        ({"presupposes": "X-T1-z"}, "presupposes 'X-T1-z'.*did you mean 'X-T1-a'"),
    ],
)
def test_broken_entry_is_named_with_what_would_do(tmp_path, changes, message):
    with pytest.raises(UserError, match=f"X-T1-a.*{message}"):
        load(tmp_path, {**CLAIM, **changes})


def test_a_claim_presupposes_one_of_its_own_experiment(tmp_path):
    base = {key: value for key, value in CLAIM.items() if key != "cell"} | {"printed": 1.0}
    entries = {"one": {**base, "presupposes": "other"}, "other": {**base, "experiment": "else"}}
    file = tmp_path / "claims.yaml"
    file.write_text(yaml.safe_dump(entries))
    with pytest.raises(UserError, match="one: presupposes 'other', which is about else"):
        load_claims(file)
    entries["other"]["experiment"] = base["experiment"]
    file.write_text(yaml.safe_dump(entries))
    assert load_claims(file)[0].presupposes == "other"
    for chained in ("one", "third"):
        entries["other"]["presupposes"] = chained
        file.write_text(yaml.safe_dump({**entries, "third": base}))
        with pytest.raises(UserError, match=f"one: .*which presupposes '{chained}' itself"):
            load_claims(file)


def test_value_without_a_printed_number_is_refused(tmp_path):
    entry = {key: value for key, value in CLAIM.items() if key != "cell"}
    with pytest.raises(UserError, match="needs 'cell' or 'printed'"):
        load(tmp_path, entry)


def test_command_names_the_runs_that_would_settle_it(tmp_path):
    claim = load(tmp_path, {**CLAIM, **DIFFERENCE})
    assert claim.settled_by() == (
        "python -m experiments.reproduce toy --optimizers b,a --seeds 0,1,2 --scale full"
    )
    assert settling_commands([claim, claim]) == (claim.settled_by(),)
    arms = load(
        tmp_path, {**CLAIM, **DIFFERENCE, "experiment": "controls", "optimizer": "sgd_lr0.1"}
    )
    assert arms.settled_by("reduced") == (
        "python -m experiments.reproduce controls --optimizers b --arms sgd_lr0.1 "
        "--seeds 0,1,2 --scale reduced"
    )
    other = load(tmp_path, {**CLAIM, "command": "make theory"})
    assert other.settled_by() == "make theory"
    share = load(tmp_path, {**CLAIM, "kind": "share", "metric": "failed", "rule": "above"})
    assert share.settled_by() == (
        "python -m experiments.reproduce toy --optimizers a --seeds 0,1,2,3,4,5 --scale full"
    )
    (both,) = settling_commands([claim, share])
    assert "--optimizers b,a --seeds 0,1,2,3,4,5" in both


def test_committed_registry_holds_table_3_as_printed():
    printed = {
        claim.id: (claim.printed.value, claim.printed.spread)
        for claim in load_claims()
        if claim.row == "M-T3" and claim.kind == "value"
    }
    assert printed == {
        "M-T3-cifar10-resnet18-sgd": (94.1, 0.1),
        "M-T3-cifar10-resnet18-adam": (92.7, 0.1),
        "M-T3-cifar10-resnet18-mlbfgs": (93.9, 0.1),
        "M-T3-cifar100-resnet18-sgd": (75.0, 0.15),
        "M-T3-cifar100-resnet18-adam": (72.2, 0.16),
        "M-T3-cifar100-resnet18-mlbfgs": (74.4, 0.1),
        "M-T3-cifar100-deit-tiny-sgd": (80.5, 0.2),
        "M-T3-cifar100-deit-tiny-adam": (75.3, 0.3),
        "M-T3-cifar100-deit-tiny-mlbfgs": (79.9, 0.2),
    }


def test_committed_registry_has_its_rows_and_differences():
    claims = {claim.id: claim for claim in load_claims(DEFAULT_CLAIMS)}
    assert {claim.row for claim in claims.values()} >= {"M-T3", "M-F3", "M-cost", "S-F5"}
    assert claims["M-T3-cifar10-resnet18-mlbfgs-minus-sgd"].printed.value == -0.2
    assert claims["M-T3-cifar100-deit-tiny-mlbfgs-minus-adam"].printed.value == 4.6
    assert claims["M-cost-imagenet-resnet50"].printed.value == pytest.approx(7.9 / 7.8, abs=1e-4)


def test_questions_of_ours_name_contestants_that_exist_and_quote_no_paper(tmp_path):
    ours = [claim for claim in load_claims(DEFAULT_CLAIMS) if claim.paper == OURS]
    assert len(ours) >= 12
    for claim in ours:
        assert set(claim.optimizers) <= {*arms(claim.experiment), *options("optimizer")}, claim.id
        # A value needs a threshold, which is our own.
        assert claim.printed is None or claim.rule == "within" or claim.kind == "value"
    with pytest.raises(UserError, match="prints nothing: it cannot have a cell"):
        load(tmp_path, {**CLAIM, "paper": "ours"})


# One row of each sort in the papers' list: without training, exact, failing, contradicting.
OTHER_ROWS = {
    "M-L1": {"kind": "value", "metric": "final:noise_variance_ratio", "printed": 0.0526},
    "M-T2-cell": {"kind": "value", "metric": "final:flops", "printed": 52e6, "deterministic": True},
    "S-F7": {"kind": "share", "metric": "diverged", "printed": 0.5, "rule": "above"},
    "S-F2": {"kind": "speedup", "reference": "sgd", "metric": "steps_to_target", "printed": 1.5},
    "S-F9": {"kind": "ordering", "reference": "b", "rule": "above", "contradicts": ["M-L1"]},
}


def test_schema_holds_the_other_rows(tmp_path):
    base = {key: value for key, value in CLAIM.items() if key != "cell"}
    entries = {name: {**base, **changes} for name, changes in OTHER_ROWS.items()}
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump(entries))
    assert [claim.id for claim in load_claims(tmp_path / "claims.yaml")] == sorted(OTHER_ROWS)


THEORY = {
    **{key: CLAIM[key] for key in ("row", "paper", "place", "statement", "margin")},
    **{"experiment": "theory", "kind": "theory", "metric": "file/quantity", "printed": 1.0},
}


def test_claim_of_theory_names_a_quantity_and_no_optimizer(tmp_path):
    claim = load(tmp_path, THEORY)
    assert (claim.metric, claim.optimizers, claim.printed.value) == ("file/quantity", (), 1.0)
    assert settling_commands([claim, claim]) == (claim.settled_by(),) == ("make theory",)
    with pytest.raises(UserError, match="has no optimizer"):
        load(tmp_path, {**THEORY, "optimizer": "mlbfgs"})
    with pytest.raises(UserError, match="needs 'cell' or 'printed'"):
        load(tmp_path, {key: value for key, value in THEORY.items() if key != "printed"})
    with pytest.raises(UserError, match="optimizer missing"):
        load(tmp_path, {**THEORY, "kind": "value"})


def test_missing_registry_is_named(tmp_path):
    with pytest.raises(UserError, match=r"claims\.yaml is missing"):
        load_claims(tmp_path / "claims.yaml")
