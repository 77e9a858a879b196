"""A panel with two axes as SVG text: scales, ticks, lines, bands, markers.

The panel has a fixed coordinate system of `WIDTH` x `HEIGHT` units and takes the width of its place
on the page. Colours of axes and text are the page's own (`currentColor`), so that one drawing does
for light, dark and print. Numbers have one decimal: the same data give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape

import numpy as np
from matplotlib.markers import MarkerStyle

from experiments.analysis.measuring.curves import FEW_DECADES

WIDTH, HEIGHT = 440, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 28, 46
FEW_TICKS = 3  # a logarithmic axis with fewer decades and parts of them has even steps
_DIGIT = 8.0  # width of a digit of a tick's label, with something to spare
# Widths of markers: shapes with little area are drawn larger.
MARKER_SIZE = 9.0
POINTED = {
    "D": 10.5,
    "*": 14.0,
    "<": 11.0,
    ">": 11.0,
    "^": 10.0,
    "v": 10.0,
    "d": 12.0,
    "p": 10.5,
    "h": 10.5,
}
INK = "currentColor"
# Of the palette; invisible on a dark page, so the page's own ink stands in for it.
_BLACK = "#000000"


@dataclass(frozen=True)
class Scale:
    """One axis: values from `low` to `high` onto `start` to `stop`, linear or logarithmic."""

    low: float
    high: float
    start: float
    stop: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """Place of a value; values outside the axis lie outside the panel, at most one length."""
        low, high, at = self.low, self.high, value
        if self.logarithmic:
            low, high = math.log10(low), math.log10(high)
            at = math.log10(value) if value > 0 else low - (high - low)
        part = min(max((at - low) / (high - low), -1.0), 2.0)
        return self.start + part * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Round values on the axis: about five, or powers of ten with what lies between them."""
        decades = _decades(self.low, self.high) if self.logarithmic else []
        if len(decades) >= FEW_TICKS:
            return decades
        step = _round_step((self.high - self.low) / 5)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(index * step, 12) for index in range(first, last + 1)]


def scale_for(
    values: Iterable[float],
    start: float,
    stop: float,
    *,
    logarithmic: bool = False,
    from_zero: bool = False,
) -> Scale:
    """An axis that holds all finite values, with a little room at its ends.

    Args:
        values: what is drawn; only positive ones count on a logarithmic axis.
        start: place of the lower end.
        stop: place of the upper end.
        logarithmic: whether the axis is.
        from_zero: whether it begins at zero.
    """
    finite = [v for v in values if math.isfinite(v) and (v > 0 or not logarithmic)]
    low, high = (min(finite), max(finite)) if finite else (1.0, 10.0)
    if logarithmic:
        spare = (high / low) ** 0.04 if high > low else 2.0
        return Scale(low / spare, high * spare, start, stop, True)
    if from_zero:
        return Scale(0.0, (high if high > 0 else 1.0) * 1.02, start, stop)
    spare = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
    return Scale(low - spare, high + spare, start, stop)


