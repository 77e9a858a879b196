"""The search: equal budgets, held-out images alone, and the same trials after a kill -9."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from experiments import reproduce, tune
from experiments.composition import CONFIG_DIR, compose_config
from experiments.contestants import optimizers_with_recipe, options
from experiments.data import digits
from experiments.errors import UserError
from experiments.runs.directory import read_status
from experiments.runs.spec import RunSpec
from experiments.training.trainer import Trainer
from experiments.tuning.chosen import Chosen
from experiments.tuning.report import ranked, summary_markdown, trials_csv
from experiments.tuning.space import read_space, space_of
from experiments.tuning.study import OptimizerStudy, Search, with_holdout
from tests.experiments.run_configs import numbers

ROOT = Path(__file__).resolve().parents[2]
SPACE = {
    "metric": "test_top1",
    "seeds": [100],
    "reporting_seeds": [0, 1],
    "trials": 5,
    "round": 3,
    "sampler_seed": 0,
    "holdout": {"digits": 200},
    "search": {"sgd": {"optimizer.lr": [1e-4, 1e4]}},
}


def search_in(folder: Path, **changes) -> Search:
    space = space_of({**SPACE, **changes.pop("space", {})}, "test", "the test's space")
    values = {
        "space": space,
        "experiment": "digits_mlp",
        "scale": "smoke",
        "optimizers": tuple(space.search),
        "seeds": (100,),
        "trials": space.rules.trials,
        "folder": folder,
        "overrides": with_holdout(space, "digits_mlp", ("schedule.min_lr=1e-5",)),
    }
    return Search(**{**values, **changes})


def trained(search: Search) -> OptimizerStudy:
    study = OptimizerStudy(search, search.optimizers[0])
    while trials := study.choose_round():
        for trial in trials:
            for spec in trial.specs:
                Trainer(spec).run()
    return study


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("digits", "did you mean 'digits_mlp'"),
        ("digits_mlp --space lr", "space 'lr' does not exist"),
        ("digits_mlp --optimizers sdg", "did you mean 'sgd'"),
        ("digits_mlp --seeds 100,1,0", "seeds 0, 1 are tuning seeds and reporting seeds"),
        ("digits_mlp --trials 0", "--trials 0 must be at least 1"),
        ("digits_mlp --jobs 0", "--jobs 0 must be at least 1"),
        ("digits_mlp dataset.holdout=null", "dataset.holdout is null"),
        ("digits_mlp dataset.holdout=1442", "holdout = 1442 must be 1 to 1441"),
        ("digits_mlp optimizer.lr=0.1", "optimizer.lr is what is searched"),
        ("digits_mlp seed=3", "write --seeds instead"),
        ("digits_mlp train.epoch=3", "did you mean 'epochs'"),
        ("controls", "has no recipes: name --optimizers"),
    ],
)
def test_mistake_is_one_line_and_exit_code_2(line, wanted, tmp_path, capfd):
    arguments = [*line.split(), "--results-dir", str(tmp_path), "--scale", "smoke"]
    if "1442" in line:  # only known when the data are there: let one short run find it
        arguments += ["--optimizers", "sgd", "--trials", "1", "--seeds", "100"]
    assert tune.main(arguments) == 2
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith("error: ") and wanted in told[0]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"seeds": [1, 100]}, "seeds 1 are tuning seeds and reporting seeds"),
        ({"seeds": [100, 100]}, "must be different"),
        ({"search": {"sdg": {}}}, "did you mean 'sgd'"),
        ({"search": {"sgd": {"optimizer.lr": [1.0, 0.1]}}}, "must be \\[low, high\\]"),
        ({"round": 0}, "round = 0 must be at least 1"),
        ({"metric": "test_top5"}, "metric = 'test_top5'"),
        ({"rounds": 3}, "unknown key"),
    ],
)
def test_space_that_will_not_do_is_told(changes, wanted):
    with pytest.raises(UserError, match=wanted):
        space_of({**SPACE, **changes}, "test", "the test's space")


def test_every_optimizer_may_be_searched_over_equal_decades():
    space = read_space("learning_rate")
    assert set(space.search) == set(options("optimizer"))
    for ranges in space.search.values():
        assert list(ranges) == ["optimizer.lr"]
        # 3.5 decades, as far as round numbers go
        span = ranges["optimizer.lr"]
        assert np.log10(span.high / span.low) == pytest.approx(3.5, abs=0.03)
    names = {compose_config([f"experiment={e}"]).dataset.name for e in options("experiment")}
    assert names <= set(space.holdout)


def test_the_small_budget_is_as_wide_for_every_optimizer():
    space = read_space("two_decades")
    for ranges in space.search.values():
        assert list(ranges) == ["optimizer.lr"]
        span = ranges["optimizer.lr"]
        assert span.high / span.low == pytest.approx(100)


@pytest.mark.parametrize(
    "experiment", [e for e in options("experiment") if optimizers_with_recipe(e)]
)
def test_space_of_learning_rates_trains_everywhere(experiment, tmp_path):
    search = search_in(
        tmp_path,
        experiment=experiment,
        scale="full",
        optimizers=optimizers_with_recipe(experiment),
        overrides=with_holdout(read_space("learning_rate"), experiment, ()),
    )
    search = replace(search, space=read_space("learning_rate"))
    for optimizer in search.optimizers:
        OptimizerStudy(search, optimizer)


def test_range_below_the_end_of_the_schedule_is_told_before_the_first_trial(tmp_path):
    search = search_in(tmp_path, space={"search": {"adam": {"optimizer.lr": [1.0e-6, 1.0e-1]}}})
    with pytest.raises(UserError, match=r"'test' searches adam where .* schedule\.min_lr = 1e-05"):
        OptimizerStudy(search, "adam")


def test_search_is_no_part_of_a_runs_config():
    assert (CONFIG_DIR / "tune").is_dir()
    with pytest.raises(UserError, match="tune is no key"):
        compose_config(["+tune=learning_rate"])


def test_test_set_plays_no_part_in_a_trial(tmp_path, monkeypatch):
    search = search_in(tmp_path / "whole", trials=2)
    whole = OptimizerStudy(search, "sgd").choose_round()[0].specs[0]
    Trainer(whole).run()
    raw = digits.load()
    poisoned = replace(raw, test=raw.test.at(np.zeros(3, dtype=np.int64)))
    monkeypatch.setattr(digits, "load", lambda: poisoned)
    search = search_in(tmp_path / "poisoned", trials=2)
    other = OptimizerStudy(search, "sgd").choose_round()[0].specs[0]
    Trainer(other).run()
    assert numbers(whole.directory) == numbers(other.directory)
    # of 200 held-out images: a multiple of half a percent
    top1 = numbers(whole.directory)[-1]["test_top1"]
    assert (2 * top1) == pytest.approx(round(2 * top1))
    # fewer trials than a round: a coarser grid over the whole range
    assert whole.config.optimizer.lr == pytest.approx(1e-2)


def test_trials_are_an_even_grid_and_then_follow_from_its_results(tmp_path):
    search = search_in(tmp_path)
    study = trained(search)
    rates = [trial.values["optimizer.lr"] for trial in study.trials]
    # 8 decades in three parts, at their middles
    np.testing.assert_allclose(np.log10(rates[:3]), [-4 + 8 / 6, 0, 4 - 8 / 6], atol=1e-12)
    assert len(rates) == 5 and len(set(rates)) == 5
    assert all(1e-4 <= rate <= 1e4 for rate in rates)

    again = OptimizerStudy(search, "sgd")
    while again.choose_round():
        pass
    assert [trial.values for trial in again.trials] == [trial.values for trial in study.trials]

    diverged = [trial for trial in study.trials if trial.diverged]
    assert study.trials[2] in diverged  # at a learning rate of 460
    order = ranked(study.trials, search)
    assert order[-len(diverged) :] == diverged
    results = [trial.result("test_top1") for trial in order[: -len(diverged)]]
    assert results == sorted(results, reverse=True)

    rows = list(csv.DictReader(trials_csv(search, [study]).splitlines()))
    assert [float(row["optimizer.lr"]) for row in rows] == rates
    assert [row["status"] for row in rows].count("diverged") == len(diverged)
    assert all((row["test_top1"] == "") == (row["status"] == "diverged") for row in rows)
    summary = summary_markdown(search, [study])
    assert f"| sgd         | 5        | {len(diverged)} " in summary
    assert f"{results[0]:.4g}" in summary and "200 held-out training images" in summary
    assert "was tried; there may be a better one" not in summary
    every, best = study.trials, order[0].values["optimizer.lr"]
    for word, beyond in (("larger", np.greater), ("smaller", np.less)):
        study.trials = [t for t in every if not beyond(t.values["optimizer.lr"], best)]
        told = f"- sgd: no optimizer.lr {word} than the best, {best:.3g}, was tried"
        assert told in summary_markdown(search, [study])


def wait_for(condition, process: subprocess.Popen, limit_s: float = 240) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_search_goes_on_with_the_same_trials_and_is_used(tmp_path, capfd):
    line = ["digits_mlp", "--scale", "smoke", "--optimizers", "sgd", "--seeds", "100"]
    line += ["--trials", "6"]  # a round of five, and one
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "experiments.tune", *line, "--results-dir", str(killed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    folder = killed / "tuning" / "digits_mlp-smoke"

    def finished() -> list[Path]:
        directories = folder.glob("runs/digits_mlp/sgd/*")
        return [d for d in directories if (s := read_status(d)) and s.status == "done"]

    try:
        wait_for(lambda: len(finished()) >= 2, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    time.sleep(2)  # the pool's process ends with its parent, and its lock with it
    before = {d: (d / "metrics.jsonl").stat().st_mtime_ns for d in finished()}
    assert 2 <= len(before) < 6 and not (folder / "trials.csv").exists()

    assert tune.main([*line, "--results-dir", str(killed), "--status"]) == 0
    assert "6 trials of 1 runs" in capfd.readouterr().out
    # two side by side, and still the trials of one after the other
    assert tune.main([*line, "--results-dir", str(killed), "--jobs", "2"]) == 0
    assert all((d / "metrics.jsonl").stat().st_mtime_ns == t for d, t in before.items())
    assert tune.main([*line, "--results-dir", str(whole)]) == 0
    for name in ("trials.csv", "summary.md", "chosen.yaml"):
        texts = [(f / "tuning/digits_mlp-smoke" / name).read_text() for f in (killed, whole)]
        assert texts[0] == texts[1]
    assert len(finished()) == 6
    capfd.readouterr()
    assert tune.main([*line, "--results-dir", str(killed), "--plan"]) == 0
    assert "6 finished, 0 to run now, 0 to be chosen" in capfd.readouterr().out

    chosen = folder / "chosen.yaml"
    rate = yaml.safe_load(chosen.read_text())["settings"]["sgd"]["optimizer.lr"]
    campaign = ["digits_mlp", "--optimizers", "sgd", "--scale", "smoke", "--tuned", str(chosen)]
    assert reproduce.main([*campaign, "--plan", "--results-dir", str(tmp_path)]) == 0
    planned = capfd.readouterr().out
    assert planned.count(f"optimizer.lr={rate!r}") == 3 and "holdout" not in planned


CHOSEN = """
experiment: digits_mlp
scale: full
space: learning_rate
metric: test_top1
holdout: 288
seeds: [100, 101]
trials: 3
settings: {sgd: {optimizer.lr: 0.25}}
"""


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("digits_mlp --optimizers sgd --seeds 0,101", "seeds 101 are tuning seeds and reporting"),
        ("digits_mlp --optimizers sgd,adam", "optimizer 'adam' has no chosen settings"),
        ("cifar10_resnet18 --optimizers sgd", "chosen on experiment 'digits_mlp'"),
        ("digits_mlp --optimizers sgd --scale smoke", "chosen on scale 'full', not on 'smoke'"),
    ],
)
def test_chosen_settings_are_used_as_they_were_found(line, wanted, tmp_path, capfd):
    file = tmp_path / "chosen.yaml"
    file.write_text(CHOSEN)
    tail = ["--tuned", str(file), "--results-dir", str(tmp_path), "--plan"]
    assert reproduce.main([*line.split(), *tail]) == 2
    assert wanted in capfd.readouterr().err
    assert reproduce.main(["digits_mlp", "--optimizers", "sgd", *tail]) == 0
    assert capfd.readouterr().out.count("optimizer.lr=0.25") == 3
    overrides = Chosen.load(file).overrides("sgd")
    config = compose_config(["experiment=digits_mlp", "optimizer=sgd", *overrides])
    told = {"search": "digits_mlp-full", "settings": {"optimizer": {"lr": 0.25}}}
    assert (config.optimizer.lr, config.experiment.tuned) == (0.25, told)
    file.write_text("a: 1\n")
    assert reproduce.main(["digits_mlp", *tail]) == 2
    assert "is no chosen.yaml" in capfd.readouterr().err


def test_adopted_settings_are_configs_over_the_recipe(tmp_path, monkeypatch, capsys):
    file = tmp_path / "chosen.yaml"
    file.write_text(CHOSEN.replace("scale: full", "scale: reduced"))
    configs = shutil.copytree(CONFIG_DIR, tmp_path / "configs")
    scale_file = configs / "experiment/scale/digits_mlp/reduced.yaml"
    monkeypatch.setattr(tune, "CONFIG_DIR", configs)
    tune.adopt(search_in(tmp_path, scale="reduced"))
    told = capsys.readouterr().out
    entry = "- optional /experiment/tuned/digits_mlp-reduced: ${optimizer}"
    assert "digits_mlp-reduced/sgd.yaml" in told and f"{scale_file}:\n  {entry}" in told
    text = scale_file.read_text()
    assert "# @package _global_" in text and "defaults" not in text
    scale_file.write_text(f"# @package _global_\ndefaults:\n  {entry}\n{text}")
    tune.adopt(search_in(tmp_path, scale="reduced"))
    assert "to train with them" not in capsys.readouterr().out
    monkeypatch.setattr("experiments.composition.CONFIG_DIR", configs)
    reduced = ("experiment=digits_mlp", "scale=reduced")
    config = compose_config(["optimizer=sgd", *reduced])
    tuned = {"search": "digits_mlp-reduced", "settings": {"optimizer": {"lr": 0.25}}}
    assert (config.optimizer.lr, config.experiment.tuned) == (0.25, tuned)
    config = compose_config(["optimizer=sgd", *reduced, "optimizer.lr=0.5"])
    assert config.optimizer.lr == 0.5
    other = compose_config(["optimizer=adam", *reduced])  # nothing was chosen for it
    assert other.experiment.tuned is None


def test_trial_is_an_ordinary_run_in_the_searchs_folder(tmp_path):
    trial = OptimizerStudy(search_in(tmp_path), "sgd").choose_round()[0]
    spec = trial.specs[0]
    assert isinstance(spec, RunSpec) and spec.config.dataset.holdout == 200
    assert spec.directory.parent == tmp_path / "runs" / "digits_mlp" / "sgd"
