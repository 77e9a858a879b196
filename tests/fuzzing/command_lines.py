"""Command lines of the suite, with odd words in them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from hypothesis import strategies as st

from experiments import plan, reproduce, train, tune
from experiments.analysis.__main__ import main as analyse
from experiments.data import prepare
from experiments.report.__main__ import main as report
from tests.fuzzing.mutations import NUMBERS, TEXTS

# Keys whose values a training of a second may have. The others (a model that takes minutes to
# build, a launcher, a download) are composed and frozen, but not trained.
TRAINED = (
    "seed", "train.epochs", "train.batch_size", "train.micro_batch", "train.precision", "train.ema",
    "train.log_interval", "train.eval_interval", "train.gradient_record", "train.channels_last",
    "train.checkpoint_interval", "train.keep_checkpoints", "train.device", "train.sync_batchnorm",
    "optimizer", "optimizer.lr", "optimizer.betas", "optimizer.weight_decay", "optimizer.damping",
    "optimizer.momentum", "optimizer.history_size", "optimizer.update_interval", "optimizer.blocks",
    "optimizer.curvature_bounds", "optimizer.direction", "optimizer.variant", "schedule",
    "schedule.min_lr", "schedule.interval", "schedule.warmup_epochs", "model.hidden",
    "dataset.mean", "dataset.std", "dataset.drop_last", "dataset.train_limit", "dataset.test_limit",
    "dataset.holdout", "dataset.test_batch_size", "experiment.target.value", "experiment.arm",
)  # fmt: skip
COMPOSED = (
    *TRAINED, "arm", "experiment", "dataset", "model", "scale", "launch", "logger", "resume",
    "train", "train.threads", "train.timeout_s", "train.compile", "model.name", "optimizer.name",
    "dataset.root", "dataset.synthetic", "dataset.crop", "launch.nproc", "launch.nnodes",
    "launch.rdzv_endpoint", "launch.timeout_s", "logger.mode", "optimizer._target_", "results_dir",
    "experiment.name", "experiment.target", "optimizer@x", "a.b.c",
)  # fmt: skip
CHOICES = (
    "sgd", "adam", "kfac", "mlbfgs", "slbfgs", "slimqn", "muon", "cifar10", "imagenet", "digits",
    "cosine", "steps", "constant", "replay", "torchrun", "slurm", "subprocess", "wandb", "resnet18",
    "controls", "ablation", "digits_mlp", "smoke", "full", "float16", "bfloat16", "resblocks:2",
    "[0.9,0.99]", "[]", "{}", "[1,[2]]", "{interval:1,images:50}", "1,2", "released", "never",
)  # fmt: skip
SMALL = (0, 1, -1, 3, 0.5, 1e308, 1e-300, float("nan"), float("inf"), 2**31, 2**64)


def overrides(keys: tuple[str, ...]) -> st.SearchStrategy[str]:
    """`key=value` with a key that there is and any value."""
    value = st.one_of(
        st.sampled_from(CHOICES),
        st.sampled_from(SMALL).map(str),
        st.sampled_from(NUMBERS).map(str),
        TEXTS,
    )
    prefix = st.sampled_from(("", "", "", "", "+", "~", "++"))
    return st.builds(lambda p, key, v: f"{p}{key}={v}", prefix, st.sampled_from(keys), value)


WORDS = st.one_of(overrides(COMPOSED), st.sampled_from(CHOICES), TEXTS)
OPTIONS = st.sampled_from(
    ("--optimizers", "--arms", "--seeds", "--scale", "--tuned", "--jobs", "--ranks", "--space",
     "--trials", "--plan", "--status", "--missing-only", "--experiment", "--model", "--images",
     "--input", "--classes", "--utilisation", "--json", "--form", "--workers", "--shard-size",
     "--verify", "-m", "--cfg=job", "--help", "--no-such-option", "-")
)  # fmt: skip
COMMAND_LINES = st.one_of(
    st.tuples(st.just("train"), st.lists(overrides(TRAINED), min_size=1, max_size=3)),
    st.tuples(
        st.sampled_from(("dry", "dry", "reproduce", "tune", "analyse", "diff", "plan", "prepare")),
        st.lists(st.one_of(WORDS, WORDS, OPTIONS), max_size=4),
    ),
)
_SHORT = ["scale=smoke", "train.timeout_s=1", "train.threads=1", "launch=local"]


def run_command(scratch: Path, example: tuple[str, list[str]]) -> int:
    """Run one command; where it writes is said last, which counts."""
    name, words = example
    results = scratch / "results"
    shutil.rmtree(results / "runs", ignore_errors=True)
    commands: Mapping[str, tuple[Callable[[list[str]], int], list[str]]] = {
        "train": (train.main, [*_SHORT, *words, f"results_dir={results}"]),
        "dry": (train.main, [*words, f"results_dir={results}", "launch.dry_run=true"]),
        "reproduce": (
            reproduce.main,
            ["digits_mlp", *words, "--plan", "--results-dir", str(results)],
        ),
        "tune": (tune.main, ["digits_mlp", *words, "--plan", "--results-dir", str(results)]),
        "analyse": (analyse, [str(results), "--all", *words]),
        "diff": (report, ["diff", str(results), *words]),
        "plan": (plan.main, ["scale=smoke", *words]),
        "prepare": (prepare.main, [str(scratch / "home"), str(results / "prepared"), *words]),
    }
    main, arguments = commands[name]
    return main(arguments)
