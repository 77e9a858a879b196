"""Numbers in words: how an estimate, an interval and a miss are printed.

One place decides the digits, so that a table, a figure and a sentence show the same number.
"""

from __future__ import annotations

import math

from experiments.analysis.measuring.comparison import Comparison
from experiments.analysis.measuring.statistics import Estimate, Interval

MINUS = "−"
NOTHING = "–"
# What it takes to reach a target, and ratios of it: infinite where a run does not. The others are
# infinite where a run diverged.
_REACHED = ("count", "seconds", "ratio")

_ROUNDING = 1e-12  # a spread this small beside its mean is float64's own, and printed as zero


def number(value: float, kind: str) -> str:
    """Print one number.

    Args:
        value: finite or infinite.
        kind: percent | loss | count | seconds | bytes (printed in MiB) | ratio | plain | flag.
    """
    if math.isinf(value) and kind in _REACHED:
        return "none" if value < 0 else "never"
    if math.isinf(value):
        return f"{MINUS}∞" if value < 0 else "∞"
    return _print(value, kind, _decimals(value, kind))


def estimate(
    value: Estimate, kind: str, *, ended: int | None = None, infinite: str = "miss"
) -> str:
    """Print mean ± half width, or say in words why there is none; of a flag, in how many seeds.

    Args:
        value: the estimate.
        kind: as in `number`.
        ended: number of ended runs, where it may be larger than that of the values.
        infinite: the word for an infinite value.
    """
    if value.n == 0:
        return NOTHING
    if kind == "flag":  # a t-interval would leave [0, 1]
        return f"in {sum(value.values):g} of {value.n}"
    if value.misses and value.median is not None:
        missed = f"{infinite} {value.misses}/{value.n}"
        if math.isinf(value.median):
            return missed
        return f"median {number(value.median, kind)}, {missed}"
    assert value.mean is not None
    text = _mean(value.mean, value.half_width, kind)
    if ended is not None and 1 < value.n < ended:
        text += f" (n = {value.n})"
    return text


def interval(bounds: Interval | None, kind: str) -> str:
    """Print "[low, high]"; "no interval" without one."""
    if bounds is None:
        return "no interval"
    if math.isinf(bounds.low) and kind in _REACHED:
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


def steady(value: float) -> float:
    """Nine significant digits of a number: the last bits of a processor shall change no file.

    Files hold these, and what is printed is rounded from these, so that both show the same digits.
    """
    return float(f"{value:.9g}")


def signed(value: float, kind: str) -> str:
    """Print a difference with its sign."""
    text = number(value, kind)
    return text if text.startswith(MINUS) else f"+{text}"


def duration(seconds: float) -> str:
    """Seconds as people read them: `45 s`, `3 min 20 s`, `2 h 05 min`, `1,200 h`."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    if total < 360_000:
        return f"{total // 3600} h {total % 3600 // 60:02d} min"
    return f"{round(total / 3600):,} h"


def _mean(mean: float, half_width: float | None, kind: str) -> str:
    """Mean ± half width with the same number of decimals."""
    decimals = _decimals(mean, kind)
    if half_width is None:
        return f"{_print(mean, kind, decimals)} (n = 1)"
    if half_width < _ROUNDING * abs(mean):
        half_width = 0.0
    if half_width > 0 and kind == "loss":
        # A small spread is shown as small, not as zero: one digit of it at least, two at most
        # beyond the usual ones.
        decimals = min(max(decimals, -math.floor(math.log10(half_width))), decimals + 2)
    return f"{_print(mean, kind, decimals)} ± {_print(half_width, kind, decimals)}"


def _print(value: float, kind: str, decimals: int) -> str:
    scaled = steady(value / 2**20 if kind == "bytes" else value)
    text = f"{scaled:.4g}" if kind in ("plain", "flag") else f"{scaled:.{decimals}f}"
    return text.replace("-", MINUS)


def _decimals(value: float, kind: str) -> int:
    size = abs(value)
    if kind == "loss":
        return 4 if size < 1 else 3
    if kind == "seconds":
        return 3 if size < 1 else 2 if size < 10 else 1 if size < 1000 else 0
    return {"percent": 2, "ratio": 3}.get(kind, 0)