def tick_label(value: float) -> str:
    """A tick in at most six characters, thousands and millions shortened."""
    for size, unit in ((1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            divisor = 1e3 if unit == "k" else size
            return f"{value / divisor:g}{unit}".replace("-", "−")
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    return f"{value:.6g}".replace("-", "−")


def label_below(at: float, floor: float, value: float) -> str:
    """The label of a tick of the x axis: in its middle, or where it ends if the panel does.

    Args:
        at: the tick, in units of the panel.
        floor: the axis.
        value: what the tick stands for.
    """
    label = tick_label(value)
    beyond = at + len(label) * _DIGIT / 2 > WIDTH
    anchor, x = ("end", WIDTH - 1.0) if beyond else ("middle", at)
    return f'<text class="tick {anchor}" x="{x:.1f}" y="{floor + 18}">{label}</text>'


def ink(colour: str) -> str:
    """A colour of the palette on any ground."""
    return INK if colour == _BLACK else colour


def polyline(points: Sequence[tuple[float, float]], css: str, extra: str = "") -> str:
    """A line through points given in units of the panel; "" for fewer than two."""
    if len(points) < 2:
        return ""
    return f'<path class="{css}" d="{_path(points)}"{extra}/>'


def area(upper: Sequence[tuple[float, float]], lower: Sequence[tuple[float, float]]) -> str:
    """A band between two lines."""
    if len(upper) < 2:
        return ""
    return f'<path class="band" d="{_path([*upper, *reversed(lower)])}Z"/>'


def marker(name: str, x: float, y: float, told: str) -> str:
    """A marker of matplotlib's names, with a text that a pointer over it shows."""
    title = f"<title>{escape(told)}</title>"
    return f'<path class="mark" d="{_outline(name, x, y)}">{title}</path>'


def swatch(colour: str, marker_name: str, dash: str) -> str:
    """A short piece of line with a marker, for legends and tables."""
    line = f'<path class="line" d="M1 7H31"{dash_attribute(dash)}/>'
    mark = f'<path class="mark" d="{_outline(marker_name, 16, 7)}"/>'
    return (
        f'<svg class="swatch" viewBox="0 0 32 14" width="32" height="14" aria-hidden="true" '
        f'style="--c:{ink(colour)}">{line}{mark}</svg>'
    )


def zone_picture(low: float, high: float, centre: float, left: float, right: float) -> str:
    """What is allowed as a shaded range, and a number with its interval on it.

    Args:
        low: lower end of what is allowed; may be infinite.
        high: upper end.
        centre: the number; may be infinite.
        left: lower end of its interval.
        right: upper end.
    """
    finite = [v for v in (low, high, centre, left, right) if math.isfinite(v)]
    scale = scale_for(finite, 8, 112)

    def place(value: float) -> float:
        return min(max(scale(value) if math.isfinite(value) else value, 0), 120)

    start, stop = place(low), place(high)
    # a point is allowed where the ends are one: it is drawn as a line
    wide = max(stop - start, 1.5)
    return (
        '<svg class="zone" viewBox="0 0 120 14" width="120" height="14" aria-hidden="true">'
        f'<rect class="allowed" x="{start:.1f}" y="0" width="{wide:.1f}" height="14"/>'
        f'<path class="bar" d="M{place(left):.1f} 7H{place(right):.1f}"/>'
        f'<circle class="dot" cx="{min(max(place(centre), 4), 116):.1f}" cy="7" r="3.5"/></svg>'
    )


def dash_attribute(dash: str) -> str:
    """The attribute of a dashed line; "" for a solid one."""
    return f' stroke-dasharray="{dash}"' if dash else ""


def frame(x: Scale, y: Scale, *, title: str, x_label: str) -> str:
    """Grid, ticks, tick labels, the title above and the name of the x axis below."""
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [f'<text class="title" x="{LEFT}" y="17">{escape(title)}</text>']
    for value in y.ticks():
        at = y(value)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{right}"/>')
        label = tick_label(value)
        parts.append(f'<text class="tick end" x="{LEFT - 7}" y="{at + 4:.1f}">{label}</text>')
    for value in x.ticks():
        at = x(value)
        parts.append(f'<path class="axis" d="M{at:.1f} {floor}v4"/>')
        parts.append(label_below(at, floor, value))
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{floor}H{right}"/>')
    middle = (LEFT + right) / 2
    parts.append(f'<text class="label middle" x="{middle}" y="{HEIGHT - 8}">{x_label}</text>')
    return "".join(parts)


def panel(name: str, alt: str, frame_text: str, body: str) -> str:
    """The drawing: frame, and a body that ends at the axes.

    Args:
        name: unique on the page.
        alt: the drawing in words.
        frame_text: of `frame`.
        body: lines, bands, markers.
    """
    wide, high = WIDTH - RIGHT - LEFT, HEIGHT - BOTTOM - TOP
    clip = (
        f'<clipPath id="{name}-clip"><rect x="{LEFT - 5}" y="{TOP - 5}" width="{wide + 10}" '
        f'height="{high + 10}"/></clipPath>'
    )
    return (
        f'<svg class="panel" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(alt)}">'
        f'{clip}{frame_text}<g clip-path="url(#{name}-clip)">{body}</g></svg>'
    )


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


@cache
def _shape(name: str) -> tuple[tuple[tuple[float, float], ...], ...]:
    style = MarkerStyle(name)
    path = style.get_path().transformed(style.get_transform())
    polygons = [np.asarray(polygon, dtype=float) for polygon in path.to_polygons()]
    corners = np.concatenate(polygons)
    size = POINTED.get(name, MARKER_SIZE) / (corners.max(axis=0) - corners.min(axis=0)).max()
    # a polygon of a circle has dozens of corners: sixteen are enough for so few units
    return tuple(
        tuple((size * float(x), -size * float(y)) for x, y in polygon[:: len(polygon) // 16 or 1])
        for polygon in polygons
    )


def _outline(name: str, x: float, y: float) -> str:
    polygons = ([(x + a, y + b) for a, b in polygon] for polygon in _shape(name))
    return "".join(f"{_path(polygon)}Z" for polygon in polygons)


def _round_step(about: float) -> float:
    size = 10.0 ** math.floor(math.log10(about))
    return size * min((1, 2, 2.5, 5, 10), key=lambda factor: abs(factor * size - about))


def _decades(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    per_decade = (1, 2, 5) if math.log10(high / low) < FEW_DECADES else (1,)
    stride = max(1, len(powers) // 7)
    ticks = [factor * 10.0**power for power in powers[::stride] for factor in per_decade]
    return [tick for tick in ticks if low <= tick <= high]
