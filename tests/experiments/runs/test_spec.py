"""The run key and the checks of the values."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ReadonlyConfigError

import experiments.runs.spec
from experiments.errors import UserError
from experiments.runs.deciding import COSMETIC_KEYS, LATER_KEYS
from experiments.runs.spec import RULES, RunSpec
from tests.experiments.run_configs import ROOT, run_config, run_spec


def _reversed(value):
    if isinstance(value, dict):
        return {key: _reversed(value[key]) for key in reversed(value)}
    return value


def test_key_ignores_order_of_keys():
    config = run_config("results")
    other = OmegaConf.create(_reversed(OmegaConf.to_container(config)))
    assert list(config) != list(other)
    assert RunSpec.from_config(config).key == RunSpec.from_config(other).key


@pytest.mark.parametrize("spelling", ["0.1", "1e-1", "1.0e-1", ".1", "0.10"])
def test_key_ignores_spelling_of_floats(spelling):
    config = OmegaConf.create(OmegaConf.to_yaml(run_config("results")))
    config.optimizer = OmegaConf.create(f"{{name: sgd, _target_: t, lr: {spelling}}}")
    plain = run_spec("results", optimizer={"name": "sgd", "_target_": "t", "lr": 0.1})
    assert RunSpec.from_config(config).key == plain.key


def test_key_takes_one_and_one_point_zero_as_equal():
    keys = {run_spec("r", **{"optimizer.momentum": value}).key for value in (1, 1.0)}
    assert len(keys) == 1


def test_key_tells_true_from_one():
    keys = {run_spec("r", **{"model.width": value}).key for value in (1, True, "1", None)}
    assert len(keys) == 4


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("results_dir", "elsewhere"),
        ("resume", "never"),
        ("experiment.target.value", 91.0),
        ("experiment.title", "a title"),
        ("launch", {"name": "subprocess", "dry_run": False}),
        ("logger", {"name": "wandb", "mode": "offline"}),
        ("dataset.root", "/data"),
        ("dataset.cache_dir", "/cache"),
        ("dataset.download", True),
        ("dataset.val_labels", "elsewhere/val.txt"),
        ("model.weights", "elsewhere/weights.pth"),
        ("dataset.workers", 7),
        ("dataset.max_unreadable", 7),
        ("train.device", "auto"),
        ("train.threads", 2),
        ("train.log_interval", 1),
        ("train.checkpoint_interval", 1),
        ("train.keep_checkpoints", 7),
        ("train.timeout_s", 60.0),
        ("optimizer.distribution", "sharded"),
    ],
)
def test_key_ignores_cosmetics(key, value):
    changed = run_spec("results", **{key: value})
    assert changed.key == run_spec("results").key
    assert changed.first_difference(run_spec("results")) is None


def test_cosmetic_keys_are_all_tested():
    tested = test_key_ignores_cosmetics.pytestmark[0].args[1]
    for cosmetic in COSMETIC_KEYS:
        assert any(key == cosmetic or key.startswith(f"{cosmetic}.") for key, _ in tested)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 1),
        ("dataset.train_limit", 100),
        ("dataset.rootless", 1),
        ("model.hidden", [32, 32]),
        ("model.hidden", []),
        ("optimizer.lr", 0.1000001),
        ("schedule.min_lr", 0.0),
        ("train.epochs", 3),
        ("train.batch_size", 32),
        ("train.channels_last", False),
        ("train.eval_interval", 2),
    ],
)
def test_key_depends_on_what_decides_numbers(key, value):
    changed, plain = run_spec("results", **{key: value}), run_spec("results")
    assert changed.key != plain.key
    difference = changed.first_difference(plain)
    assert difference is not None and difference[0].startswith(key)


@pytest.mark.parametrize("key", LATER_KEYS)
def test_key_ignores_a_later_key_only_where_it_says_what_runs_did_before(key):
    before = run_spec("results")
    same = run_spec("results", **{key: LATER_KEYS[key]})
    assert same.key == before.key and same.first_difference(before) is None
    rule = next((rule for rule in RULES if rule.key == key), None)
    others = ("other", "bfloat16", 1, 0.9, True, ["x"], {"base": LATER_KEYS[key]})
    others += ({"interval": 1, "images": None},)
    allowed = [value for value in others if rule is None or rule.holds(value)]
    assert allowed
    for value in allowed:
        assert run_spec("results", **{key: value}).key != before.key


def test_committed_runs_keep_their_keys():
    configs = sorted((ROOT / "results/runs").glob("*/*/*/config.yaml"))
    assert len(configs) >= 16
    for path in configs:
        spec = RunSpec.load(path)
        assert path.parent.parts[-3:] == spec.directory.parts[-3:]


def test_key_depends_on_the_meaning_of_the_numerics_and_not_on_their_rounding(monkeypatch):
    before = run_spec("results").key
    monkeypatch.setattr(experiments.runs.spec, "NUMERICS_ROUNDING", 10**6)
    assert run_spec("results").key == before
    monkeypatch.setattr(experiments.runs.spec, "NUMERICS_MEANING", 10**6)
    assert run_spec("results").key != before


def test_committed_runs_of_the_full_model_release_are_what_they_would_be_now():
    """They came before `drop_oldest_first`, which acts on a refusal at a full history alone."""
    released = 0
    for path in sorted((ROOT / "results/runs").glob("*/*/*/config.yaml")):
        optimizer = RunSpec.load(path).config.optimizer
        variant = optimizer.get("variant", "paper")
        named = variant if isinstance(variant, str) else variant.get("base", "paper")
        if optimizer.get("_target_") != "mlbfgs.SLIMQN" or named != "released":
            continue
        if not isinstance(variant, str) and "drop_oldest_first" in variant:
            continue
        lines = (path.parent / "metrics.jsonl").read_text().splitlines()
        records = [r for r in map(json.loads, lines) if r["kind"] == "curvature"]
        assert records and all(
            r["accepted"] or r["pairs"] < optimizer.history_size for r in records
        )
        released += 1
    assert released >= 3


def test_key_is_the_same_in_another_process():
    code = "from tests.experiments.run_configs import run_spec; print(run_spec('elsewhere').key)"
    command = [sys.executable, "-c", code]
    environment = {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7", "HOME": "/nowhere"}
    answer = subprocess.run(command, cwd="/", env=environment, capture_output=True, check=True)
    assert answer.stdout.decode().strip() == run_spec("results").key


def test_directory_is_named_by_experiment_optimizer_scale_seed_and_key():
    spec = run_spec("some/results", seed=3)
    expected = Path("some/results/runs/test/sgd") / f"smoke-seed3-{spec.key}"
    assert spec.directory == expected
    assert len(spec.key) == 10 and int(spec.key, 16) >= 0


def test_save_and_load_give_the_same_run(tmp_path):
    spec = run_spec("results", **{"optimizer.lr": 1e-30, "dataset.std": [1 / 3]})
    spec.save(tmp_path / "config.yaml")
    loaded = RunSpec.load(tmp_path / "config.yaml")
    assert loaded.deciding_values == spec.deciding_values
    assert loaded.key == spec.key
    assert loaded.config == spec.config


def test_config_is_read_only_and_a_copy():
    config = run_config("results")
    spec = RunSpec.from_config(config)
    with pytest.raises(ReadonlyConfigError):
        spec.config.train.epochs = 5
    config.train.epochs = 5
    assert spec.config.train.epochs == 2


def test_interpolations_are_resolved():
    spec = run_spec("results", **{"schedule.min_lr": "${optimizer.lr}"})
    assert spec.deciding_values["schedule.min_lr"] == 0.1
    assert "${" not in json.dumps(OmegaConf.to_container(spec.config))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", -1),
        ("seed", 1.5),
        ("seed", True),
        ("results_dir", ""),
        ("resume", "always"),
        ("experiment.name", "a/b"),
        ("experiment.name", ".."),
        ("optimizer.name", ""),
        ("optimizer.lr", 0.0),
        ("optimizer.lr", float("nan")),
        ("optimizer.lr", "fast"),
        ("scale.name", "huge"),
        ("train.epochs", 0),
        ("train.epochs", 1.5),
        ("train.batch_size", -64),
        ("train.device", "tpu"),
        ("train.threads", 0),
        ("train.channels_last", "yes"),
        ("train.log_interval", 0),
        ("train.eval_interval", 0),
        ("train.checkpoint_interval", 0),
        ("train.keep_checkpoints", 0),
        ("train.timeout_s", 0),
        ("logger.name", "tensorboard"),
    ],
)
def test_check_refuses_values_that_will_not_do(key, value):
    with pytest.raises(UserError) as caught:
        run_spec("results", **{key: value})
    message = str(caught.value)
    assert f"{key}={value!r}" in message and "must be" in message and "\n" not in message


def test_check_names_the_nearest_setting():
    with pytest.raises(UserError, match=r"train\.epoch .*did you mean 'epochs'"):
        run_spec("results", **{"train.epoch": 3})


def test_check_names_what_is_absent():
    config = run_config("results")
    del config.train.epochs
    with pytest.raises(UserError, match=r"no train\.epochs"):
        RunSpec.from_config(config)


@pytest.mark.parametrize("value", ["???", "${nowhere}"])
def test_values_that_do_not_resolve_are_told_in_one_line(value):
    with pytest.raises(UserError, match="does not resolve") as caught:
        run_spec("results", **{"optimizer.lr": value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["a: [", "- 1\n- 2\n", "just text", ""])
def test_load_refuses_a_corrupt_file(tmp_path, content):
    file = tmp_path / "config.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=r"config\.yaml"):
        RunSpec.load(file)


def test_load_names_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="no config at"):
        RunSpec.load(tmp_path / "config.yaml")
