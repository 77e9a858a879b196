"""What a check can find out, and the words in which it says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

_T = TypeVar("_T")

Status = Literal["pass", "fail", "unsupported", "not run"]

#: Errors by which libraries refuse an argument or a tensor.
REFUSALS = (TypeError, ValueError, RuntimeError, NotImplementedError, AssertionError)


@dataclass(frozen=True)
class Outcome:
    """The result of one check on one optimizer.

    Attributes:
        status: `pass`; `fail`; `unsupported`, the optimizer says itself that it cannot do this;
            `not run`, something that the check needs is not installed.
        reason: one line, empty for a pass.
        details: the traceback of a failure, else empty.
    """

    status: Status
    reason: str = ""
    details: str = ""


class CheckFailedError(AssertionError):
    """The optimizer does not do what the check asks."""


class UnsupportedError(Exception):
    """The optimizer refuses what the check asks, in words that name it."""


class ConstructionError(ValueError):
    """The optimizer cannot be imported, or not be constructed with its settings."""


class NotRunError(Exception):
    """Something that the check needs is missing on this machine."""


def expect(condition: bool, message: str) -> None:
    """Fail the check unless the condition holds (an `assert` would vanish under `python -O`).

    Args:
        condition: what must hold.
        message: one line that says what was found instead.

    Raises:
        CheckFailedError: the condition does not hold.
    """
    if not condition:
        raise CheckFailedError(message)


def one_line(error: BaseException) -> str:
    """The first line of an error's message, with its type where the message alone says little."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    if isinstance(error, CheckFailedError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def unless_refused(action: Callable[[], _T], *words: str) -> _T:
    """The action's result, if the optimizer does not refuse it by name.

    Args:
        action: what is asked of the optimizer.
        *words: a refusal must name one of these.

    Returns:
        What the action returned.

    Raises:
        UnsupportedError: the action raised an error whose message names one of the words.
        CheckFailedError: it raised an error that names none of them.
    """
    try:
        return action()
    except CheckFailedError:
        raise
    except REFUSALS as error:
        if any(word.lower() in str(error).lower() for word in words):
            raise UnsupportedError(one_line(error)) from error
        raise CheckFailedError(
            f"refused without naming {' or '.join(words)}: {one_line(error)}"
        ) from error
