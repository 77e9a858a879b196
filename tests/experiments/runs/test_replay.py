"""The schedule `replay`: the γ of a finished run, as a pure function of the step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from experiments import train
from experiments.analysis.measuring.groups import group_runs
from experiments.analysis.measuring.runs import load_runs
from experiments.errors import UserError
from experiments.reproduce import main as reproduce
from experiments.runs.replay import fill, find_source, trajectory, wants_source
from experiments.runs.spec import RunSpec
from experiments.training.schedules import check_schedule, learning_rate
from experiments.training.trainer import Trainer
from tests.experiments.run_configs import numbers, run_config, run_spec

MULTIPLIERS = [[0, 1.0], [5, 2.5], [9, 0.25]]
REPLAY = {
    "name": "replay",
    "min_lr": 1e-3,
    "source": "mlbfgs",
    "source_key": "0123456789",
    "multipliers": MULTIPLIERS,
}
MLBFGS = {
    "name": "mlbfgs",
    "_target_": "mlbfgs.MLBFGS",
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "betas": [0.99, 0.99],
    "update_interval": 5,
}


def rate(step: int, **changes: Any) -> float:
    node = {**REPLAY, **changes}
    return learning_rate(node, base_lr=0.1, step=step, steps_per_epoch=4, epochs=5)


def wanting(folder: Path, **changes: Any) -> DictConfig:
    """The config of a run that replays a run of mlbfgs in the same folder."""
    schedule = {"name": "replay", "min_lr": 1e-4, "source": "mlbfgs", "multipliers": []}
    return run_config(folder, schedule=schedule, **{"experiment.arm": "again", **changes})


def test_replay_is_the_cosine_times_the_last_multiplier() -> None:
    for step in range(20):
        cosine = 1e-3 + (0.1 - 1e-3) * (1 + math.cos(math.pi * (step // 4) / 5)) / 2
        factor = 1.0 if step < 5 else 2.5 if step < 9 else 0.25
        assert rate(step) == pytest.approx(cosine * factor, rel=1e-12)
    # any order of the steps: nothing is remembered between them
    assert [rate(step) for step in (12, 0, 5)] == [rate(12), rate(0), rate(5)]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"multipliers": []}, "is empty: they are the γ of a finished run of mlbfgs"),
        ({"multipliers": [[1, 1.0]]}, "must increase from 0 on"),
        ({"multipliers": [[0, 1.0], [5, 2.0], [5, 3.0]]}, "must increase from 0 on"),
        ({"multipliers": [[0, 1.0, 2.0]]}, "must be .step, multiplier. pairs"),
        ({"multipliers": [[0, -1.0]]}, "must be a positive number"),
        ({"multipliers": [[0, math.inf]]}, "must be a positive number"),
        ({"multipliers": [0, 1.0]}, r"multipliers\[0\] = 0 must be a list"),
        ({"warmup_epochs": 1}, "must be 0 in a replay"),
    ],
)
def test_replay_that_makes_no_sense_is_refused(changes: dict[str, Any], wanted: str) -> None:
    with pytest.raises(UserError, match=wanted):
        check_schedule({**REPLAY, **changes}, base_lr=0.1, epochs=5)


def records(folder: Path, *changes: dict[str, Any]) -> Path:
    path = folder / "metrics.jsonl"
    plain = {"kind": "curvature", "block": 0, "accepted": True}
    path.write_text("".join(json.dumps({**plain, **change}) + "\n" for change in changes))
    return path


def test_trajectory_is_that_of_the_accepted_pairs(tmp_path: Path) -> None:
    refused = {"step": 20, "gamma": 9.0, "accepted": False}
    path = records(tmp_path, {"step": 10, "gamma": 2}, refused, {"step": 30, "gamma": 0.5})
    assert trajectory(path) == [(0, 1.0), (10, 2.0), (30, 0.5)]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ((), "no curvature records"),
        (({"step": 10, "gamma": 1}, {"step": 10, "gamma": 2, "block": 1}), "has 2 blocks"),
        (({"step": 10, "gamma": -0.5},), "step 10: γ is -0.5"),
        (({"step": 10, "gamma": None},), "step 10: γ is None"),
    ],
)
def test_trajectory_that_is_no_schedule_is_refused(
    tmp_path: Path, changes: tuple[dict[str, Any], ...], wanted: str
) -> None:
    with pytest.raises(UserError, match=wanted):
        trajectory(records(tmp_path, *changes))


def test_replay_is_filled_from_the_finished_run_of_its_seed(tmp_path: Path) -> None:
    config = wanting(tmp_path)
    assert wants_source(config) and not fill(config)
    specs = [run_spec(tmp_path, optimizer=MLBFGS, seed=seed) for seed in (0, 1)]
    for spec in specs:
        Trainer(spec).run()
    filled = []
    for source in specs:
        config = wanting(tmp_path, seed=source.seed)
        assert fill(config) and not wants_source(config)
        curvature = [
            json.loads(line)
            for line in (source.directory / "metrics.jsonl").read_text().splitlines()
            if '"curvature"' in line
        ]
        assert len(curvature) == 7  # steps 10, 15, ... 40 of 44
        expected = [[0, 1.0], *([r["step"], r["gamma"]] for r in curvature if r["accepted"])]
        assert config.schedule.multipliers == expected
        assert config.schedule.source_key == source.key
        filled.append(RunSpec.from_config(config))
        Trainer(filled[-1]).run()
    # Each seed has a γ of its own, and still the seeds are one group.
    (results,) = group_runs(load_runs(tmp_path, "test"))
    assert [len(group.runs) for group in results.of_contestant("again")] == [2]

    # A run that another batch size, or an edited config, made is no source.
    assert find_source(wanting(tmp_path, **{"train.batch_size": 32})) is None
    lr = {"optimizer.lr": 0.2}
    other = run_spec(tmp_path, optimizer=MLBFGS, **{**lr, "train.timeout_s": None})
    Trainer(other).run()
    with pytest.raises(UserError, match=f"has 2 runs .*{other.key}.*move all but one"):
        fill(wanting(tmp_path))


def test_replay_of_gamma_alone_is_the_same_training(tmp_path: Path) -> None:
    # Without momentum d = γ g makes the step lr γ g, which SGD makes at the learning rate lr γ.
    alone = {**MLBFGS, "momentum": 0.0, "direction": "gamma_gradient"}
    source = run_spec(tmp_path, optimizer=alone)
    Trainer(source).run()
    sgd = {"optimizer.momentum": 0.0, "optimizer.weight_decay": 5e-4}
    config = wanting(tmp_path, **sgd)
    assert fill(config)
    assert len({round(gamma, 2) for _, gamma in config.schedule.multipliers}) > 3
    replay = RunSpec.from_config(config)
    Trainer(replay).run()
    losses = [
        [record["loss"] for record in numbers(spec.directory) if record["kind"] == "step"]
        for spec in (source, replay)
    ]
    assert len(losses[0]) == 4
    # The two differ by the rounding of float32 alone.
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_command_says_what_a_replay_waits_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = ["experiment=controls", "arm=sgd_replay", "scale=smoke", f"results_dir={tmp_path}"]
    assert train.main(line) == 2
    said = capfd.readouterr().err
    assert "sgd_replay seed 0 replays mlbfgs, which has no finished run" in said
    line = ["controls", "--arms", "sgd_replay,mlbfgs", "--scale", "smoke", "--seeds", "0"]
    assert reproduce([*line, "--results-dir", str(tmp_path), "--plan"]) == 0
    said = capfd.readouterr().out
    assert "2 runs, 0 finished, 2 to run" in said and said.count("experiments.train") == 1
    assert "waiting: sgd_replay seed 0 replays mlbfgs" in said
