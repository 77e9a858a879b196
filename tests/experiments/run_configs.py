"""Small run configs, and the comparison of two runs, for the tests of the run's machinery."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch.optim.optimizer import register_optimizer_step_pre_hook

from experiments.runs.metrics import read_metrics
from experiments.runs.spec import RunSpec
from experiments.training.checkpoint import CheckpointStore
from experiments.training.trainer import Trainer

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
MEASURED = (
    "train_time_s",
    "data_time_s",
    "forward_backward_time_s",
    "optimizer_time_s",
    "extra_passes_time_s",
    "gradient_time_s",
    "images_per_second",
    "peak_memory_bytes",
)


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


def numbers(directory: Path) -> list[dict[str, Any]]:
    """The records of a run without what is measured anew each time."""
    records = read_metrics(directory / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in MEASURED} for record in records]


def newest_state(spec: RunSpec, directory: Path | None = None) -> dict[str, Any]:
    folder = (directory or spec.directory) / "checkpoints"
    state = CheckpointStore(folder, key=spec.key, keep=1).load_newest()
    assert state is not None
    return state


def assert_same_bits(left: Any, right: Any, path: str = "state") -> None:
    """Compare nested states: tensors by their bits, everything else by ==."""
    assert type(left) is type(right), path
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and left.shape == right.shape, path
        assert torch.equal(left, right), path
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            assert_same_bits(left[key], right[key], f"{path}[{key!r}]")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), path
        for index, pair in enumerate(zip(left, right, strict=True)):
            assert_same_bits(*pair, f"{path}[{index}]")
    else:
        assert left == right, path


def assert_same_run(left: RunSpec, right: RunSpec) -> None:
    """Records, final weights, optimizer and random state are equal, bit for bit."""
    assert numbers(left.directory) == numbers(right.directory)
    states = newest_state(left), newest_state(right)
    for key in ("model", "optimizer", "loss_sum", "rng"):
        assert_same_bits(states[0][key], states[1][key], key)
    ends = [
        {k: v for k, v in state["position"].items() if k != "epoch_start_time_s"}
        for state in states
    ]
    assert ends[0] == ends[1]


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
