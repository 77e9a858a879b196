"""Every config composes, and the papers' printed values arrive where they belong."""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from experiments.composition import compose_config, recipe_note
from experiments.contestants import CONFIG_DIR, arms, optimizers_with_recipe, options
from experiments.runs.spec import RunSpec
from experiments.tuning.chosen import Chosen

ROOT = Path(__file__).resolve().parents[3]

EXPERIMENTS = (
    "ablation",
    "blocks_cifar10",
    "blocks_cifar100",
    "cifar100_deit_tiny",
    "cifar100_resnet18",
    "cifar10_resnet18",
    "cifar10_resnet18_slimqn",
    "cifar10_vit",
    "classical_lbfgs",
    "controls",
    "deviations",
    "digits_mlp",
    "imagenet_resnet50",
    "imagenet_resnet50_slimqn",
    "imagenet_vit",
    "pl_condition",
    "released",
)
OPTIMIZERS = (
    *("adadelta", "adagrad", "adam", "adamw", "kfac", "lbfgs", "mlbfgs", "mlbfgs_released", "muon"),
    *("sgd", "sgd_normalized", "shampoo", "slbfgs", "slimqn", "slimqn_released", "soap"),
)
SCALES = ("full", "reduced", "smoke")

# Typed in from the papers, not from the configs: M Table 5 with Section 5 and Appendix A.4.1,
# S Table 5 with Appendix B.1 and C.1 (its damping 0.05 is 1 - tau_0).
M_MLBFGS = {
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 2e-4,
    "damping": 0.99,
    "betas": [0.999, 0.999],
    "update_interval": 50,
    "history_size": 10,
    "curvature_bounds": [0.01, 1.5],
    "blocks": "resblocks:2",
}
S_SLIMQN = {
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "damping": 0.95,
    "betas": [0.9, 0.9],
    "update_interval": 100,
    "history_size": 10,
    "curvature_bounds": [0.01, 1.0],
}
S_SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
S_KFAC = {  # Table 3, of ResNet-50/ImageNet
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 2e-4,
    "damping": 0.001,
    "inverse_update_interval": 50,
}
M_SGD = {"lr": 0.1, "momentum": 0.9}
M_ADAM = {"lr": 0.01}
PRINTED = [
    ("cifar10_resnet18", "mlbfgs", M_MLBFGS),
    ("cifar10_resnet18", "sgd", M_SGD),
    ("cifar10_resnet18", "adam", M_ADAM),
    ("cifar10_resnet18", "slimqn", S_SLIMQN),
    ("cifar10_resnet18", "kfac", S_KFAC),
    ("cifar100_resnet18", "mlbfgs", M_MLBFGS),
    ("cifar100_resnet18", "sgd", M_SGD),
    ("cifar100_resnet18", "adam", M_ADAM),
    ("cifar100_resnet18", "kfac", S_KFAC),
    ("cifar10_resnet18_slimqn", "sgd", S_SGD),
    ("cifar10_resnet18_slimqn", "slimqn", S_SLIMQN),
]

S_VIT_SLIMQN = {"momentum": 0.9, "damping": 0.99, "betas": [0.99, 0.99], "update_interval": 100}
# (experiment, optimizer, batch, epochs, schedule, settings): S Tables 3, 4, 6 with Appendix B and
# C.2, M Tables 5 and 6 with Appendix A.4. The epochs of S Table 3 are not printed (ours: 100).
COSINE = {"name": "cosine", "min_lr": 1e-4, "warmup_epochs": 0}
PRINTED_LARGE = [
    ("cifar100_deit_tiny", "sgd", 256, 50, COSINE, M_SGD),
    ("cifar100_deit_tiny", "adam", 256, 50, COSINE, M_ADAM),
    ("cifar100_deit_tiny", "mlbfgs", 256, 50, COSINE, M_MLBFGS | {"blocks": None}),
    (
        *("cifar10_vit", "sgd", 1024, 150, {"milestones": [140], "warmup_epochs": 5}),
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4},
    ),
    (
        *("cifar10_vit", "slimqn", 1024, 90, {"milestones": [100], "warmup_epochs": 5}),
        S_VIT_SLIMQN | {"lr": 0.025, "weight_decay": 1e-4, "history_size": 10},
    ),
    (
        *("imagenet_vit", "sgd", 1024, 100, {"milestones": [30, 60, 90], "warmup_epochs": 5}),
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4},
    ),
    (
        *("imagenet_vit", "slimqn", 1024, 90, {"milestones": [80], "warmup_epochs": 5}),
        S_VIT_SLIMQN | {"lr": 0.1, "weight_decay": 0.0, "history_size": 20},
    ),
    (
        *("imagenet_resnet50", "sgd", 512, 100, COSINE),
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4},
    ),
    (
        *("imagenet_resnet50", "adam", 512, 100, COSINE),
        {"lr": 0.07, "betas": [0.9, 0.999], "weight_decay": 3e-2},
    ),
    (
        *("imagenet_resnet50", "kfac", 512, 100, COSINE),
        {"lr": 0.06, "momentum": 0.9, "weight_decay": 3e-2, "inverse_update_interval": 50},
    ),
    ("imagenet_resnet50", "mlbfgs", 512, 100, COSINE, M_MLBFGS),
    *(
        (
            *("imagenet_resnet50_slimqn", optimizer, 256, 100),
            {"name": "steps", "milestones": [30, 60, 90], "gamma": 0.1, "warmup_epochs": 2},
            settings,
        )
        for optimizer, settings in (
            ("sgd", S_SGD),
            ("kfac", S_KFAC),
            ("slimqn", S_SLIMQN | {"weight_decay": 2e-4, "update_interval": 30}),
        )
    ),
]
MODELS = {"deit": "deit_tiny", "vit": "vit", "resnet50": "resnet50"}


