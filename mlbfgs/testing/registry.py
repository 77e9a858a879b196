"""The list of checks, and how one is run on one optimizer."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mlbfgs.testing.outcome import (
    CheckFailedError,
    NotRunError,
    Outcome,
    UnsupportedError,
    one_line,
)
from mlbfgs.testing.subject import Subject

SECTIONS = ("Traps", "Interface", "State", "Mathematics", "Speed", "Frameworks")

CheckFunction = Callable[[Subject], None]


@dataclass(frozen=True)
class Check:
    """One thing that an optimizer must survive.

    Attributes:
        name: a word for the command line.
        title: a sentence for reports.
        section: one of `SECTIONS`.
        function: returns if the optimizer passes.
        slow: whether it takes seconds.
    """

    name: str
    title: str
    section: str
    function: CheckFunction
    slow: bool = False


class Registry:
    """Checks by name, in the order in which they were added."""

    def __init__(self) -> None:
        self.checks: dict[str, Check] = {}

    def add(
        self,
        section: str,
        function: CheckFunction,
        *,
        name: str = "",
        title: str = "",
        slow: bool = False,
    ) -> None:
        """Add one check; name and title default to the function's name and docstring."""
        name = name or function.__name__
        title = title or (function.__doc__ or "").strip().splitlines()[0].rstrip(".")
        assert section in SECTIONS and name not in self.checks, name
        assert title not in {c.title for c in self.checks.values()}, title
        self.checks[name] = Check(name, title, section, function, slow)

    def check(
        self, section: str, *, slow: bool = False
    ) -> Callable[[CheckFunction], CheckFunction]:
        """Decorator that adds a function."""

        def added(function: CheckFunction) -> CheckFunction:
            self.add(section, function, slow=slow)
            return function

        return added

    def for_each(
        self, section: str, values: Mapping[str, Any], title: str, *, slow: bool = False
    ) -> Callable[[Callable[[Subject, Any], None]], Callable[[Subject, Any], None]]:
        """Decorator that adds a function of two arguments once for each value.

        Args:
            section: of all.
            values: what is passed as the second argument, by a word for it.
            title: of the check, with `{}` where the word stands.
            slow: whether each takes seconds.
        """

        def added(function: Callable[[Subject, Any], None]) -> Callable[[Subject, Any], None]:
            for word, value in values.items():
                bound = _with_value(function, value)
                name = f"{function.__name__}[{word.replace(' ', '_')}]"
                self.add(section, bound, name=name, title=title.format(word), slow=slow)
            return function

        return added


def _with_value(function: Callable[[Subject, Any], None], value: Any) -> CheckFunction:
    def bound(subject: Subject) -> None:
        function(subject, value)

    return bound


def _constructed(subject: Subject) -> None:
    raise CheckFailedError(subject.broken)


#: The one check of an optimizer that cannot be constructed.
CONSTRUCTION = Check(
    "construction", "Can be constructed with its settings", "Interface", _constructed
)


@dataclass(frozen=True)
class BoundCheck:
    """A check and the optimizer that it is for."""

    check: Check
    subject: Subject

    def __str__(self) -> str:
        """For test ids."""
        return f"{self.subject.name}-{self.check.name}"

    def run(self) -> Outcome:
        """Run the check; whatever happens becomes an outcome."""
        dtype = torch.get_default_dtype()
        try:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.manual_seed(0)
                self.check.function(self.subject)
        except UnsupportedError as error:
            return Outcome("unsupported", str(error))
        except NotRunError as error:
            return Outcome("not run", str(error))
        except (Exception, SystemExit) as error:
            return Outcome("fail", one_line(error), traceback.format_exc())
        finally:
            torch.set_default_dtype(dtype)
        return Outcome("pass")

    def __call__(self) -> Outcome:
        """Run the check, for use as the body of a test.

        Returns:
            The outcome where it is not a failure.

        Raises:
            CheckFailedError: the optimizer fails the check.
        """
        outcome = self.run()
        if outcome.status == "fail":
            raise CheckFailedError(f"{self.check.title}: {outcome.reason}\n\n{outcome.details}")
        return outcome
