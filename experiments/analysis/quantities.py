"""Numbers in words: how an estimate, an interval and a miss are printed.

One place decides the digits, so that a table, a figure and a sentence show the same number.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from experiments.analysis.statistics import Comparison, Estimate, Interval

MINUS = "−"
NOTHING = "–"


def number(value: float, kind: str) -> str:
    """Print one number.

    Args:
        value: finite or infinite.
        kind: percent | loss | count | seconds | bytes | ratio | plain.
    """
    if math.isinf(value):
        return "none" if value < 0 else "never"
    return _PRINTERS[kind](value).replace("-", MINUS)


def estimate(value: Estimate, kind: str, *, ended: int | None = None) -> str:
    """Print mean ± half width, or say in words why there is none.

    Args:
        value: the estimate.
        kind: as in `number`.
        ended: number of ended runs, where it may be larger than that of the values.
    """
    if value.n == 0:
        return NOTHING
    if value.misses == value.n:
        return f"miss {value.misses}/{value.n}"
    if value.misses and value.median is not None:
        if math.isinf(value.median):
            return f"miss {value.misses}/{value.n}"
        return f"median {number(value.median, kind)}, miss {value.misses}/{value.n}"
    assert value.mean is not None
    text = number(value.mean, kind)
    text += f" ± {number(value.half_width, kind)}" if value.half_width is not None else " (n = 1)"
    if ended is not None and 1 < value.n < ended:
        text += f" (n = {value.n})"
    return text


def interval(bounds: Interval | None, kind: str) -> str:
    """Print "[low, high]"; "no interval" without one."""
    if bounds is None:
        return "no interval"
    if math.isinf(bounds.low):
        return "[none reached it]"
    return f"[{number(bounds.low, kind)}, {number(bounds.high, kind)}]"


def comparison(value: Comparison, kind: str) -> str:
    """Print a difference or a ratio with its interval, or why it cannot be computed."""
    if value.centre is None:
        return value.reason
    text = number(value.centre, kind)
    if value.interval is None:
        return f"{text} (n = 1)"
    return f"{text} {interval(value.interval, kind)}"


def signed(value: float, kind: str) -> str:
    """Print a difference with its sign."""
    text = number(value, kind)
    return text if text.startswith(MINUS) else f"+{text}"


def _loss(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.3f}"


def _seconds(value: float) -> str:
    if abs(value) < 10:
        return f"{value:.2f}"
    return f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"


_PRINTERS: dict[str, Callable[[float], str]] = {
    "percent": lambda value: f"{value:.2f}",
    "loss": _loss,
    "count": lambda value: f"{value:.0f}",
    "seconds": _seconds,
    "bytes": lambda value: f"{value / 2**20:.0f} MiB",
    "ratio": lambda value: f"{value:.3f}",
    "plain": lambda value: f"{value:.4g}",
}
