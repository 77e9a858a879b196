"""The optimizer under test, and the moments of its life at which checks look at it.

Legend: `M` history size, `T` update interval of optimizers that collect curvature pairs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from mlbfgs.testing.outcome import ConstructionError, UnsupportedError, one_line, unless_refused

Factory = Callable[..., Optimizer]

#: Sizes for optimizers that know these settings: a few dozen steps then pass through every phase.
SMALL_SETTINGS = {"update_interval": 4, "history_size": 3}

#: Phases in the order of training; `Subject.steps` says how many steps lead there.
PHASES = (
    "before the first step",
    "after the first step",
    "in warm-up",
    "on the step before a pair",
    "on the step of a pair",
    "on the step after a pair",
    "in mid-interval",
    "with a part-filled history",
    "with a full history",
)


@dataclass(frozen=True)
class Subject:
    """An optimizer with its settings.

    Attributes:
        name: in reports.
        factory: called with parameters and keyword arguments, returns the optimizer.
        kwargs: keyword arguments that every check passes on.
        defaults: `defaults` of an optimizer made with them.
        broken: why there is no such optimizer; "" where there is.
    """

    name: str
    factory: Factory
    kwargs: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(repr=False)
    broken: str = ""

    def make(self, params: Any, **overrides: Any) -> Optimizer:
        """An optimizer over `params`; overrides go before the subject's own settings."""
        return self.factory(params, **{**self.kwargs, **overrides})

    def make_with(self, params: Any, **options: Any) -> Optimizer:
        """Like `make`, with options that an optimizer need not know.

        Raises:
            UnsupportedError: the optimizer refuses, naming an option.
            CheckFailedError: it refuses without naming one.
        """
        return unless_refused(lambda: self.make(params, **options), *options)

    def has(self, setting: str) -> bool:
        """Whether the optimizer's groups carry this setting."""
        return setting in self.defaults

    def require(self, setting: str) -> None:
        """Go on only if the optimizer knows a setting.

        Raises:
            UnsupportedError: the optimizer refuses the setting by name, or has no such key.
            CheckFailedError: it refuses without naming the setting.
        """
        if self.has(setting):
            return
        self.make_with([Parameter(torch.zeros(1))], **{setting: 0.5})
        raise UnsupportedError(f"there is no {setting!r} in the parameter groups")

    @property
    def update_interval(self) -> int:
        """T, or a stand-in for optimizers without one."""
        return int(self.defaults.get("update_interval", SMALL_SETTINGS["update_interval"]))

    @property
    def history_size(self) -> int:
        """M, or a stand-in for optimizers without one."""
        return int(self.defaults.get("history_size", SMALL_SETTINGS["history_size"]))

    @property
    def horizon(self) -> int:
        """2T + M T: after that many steps nothing of the old history is left."""
        return (2 + self.history_size) * self.update_interval

    def steps(self, phase: str) -> int:
        """How many steps lead to a phase; the first pair comes at step 2T."""
        t, m = self.update_interval, self.history_size
        counts = (0, 1, t + 1, 2 * t - 1, 2 * t, 2 * t + 1, 2 * t + t // 2, m * t + 1)
        return (*counts, (m + 2) * t + 1)[PHASES.index(phase)]


def subject_of(
    factory: Factory | str, kwargs: Mapping[str, Any] | None = None, *, name: str | None = None
) -> Subject:
    """Describe the optimizer under test.

    Args:
        factory: an optimizer class, a callable that takes parameters and keyword arguments and
            returns an optimizer, or the full name of either, such as `torch.optim.SGD`.
        kwargs: settings for every check. Where the optimizer knows `update_interval` and
            `history_size` and they are not given, they are 4 and 3.
        name: in reports; None is the factory's own.

    Returns:
        The subject.

    Raises:
        ValueError: there is nothing of that name.
        ConstructionError: it cannot be imported, or does not make an optimizer.
    """
    made = by_name(factory) if isinstance(factory, str) else factory
    settings = dict(kwargs or {})
    defaults = _defaults(made, settings)
    small = {k: v for k, v in SMALL_SETTINGS.items() if k in defaults and k not in settings}
    if small:
        settings |= small
        defaults = _defaults(made, settings)
    return Subject(name or name_of(factory), made, settings, defaults)


def name_of(factory: Factory | str) -> str:
    """What reports call an optimizer: the last word of its name, or what a partial wraps."""
    if isinstance(factory, str):
        return factory.rpartition(".")[2]
    if isinstance(factory, partial):
        return f"partial({name_of(factory.func)})"
    return str(getattr(factory, "__name__", type(factory).__name__))


def by_name(full_name: str) -> Factory:
    """What stands under a full name, such as `torch.optim.SGD` or `package.module.Outer.Inner`.

    Raises:
        ValueError: there is nothing of that name, or nothing that can be called.
        ConstructionError: its module cannot be imported.
    """
    words = full_name.split(".")
    if len(words) < 2 or not all(word.isidentifier() for word in words):
        raise ValueError(f"{full_name!r}: expected the full name of a class, as torch.optim.SGD")
    found, rest = _module_of(words, full_name)
    for word in rest:
        try:
            found = getattr(found, word)
        except AttributeError as error:
            raise ValueError(f"no optimizer class {full_name!r}: {error}") from error
    if not callable(found):
        raise ValueError(f"{full_name!r} is a {type(found).__name__}, not a class or a function")
    return cast(Factory, found)


def _module_of(words: list[str], full_name: str) -> tuple[Any, list[str]]:
    """The innermost module of a full name, and the words behind it."""
    missing: ImportError | None = None
    for k in range(len(words) - 1, 0, -1):
        module = ".".join(words[:k])
        try:
            return importlib.import_module(module), words[k:]
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise ConstructionError(f"importing {module} fails: {one_line(error)}") from error
            missing = missing or error
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise ConstructionError(f"importing {module} fails: {one_line(error)}") from error
    raise ValueError(f"no optimizer class {full_name!r}: {missing}") from missing


def _defaults(factory: Factory, settings: Mapping[str, Any]) -> dict[str, Any]:
    """`defaults` of an optimizer made with these settings."""
    try:
        probe = factory([Parameter(torch.zeros(2))], **settings)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a constructor may even call sys.exit
        raise ConstructionError(
            f"cannot construct {factory!r} with {dict(settings)}: {one_line(error)}"
        ) from error
    if not isinstance(probe, Optimizer):
        raise ConstructionError(f"{factory!r} makes a {type(probe).__name__}, no torch optimizer")
    defaults = getattr(probe, "defaults", None)
    if not isinstance(defaults, Mapping):
        raise ConstructionError(f"{factory!r} makes an optimizer without `defaults`")
    return dict(defaults)
