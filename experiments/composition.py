"""From command-line overrides to a composed config, with Hydra's complaints in one line.

Hydra says what went wrong in several lines, with its search path and with advice that is wrong here
("to append to your config use +..." for a misspelt key). `explained` says the same in one line with
the nearest valid name. Both entry points, `train` and `reproduce`, compose through this module.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from experiments.contestants import ARM_GROUP, CONFIG_DIR, arms, experiments_with_arm, options
from experiments.errors import UserError, nearest, one_line
from experiments.yaml_text import refuse_bombs_once

CONFIG_NAME = "train"
# Where Hydra is told to look for configs besides those of the project.
_CONFIG_DIR_OPTION = re.compile(r"^(?:--config-dir|-cd)(?:=|\n)(.+)$", re.M)

# What composing can raise because of what the user wrote, on the command line or in a config file.
# Hydra raises a plain ValueError for `optimizer=null` and its like.
COMPOSITION_ERRORS = (
    HydraException,
    OmegaConfBaseException,
    YAMLError,
    ValueError,
    RecursionError,
)

# Keys whose values are paths. Hydra's grammar has no words for a `~`, an umlaut or a `#`.
PATH_KEYS = (
    "results_dir",
    "dataset.root",
    "dataset.cache_dir",
    "dataset.val_labels",
    "model.weights",
)


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """Compose the config of one run, as `python -m experiments.train <overrides>` would.

    Args:
        overrides: Hydra overrides: `group=option` and `key=value`, and `arm=<name>`.

    Raises:
        UserError: a name, a key or a value will not do.
    """
    overrides = with_arms_as_groups(with_paths_quoted(overrides))
    try:
        config = _compose(overrides)
    except COMPOSITION_ERRORS as error:
        raise UserError(explained(error, overrides)) from error
    refuse_unknown_keys(config)
    return config


def override(key: str, value: str) -> str:
    """Write a text as an override, in quotes where Hydra would read it otherwise or not at all."""
    plain = f"{key}={value}"
    return plain if _reads_as(plain, value) else quoted(key, value)


def quoted(key: str, value: str) -> str:
    """An override whose value is this very text, whatever is in it."""
    # Of backslashes, only those in front of a quote count, and the last ones are in front of one.
    escaped = re.sub(r"(\\*)'", r"\1\1\'", value)
    end = len(escaped) - len(escaped.rstrip("\\"))
    return f"{key}='{escaped}{escaped[len(escaped) - end :]}'"


def with_paths_quoted(overrides: Sequence[str]) -> list[str]:
    """Quote the paths that Hydra's grammar cannot read as they stand, such as `~/results`."""
    return [_path_quoted(item) for item in overrides]


def _path_quoted(item: str) -> str:
    key, equals, value = item.partition("=")
    if not equals or key.lstrip("+") not in PATH_KEYS:
        return item
    try:
        OverridesParser.create().parse_override(item)
    except COMPOSITION_ERRORS:
        return quoted(key, value)
    return item


def _reads_as(item: str, value: str) -> bool:
    try:
        return bool(OverridesParser.create().parse_override(item).value() == value)
    except COMPOSITION_ERRORS:
        return False


def with_arms_as_groups(overrides: Sequence[str]) -> list[str]:
    """Write `arm=a` as what Hydra understands: `experiment/arm=<experiment>/a`.

    Args:
        overrides: of the command line; `arm=a,b` of a sweep is one too.

    Returns:
        The overrides, those of arms rewritten.

    Raises:
        UserError: no such arm, an arm of another experiment, an optimizer beside the arm, or a
            config file that cannot be composed within the memory of a machine.
    """
    refuse_bombs_once(CONFIG_DIR)
    for folder in _CONFIG_DIR_OPTION.findall("\n".join(overrides)):
        refuse_bombs_once(Path(folder))
    chosen = {item.split("=", 1)[0]: item.split("=", 1)[1] for item in overrides if "=" in item}
    if any(key.lstrip("+~") == ARM_GROUP for key in chosen):
        raise UserError(f"{ARM_GROUP} is chosen with arm=<name> beside experiment=<name>")
    if "arm" not in chosen:
        return list(overrides)
    experiment = chosen.get("experiment") or _default_experiment()
    if "," in experiment:
        raise UserError(f"experiment={experiment} beside arm=: an arm belongs to one experiment")
    names = chosen["arm"].split(",")
    for name in names:
        _check_arm(experiment, name)
    if "optimizer" in chosen:
        raise UserError(
            f"optimizer={chosen['optimizer']} beside arm={chosen['arm']}: an arm chooses its"
            " optimizer itself; leave out one of the two"
        )
    group = f"{ARM_GROUP}={','.join(f'{experiment}/{name}' for name in names)}"
    return [group if item.startswith("arm=") else item for item in overrides]


