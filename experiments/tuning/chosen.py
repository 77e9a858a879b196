"""The settings that a search chose, in files that reporting runs take them from.

`chosen.yaml` is given to a campaign (`reproduce --tuned`), or *adopted*: as a config for each
optimizer in `configs/experiment/tuned/<experiment>-<scale>/`, which the scale's file names, so that
every command trains with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from experiments.contestants import TUNED_GROUP
from experiments.errors import UserError, nearest
from experiments.runs.atomic import write_atomically
from experiments.tuning.space import check_seeds
from experiments.yaml_text import refuse_bomb

_ADOPTED = """# @package _global_
# Written by python -m experiments.tune with --adopt: what the search chose, over the recipe.
"""


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
            text = path.read_text(encoding="utf-8")
            refuse_bomb(text, path)
            content: Any = yaml.safe_load(text)
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
        values = self.settings[optimizer]
        told = self._told(self._nested(optimizer))
        return (
            *(f"{key}={value!r}" for key, value in values.items()),
            f"experiment.tuned={_as_override(told)}",
        )

    @property
    def name(self) -> str:
        """Of the search: its folder in `results/tuning`, and that of the configs."""
        return f"{self.experiment}-{self.scale}"

    def adopt(self, config_dir: Path) -> list[Path]:
        """Write a config for each optimizer that sets what was chosen for it.

        Args:
            config_dir: the folder of the configs.

        Returns:
            The files.
        """
        files = []
        for optimizer in self.settings:
            chosen = self._nested(optimizer)
            # Beside the settings themselves, which a command line may win over.
            config = OmegaConf.merge({"experiment": {"tuned": self._told(chosen)}}, chosen)
            path = config_dir / TUNED_GROUP / self.name / f"{optimizer}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, _ADOPTED + OmegaConf.to_yaml(config))
            files.append(path)
        return files

    def adoption(self) -> str:
        """The entry of the scale's defaults list that makes runs take the adopted configs."""
        return f"optional /{TUNED_GROUP}/{self.name}: ${{optimizer}}"

    def _nested(self, optimizer: str) -> DictConfig:
        """What was chosen for an optimizer, as a config."""
        chosen = OmegaConf.create()
        for key, value in self.settings[optimizer].items():
            OmegaConf.update(chosen, key, value)
        return chosen

    def _told(self, chosen: DictConfig) -> dict[str, Any]:
        """What `experiment.tuned` of a run says of the search."""
        return {"search": self.name, "settings": OmegaConf.to_container(chosen)}

    def check(self, experiment: str, scale: str, seeds: Sequence[int]) -> None:
        """Refuse another experiment or scale, and seeds that the settings were chosen on.

        Raises:
            UserError: one of them.
        """
        for what, own, asked in (
            ("experiment", self.experiment, experiment),
            ("scale", self.scale, scale),
        ):
            if asked != own:
                raise UserError(f"the settings were chosen on {what} {own!r}, not on {asked!r}")
        check_seeds(tuple(self.seeds), tuple(seeds))


def _as_override(value: Any) -> str:
    """A value, with all that is in it, as Hydra's grammar of overrides writes it."""
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_as_override(part)}' for key, part in value.items())}}}"
    return repr(value)
