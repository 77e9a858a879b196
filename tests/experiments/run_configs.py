"""Small run configs, and the comparison of two runs, for the tests of the run's machinery."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch.optim.optimizer import register_optimizer_step_pre_hook

from experiments.faults import comparison
from experiments.faults.comparison import MEASURED, numbers
from experiments.runs.spec import RunSpec
from experiments.training.trainer import Trainer

__all__ = ["MEASURED", "numbers"]

ROOT = Path(__file__).resolve().parents[2]

SGD = {"name": "sgd", "_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}
MLBFGS = {
    "name": "mlbfgs",
    "_target_": "mlbfgs.MLBFGS",
    "lr": 0.05,
    "update_interval": 4,
    "history_size": 3,
    "betas": [0.9, 0.9],
}


def run_config(results_dir: Path | str, /, **changes: Any) -> DictConfig:
    """Digits, an MLP and SGD: 22 steps an epoch, two epochs; `changes` by dotted key."""
    config = OmegaConf.create(
        {
            "seed": 0,
            "results_dir": str(results_dir),
            "resume": "auto",
            "experiment": {"name": "test", "target": {"metric": "test_top1", "value": 90.0}},
            "dataset": {
                "name": "digits",
                "mean": [0.3051],
                "std": [0.3762],
                "crop_padding": 0,
                "horizontal_flip": False,
            },
            "model": {"name": "mlp", "hidden": [32]},
            "optimizer": dict(SGD),
            "schedule": {"name": "cosine", "min_lr": 1e-4},
            "scale": {"name": "smoke"},
            "train": {
                "epochs": 2,
                "batch_size": 64,
                "device": "cpu",
                "threads": 1,
                "channels_last": True,
                "log_interval": 10,
                "eval_interval": 1,
                "checkpoint_interval": 200,
                "keep_checkpoints": 2,
                "timeout_s": None,
            },
            "launch": {"name": "local"},
            "logger": {"name": "files"},
        }
    )
    for key, value in changes.items():
        OmegaConf.update(config, key, value, merge=False)
    return config


def run_spec(results_dir: Path | str, /, **changes: Any) -> RunSpec:
    return RunSpec.from_config(run_config(results_dir, **changes))


def newest_state(spec: RunSpec, directory: Path | None = None) -> dict[str, Any]:
    return comparison.newest_state(directory or spec.directory)


def assert_same_bits(left: Any, right: Any, path: str = "state") -> None:
    """Compare nested states: tensors by their bits, everything else by ==."""
    assert comparison.differing(left, right, path) is None


def assert_same_run(left: RunSpec, right: RunSpec) -> None:
    """Records, final weights, optimizer and random state are equal, bit for bit."""
    assert comparison.first_difference(left.directory, right.directory) is None


def stop_at(step: int, trainer: Trainer) -> None:
    """Interrupt a run as its optimizer begins the step after `step`."""
    done = 0

    def count(optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
        nonlocal done
        done += 1
        if done > step:
            raise KeyboardInterrupt

    handle = register_optimizer_step_pre_hook(count)
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
    finally:
        handle.remove()