def _check_arm(experiment: str, arm: str) -> None:
    """Refuse a name that is no arm of the experiment."""
    if experiment not in options("experiment"):
        raise UserError(
            f"experiment={experiment} does not exist; {nearest(experiment, options('experiment'))}"
        )
    valid = arms(experiment)
    if arm in valid:
        return
    others = experiments_with_arm(arm)
    if others:
        hint = f"it is one of {' and '.join(others)}: write experiment={others[0]}"
    elif valid:
        hint = nearest(arm, valid)
    else:
        hint = "this experiment has none; its settings are chosen with optimizer=<name>"
    raise UserError(f"arm={arm} is no arm of experiment {experiment}; {hint}")


def _default_experiment() -> str:
    """The experiment that `configs/train.yaml` names."""
    defaults = OmegaConf.load(CONFIG_DIR / f"{CONFIG_NAME}.yaml").defaults
    return str(next(item["experiment"] for item in defaults if "experiment" in item))


def refuse_unknown_keys(config: DictConfig) -> None:
    """Refuse what `+key=value` added where nothing reads it; the rooms check their own nodes.

    Args:
        config: a composed config.

    Raises:
        UserError: a key at the top of the config that is neither a group nor in train.yaml.
    """
    known = {str(key) for key in OmegaConf.load(CONFIG_DIR / f"{CONFIG_NAME}.yaml")}
    known = known.union(_groups()).difference(("defaults", "hydra"))
    for key in map(str, config):
        if key not in known:
            raise UserError(f"{key} is no key of the config; {nearest(key, known)}")


def _groups() -> list[str]:
    # What is searched is read by experiments.tune; it is no part of a run's config.
    return sorted(p.name for p in CONFIG_DIR.iterdir() if p.is_dir() and p.name != "tune")


def recipe_note(config: DictConfig) -> str | None:
    """Say that the optimizer's settings come from no recipe, where that is so.

    Args:
        config: a composed config.
    """
    if config.experiment.get("recipe") is not None:
        return None
    experiment, optimizer = config.experiment.name, config.optimizer.name
    return (
        f"experiment {experiment} has no recipe for optimizer {optimizer}: it runs with the values"
        f" of configs/optimizer/{optimizer}.yaml and of the command line"
    )


def explained(error: Exception, overrides: Sequence[str]) -> str:
    """Say in one line what was wrong with a config or an override, and what would do.

    Args:
        error: one of `COMPOSITION_ERRORS`.
        overrides: the overrides that led to it.
    """
    if isinstance(error, OverrideParseException):
        return _unreadable(str(error.override))
    if isinstance(error, MissingConfigException):
        return _missing_config(error)
    if isinstance(error, YAMLError):
        return f"a config file is no valid YAML: {one_line(error)}"
    message = str(error) or str(error.__cause__)
    for pattern, explain in _EXPLANATIONS:
        found = re.search(pattern, message)
        if found:
            return explain(found, overrides)
    cause = f" ({one_line(error.__cause__)})" if str(error) and error.__cause__ else ""
    return f"the config does not compose: {one_line(message)}{cause}"


