"""The optimizer under test, and the moments of its life at which checks look at it.

Legend: `M` history size, `T` update interval of optimizers that collect curvature pairs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from mlbfgs.testing.outcome import UnsupportedError, unless_refused

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
    """

    name: str
    factory: Factory
    kwargs: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(repr=False)

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
        ValueError: there is nothing of that name, or it does not make an optimizer.
    """
    made = _by_name(factory) if isinstance(factory, str) else factory
    settings = dict(kwargs or {})
    probe = _probe(made, settings)
    small = {k: v for k, v in SMALL_SETTINGS.items() if k in probe.defaults and k not in settings}
    if small:
        settings |= small
        probe = _probe(made, settings)
    own_name = getattr(made, "__name__", type(made).__name__)
    return Subject(name or own_name, made, settings, dict(probe.defaults))


def _by_name(full_name: str) -> Factory:
    module, _, attribute = full_name.rpartition(".")
    if not module:
        raise ValueError(f"{full_name!r}: expected the full name of a class, as torch.optim.SGD")
    try:
        return cast(Factory, getattr(importlib.import_module(module), attribute))
    except (ImportError, AttributeError) as error:
        raise ValueError(f"no optimizer class {full_name!r}: {error}") from error


def _probe(factory: Factory, settings: Mapping[str, Any]) -> Optimizer:
    try:
        probe = factory([Parameter(torch.zeros(2))], **settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"cannot construct {factory!r} with {dict(settings)}: {error}") from error
    if not isinstance(probe, Optimizer):
        raise ValueError(f"{factory!r} makes a {type(probe).__name__}, not a torch optimizer")
    return probe
