"""The settings that a search chose, in a file that reporting runs take them from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments.errors import UserError, nearest
from experiments.runs.atomic import write_atomically
from experiments.tuning.space import check_seeds


@dataclass(frozen=True)
class Chosen:
    """What a search chose, and how.

    Attributes:
        experiment: what was searched on.
        scale: at which scale.
        space: name of the search space.
        metric: what was optimised on the held-out images.
        holdout: how many images were held out.
        seeds: the tuning seeds.
        trials: of each optimizer.
        settings: the chosen values by optimizer and dotted config key.
    """

    experiment: str
    scale: str
    space: str
    metric: str
    holdout: int
    seeds: list[int]
    trials: int
    settings: dict[str, dict[str, float]]

    def save(self, path: Path) -> None:
        """Write the file."""
        header = (
            "# Written by python -m experiments.tune; used with experiments.reproduce --tuned.\n"
        )
        write_atomically(path, header + yaml.safe_dump(asdict(self), sort_keys=False))

    @classmethod
    def load(cls, path: Path) -> Chosen:
        """Read the file.

        Raises:
            UserError: it is missing or was not written by a search.
        """
        try:
            content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
            return cls(**content)
        except FileNotFoundError as error:
            raise UserError(f"--tuned {path} does not exist: run experiments.tune first") from error
        except (yaml.YAMLError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path} is no chosen.yaml of experiments.tune: {reason}") from error

    def overrides(self, optimizer: str) -> tuple[str, ...]:
        """The chosen settings of one optimizer, as Hydra overrides.

        Raises:
            UserError: it was not searched, or nothing was chosen for it.
        """
        if optimizer not in self.settings:
            raise UserError(
                f"optimizer {optimizer!r} has no chosen settings; "
                f"{nearest(optimizer, self.settings)}"
            )
        return tuple(f"{key}={value!r}" for key, value in self.settings[optimizer].items())

    def check(self, experiment: str, seeds: Sequence[int]) -> None:
        """Refuse another experiment, and seeds that the settings were chosen on.

        Raises:
            UserError: one of the two.
        """
        if experiment != self.experiment:
            raise UserError(
                f"the settings were chosen on experiment {self.experiment!r}, not on {experiment!r}"
            )
        check_seeds(tuple(self.seeds), tuple(seeds))