@cache
def _composed(*overrides: str) -> DictConfig:
    return compose_config(overrides)


def composed(experiment: str, optimizer: str, *overrides: str) -> DictConfig:
    # Composing takes a tenth of a second, and the tests below ask for the same configs.
    if not any(item.startswith("scale=") for item in overrides):
        overrides = ("scale=full", *overrides)
    return _composed(f"experiment={experiment}", f"optimizer={optimizer}", *overrides).copy()


def test_options_are_those_tested_here() -> None:
    assert tuple(options("experiment")) == EXPERIMENTS
    assert tuple(options("optimizer")) == OPTIMIZERS
    assert tuple(options("scale")) == SCALES


def combinations(experiment: str) -> list[tuple[str, str]]:
    """Recipes at every scale; an optimizer without one, whose config no scale touches, at full.

    Where an experiment has arms and no recipes (test_arms.py), two optimizers stand for all.
    """
    with_recipe = optimizers_with_recipe(experiment)
    return [
        (optimizer, scale)
        for optimizer, scale in product(OPTIMIZERS if with_recipe else ("mlbfgs", "sgd"), SCALES)
        if optimizer in with_recipe or scale == "full"
    ]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_combination_composes_into_a_run_of_its_own(experiment: str) -> None:
    directories = set()
    for optimizer, scale in combinations(experiment):
        spec = RunSpec.from_config(composed(experiment, optimizer, f"scale={scale}"))
        assert (spec.experiment, spec.optimizer, spec.scale) == (experiment, optimizer, scale)
        assert spec.directory.name.startswith(f"{scale}-seed0-")
        assert spec.config.experiment.target.value > 0
        directories.add(spec.directory)
    assert len(directories) == len(combinations(experiment))
    assert optimizers_with_recipe(experiment) or arms(experiment)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_scales_differ_in_what_decides_the_numbers(experiment: str) -> None:
    keys = set()
    for scale in SCALES:
        config = composed(experiment, "mlbfgs", f"scale={scale}")
        config.scale.name = "full"  # the name alone must not be what tells them apart
        keys.add(RunSpec.from_config(config).key)
    assert len(keys) == len(SCALES)


def searched(experiment: str, scale: str, optimizer: str) -> dict[str, float]:
    """What an adopted search chose, from its own file."""
    file = ROOT / "results/tuning" / f"{experiment}-{scale}" / "chosen.yaml"
    adopted = (CONFIG_DIR / "experiment/tuned" / f"{experiment}-{scale}").is_dir()
    chosen = yaml.safe_load(file.read_text())["settings"] if adopted else {}
    return {key.removeprefix("optimizer."): v for key, v in chosen.get(optimizer, {}).items()}


def test_adopted_configs_are_those_of_a_committed_search_and_are_used() -> None:
    folders = sorted((CONFIG_DIR / "experiment/tuned").iterdir())
    assert folders
    for folder in folders:
        chosen = Chosen.load(ROOT / "results/tuning" / folder.name / "chosen.yaml")
        assert folder.name == chosen.name
        assert {path.stem for path in folder.iterdir()} == set(chosen.settings)
        for optimizer in chosen.settings:
            config = composed(chosen.experiment, optimizer, f"scale={chosen.scale}")
            assert config.experiment.tuned.search == folder.name
            assert list(chosen.settings[optimizer]) == ["optimizer.lr"]
            assert config.optimizer.lr == chosen.settings[optimizer]["optimizer.lr"]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_scale_touches_no_recipe_but_for_a_search_and_the_pairs_of_a_smoke_run(
    experiment: str,
) -> None:
    for optimizer in optimizers_with_recipe(experiment):
        full, reduced, smoke = (
            dict(composed(experiment, optimizer, f"scale={scale}").optimizer) for scale in SCALES
        )
        # No search is adopted at the smallest scale: its learning rate is the recipe's.
        interval = {key: full[key] for key in ("update_interval",) if key in full}
        assert smoke == smoke | interval or smoke["update_interval"] == 1
        recipe = smoke | interval
        assert full == recipe | searched(experiment, "full", optimizer)
        assert reduced == recipe | searched(experiment, "reduced", optimizer)


