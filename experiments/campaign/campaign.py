"""The runs of one experiment that a command asks for, composed and named.

A campaign is an experiment, contestants of it, seeds and a scale. Composing it gives its runs; what
is finished is found by their run keys.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from experiments.analysis.measuring.runs import DIRECTORY_NAME
from experiments.analysis.showing.summary import summary_folder
from experiments.composition import compose_config, override, recipe_note
from experiments.contestants import arms
from experiments.errors import UserError
from experiments.runs.replay import fill, missing_source
from experiments.runs.spec import RunSpec
from experiments.tuning.chosen import Chosen

logger = logging.getLogger(__name__)

# Overrides that would make the runs others than the options say, and what to write instead.
OPTION_OF = {
    "experiment": "the first argument",
    "optimizer": "--optimizers",
    "arm": "--arms",
    "seed": "--seeds",
    "scale": "--scale",
    "results_dir": "--results-dir",
}


@dataclass(frozen=True)
class Plan:
    """The runs of a campaign, as far as they are known.

    Attributes:
        runs: the override that chooses the contestant, and the run.
        waiting: contestant and seed of every run whose config wants a run that is not finished,
            with a line that says which.
    """

    runs: tuple[tuple[str, RunSpec], ...]
    waiting: tuple[tuple[str, int, str], ...]

    @property
    def specs(self) -> list[RunSpec]:
        """The runs alone."""
        return [spec for _, spec in self.runs]


@dataclass(frozen=True)
class Campaign:
    """The runs of one comparison.

    Attributes:
        experiment: name of the experiment.
        optimizers: options of the config group `optimizer`.
        arms: arms of the experiment.
        seeds: one run each per optimizer and arm.
        scale: full, reduced or smoke.
        results_dir: where `runs/` and `summary/` are.
        overrides: further Hydra overrides, the same for all runs.
        ranks: processes that train each run together; 1: the pool's own.
        tuned: settings that a search chose, for each optimizer; they win over the recipe.
    """

    experiment: str
    optimizers: tuple[str, ...]
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    scale: str
    results_dir: Path
    overrides: tuple[str, ...] = ()
    ranks: int = 1
    tuned: Chosen | None = None

    @property
    def choices(self) -> tuple[str, ...]:
        """The override that chooses each contestant, optimizers first."""
        return (
            *(f"optimizer={name}" for name in self.optimizers),
            *(f"arm={name}" for name in self.arms),
        )

    @property
    def contestants(self) -> tuple[str, ...]:
        """Their names, in the same order."""
        return (*self.optimizers, *self.arms)

    def arguments(self, choice: str) -> list[str]:
        """Hydra overrides of one contestant's runs, without the seed and the results directory."""
        group, _, name = choice.partition("=")
        tuned = self.tuned.overrides(name) if self.tuned and group == "optimizer" else ()
        first = [f"experiment={self.experiment}", choice, f"scale={self.scale}"]
        launch = ["launch=torchrun", f"launch.nproc={self.ranks}"] if self.ranks > 1 else []
        return [*first, *launch, *tuned, *self.overrides]

    def command(self, choice: str, seed: int) -> str:
        """The command that makes one run."""
        folder = override("results_dir", str(self.results_dir))
        arguments = [*self.arguments(choice), f"seed={seed}", folder]
        return shlex.join(["python", "-m", "experiments.train", *arguments])

    def compose(self) -> Plan:
        """Compose every run, seed by seed, so that a part of a campaign compares as well.

        Raises:
            UserError: a name, a key or a value will not do.
        """
        configs = []
        for choice in self.choices:
            config = self._config(choice)
            configs.append(config)
            note = recipe_note(config)
            if note is not None:
                logger.warning(note)
        runs, waiting = [], []
        for seed in self.seeds:
            for choice, composed in zip(self.choices, configs, strict=True):
                config = _seeded(composed, seed)
                if fill(config):
                    runs.append((choice, RunSpec.from_config(config)))
                else:
                    name = choice.partition("=")[2]
                    waiting.append((name, seed, missing_source(config)))
        return Plan(tuple(runs), tuple(waiting))

    def comparable_keys(self, plan: Plan) -> frozenset[str]:
        """Keys of the runs that belong into one table with those of a plan of this campaign.

        A command that is typed with some of the contestants or seeds must not take the others
        out of the table that it wrote before, nor may runs with other overrides come in. So
        every contestant and seed with a run of this experiment and scale is composed as well.

        Args:
            plan: what `compose` returned.
        """
        keys = {spec.key for spec in plan.specs}
        planned = {(spec.contestant, spec.seed) for spec in plan.specs}
        others: dict[str, set[int]] = {}
        for path in (self.results_dir / "runs" / self.experiment).glob("*/*"):
            match = DIRECTORY_NAME.fullmatch(path.name)
            if match is None or match["scale"] != self.scale:
                continue
            if (path.parent.name, int(match["seed"])) not in planned:
                others.setdefault(path.parent.name, set()).add(int(match["seed"]))
        own_arms = arms(self.experiment)
        for name, seeds in others.items():
            choice = f"{'arm' if name in own_arms else 'optimizer'}={name}"
            try:
                config = self._config(choice)
            except UserError:
                continue  # it cannot take the overrides, so this command has no such run
            seeded = [_seeded(config, seed) for seed in seeds]
            keys |= {RunSpec.from_config(each).key for each in seeded if fill(each)}
        return frozenset(keys)

    def _config(self, choice: str) -> DictConfig:
        """The config of one contestant, without its seed.

        Raises:
            UserError: a name, a key or a value will not do.
        """
        config = compose_config(self.arguments(choice))
        # Set here and not as an override: a path may hold what Hydra's grammar reserves.
        config.results_dir = str(self.results_dir)
        return config

    @property
    def summary_dir(self) -> Path:
        """Where the judgement goes; one folder for each scale, tuned settings apart."""
        tuned = "-tuned" if self.tuned else ""
        return summary_folder(self.results_dir, self.experiment, f"{self.scale}{tuned}")


def _seeded(config: DictConfig, seed: int) -> DictConfig:
    seeded = config.copy()
    seeded.seed = seed
    return seeded


def refuse_options(overrides: Sequence[str]) -> None:
    """Refuse an override in the place of an option.

    Raises:
        UserError: there is one.
    """
    for item in overrides:
        key = item.lstrip("+~").split("=", 1)[0]
        if key in OPTION_OF:
            raise UserError(f"{item}: write {OPTION_OF[key]} instead of this override")
