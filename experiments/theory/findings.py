"""What a piece of theory found: quantities, tables and series, kept as JSON.

A quantity is one number with an interval. An exact one (a closed form, a worst case over a search,
a count) has an interval of no width. JSON has no infinities: they are the strings "inf" and "-inf".
Numbers are rounded to ten significant digits, so that a processor's last bits do not change a
committed file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scipy.stats import beta

from experiments.analysis.measuring.comparison import Comparison
from experiments.analysis.measuring.statistics import CONFIDENCE, Estimate
from experiments.runs.atomic import write_atomically

DIGITS = 10


@dataclass(frozen=True)
class Quantity:
    """One number that a claim can be judged by.

    Attributes:
        value: the number; may be infinite.
        low: lower end of its 95 % interval; equal to `value` if it is exact.
        high: upper end.
        n: seeds, samples or cases behind it.
        about: what it is, in one sentence.
    """

    value: float
    low: float
    high: float
    n: int
    about: str


@dataclass
class Findings:
    """What one subject found.

    Attributes:
        subject: name of the module and of the file.
        settings: every number that was chosen, so that the file explains itself.
        quantities: by name, which claims refer to as `<subject>/<name>`.
        tables: title, columns and rows, for the page.
        series: numbers for the figures.
        notes: what a reader must know, one sentence each.
    """

    subject: str
    settings: dict[str, Any] = field(default_factory=dict)
    quantities: dict[str, Quantity] = field(default_factory=dict)
    tables: list[dict[str, Any]] = field(default_factory=list)
    series: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, quantity: Quantity) -> None:
        """Add a quantity under a name of its own."""
        assert name not in self.quantities, name
        self.quantities[name] = quantity

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Add a table; cells are text or numbers."""
        assert all(len(row) == len(columns) for row in rows), title
        self.tables.append({"title": title, "columns": list(columns), "rows": [*map(list, rows)]})

    def write(self, folder: Path) -> Path:
        """Write `<subject>.json`.

        Args:
            folder: an existing directory.

        Returns:
            The file.
        """
        path = folder / f"{self.subject}.json"
        write_atomically(path, _dump(_plain(asdict(self))) + "\n")
        return path


def exact(value: float, about: str, n: int = 1) -> Quantity:
    """A quantity without uncertainty."""
    return Quantity(float(value), float(value), float(value), n, about)


def share(hits: int, n: int, about: str) -> Quantity:
    """A share of n independent cases, with the interval of Clopper and Pearson.

    Args:
        hits: how many of them.
        n: the cases.
        about: what is counted.
    """
    tail = (1 - CONFIDENCE) / 2
    low = 0.0 if hits == 0 else float(beta.ppf(tail, hits, n - hits + 1))
    high = 1.0 if hits == n else float(beta.ppf(1 - tail, hits + 1, n - hits))
    return Quantity(hits / n, low, high, n, about)


def estimated(estimate: Estimate, about: str) -> Quantity:
    """The mean of values without a miss, with Student's interval."""
    assert estimate.mean is not None and estimate.interval is not None
    bounds = estimate.interval
    return Quantity(estimate.mean, bounds.low, bounds.high, estimate.n, about)


def compared(comparison: Comparison, about: str) -> Quantity:
    """A paired ratio or difference.

    Where only the subject missed, the ratio is infinite; its interval then says that nothing more
    than the half line is known.
    """
    n = len(comparison.seeds)
    if comparison.centre is None or comparison.interval is None:
        return Quantity(math.inf, -math.inf, math.inf, n, f"{about} ({comparison.reason})")
    bounds = comparison.interval
    return Quantity(comparison.centre, bounds.low, bounds.high, n, about)


def _plain(value: Any) -> Any:
    """Numbers that JSON can hold, tuples as lists."""
    if isinstance(value, bool) or value is None or isinstance(value, int | str):
        return value
    if isinstance(value, float):
        if math.isinf(value):
            return "inf" if value > 0 else "-inf"
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value]


def _dump(value: Any, indent: str = "") -> str:
    """JSON text with a list of scalars on one line."""
    inner = indent + " "
    if isinstance(value, dict) and value:
        entries = [f"{inner}{json.dumps(k)}: {_dump(v, inner)}" for k, v in value.items()]
        return "{\n" + ",\n".join(entries) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(entry, list | dict) for entry in value):
        entries = [inner + _dump(entry, inner) for entry in value]
        return "[\n" + ",\n".join(entries) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
