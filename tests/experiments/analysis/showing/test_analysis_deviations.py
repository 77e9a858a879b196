"""The ledger of deviations: complete, generated, its switches real, its effects read from runs."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest
import yaml

import mlbfgs
from experiments.analysis.documents import main as documents
from experiments.analysis.measuring.groups import group_runs
from experiments.analysis.measuring.runs import load_runs
from experiments.analysis.showing.deviations import (
    LEDGER,
    Contrast,
    ledger_document,
    load_ledger,
    measured,
)
from experiments.contestants import CONFIG_DIR, arms, options
from experiments.errors import UserError
from experiments.reproduce import main as reproduce
from tests.experiments.analysis.run_factory import FakeRun, write_runs

ROOT = Path(__file__).resolve().parents[4]
ROWS = load_ledger(ROOT / LEDGER)
# The items of the list of unclear places in the papers, and of the list of what the released code
# does differently.
UNCLEAR = {f"claims-4.{number}" for number in range(1, 14)}
RELEASED = {
    f"released-{item}"
    for item in (
        "averages",
        "gradient-average-reset",
        "pair-averaging",
        "averaged-gradient",
        "damping-bounds",
        "pair-acceptance",
        "direction",
        "step",
        "weight-decay-outside-blocks",
        "blocks",
        "distribution",
        "first-pair",
        "sgd-baseline",
        "adam-baseline",
        "cifar-input",
        "deit",
        "imagenet-run",
        "schedule",
        "resume",
        "kfac",
        "settings",
    )
}
ROW = {
    "printed": "a",
    "released": "b",
    "ours": "c",
    "why": "d",
    "switch": ["optimizer.lr"],
    "sources": [],
    "effect": {"experiment": "controls", "subject": "mlbfgs", "reference": "sgd_lr0.1"},
}


def test_every_unclear_place_and_every_item_of_the_released_code_has_a_row() -> None:
    assert {source for row in ROWS for source in row.sources} == UNCLEAR | RELEASED


def test_every_switch_exists() -> None:
    keys = {
        group: {key for name in options(group) for key in _config(group, name)}
        for group in ("optimizer", "dataset", "schedule", "model")
    }
    keys["train"] = set(_file(CONFIG_DIR / "train.yaml")["train"])
    for name in ("MLBFGS", "SLIMQN"):
        keys["optimizer"] |= set(inspect.signature(getattr(mlbfgs, name)).parameters)
    for row in ROWS:
        for switch in row.switch:
            if "=" in switch:
                group, option = switch.split("=")
                assert option in options(group), (row.id, switch)
            elif switch.startswith(("optimizer.variant", "optimizer.outside_blocks")):
                continue  # the next test
            elif "." in switch:
                group, key = switch.split(".")
                assert key in keys[group], (row.id, switch)
            else:
                assert switch in _file(CONFIG_DIR / "train.yaml"), (row.id, switch)


def test_every_switch_of_the_variant_has_a_row_and_an_arm() -> None:
    variant = mlbfgs.Variant
    assert {"variant", "outside_blocks"} <= set(inspect.signature(mlbfgs.MLBFGS).parameters)
    switches = {field.name for field in dataclasses.fields(variant)}
    prefix = "optimizer.variant."
    named = {s.removeprefix(prefix) for row in ROWS for s in row.switch if s.startswith(prefix)}
    assert named == switches
    names = {arm.removeprefix("slimqn_") for arm in arms("released")}
    switches -= {"growth_limit"}  # ours, not the release's: an arm of `controls`
    assert names >= {f"{way}_{switch}" for way in ("on", "off") for switch in switches}
    assert "mlbfgs_guarded" in arms("controls")


def test_every_effect_has_a_command_whose_runs_compose(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    contrasts = [row.effect for row in ROWS if row.effect is not None]
    assert len(contrasts) > 25
    for contrast in contrasts:
        # Every arm is composed by the tests of the arms.
        assert {contrast.subject, contrast.reference} <= set(arms(contrast.experiment))
        assert contrast.subject != contrast.reference
    command = contrasts[0].command.split()
    assert command[:3] == ["python", "-m", "experiments.reproduce"]
    assert reproduce([*command[3:], "--plan", "--results-dir", str(tmp_path)]) == 0
    assert "6 runs" in capfd.readouterr().out


def test_every_arm_of_the_experiment_deviations_belongs_to_a_row() -> None:
    used = {
        name
        for row in ROWS
        if row.effect and row.effect.experiment == "deviations"
        for name in (row.effect.subject, row.effect.reference)
    }
    assert used == set(arms("deviations"))


def test_committed_document_is_the_ledgers() -> None:
    assert documents(["--check"], documents=["docs/deviations.md"]) == 0


def test_effect_is_read_from_the_runs(tmp_path: Path) -> None:
    ledger = tmp_path / LEDGER
    ledger.parent.mkdir()
    ledger.write_text(yaml.safe_dump({"some-row": ROW}))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/deviations.md").write_text("old\n")
    text = ledger_document(tmp_path)
    command = "python -m experiments.reproduce controls --arms sgd_lr0.1,mlbfgs --seeds 0,1,2"
    assert f"| some-row | controls: mL-BFGS − sgd_lr0.1 |  | not measured: `{command}" in text
    ours = [
        FakeRun(experiment="controls", arm="mlbfgs", seed=s, top1=(1.0, 2.0, v))
        for s, v in enumerate((92.0, 93.0, 94.0))
    ]
    theirs = [
        FakeRun(experiment="controls", arm="sgd_lr0.1", seed=s, settings={"lr": 0.2})
        for s in range(3)
    ]
    write_runs(tmp_path / "results", *ours, *theirs)
    # Differences 1, 2, 3: mean 2, half width 4.303 / sqrt(3).
    wanted = "reduced: 2.00 [−0.48, 4.48], n = 3"
    text = ledger_document(tmp_path)
    assert wanted in text and all(run.key in text for run in (*ours, *theirs))
    assert documents(["--check"], root=tmp_path, documents=["docs/deviations.md"]) == 1
    assert documents([], root=tmp_path, documents=["docs/deviations.md"]) == 0
    assert (tmp_path / "docs/deviations.md").read_text() == text


def test_effect_of_one_seed_says_so_once(tmp_path: Path) -> None:
    runs = [FakeRun(arm="a", top1=(1.0, 2.0, 93.0)), FakeRun(arm="b", settings={"lr": 0.2})]
    write_runs(tmp_path, *runs)
    found = measured(Contrast("toy", "a", "b"), group_runs(load_runs(tmp_path, "toy")))
    assert found is not None and found[0] == "reduced: 2.00 (n = 1)"


def test_effect_says_which_runs_diverged(tmp_path: Path) -> None:
    lost = FakeRun(arm="a", seed=1, status="diverged", top1=(60.0, None, None))
    runs = [
        FakeRun(arm="a"),
        lost,
        *(FakeRun(arm="b", seed=s, settings={"lr": 0.2}) for s in (0, 1)),
    ]
    write_runs(tmp_path, *runs)
    found = measured(Contrast("toy", "a", "b"), group_runs(load_runs(tmp_path, "toy")))
    assert found is not None and found[0].endswith(", n = 2, a diverged in 1 of 2")


def test_effect_of_a_contestant_under_two_configs_is_not_computed(tmp_path: Path) -> None:
    runs = [FakeRun(arm="a", settings={"lr": lr}) for lr in (0.1, 0.2)]
    write_runs(tmp_path, *runs, FakeRun(arm="b"))
    results = group_runs(load_runs(tmp_path, "toy"))
    found = measured(Contrast("toy", "a", "b"), results)
    assert found is not None and "several configs" in found[0]
    assert measured(Contrast("toy", "a", "c"), results) is None


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"printd": "x"}, "unknown key 'printd': did you mean 'printed'"),
        ({"why": ""}, "why missing"),
        ({"switch": "optimizer.lr"}, "switch missing"),
        ({"unmeasured": "x"}, "either 'effect' or 'unmeasured'"),
        ({"effect": {"experiment": "controls"}}, "experiment, subject, reference"),
        ({"effect": {**ROW["effect"], "experiment": "control"}}, "did you mean 'controls'"),
        ({"effect": {**ROW["effect"], "subject": "mlbfg"}}, "did you mean 'mlbfgs'"),
    ],
)
def test_row_that_breaks_the_schema_is_named(tmp_path: Path, change: dict, wanted: str) -> None:
    path = tmp_path / "ledger.yaml"
    path.write_text(yaml.safe_dump({"some-row": {**ROW, **change}}))
    with pytest.raises(UserError, match=wanted) as caught:
        load_ledger(path)
    assert "some-row" in str(caught.value)


def test_id_stands_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.yaml"
    path.write_text(2 * yaml.safe_dump({"some-row": ROW}))
    with pytest.raises(UserError, match="'some-row' stands twice"):
        load_ledger(path)


def _config(group: str, name: str) -> dict:
    return _file(CONFIG_DIR / group / f"{name}.yaml")


def _file(path: Path) -> dict:
    return yaml.safe_load(path.read_text())
