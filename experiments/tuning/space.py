"""What is searched, and on what: `configs/tune/<space>.yaml`, read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from experiments.contestants import CONFIG_DIR, options
from experiments.errors import UserError, nearest
from experiments.settings import read_settings
from experiments.yaml_text import refuse_bombs_once

GROUP = "tune"
Metric = Literal["test_top1", "test_loss"]


@dataclass(frozen=True, kw_only=True)
class Range:
    """A log-uniform range: 0 < `low` < `high`."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What holds for every optimizer of a search.

    Attributes:
        metric: what is optimised: top-1 in percent (up) or the loss (down) of the held-out images
            after the last epoch, mean over the seeds.
        seeds: the runs of one trial.
        reporting_seeds: those of the comparison that the search is for.
        trials: budget of every optimizer.
        round: trials that are chosen before any of them has a result.
        sampler_seed: decides which trials are tried.
    """

    metric: Metric
    seeds: tuple[int, ...]
    reporting_seeds: tuple[int, ...]
    trials: int
    round: int
    sampler_seed: int


@dataclass(frozen=True)
class Space:
    """A search space.

    Attributes:
        name: of its file.
        rules: what holds for all.
        holdout: training images to hold out, by the data set's name.
        search: the ranges by optimizer and dotted config key.
    """

    name: str
    rules: Rules
    holdout: Mapping[str, int]
    search: Mapping[str, Mapping[str, Range]]


def read_space(name: str) -> Space:
    """Read `configs/tune/<name>.yaml`.

    Raises:
        UserError: the file does not exist, or holds what will not do.
    """
    if name not in options(GROUP):
        raise UserError(f"space {name!r} does not exist; {nearest(name, options(GROUP))}")
    path = CONFIG_DIR / GROUP / f"{name}.yaml"
    where = f"configs/{GROUP}/{name}.yaml"
    refuse_bombs_once(path.parent)
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{where} is no valid YAML: {' '.join(str(error).split())}") from error
    return space_of(content, name, where)


def space_of(content: dict[str, Any], name: str, where: str) -> Space:
    """Check the content of a space's file.

    Args:
        content: as it was read.
        name: of the space.
        where: what to call the file in a message.

    Raises:
        UserError: a key is absent or unknown, or a value will not do.
    """
    rest = dict(content)
    holdout, search = rest.pop("holdout", {}), rest.pop("search", None)
    if not isinstance(holdout, dict) or not isinstance(search, dict) or not search:
        raise UserError(f"{where} must have `search` (optimizer: key: [low, high]) and `holdout`")
    rules = read_settings(Rules, rest, where)
    for key in ("trials", "round"):
        if getattr(rules, key) < 1:
            raise UserError(f"{where}: {key} = {getattr(rules, key)} must be at least 1")
    check_seeds(rules.seeds, rules.reporting_seeds)
    for optimizer in search:
        if optimizer not in options("optimizer"):
            known = nearest(str(optimizer), options("optimizer"))
            raise UserError(f"{where}: search.{optimizer} is no optimizer; {known}")
    ranges = {
        str(optimizer): {
            str(key): _range(value, f"{where}: search.{optimizer}.{key}")
            for key, value in (keys or {}).items()
        }
        for optimizer, keys in search.items()
    }
    return Space(name, rules, {str(k): v for k, v in holdout.items()}, ranges)


def check_seeds(tuning: tuple[int, ...], reporting: tuple[int, ...]) -> None:
    """Refuse seeds that both choose the settings and report what they do.

    Raises:
        UserError: the two overlap, or there is no tuning seed.
    """
    shared = sorted(set(tuning) & set(reporting))
    if shared:
        raise UserError(
            f"seeds {', '.join(map(str, shared))} are tuning seeds and reporting seeds: a setting "
            f"must be reported on other seeds than it was chosen on (tuning: "
            f"{', '.join(map(str, tuning))}; reporting: {', '.join(map(str, reporting))})"
        )
    if not tuning or len(set(tuning)) < len(tuning) or min(tuning) < 0:
        raise UserError(f"tuning seeds {list(tuning)} must be different whole numbers from 0 on")


def _range(value: Any, where: str) -> Range:
    numbers = isinstance(value, list) and all(isinstance(x, int | float) for x in value)
    if not numbers or len(value) != 2 or not 0 < value[0] < value[1]:
        raise UserError(f"{where} = {value!r} must be [low, high] with 0 < low < high")
    return Range(low=float(value[0]), high=float(value[1]))
