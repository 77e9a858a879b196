"""One run as a frozen value: its resolved config, what of it decides the numbers, and its key.

The key is the first ten hex digits of the SHA-256 over the *deciding values*: every leaf of the
resolved config except the cosmetic ones and those that say what runs did before the key came
(`experiments.runs.deciding`), together with `NUMERICS_MEANING`. It does not depend on the order of
keys, on how a float is spelled, on the host or on the time, so one config has one key, and one
directory, wherever it is run.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from experiments.errors import UserError, nearest, one_line
from experiments.given import MALFORMED, read_text, user_path
from experiments.runs.atomic import write_atomically
from experiments.runs.deciding import LATER_KEYS, is_cosmetic
from experiments.yaml_text import refuse_bomb

# Both raised by hand where a change of the code changes the numbers of an unchanged config.
# The meaning: the run is another experiment now, by more than rounding, and gets another key.
NUMERICS_MEANING = 1
# The rounding: the same formulas, sums in another order or stored otherwise. Runs differ by it as
# they do between processors, so it is recorded and parts none of them. 2: the flat vector is
# padded, and the parameters' average is kept as its progress since the snapshot.
NUMERICS_ROUNDING = 2

#: Of counts and of seeds: what every library below takes.
MOST = 2**31 - 1
MOST_SEED = 2**63 - 1
MOST_THREADS = 4096
#: Keys that may be infinite: there it says that nothing is ever too small.
_MAY_BE_INFINITE = ("pair_threshold",)

Scalar = str | int | float | bool | None
_PATH_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class Rule:
    """What a config value must be.

    Attributes:
        key: dotted path of the value.
        holds: tells whether a value will do.
        wanted: the same in words, for the message.
        optional: whether the key may be absent.
    """

    key: str
    holds: Callable[[Any], bool]
    wanted: str
    optional: bool = False


def _is_count(value: Any, *, least: int = 1, most: int = MOST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_positive(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value > 0


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and _PATH_SAFE.fullmatch(value) is not None


def _count(key: str) -> Rule:
    return Rule(key, _is_count, f"an integer from 1 to {MOST}")


def _name(key: str) -> Rule:
    return Rule(key, _is_name, "a name of letters, digits and . _ + - (it becomes a folder)")


def _is_gradient_record(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, Mapping) or set(value) != {"interval", "images"}:
        return False
    return _is_count(value["interval"]) and (value["images"] is None or _is_count(value["images"]))


def _choice(key: str, *choices: str) -> Rule:
    return Rule(key, lambda value: value in choices, f"one of {', '.join(choices)}")


RULES = (
    Rule(
        "seed",
        lambda value: _is_count(value, least=0, most=MOST_SEED),
        f"an integer from 0 to {MOST_SEED}",
    ),
    Rule("results_dir", lambda value: isinstance(value, str) and value != "", "a path"),
    _choice("resume", "auto", "never"),
    _name("experiment.name"),
    Rule(
        "experiment.arm",
        lambda value: value is None or _is_name(value),
        "null or a name of letters, digits and . _ + - (it becomes a folder)",
        optional=True,  # runs from before there were arms
    ),
    _name("dataset.name"),
    _name("model.name"),
    _name("optimizer.name"),
    Rule("optimizer.lr", _is_positive, "a finite number above 0"),
    _name("schedule.name"),
    _choice("scale.name", "full", "reduced", "smoke"),
    _count("train.epochs"),
    _count("train.batch_size"),
    _choice("train.device", "auto", "cpu", "cuda"),
    Rule(
        "train.threads",
        lambda value: value is None or _is_count(value, most=MOST_THREADS),
        f"null or an integer from 1 to {MOST_THREADS}",
    ),
    Rule("train.channels_last", lambda value: isinstance(value, bool), "true or false"),
    _count("train.log_interval"),
    _count("train.eval_interval"),
    _count("train.checkpoint_interval"),
    _count("train.keep_checkpoints"),
    Rule(
        "train.timeout_s",
        lambda value: value is None or _is_positive(value),
        "null or a number of seconds above 0",
    ),
    Rule(
        "train.micro_batch",
        lambda value: value is None or _is_count(value),
        f"null or an integer from 1 to {MOST}",
        optional=True,
    ),
    Rule(
        "train.sync_batchnorm",
        lambda value: isinstance(value, bool),
        "true or false",
        optional=True,
    ),
    Rule(
        "train.precision",
        lambda value: value in ("float32", "bfloat16", "float16"),
        "one of float32, bfloat16, float16",
        optional=True,
    ),
    Rule(
        "train.compile",
        lambda value: isinstance(value, bool) or value in ("reduce-overhead", "max-autotune"),
        "true, false, reduce-overhead or max-autotune",
        optional=True,
    ),
    Rule(
        "train.ema",
        lambda value: value is None or (_is_positive(value) and value < 1),
        "null or a number between 0 and 1, such as 0.9999",
        optional=True,
    ),
    Rule(
        "train.gradient_record",
        _is_gradient_record,
        "null or {interval: epochs, images: null or a count}, both integers from 1 on",
        optional=True,
    ),
    _name("launch.name"),
    _choice("logger.name", "files", "wandb"),
)


@dataclass(frozen=True)
class RunSpec:
    """The resolved config of one run, checked and read-only.

    Attributes:
        config: the config; every interpolation is resolved.
    """

    config: DictConfig

    @classmethod
    def from_config(cls, config: DictConfig, *, source: str = "the config") -> RunSpec:
        """Freeze a composed config.

        Args:
            config: the composed config; it is copied, not changed.
            source: what to call it in a message.

        Raises:
            UserError: an interpolation does not resolve, a value is missing or will not do.
        """
        try:
            values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        except (OmegaConfBaseException, *MALFORMED) as error:
            raise UserError(f"{source} does not resolve: {one_line(error)}") from error
        if not isinstance(values, dict):
            raise UserError(f"{source} is a {type(values).__name__}, not a mapping of keys")
        results_dir = values.get("results_dir")
        if isinstance(results_dir, str) and results_dir:
            values["results_dir"] = str(user_path(results_dir, "results_dir"))
        frozen = OmegaConf.create(values)
        OmegaConf.set_readonly(frozen, True)
        OmegaConf.set_struct(frozen, True)
        check(frozen, source=source)
        return cls(frozen)

    @classmethod
    def load(cls, path: Path | str) -> RunSpec:
        """Read the frozen config of a run.

        Args:
            path: a `config.yaml` written by `save`.

        Raises:
            UserError: the file is missing, is no YAML, or holds values that will not do.
        """
        try:
            text = read_text(Path(path))
            refuse_bomb(text, path)
            config = OmegaConf.load(io.StringIO(text))
        except FileNotFoundError as error:
            raise UserError(f"no config at {path}: expected the config.yaml of a run") from error
        except (OSError, YAMLError, OmegaConfBaseException, *MALFORMED) as error:
            raise UserError(f"{path} cannot be read as YAML: {one_line(error)}") from error
        if not isinstance(config, DictConfig):
            raise UserError(f"{path} holds no mapping of keys: expected the config.yaml of a run")
        return cls.from_config(config, source=str(path))

    def save(self, path: Path | str) -> None:
        """Write the config as YAML, atomically."""
        write_atomically(Path(path), OmegaConf.to_yaml(self.config))

    @cached_property
    def key(self) -> str:
        """Ten hex digits that stand for what decides the numbers."""
        decisive = {"numerics_version": NUMERICS_MEANING, "values": self.deciding_values}
        text = json.dumps(decisive, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    @cached_property
    def deciding_values(self) -> dict[str, Scalar]:
        """The leaves of the config that decide the numbers, by dotted path, normalised."""
        values = OmegaConf.to_container(self.config)
        leaves = ((path, _normalised(value)) for path, value in _leaves(values, ""))
        return {path: value for path, value in leaves if _decides(path, value)}

    @property
    def directory(self) -> Path:
        """`<results_dir>/runs/<experiment>/<contestant>/<scale>-seed<seed>-<key>`."""
        name = f"{self.scale}-seed{self.seed}-{self.key}"
        return Path(self.config.results_dir) / "runs" / self.experiment / self.contestant / name

    @property
    def experiment(self) -> str:
        """Name of the table or figure that the run belongs to."""
        return str(self.config.experiment.name)

    @property
    def optimizer(self) -> str:
        """Name of the optimizer."""
        return str(self.config.optimizer.name)

    @property
    def arm(self) -> str | None:
        """Name of the arm; None where the run belongs to none."""
        arm = self.config.experiment.get("arm")
        return None if arm is None else str(arm)

    @property
    def contestant(self) -> str:
        """The arm, or the optimizer where there is none: what the run is called in results."""
        return self.arm or self.optimizer

    @property
    def scale(self) -> str:
        """`full`, `reduced` or `smoke`."""
        return str(self.config.scale.name)

    @property
    def seed(self) -> int:
        """Decides the initial weights, the order of the images and their augmentation."""
        return int(self.config.seed)

    def first_difference(self, other: RunSpec) -> tuple[str, str, str] | None:
        """Find the first deciding value in which two runs differ.

        Returns:
            The dotted key and both values in words, this run's first; None where none differs.
        """
        mine, others = self.deciding_values, other.deciding_values
        for key in sorted(mine.keys() | others.keys()):
            in_mine, in_other = _shown(mine, key), _shown(others, key)
            if in_mine != in_other:
                return key, in_mine, in_other
        return None


def check(config: DictConfig, *, source: str = "the config") -> None:
    """Check the values that this package itself reads; the builders check their own.

    Args:
        config: a resolved config.
        source: what to call it in a message.

    Raises:
        UserError: a value is absent or will not do, or `train` holds a key that nothing reads.
    """
    values = OmegaConf.to_container(config)
    for rule in RULES:
        value = _found(values, rule.key)
        if value is _ABSENT and rule.optional:
            continue
        if value is _ABSENT:
            raise UserError(f"{source} has no {rule.key}: it must be {rule.wanted}")
        if not rule.holds(value):
            raise UserError(f"{rule.key}={value!r} in {source} must be {rule.wanted}")
    known = {rule.key.removeprefix("train.") for rule in RULES if rule.key.startswith("train.")}
    for key in config.train:
        if key not in known:
            raise UserError(f"train.{key} in {source} is no setting: {nearest(str(key), known)}")
    _check_finite(values, source)
    micro_batch, batch = config.train.get("micro_batch"), config.train.batch_size
    if micro_batch is not None and micro_batch > batch:
        raise UserError(
            f"train.micro_batch={micro_batch} in {source} is more than train.batch_size={batch}: a "
            "pass has a part of a batch; use null for one pass"
        )


def _check_finite(values: Any, source: str) -> None:
    """Refuse NaN and infinities, which every comparison passes over or takes for a limit."""
    for path, value in _leaves(values, ""):
        if not isinstance(value, float) or math.isfinite(value):
            continue
        if math.isnan(value) or path.rpartition(".")[2] not in _MAY_BE_INFINITE:
            raise UserError(f"{path}={value} in {source} must be a finite number")


def _found(values: Any, key: str) -> Any:
    """The value at a dotted key; `_ABSENT` where there is none."""
    for part in key.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return _ABSENT
        values = values[part]
    return values


_ABSENT = object()


def _decides(path: str, value: Scalar) -> bool:
    if is_cosmetic(path):
        return False
    # By repr, because True equals 1 to Python.
    return path not in LATER_KEYS or repr(value) != repr(_normalised(LATER_KEYS[path]))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings and lists; an empty one is a leaf itself."""
    children: Any = ()
    if isinstance(value, Mapping):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    if not children:
        yield path, value
    for key, child in children:
        yield from _leaves(child, f"{path}.{key}" if path else str(key))


def _normalised(value: Any) -> Scalar:
    """Give equal numbers one form: 1e-1 and 0.1 are one float already, 1.0 becomes 1."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return repr(value)
        return int(value) if value.is_integer() else value
    if value is None or isinstance(value, str | int):
        return value
    return repr(value)


def _shown(values: Mapping[str, Scalar], key: str) -> str:
    return repr(values[key]) if key in values else "(absent)"
