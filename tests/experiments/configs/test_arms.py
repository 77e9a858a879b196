"""Arms: several settings of one optimizer in one experiment, each with a folder of its own."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from experiments import train
from experiments.composition import compose_config, recipe_note
from experiments.contestants import (
    ARM_GROUP,
    CONFIG_DIR,
    arms,
    optimizers_with_recipe,
    options,
)
from experiments.errors import UserError
from experiments.reproduce import main as reproduce
from experiments.runs.directory import RunDirectory
from experiments.runs.spec import NUMERICS_MEANING, NUMERICS_ROUNDING, RunSpec
from tests.experiments.run_configs import run_spec

ALL = [(path.parent.name, path.stem) for path in sorted((CONFIG_DIR / ARM_GROUP).glob("*/*.yaml"))]


@cache
def composed(*overrides: str) -> DictConfig:
    return compose_config(overrides)


def composed_spec(experiment: str, arm: str, scale: str = "full") -> RunSpec:
    return RunSpec.from_config(composed(f"experiment={experiment}", f"arm={arm}", f"scale={scale}"))


@pytest.mark.parametrize("experiment", sorted({experiment for experiment, _ in ALL}))
def test_scale_changes_of_an_arm_what_an_adopted_search_chose_and_no_more(experiment: str) -> None:
    arm = arms(experiment)[-1]
    full, *smaller = (composed_spec(experiment, arm, scale) for scale in sorted(options("scale")))
    for spec in smaller:
        chosen = (spec.config.experiment.tuned or {}).get("settings", {}).get("optimizer", {})
        assert set(chosen) <= {"lr"}
        assert spec.config.optimizer == {**full.config.optimizer, **chosen}
        assert _without_lengths(spec) == _without_lengths(full) and spec.key != full.key


def _without_lengths(spec: RunSpec) -> dict[str, Any]:
    """The schedule without the epochs in it, which shrink with the run, or what they step by."""
    lengths = {"steps": ("milestones", "warmup_epochs"), "cosine": ("interval",)}
    own = lengths.get(spec.config.schedule.name, ())
    return {key: value for key, value in spec.config.schedule.items() if key not in own}


def test_there_are_arms() -> None:
    assert {"mlbfgs", "sgd_lr0.1", "sgd_lr1.0_warmup"} <= set(arms("controls"))
    assert arms("digits_mlp") == ()


@pytest.mark.parametrize(("experiment", "arm"), ALL)
def test_every_arm_composes_and_says_its_name_and_source(experiment: str, arm: str) -> None:
    spec = composed_spec(experiment, arm)
    assert (spec.experiment, spec.arm, spec.contestant) == (experiment, arm, arm)
    assert spec.directory.parts[-3:-1] == (experiment, arm)
    assert recipe_note(spec.config) is None
    # A name that means an optimizer everywhere else means it here too, and only once.
    if arm in options("optimizer"):
        assert spec.optimizer == arm and arm not in optimizers_with_recipe(experiment)
    text = (CONFIG_DIR / ARM_GROUP / experiment / f"{arm}.yaml").read_text()
    assert "Table" in text or "urs" in text


@pytest.mark.parametrize("experiment", sorted({experiment for experiment, _ in ALL}))
def test_arms_of_an_experiment_decide_different_numbers(experiment: str) -> None:
    assert experiment in options("experiment")
    keys: dict[str, str] = {}
    for arm in arms(experiment):
        spec = composed_spec(experiment, arm)
        assert spec.key not in keys, f"{arm} and {keys[spec.key]} are one setting"
        keys[spec.key] = arm


def test_arm_decides_the_folder_and_not_the_key() -> None:
    plain = run_spec("results")
    for value, folder in ((None, "sgd"), ("slow", "slow")):
        spec = run_spec("results", **{"experiment.arm": value})
        assert spec.key == plain.key
        assert spec.directory == Path("results/runs/test") / folder / plain.directory.name
    with pytest.raises(UserError, match=r"experiment\.arm='a/b'"):
        run_spec("results", **{"experiment.arm": "a/b"})


def test_without_an_arm_nothing_changes() -> None:
    config = composed("experiment=digits_mlp", "optimizer=sgd")
    assert config.experiment.arm is None
    without = config.copy()
    OmegaConf.set_struct(without, False)
    del without.experiment["arm"]
    ours, before = RunSpec.from_config(config), RunSpec.from_config(without)
    assert (ours.key, ours.directory) == (before.key, before.directory)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("experiment=controls arm=sgd_lr05", "did you mean 'sgd_lr0.5'"),
        ("arm=sgd_lr0.1", "it is one of controls: write experiment=controls"),
        ("experiment=digits_mlp arm=zzz", "this experiment has none"),
        ("experiment=control arm=mlbfgs", "did you mean 'controls'"),
        ("experiment=controls,digits_mlp arm=mlbfgs", "an arm belongs to one experiment"),
        ("experiment=controls arm=mlbfgs optimizer=sgd", "chooses its optimizer itself"),
        ("experiment/arm=controls/mlbfgs", "arm=<name> beside experiment="),
    ],
)
def test_mistake_about_an_arm_is_one_line(
    line: str, wanted: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=wanted) as caught:
        compose_config(line.split())
    assert "\n" not in str(caught.value)
    assert train.main(line.split()) == 2
    assert capfd.readouterr().err == f"error: {caught.value}\n"


def test_settings_of_the_command_line_win_over_the_arm() -> None:
    config = compose_config(["experiment=controls", "arm=sgd_lr1.0", "optimizer.lr=0.3"])
    assert (config.optimizer.lr, config.experiment.arm) == (0.3, "sgd_lr1.0")


def test_sweep_over_arms(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = "-m experiment=controls arm=sgd_lr0.1,sgd_lr0.5_warmup scale=smoke launch.dry_run=true"
    assert train.main([*line.split(), f"results_dir={tmp_path}"]) == 0
    found = {path.parent.name for path in tmp_path.glob("runs/controls/*/smoke-seed0-*")}
    assert found == {"sgd_lr0.1", "sgd_lr0.5_warmup"}
    assert "2 runs" in capfd.readouterr().out


def test_campaign_takes_every_arm_or_those_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = ["controls", "--seeds", "0", "--scale", "smoke", "--plan", "--results-dir"]
    line.append(str(tmp_path))
    assert reproduce(line) == 0
    said = capfd.readouterr().out
    assert f"{len(arms('controls'))} runs, 0 finished" in said
    waiting = {"sgd_replay"}  # planned once the run that it replays is there
    for arm in set(arms("controls")) - waiting:
        assert f"arm={arm} scale=smoke" in said
    assert said.count("  waiting: ") == len(waiting)
    assert reproduce([*line, "--optimizers", "sgd", "--arms", "mlbfgs"]) == 0
    said = capfd.readouterr().out
    assert "2 runs" in said and "optimizer=sgd" in said and "arm=mlbfgs scale" in said
    for wrong, wanted in (("--arms=x", "arm=x is no arm"), ("--arms=", "each entry once")):
        assert reproduce([*line, wrong]) == 2
        assert wanted in capfd.readouterr().err
    assert reproduce([*line, "arm=mlbfgs"]) == 2
    assert "write --arms" in capfd.readouterr().err


def test_meta_names_the_arm_and_the_version_of_the_numerics(tmp_path: Path) -> None:
    for arm in (None, "slow"):
        spec = run_spec(tmp_path, **{"experiment.arm": arm})
        with RunDirectory.open(spec) as directory:
            directory.write_meta(origin={}, parameters=1, resumed_at=0)
            directory.write_meta(origin={"ranks": 2}, parameters=1, resumed_at=7)
        meta = json.loads((spec.directory / "meta.json").read_text())
        assert meta["numerics_version"] == NUMERICS_MEANING
        assert meta["numerics_rounding"] == NUMERICS_ROUNDING
        resumed = {"step": 7, "numerics_rounding": NUMERICS_ROUNDING, "ranks": 2}
        assert meta["resumes"] == [resumed]
        assert meta.get("arm") == arm and meta["optimizer"] == "sgd"
