"""The page of one experiment: what its runs show, curves, tables, every run, every command."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.analysis.judging.claims import reproduce_command
from experiments.analysis.measuring import quantities
from experiments.analysis.measuring.comparison import Comparison
from experiments.analysis.measuring.contrasts import TOP1
from experiments.analysis.measuring.curvature import summarise_curvature
from experiments.analysis.measuring.estimates import estimate_of, speedup_over_baseline
from experiments.analysis.measuring.groups import Group, Results
from experiments.analysis.measuring.measures import measure_named
from experiments.analysis.measuring.runs import Run
from experiments.analysis.showing.tables import Table, result_tables
from experiments.report import charts, record_charts
from experiments.report.cells import Cell, HtmlTable, number_cell
from experiments.report.charts import Entry, Panel
from experiments.report.material import Material
from experiments.report.words import findings

# Where the repeated runs go: a folder that git ignores.
AGAIN = "outputs/again"
_TEXT_COLUMNS = 2  # of the result tables: the contestant and the scale


@dataclass(frozen=True)
class Source:
    """Where the numbers of a group come from.

    Attributes:
        name: id on the page.
        label: of the group.
        runs: the run directories: text and link.
        command: what repeats its runs.
    """

    name: str
    label: str
    runs: tuple[tuple[str, str], ...]
    command: str


@dataclass(frozen=True)
class Section:
    """What a page shows of one scale.

    Attributes:
        scale: full, reduced or smoke.
        facts: name and value of what all runs have in common.
        findings: sentences.
        problems: what a reader must know about the runs.
        legend: one entry a group.
        subsets: names of the entries that belong to one figure, by its name.
        training: curves.
        curvature: curves of the curvature records.
        gradient: curves of the gradient of the whole training set.
        words: per quasi-Newton group: label and what its curvature did.
        intervals: drawings of final accuracy and speed-ups with intervals.
        times: a drawing of where the training time goes.
        tables: accuracy, target, cost, differences.
        runs: every run.
        sources: where the numbers of each group come from.
        command: what repeats all runs.
        unfinished: whether there are runs that are not over.
    """

    scale: str
    facts: tuple[tuple[str, str], ...]
    findings: tuple[str, ...]
    problems: tuple[str, ...]
    legend: tuple[Entry, ...]
    subsets: dict[str, tuple[str, ...]]
    training: tuple[Panel, ...]
    curvature: tuple[Panel, ...]
    gradient: tuple[Panel, ...]
    words: tuple[tuple[str, str], ...]
    intervals: tuple[str, ...]
    times: str
    tables: tuple[HtmlTable, ...]
    runs: HtmlTable
    sources: tuple[Source, ...]
    command: str
    unfinished: bool


def section(material: Material, results: Results, to_results: str) -> Section:
    """Everything about the runs of one scale.

    Args:
        material: what the report is made of.
        results: the runs.
        to_results: path from the page's folder to the results directory.
    """
    names = _names(results)
    legend = charts.legend(results.groups)
    prefix = results.scale
    return Section(
        scale=results.scale,
        facts=_facts(results),
        findings=tuple(findings(results)),
        problems=results.problems,
        legend=tuple(legend),
        subsets=_subsets(results, legend),
        training=tuple(charts.training_panels(results, prefix)),
        curvature=tuple(record_charts.curvature_panels(results, f"{prefix}-curvature")),
        gradient=tuple(record_charts.gradient_panels(results, f"{prefix}-gradient")),
        words=_curvature_words(results),
        intervals=_interval_panels(results),
        times=_time_panel(results),
        tables=tuple(
            _traced(table, family, names, dict(zip(results.groups, legend, strict=True)))
            for family in results.families()
            for table in result_tables(family)
        ),
        runs=_run_table(material, results, to_results),
        sources=tuple(_source(material, group, name, to_results) for group, name in names.items()),
        command=_command(results.groups),
        unfinished=any(group.unfinished for group in results.groups),
    )


def _names(results: Results) -> dict[Group, str]:
    return {group: f"source-{results.scale}-{i}" for i, group in enumerate(results.groups)}


def _subsets(results: Results, legend: Sequence[Entry]) -> dict[str, tuple[str, ...]]:
    by_contestant = [
        (group.contestant, entry.name) for group, entry in zip(results.groups, legend, strict=True)
    ]
    return {
        name.replace("_", " "): tuple(entry for who, entry in by_contestant if who in shown)
        for name, shown in results.figures().items()
    }


def _facts(results: Results) -> tuple[tuple[str, str], ...]:
    """Settings that are equal in all runs; what differs is not shown here."""
    runs = [run for group in results.groups for run in group.runs]

    def common(*path: str, of: str = "config") -> str:
        values = {_lookup(getattr(run, of), path) for run in runs}
        return values.pop() if len(values) == 1 else ""

    model = common("model", "name")
    size = " ".join(
        f"{key} {common('model', key)}" for key in ("depth", "width") if common("model", key)
    )
    parameters = common("parameters", of="meta")
    facts = {
        "data set": common("dataset", "name"),
        "network": f"{model} {size}".strip(),
        "parameters": f"{int(parameters):,}" if parameters else "",
        "epochs": common("train", "epochs"),
        "batch size": common("train", "batch_size"),
        "target": str(results.target or ""),
        "learning rates": _searched(results),
        "seeds": ", ".join(map(str, sorted({run.seed for run in runs}))),
        "processor": common("hardware", "gpu", of="meta") or common("hardware", "cpu", of="meta"),
    }
    return tuple((name, value) for name, value in facts.items() if value)


def _searched(results: Results) -> str:
    """The learning rates that a search chose, and its name; nothing of those that are not its."""
    rates: dict[str, list[str]] = {}
    for group in results.groups:
        config = group.runs[0].config
        rate = _lookup(config, ("optimizer", "lr"))
        tuned = ("experiment", "tuned")
        if rate and rate == _lookup(config, (*tuned, "settings", "optimizer", "lr")):
            name = _lookup(config, (*tuned, "search"))
            rates.setdefault(name, []).append(f"{group.label} {float(rate):.3g}")
    told = (f"{', '.join(shown)} (search {name})" for name, shown in rates.items())
    return "; ".join(told)


def _lookup(node: object, path: Sequence[str]) -> str:
    for part in path:
        node = node.get(part) if isinstance(node, dict) else None
    return "" if node is None else str(node)


def _curvature_words(results: Results) -> tuple[tuple[str, str], ...]:
    found = ((group.label, summarise_curvature(group)) for group in results.groups)
    return tuple((label, summary.words()) for label, summary in found if summary is not None)


def _interval_panels(results: Results) -> tuple[str, ...]:
    accuracy = []
    for group in results.groups:
        value = estimate_of(results, group, TOP1)
        if value.mean is not None:
            spread = math.nan if value.half_width is None else value.half_width
            accuracy.append((group, value.mean, value.mean - spread, value.mean + spread))
    panels = [charts.interval_panel("final test top-1, %", accuracy)]
    for family in results.families():
        panels += _speedup_panels(family)
    return tuple(panel for panel in panels if panel)


def _speedup_panels(results: Results) -> list[str]:
    over, panels = results.baseline(), []
    for measure, unit in (("steps_to_target", "steps"), ("seconds_to_target", "seconds")):
        if over is None or results.target is None:
            continue
        rows = []
        for group in results.groups:
            ratio = speedup_over_baseline(results, group, measure)
            if group is not over and ratio is not None and ratio.centre is not None:
                rows.append((group, ratio.centre, *_bounds(ratio)))
        title = f"speed-up over {over.label}, {unit} to the target"
        rows = [row for row in rows if math.isfinite(row[1])]
        panels.append(charts.interval_panel(title, rows, neutral=1.0, logarithmic=True))
    return panels


def _time_panel(results: Results) -> str:
    """Means over the seeds of seconds per epoch, for groups whose records have all parts."""
    rows = []
    for group in results.groups:
        runs = [run for run in group.ended if run.epochs]
        last = [(run.epochs[-1], float(run.epochs[-1]["epoch"])) for run in runs]
        if last and all(
            isinstance(e.get(f), float) for e, _ in last for f in charts.PARTS.values()
        ):
            parts = {
                name: sum(epoch[field] / count for epoch, count in last) / len(last)
                for name, field in charts.PARTS.items()
            }
            rows.append((group, parts))
    return charts.time_panel(rows)


def _bounds(ratio: Comparison) -> tuple[float, float]:
    bounds = ratio.interval
    return (math.nan, math.nan) if bounds is None else (bounds.low, bounds.high)


def _traced(
    table: Table, results: Results, names: dict[Group, str], legend: dict[Group, Entry]
) -> HtmlTable:
    """A table of the analysis, each number with the blocks that list its runs."""
    rows: list[tuple[Cell, ...]] = []
    for group, cells in zip(results.groups, table.rows, strict=True):
        row = [Cell(cells[0], str(len(rows)), swatch=legend[group].swatch), Cell(cells[1])]
        for column, text in zip(table.columns[2:], cells[2:], strict=True):
            other = _other(table, column, results)
            sources = [names[group], *([names[other]] if other not in (None, group) else [])]
            row.append(Cell(text) if column == "runs" else number_cell(text, sources))
        rows.append(tuple(row))
    numeric = frozenset(range(_TEXT_COLUMNS, len(table.columns)))
    return HtmlTable(table.title, table.columns, tuple(rows), numeric=numeric)


def _other(table: Table, column: str, results: Results) -> Group | None:
    """The second group behind a column: the baseline of speed-ups, the subject of differences.

    Returns:
        The group; None for a column about one group alone.
    """
    if column.startswith("speed-up over"):
        return results.baseline()
    return results.subject() if table.title.startswith("Difference to") else None


def _run_table(material: Material, results: Results, to_results: str) -> HtmlTable:
    rows = []
    for group, entry in zip(results.groups, charts.legend(results.groups), strict=True):
        for run in group.runs:
            rows.append(_run_row(material, run, entry, to_results))
    measures = tuple(title for _, title in _RUN_MEASURES)
    columns = ("contestant", "seed", "status", *measures, "training", "commit", "run directory")
    numeric = frozenset(range(3, 4 + len(measures)))
    caption = f"Every run ({results.experiment}, {results.scale} scale)"
    return HtmlTable(caption, columns, tuple(rows), f"{results.scale}-runs", numeric)


_RUN_MEASURES = (
    ("final_top1", "final top-1, %"),
    ("best_top1", "best top-1, %"),
    ("final_train_loss", "final train loss"),
    ("steps_to_target", "steps to target"),
    ("seconds_to_target", "seconds to target"),
    ("peak_memory", "peak memory, MiB"),
)


def _run_row(material: Material, run: Run, entry: Entry, to_results: str) -> tuple[Cell, ...]:
    cells = []
    for name, _ in _RUN_MEASURES:
        measure = measure_named(name)
        value = measure(run)
        if value is None:
            cells.append(Cell(quantities.NOTHING))
            continue
        infinite = math.isinf(value)
        text = measure.infinite if infinite else quantities.number(value, measure.kind)
        cells.append(Cell(text, f"{value:.9g}".replace("inf", "Infinity")))
    seconds = run.train_time_s
    git = run.meta.get("git") or {}
    commit = str(git.get("commit", ""))[:10] + (" (changed)" if git.get("dirty") else "")
    place = material.place(run)
    return (
        Cell(entry.label, swatch=entry.swatch),
        Cell(str(run.seed), str(run.seed)),
        Cell(run.state, note=run.message),
        *cells,
        Cell(quantities.duration(seconds), f"{seconds:.3f}"),
        Cell(commit),
        Cell(run.key, run.key, href=f"{to_results}/{place}"),
    )


def _source(material: Material, group: Group, name: str, to_results: str) -> Source:
    places = [material.place(run) for run in (*group.ended, *group.unfinished)]
    runs = tuple((place, f"{to_results}/{place}") for place in places)
    return Source(name, group.label, runs, _command([group]))


def _command(groups: Sequence[Group]) -> str:
    """What trains the runs of groups of one experiment again, beside the committed ones."""
    first = groups[0]
    contestants = tuple(dict.fromkeys(group.contestant for group in groups))
    seeds = sorted({run.seed for group in groups for run in group.runs})
    command = reproduce_command(first.experiment, contestants, first.scale, seeds=seeds)
    return f"{command} --results-dir {AGAIN}"
