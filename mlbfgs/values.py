"""Plain values from what users give, or a refusal that names the setting.

Numbers may be Python's, NumPy's (also as arrays without dimensions), tensors of one element, or
anything that says it is real, such as a fraction: they become `int` or `float`, so that a
checkpoint with them loads with `weights_only=True`. True and False are no numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from difflib import get_close_matches
from numbers import Integral, Real

from torch import Tensor


def plain_number(value: object) -> int | float | None:
    """The value as `int` or `float`; None if it is no real number."""
    if type(value) in (int, float):
        return value  # type: ignore[return-value]
    value = _scalar(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return int(value) if isinstance(value, Integral) else float(value)
    except OverflowError:
        return None


def _scalar(value: object) -> object:
    """What a tensor of one element or an array without dimensions holds; else the value."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 and value.device.type != "meta" else value
    is_array = getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    return value.item() if is_array else value  # type: ignore[attr-defined]


def is_finite(number: int | float) -> bool:
    """Whether a plain number is a finite float."""
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer that no float can hold
        return False


def not_negative(label: str, value: object) -> int | float:
    """A finite number of at least 0, or torch's own refusal.

    Args:
        label: torch's words for it, such as "momentum value".
        value: what was given.

    Raises:
        ValueError: it is something else.
    """
    number = plain_number(value)
    if number is None:
        raise ValueError(f"Invalid {label}: {value!r} (expected a number)")
    if not (number >= 0 and is_finite(number)):
        raise ValueError(f"Invalid {label}: {number}")
    return number


def whole(label: str, value: object, wanted: str, least: int) -> int:
    """A whole number of at least `least`.

    Raises:
        ValueError: it is something else; the message has `wanted`.
    """
    number = plain_number(value)
    if not isinstance(number, int) or number < least:
        raise ValueError(f"Invalid {label}: {value!r} ({wanted})")
    return number


def flag(label: str, value: object, *, numbers: bool = False) -> bool:
    """True or False.

    Args:
        label: of the setting.
        value: what was given.
        numbers: whether 1 and 0 will do.

    Raises:
        ValueError: it is something else.
    """
    scalar = _scalar(value)
    if isinstance(scalar, bool) or (numbers and isinstance(scalar, int) and scalar in (0, 1)):
        return bool(scalar)
    raise ValueError(f"Invalid {label}: {value!r} (True or False)")


def two_numbers(label: str, value: object, wanted: str) -> tuple[int | float, int | float]:
    """Two numbers in a row, of a tuple, a list, an array or the like.

    Raises:
        ValueError: it is something else; the message has `wanted`.
    """
    unordered = isinstance(value, (str, bytes, Mapping, Set))
    single = getattr(value, "ndim", 1) == 0  # iterable by its type alone
    given = list(value) if isinstance(value, Iterable) and not (unordered or single) else []
    numbers = [plain_number(number) for number in given]
    if len(numbers) != 2 or numbers[0] is None or numbers[1] is None:
        raise ValueError(f"Invalid {label}: {value!r} ({wanted})")
    return numbers[0], numbers[1]


def check_choice(key: str, value: object, choices: Sequence[str]) -> None:
    """Refuse a name that is none of the choices.

    Raises:
        ValueError: the message has the choices and, if there is one, the nearest.
    """
    if not isinstance(value, str) or value not in choices:
        near = get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Invalid {key}: {value!r} (one of {', '.join(choices)}){hint}")
