"""Which config keys decide what a run computes: for the run key, and for what may be averaged.

The standard library alone, so that the analysis can read it too.
"""

from __future__ import annotations

from typing import Any

# Config keys, with all that is below them, that do not decide what a run computes.
COSMETIC_KEYS = (
    "results_dir",
    "resume",
    # Where and on how many ranks: rounding alone, but for BatchNorm without train.sync_batchnorm.
    # meta.json has the ranks, and the analysis says where runs differ in them.
    "launch",
    "logger",
    # The name stands in the directory's path; the rest (target, title, table) is about judging.
    "experiment",
    # Where the images lie, not which images they are.
    "dataset.root",
    "dataset.cache_dir",
    "dataset.download",
    "dataset.val_labels",
    # The same of weights: model.pretrained says that the run starts from them.
    "model.weights",
    # A batch does not depend on who loads it, and the limit only says when to give up.
    "dataset.workers",
    "dataset.max_unreadable",
    # Device and threads change the rounding, not the experiment, and `auto` depends on the host,
    # on which no key may depend; meta.json records what was used.
    "train.device",
    "train.threads",
    # How densely, not what: the log interval thins the step records out, and the checkpoints only
    # say from where a killed run goes on, with the same numbers.
    "train.log_interval",
    "train.checkpoint_interval",
    "train.keep_checkpoints",
    "train.timeout_s",
    # Who keeps which part of the optimizer's state: rounding alone.
    "optimizer.distribution",
)

# Config keys that came after results were committed, with the value that says what runs did before:
# a leaf with that value does not enter the key, so that the older runs keep theirs.
LATER_KEYS: dict[str, Any] = {
    "optimizer.variant": "paper",
    "optimizer.direction": "hessian",
    "dataset.holdout": None,
    "dataset.synthetic": False,
    "train.micro_batch": None,
    "train.sync_batchnorm": False,
    "train.precision": "float32",
    "train.compile": False,
    "train.ema": None,
    "train.gradient_record": None,
}


def is_cosmetic(path: str) -> bool:
    """Whether a dotted config path is one of the cosmetic keys, or below one."""
    return any(path == key or path.startswith(f"{key}.") for key in COSMETIC_KEYS)
