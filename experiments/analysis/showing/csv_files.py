"""The numbers of tables, comparisons and curves as CSV: bare, with more digits, a group a line."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

import numpy as np

from experiments.analysis.judging.verdicts import Verdict
from experiments.analysis.measuring.curves import AXES, METRICS, Axis, curve
from experiments.analysis.measuring.estimates import estimate_of, speedup_over_baseline
from experiments.analysis.measuring.groups import Group, Results

# What stands in `table.csv`, one block of columns per measure.
CSV_MEASURES = (
    "final_top1",
    "best_top1",
    "final_train_loss",
    "steps_to_target",
    "seconds_to_target",
    "seconds_per_epoch",
    "optimizer_share",
    "peak_memory",
)
_SPEEDUPS = ("steps_to_target", "seconds_to_target")


def results_csv(all_results: Sequence[Results]) -> str:
    """All numbers of the result tables, bare, with more digits; empty where there is none."""
    header = ["experiment", "scale", "optimizer", "config", "n", "runs", "target", "baseline"]
    for measure in CSV_MEASURES:
        header += [f"{measure}_{part}" for part in ("mean", "half_width", "median", "n", "misses")]
    for measure in _SPEEDUPS:
        header += [f"speedup_{measure}_{part}" for part in ("ratio", "low", "high", "reason")]
    rows: list[list[object]] = []
    for results in (family for entry in all_results for family in entry.families()):
        for group in results.groups:
            config = "; ".join(f"{key}={value}" for key, value in group.differs)
            row: list[object] = [results.experiment, results.scale, group.contestant, config]
            row += [len(group.ended), group.status_counts, results.target or ""]
            row += [results.role("baseline")]
            for measure in CSV_MEASURES:
                value = estimate_of(results, group, measure)
                median = value.median if value.n else None
                row += [_bare(value.mean), _bare(value.half_width), _bare(median)]
                row += [value.n, value.misses]
            for measure in _SPEEDUPS:
                ratio = speedup_over_baseline(results, group, measure)
                bounds = ratio.interval if ratio else None
                row += [_bare(ratio.centre if ratio else None)]
                row += [
                    _bare(bounds.low if bounds else None),
                    _bare(bounds.high if bounds else None),
                ]
                row += [ratio.reason if ratio else "no single group of the baseline"]
            rows.append(row)
    return write_csv(header, rows)


def comparison_csv(verdicts: Sequence[Verdict]) -> str:
    """The comparison with bare numbers, the margin and the rule beside them."""
    header = ["claim", "row", "paper", "place", "statement", "experiment", "metric", "kind"]
    header += ["optimizer", "reference", "printed", "printed_spread", "printed_n", "rule", "margin"]
    header += ["scale", "n", "ours", "low", "high", "difference", "verdict", "reason", "command"]
    rows: list[list[object]] = []
    for verdict in verdicts:
        claim, printed, effect = verdict.claim, verdict.claim.printed, verdict.effect
        bounds = effect.interval if effect else None
        row: list[object] = [claim.id, claim.row, claim.paper, claim.place, claim.statement]
        row += [claim.experiment, claim.metric, claim.kind, claim.optimizer, claim.reference or ""]
        row += [
            _bare(printed.value if printed else None),
            _bare(printed.spread if printed else None),
        ]
        row += [(printed.n if printed else None) or "", claim.rule, _bare(claim.margin)]
        row += [verdict.scale if effect else "", effect.n if effect else 0]
        row += [_bare(effect.centre if effect else None)]
        row += [_bare(bounds.low if bounds else None), _bare(bounds.high if bounds else None)]
        row += [_bare(verdict.difference), verdict.outcome, verdict.reason, verdict.command]
        rows.append(row)
    return write_csv(header, rows)


def curves_csv(all_results: Sequence[Results]) -> str:
    """Every curve of every group, one point a line."""
    header = ["experiment", "scale", "optimizer", "config", "metric", "axis", "x"]
    header += ["n", "mean", "half_width", "min", "max"]
    rows: list[list[object]] = []
    for results in all_results:
        for group in results.groups:
            config = "; ".join(f"{key}={value}" for key, value in group.differs)
            name = [results.experiment, results.scale, group.contestant, config]
            for metric in METRICS:
                for axis in AXES:
                    rows += [
                        [*name, metric, axis, *point] for point in _points(group, metric, axis)
                    ]
    return write_csv(header, rows)


def _points(group: Group, metric: str, axis: Axis) -> list[list[object]]:
    line = curve(group, metric, axis)
    numbers = zip(line.x, line.n, line.mean, line.half_width, line.low, line.high, strict=True)
    return [
        [f"{x:.6g}", int(n), *("" if np.isnan(value) else f"{value:.6g}" for value in values)]
        for x, n, *values in numbers
    ]


def write_csv(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """CSV text with Unix line ends."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue()


def _bare(value: float | None) -> str:
    """Six significant digits; empty for None; inf stays inf (CSV readers know it)."""
    return "" if value is None else f"{value:.6g}"