def _unreadable(item: str) -> str:
    """Say how to write an override that the grammar cannot read."""
    key, equals, value = item.partition("=")
    said = f"cannot read {item!r}: write key=value or group=option, with no spaces"
    if not equals or not re.fullmatch(r"[+~]{0,2}[\w./@]+", key):
        return said
    return (
        f"{said}; a value with = # & [ ~ or the like stands in quotes, and these in the shell's: "
        f"{shlex.quote(quoted(key, value))}"
    )


def _compose(overrides: Sequence[str]) -> DictConfig:
    # A sweep calls this from inside a Hydra run, whose own state must come back afterwards.
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
            return compose(CONFIG_NAME, overrides=list(overrides))
    finally:
        GlobalHydra.instance().hydra = outer


def _missing_config(error: MissingConfigException) -> str:
    wanted = str(error.missing_cfg_file or "")
    group, _, name = wanted.rpartition("/")
    if group.startswith("experiment/scale/"):
        experiment = group.removeprefix("experiment/scale/")
        valid = options("experiment")
        if experiment not in valid:
            return f"experiment={experiment} does not exist; {nearest(experiment, valid)}"
        return (
            f"experiment={experiment} has no scale={name}: configs/{wanted}.yaml does not exist;"
            f" {nearest(name, options(group))}"
        )
    if group:
        return f"{group}={name} does not exist; {nearest(name, options(group))}"
    return f"config file {wanted!r} does not exist: {one_line(error)}"


def _unknown_key(found: re.Match[str], overrides: Sequence[str]) -> str:
    """Name the keys that stand beside a key that does not exist."""
    key = found["key"]
    if key.startswith("hydra."):
        return f"{key} is no setting of Hydra; python -m experiments.train --cfg hydra shows them"
    config = _without(key, overrides)
    if config is None:
        return f"{key} is no key of the config"
    known, parent = config, ""
    for part in key.split("."):
        if not OmegaConf.is_dict(known) or part not in known:
            break
        parent = f"{parent}.{part}" if parent else part
        known = known[part]
    if not OmegaConf.is_dict(known):
        return f"{key} is no key of the config: {parent}={known} has no keys below it"
    wrong = key.removeprefix(f"{parent}.") if parent else key
    where = f"below {parent}" if parent else "at the top"
    return (
        f"{key} is no key of the config; {where}: "
        f"{nearest(wrong.split('.')[0], [str(name) for name in known])}"
    )


def _without(key: str, overrides: Sequence[str]) -> DictConfig | None:
    """Compose with the overrides that do not touch `key`, to see which keys there are."""
    others = [item for item in overrides if item.lstrip("+~").split("=", 1)[0] != key]
    # Of a swept value any will do; of a swept group the first option.
    others = [item for item in others if "=" in item and not item.startswith("-")]
    singles = [re.sub(r"=([^,\[\]{}()'\"]+),.*", r"=\1", item) for item in others]
    try:
        return _compose(singles)
    except COMPOSITION_ERRORS:
        return None


_EXPLANATIONS = (
    (
        r"Config group override must be a string",
        lambda _found, _overrides: "a config group wants the name of one option: group=option",
    ),
    (
        r"Could not override '(?P<key>[^']+)'\.\s*No match in the defaults list",
        lambda found, _: f"{found['key']} is no config group; {nearest(found['key'], _groups())}",
    ),
    (r"Could not override '(?P<key>[^']+)'", _unknown_key),
    (
        r"Could not delete from config\. '(?P<key>[^']+)' does not exist",
        _unknown_key,
    ),
    (
        r"Could not append to config\. An item is already at '(?P<key>[^']+)'",
        lambda found, _: f"{found['key']} is set already: write {found['key']}=... without the +",
    ),
    (
        r"Ambiguous value for argument '(?P<item>[^']+)'",
        lambda found, _: (
            f"{found['item']} names several values: add -m for one run each, or write"
            " key=[a,b] for a list"
        ),
    ),
    (
        r"Sweep parameters '(?P<item>[^']+)' requires",
        lambda found, _: f"{found['item']} names several values: add -m for one run each",
    ),
)
