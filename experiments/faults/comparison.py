"""Two runs compared bit by bit: records, weights, optimizer and random state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from experiments.runs.directory import CHECKPOINTS_FOLDER, CONFIG_FILE, METRICS_FILE
from experiments.runs.metrics import read_metrics
from experiments.runs.spec import RunSpec
from experiments.training.checkpoint import CheckpointStore

# Seconds and bytes, which differ from run to run.
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
_COMPARED = ("model", "optimizer", "loss_sum", "rng", "position")


def numbers(directory: Path) -> list[dict[str, Any]]:
    """The records of a run without what is measured anew each time."""
    records = read_metrics(directory / METRICS_FILE)
    return [{k: v for k, v in record.items() if k not in MEASURED} for record in records]


def newest_state(directory: Path) -> dict[str, Any]:
    """What the newest intact checkpoint of a run holds.

    Raises:
        ValueError: there is none.
    """
    key = RunSpec.load(directory / CONFIG_FILE).key
    state = CheckpointStore(directory / CHECKPOINTS_FOLDER, key=key, keep=1).load_newest()
    if state is None:
        raise ValueError(f"{directory} has no intact checkpoint")
    return state


def first_difference(left: Path, right: Path) -> str | None:
    """Where two runs differ first; None where records and final states are equal, bit for bit.

    Args:
        left: a run directory.
        right: another one.
    """
    found = differing(numbers(left), numbers(right), "records")
    if found is not None:
        return found
    states = []
    for directory in (left, right):
        state = newest_state(directory)
        position = {k: v for k, v in state["position"].items() if k != "epoch_start_time_s"}
        states.append({**{key: state[key] for key in _COMPARED}, "position": position})
    return differing(states[0], states[1], "state")


def differing(left: Any, right: Any, path: str) -> str | None:
    """Where two nested values differ first: tensors by their bits, everything else by ==.

    Args:
        left: dicts, lists, tensors and plain values.
        right: the same.
        path: what they are called.
    """
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        same = left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
        return None if same else path
    if type(left) is not type(right):
        return f"{path}: {type(left).__name__} and {type(right).__name__}"
    if isinstance(left, dict):
        if left.keys() != right.keys():
            return f"{path}: keys {sorted(map(str, left.keys() ^ right.keys()))}"
        pairs = [(f"{path}[{key!r}]", left[key], right[key]) for key in left]
    elif isinstance(left, list | tuple):
        if len(left) != len(right):
            return f"{path}: {len(left)} and {len(right)} entries"
        pairs = [(f"{path}[{i}]", *pair) for i, pair in enumerate(zip(left, right, strict=True))]
    else:
        return None if left == right else f"{path}: {left!r} and {right!r}"
    return next(filter(None, (differing(a, b, name) for name, a, b in pairs)), None)
