"""Who takes part in an experiment: its optimizers, and its arms.

An *arm* is one setting of an optimizer where an experiment needs several: the file
`configs/experiment/arm/<experiment>/<arm>.yaml` chooses the optimizer and sets what differs, and
`arm=<arm>` beside `experiment=` chooses the file. A *contestant* is an arm, or an optimizer where
there is no arm; its name is the folder of its runs and its label in every table.

Only names of files are looked at here, so that the analysis needs neither Hydra nor torch for it.
"""

from __future__ import annotations

from pathlib import Path

from experiments.given import visible

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
RECIPE_GROUP = "experiment/recipe"
ARM_GROUP = "experiment/arm"
TUNED_GROUP = "experiment/tuned"

# The papers' order in tables: the baselines, the first paper's optimizer, the second's.
_ORDER = ("sgd", "adam", "adamw", "kfac", "slbfgs", "slimqn", "mlbfgs")


def options(group: str) -> list[str]:
    """Names of the configs of a group, such as `optimizer`."""
    return [path.stem for path in visible(CONFIG_DIR / group, "*.yaml")]


def optimizers_with_recipe(experiment: str) -> tuple[str, ...]:
    """The optimizers whose settings an experiment has, in the papers' order."""
    found = options(f"{RECIPE_GROUP}/{experiment}")
    ordered = [name for name in _ORDER if name in found]
    return (*ordered, *(name for name in found if name not in ordered))


def arms(experiment: str) -> tuple[str, ...]:
    """The arms of an experiment, by name; empty where it has none."""
    return tuple(options(f"{ARM_GROUP}/{experiment}"))


def experiments_with_arm(arm: str) -> tuple[str, ...]:
    """The experiments that have an arm of this name."""
    folders = visible(CONFIG_DIR / ARM_GROUP, "*")
    return tuple(folder.name for folder in folders if arm in arms(folder.name))