@pytest.mark.parametrize(
    ("experiment", "optimizer"),
    [
        (experiment, optimizer)
        for experiment in EXPERIMENTS
        for optimizer in optimizers_with_recipe(experiment)
        if optimizer in ("mlbfgs", "slimqn", "slbfgs")
    ],
)
def test_smoke_run_uses_its_history(experiment: str, optimizer: str) -> None:
    config = composed(experiment, optimizer, "scale=smoke")
    if experiment == "digits_mlp":
        images = 1442  # configs/dataset/digits.yaml
    else:
        images = config.dataset.get("train_images") or config.dataset.train_limit
    steps = config.train.epochs * (images // config.train.batch_size)
    assert steps > 2 * config.optimizer.update_interval


@pytest.mark.parametrize(("experiment", "optimizer", "printed"), PRINTED)
def test_recipe_holds_what_is_printed(
    experiment: str, optimizer: str, printed: dict[str, Any]
) -> None:
    config = composed(experiment, optimizer)
    values = OmegaConf.to_container(config.optimizer)
    assert isinstance(values, dict)
    assert {key: values[key] for key in printed} == printed
    assert config.train.batch_size == 256
    assert config.model.name == "resnet18" and config.model.width == 64
    assert recipe_note(config) is None


@pytest.mark.parametrize(
    ("experiment", "optimizer", "batch", "epochs", "schedule", "printed"), PRINTED_LARGE
)
def test_recipe_of_large_task_holds_what_is_printed(
    experiment: str,
    optimizer: str,
    batch: int,
    epochs: int,
    schedule: dict[str, Any],
    printed: dict[str, Any],
) -> None:
    config = composed(experiment, optimizer)
    assert {key: config.optimizer[key] for key in printed} == printed
    assert {key: config.schedule[key] for key in schedule} == schedule
    assert (config.train.batch_size, config.train.epochs) == (batch, epochs)
    assert config.model.name == MODELS[experiment.split("_")[1]]
    assert config.dataset.name == experiment.split("_")[0]
    assert config.dataset.get("synthetic", False) is False
    assert recipe_note(config) is None


@pytest.mark.parametrize("experiment", ["cifar10_resnet18", "cifar100_resnet18"])
def test_mlbfgs_paper_schedule(experiment: str) -> None:
    config = composed(experiment, "mlbfgs")
    assert config.train.epochs == 150
    assert config.schedule.name == "cosine" and config.schedule.min_lr == 1e-4
    assert config.schedule.warmup_epochs == 0


def test_slimqn_paper_schedule() -> None:
    schedule = composed("cifar10_resnet18_slimqn", "slimqn").schedule
    assert (schedule.name, schedule.milestones, schedule.gamma) == ("steps", [150], 0.1)
    assert schedule.warmup_epochs == 5


def test_optimizer_defaults_are_the_papers_constants() -> None:
    # Without a recipe: S and M each fix these in all their experiments.
    mlbfgs = composed("cifar10_resnet18_slimqn", "mlbfgs").optimizer
    assert (mlbfgs.damping, mlbfgs.betas, mlbfgs.history_size) == (0.99, [0.999, 0.999], 10)
    assert mlbfgs.curvature_bounds == [0.01, 1.5]


def test_command_line_wins_over_recipe_and_scale() -> None:
    overrides = ("optimizer.lr=0.05", "train.epochs=7", "scale=reduced")
    config = composed("cifar10_resnet18", "mlbfgs", *overrides)
    assert (config.optimizer.lr, config.train.epochs) == (0.05, 7)
    assert config.optimizer.weight_decay == 2e-4


def test_pair_without_recipe_runs_with_the_optimizers_defaults_and_says_so() -> None:
    config = composed("cifar10_resnet18_slimqn", "adam")
    assert config.optimizer.lr == OmegaConf.load(CONFIG_DIR / "optimizer/adam.yaml").lr
    note = recipe_note(config)
    assert note is not None and "cifar10_resnet18_slimqn" in note and "adam" in note


def test_every_recipe_belongs_to_an_experiment_and_an_optimizer() -> None:
    for folder in (CONFIG_DIR / "experiment/recipe").iterdir():
        assert folder.name in EXPERIMENTS
        assert set(optimizers_with_recipe(folder.name)) <= set(OPTIMIZERS)
    for folder in (CONFIG_DIR / "experiment/scale").iterdir():
        assert folder.name in EXPERIMENTS
        assert {path.stem for path in folder.iterdir()} == set(SCALES)


def test_every_recipe_and_experiment_says_where_it_comes_from() -> None:
    files = [*(CONFIG_DIR / "experiment").glob("*.yaml")]
    files += (CONFIG_DIR / "experiment/recipe").glob("*/*.yaml")
    for path in files:
        text = path.read_text()
        assert "Table" in text or "urs" in text, f"{path} cites no table and does not say ours"


def test_demonstration_gives_every_optimizer_the_same_budget() -> None:
    configs = [composed("digits_mlp", name) for name in optimizers_with_recipe("digits_mlp")]
    assert len(configs) == 6
    for node in ("train", "dataset", "model", "schedule", "experiment.target", "seed"):
        values = [OmegaConf.select(config, node) for config in configs]
        assert all(value == values[0] for value in values), node
    assert len({config.optimizer.weight_decay for config in configs}) == 1
