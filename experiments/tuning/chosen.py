"""The settings that a search chose, in files that reporting runs take them from.

`chosen.yaml` is given to a campaign (`reproduce --tuned`), or *adopted*: as a config for each
optimizer in `configs/experiment/tuned/<experiment>-<scale>/`, which the scale's file names, so that
every command trains with them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from experiments.contestants import TUNED_GROUP
from experiments.errors import UserError, nearest, one_line
from experiments.given import MALFORMED, is_number
from experiments.runs.atomic import make_folder, write_atomically
from experiments.tuning.space import check_seeds
from experiments.yaml_text import read_yaml

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
# What begins with an underscore says what is to be imported and called.
_SEARCHED = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+")
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

    def text(self) -> str:
        """The content of the file."""
        header = (
            "# Written by python -m experiments.tune; used with experiments.reproduce --tuned.\n"
        )
        return header + yaml.safe_dump(asdict(self), sort_keys=False)

    @classmethod
    def load(cls, path: Path) -> Chosen:
        """Read the file.

        Raises:
            UserError: it is missing or was not written by a search.
        """
        try:
            chosen = cls(**read_yaml(path))
            chosen._check()
        except FileNotFoundError as error:
            raise UserError(f"--tuned {path} does not exist: run experiments.tune first") from error
        except MALFORMED as error:
            reason = one_line(error)
            raise UserError(f"{path} is no chosen.yaml of experiments.tune: {reason}") from error
        return chosen

    def _check(self) -> None:
        """Refuse what no search writes: its names become folders, its settings overrides.

        Raises:
            ValueError: there is something.
        """
        texts = (self.experiment, self.scale, self.space, self.metric, *self.settings)
        wrong = [text for text in texts if not isinstance(text, str) or not _NAME.fullmatch(text)]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is no name of letters, digits and . _ + -")
        for optimizer, settings in self.settings.items():
            for key, value in settings.items():
                place = f"settings.{optimizer}.{key}"
                if not _SEARCHED.fullmatch(key):
                    raise ValueError(f"{place} is none of the settings that a search sets")
                if not is_number(value):
                    raise ValueError(f"{place} = {value!r} is no number")
        for number in (self.holdout, self.trials, *self.seeds):
            if not isinstance(number, int) or number < 0:
                raise ValueError(f"{number!r} is no count and no seed")

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

        Raises:
            UserError: one of them is there and was written by hand, or cannot be written.
        """
        files = []
        for optimizer in self.settings:
            chosen = self._nested(optimizer)
            # Beside the settings themselves, which a command line may win over.
            config = OmegaConf.merge({"experiment": {"tuned": self._told(chosen)}}, chosen)
            path = config_dir / TUNED_GROUP / self.name / f"{optimizer}.yaml"
            make_folder(path.parent, below=config_dir)
            if path.exists() and not path.read_text(encoding="utf-8").startswith(_ADOPTED):
                raise UserError(f"{path} was not written by --adopt: move it away first")
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
