"""A search: which trials are made, and what became of them.

Trials are made in rounds. Those of a round are chosen together, from the results of the rounds
before, by Optuna's TPE sampler, seeded by the trial's number; the first round is an even grid over
the logarithm of the range (a Latin hypercube, where several settings are searched). So they depend
neither on how many run side by side nor on when a search was interrupted: the study is played again
from the run directories, where what is finished is found by its run key. There is no other record
of a search that could disagree with them. Nothing is pruned.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import optuna

from experiments.composition import compose_config
from experiments.errors import UserError, nearest
from experiments.runs.directory import METRICS_FILE
from experiments.runs.metrics import read_metrics
from experiments.runs.outcome import finished_outcome
from experiments.runs.spec import RunSpec
from experiments.training.schedules import check_schedule
from experiments.tuning.space import Space

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class Search:
    """The search of all optimizers of one experiment.

    Attributes:
        space: what is searched.
        experiment: name of the experiment.
        scale: full, reduced or smoke.
        optimizers: names; all have ranges in the space.
        seeds: of a trial's runs.
        trials: budget of each optimizer.
        folder: where runs and reports are.
        overrides: further Hydra overrides, the same for all runs.
    """

    space: Space
    experiment: str
    scale: str
    optimizers: tuple[str, ...]
    seeds: tuple[int, ...]
    trials: int
    folder: Path
    overrides: tuple[str, ...] = ()

    @property
    def maximises(self) -> bool:
        """Whether more of the metric is better."""
        return self.space.rules.metric == "test_top1"


@dataclass(frozen=True)
class Trial:
    """One setting of one optimizer.

    Attributes:
        optimizer: its name.
        number: from 0.
        values: the searched settings by dotted config key.
        specs: one run for each seed.
    """

    optimizer: str
    number: int
    values: dict[str, float]
    specs: tuple[RunSpec, ...]

    @property
    def finished(self) -> bool:
        """Whether all its runs are done or diverged."""
        return all(finished_outcome(spec) is not None for spec in self.specs)

    @property
    def diverged(self) -> bool:
        """Whether one of its runs diverged."""
        outcomes = [finished_outcome(spec) for spec in self.specs]
        return any(outcome is not None and outcome.status == "diverged" for outcome in outcomes)

    def result(self, metric: str) -> float:
        """The metric after the last epoch, mean over the seeds.

        Returns:
            NaN where a run diverged: such a trial is worse than every other.
        """
        if self.diverged:
            return math.nan
        return math.fsum(self.of_seeds(metric)) / len(self.specs)

    def of_seeds(self, metric: str) -> list[float]:
        """The metric after the last epoch of each run; NaN where there is none."""
        return [_last(spec, metric) for spec in self.specs]


@dataclass
class OptimizerStudy:
    """The trials of one optimizer, played from the run directories.

    Attributes:
        search: the search that it belongs to.
        optimizer: its name.
        trials: those chosen so far.
    """

    search: Search
    optimizer: str
    trials: list[Trial] = field(default_factory=list)

    def __post_init__(self) -> None:
        direction = optuna.study.StudyDirection
        self._study = optuna.create_study(
            direction=direction.MAXIMIZE if self.search.maximises else direction.MINIMIZE
        )
        self._asked: list[optuna.Trial] = []
        self._check_ends()

    def _check_ends(self) -> None:
        """Refuse a range whose ends no run could have, before the first trial."""
        space = self.search.space
        spans = space.search[self.optimizer]
        for ends in (
            {key: span.low for key, span in spans.items()},
            {key: span.high for key, span in spans.items()},
        ):
            config = self._specs(ends)[0].config
            try:
                check_schedule(
                    config.schedule, base_lr=config.optimizer.lr, epochs=config.train.epochs
                )
            except UserError as error:
                raise UserError(
                    f"{space.name!r} searches {self.optimizer} where it cannot train: {error}; "
                    "give another space with --space"
                ) from None

    def choose_round(self) -> list[Trial]:
        """Choose the trials of the next round; those before are finished.

        Raises:
            UserError: the config of a trial does not compose, or it would look at the test set.
        """
        self._tell()
        rules = self.search.space.rules
        count = min(rules.round, self.search.trials - len(self.trials))
        chosen = [self._ask(len(self.trials) + i) for i in range(count)]
        self.trials += chosen
        return chosen

    def _tell(self) -> None:
        """Report the results of the last round; a diverged trial counts as the worst possible."""
        worst = 0.0 if self.search.maximises else math.inf
        for asked in self._asked:
            result = self.trials[asked.number].result(self.search.space.rules.metric)
            self._study.tell(asked, worst if math.isnan(result) else result)
        self._asked.clear()

    def _ask(self, number: int) -> Trial:
        rules = self.search.space.rules
        first = min(rules.round, self.search.trials)
        self._study.sampler = optuna.samplers.TPESampler(
            seed=rules.sampler_seed * 1_000_003 + number, n_startup_trials=rules.round
        )
        if number < first:
            self._study.enqueue_trial(self._on_grid(number, first))
        asked = self._study.ask()
        assert asked.number == number
        self._asked.append(asked)
        values = {
            key: asked.suggest_float(key, span.low, span.high, log=True)
            for key, span in self.search.space.search[self.optimizer].items()
        }
        return Trial(self.optimizer, number, values, self._specs(values))

    def _on_grid(self, number: int, count: int) -> dict[str, float]:
        """The settings of a trial of the first round: mid-points of equal parts of each range."""
        sampler_seed = self.search.space.rules.sampler_seed
        values = {}
        for i, (key, span) in enumerate(self.search.space.search[self.optimizer].items()):
            parts = list(range(count))
            if i > 0:  # not all settings small together, then all large
                random.Random(f"{sampler_seed}/{key}").shuffle(parts)
            place = (parts[number] + 0.5) / count
            values[key] = span.low * (span.high / span.low) ** place
        return values

    def _specs(self, values: dict[str, float]) -> tuple[RunSpec, ...]:
        search = self.search
        arguments = [
            f"experiment={search.experiment}",
            f"optimizer={self.optimizer}",
            f"scale={search.scale}",
            *search.overrides,
            *(f"{key}={value!r}" for key, value in values.items()),
        ]
        config = compose_config(arguments)
        # Set here and not as an override: a path may hold what Hydra's grammar reserves.
        config.results_dir = str(search.folder)
        specs = []
        for seed in search.seeds:
            config.seed = seed
            specs.append(RunSpec.from_config(config))
            if specs[-1].config.dataset.get("holdout") is None:
                raise UserError(
                    "dataset.holdout is null: a search selects on held-out training images, never "
                    "on the test set; set dataset.holdout to their number"
                )
        return tuple(specs)


def with_holdout(space: Space, experiment: str, overrides: Sequence[str]) -> tuple[str, ...]:
    """Add the space's number of held-out images, unless the overrides have their own.

    Raises:
        UserError: neither says how many images of this data set are to be held out.
    """
    if any(item.lstrip("+~").split("=", 1)[0] == "dataset.holdout" for item in overrides):
        return tuple(overrides)
    name = str(compose_config([f"experiment={experiment}", *overrides]).dataset.name)
    if name not in space.holdout:
        raise UserError(
            f"space {space.name!r} holds out no images of data set {name!r}: add it to its "
            f"`holdout`, or give dataset.holdout=n; {nearest(name, space.holdout)}"
        )
    return (*overrides, f"dataset.holdout={space.holdout[name]}")


def _last(spec: RunSpec, metric: str) -> float:
    records = read_metrics(spec.directory / METRICS_FILE)
    epochs = [record for record in records if record["kind"] == "epoch"]
    value = epochs[-1][metric] if epochs else None
    return math.nan if value is None else float(value)
