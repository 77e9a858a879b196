"""Tables of one experiment at one scale: accuracy, target, cost, and ours beside the paper's.

`headline_table` is the one of them that a README has room for. Every table exists as Markdown, as
lines of CSV with bare numbers, and as text of at most 100 columns. The scale stands in every row,
because a number without its scale means nothing.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tabulate import tabulate

from experiments.analysis.judging.claims import OURS
from experiments.analysis.judging.settling import Effect
from experiments.analysis.judging.verdicts import Verdict
from experiments.analysis.measuring import quantities
from experiments.analysis.measuring.contrasts import LOSS, TOP1, difference, share_of_gain
from experiments.analysis.measuring.estimates import estimate_of, speedup_over_baseline
from experiments.analysis.measuring.groups import Group, Results, display_name
from experiments.analysis.measuring.measures import measure_named

TERMINAL_WIDTH = 100


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: one line above it.
        columns: headers.
        rows: cells, one tuple a row.
        widths: largest width of each column on a terminal, characters; 0: left out there.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    widths: tuple[int, ...]

    def markdown(self) -> str:
        """The table as Markdown, with its title as a bold line."""
        head = [self.columns, tuple("---" for _ in self.columns)]
        lines = [
            "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
            for row in (*head, *self.rows)
        ]
        return f"**{self.title}**\n\n" + "\n".join(lines) + "\n"

    def terminal(self) -> str:
        """The table as text of at most `TERMINAL_WIDTH` columns; long cells are wrapped."""
        shown = [column for column, width in enumerate(self.widths) if width]
        widths = [self.widths[column] for column in shown]
        body = tabulate(
            [[row[column] for column in shown] for row in self.rows],
            headers=[self.columns[column] for column in shown],
            tablefmt="simple",
            disable_numparse=True,
            maxcolwidths=widths,
            maxheadercolwidths=widths,
        )
        title = textwrap.fill(self.title, TERMINAL_WIDTH, break_on_hyphens=False)
        return f"{title}\n\n{body}\n"


def result_tables(results: Results) -> tuple[Table, ...]:
    """Accuracy, target, cost and differences per optimizer; intervals are Student's, 95 %.

    Args:
        results: of one family (`Results.families`).
    """
    where = results.where
    goal = f"target {results.target}" if results.target else "no common target"

    def table(title: str, columns: Sequence[_Column], label_width: int = 15) -> Table:
        return _table(results, title, columns, label_width)

    def estimated(header: str, measure: str, width: int = 15) -> _Column:
        return _estimated(results, header, measure, width)

    def speedup(header: str, measure: str) -> _Column:
        return _Column(header, 15, lambda group: _speedup_cell(results, group, measure))

    base = display_name(results.role("baseline") or "")
    tables: tuple[Table, ...] = (
        table(
            f"Accuracy and loss ({where}; mean ± half width of the 95 % t-interval)",
            (
                _Column("runs", 13, lambda group: group.status_counts),
                estimated("final top-1, %", "final_top1"),
                estimated("best top-1, %", "best_top1"),
                estimated("final train loss", "final_train_loss"),
            ),
        ),
        table(
            f"Steps and seconds to the target ({where}; {goal}; seen at evaluations)",
            (
                estimated("steps to target", "steps_to_target", 14),
                estimated("seconds to target", "seconds_to_target", 14),
                speedup(f"speed-up over {base}, steps", "steps_to_target"),
                speedup(f"speed-up over {base}, seconds", "seconds_to_target"),
            ),
            label_width=13,
        ),
        table(
            f"Cost ({where}; training seconds, evaluation excluded)",
            (
                estimated("seconds per epoch", "seconds_per_epoch"),
                estimated("optimizer's share, %", "optimizer_share"),
                estimated("peak memory, MiB", "peak_memory"),
            ),
        ),
    )
    if any(run.gradients for group in results.groups for run in group.ended):
        tables += (
            table(
                f"Squared gradient norm over loss, of the whole training set ({where})",
                (
                    estimated("smallest ‖∇L‖² / L", "pl_constant"),
                    estimated("first over smallest", "pl_fall"),
                    estimated("slope of ln ‖∇L‖² over ln L", "pl_exponent"),
                ),
            ),
        )
    subject = results.subject()
    if subject is None:
        return tables

    def minus_subject(header: str, measure: str) -> _Column:
        return _difference(results, subject, header, measure)

    shared = any(share_of_gain(results, group) is not None for group in results.groups)
    share = _Column("share of its gain", 10, lambda group: _share_cell(results, group))
    return (
        *tables,
        table(
            f"Difference to {subject.label} ({where}; paired by seed, 95 % interval of the mean)",
            (
                minus_subject("final top-1, points", TOP1),
                minus_subject("final train loss", LOSS),
                *([share] if shared else []),
            ),
            label_width=28,
        ),
    )


def headline_table(results: Results) -> Table:
    """One line per contestant: what it reached, how far from the others, at which cost.

    Differences are to the contestant that the experiment is about, else to the baseline.

    Args:
        results: of one family (`Results.families`).
    """
    goal = f"; target {results.target}, seen at evaluations" if results.target else ""
    columns = [
        _Column("runs", 13, lambda group: group.status_counts),
        _estimated(results, "final top-1, %", "final_top1"),
        _estimated(results, "final train loss", "final_train_loss"),
    ]
    other = results.subject() or results.baseline()
    if other is not None:
        header = f"top-1 {quantities.MINUS} that of {other.label}, points"
        columns.insert(2, _difference(results, other, header, TOP1))
    if results.target is not None:
        columns.append(_estimated(results, "steps to target", "steps_to_target"))
    columns.append(_estimated(results, "seconds per epoch", "seconds_per_epoch"))
    columns.append(_estimated(results, "optimizer's share of them, %", "optimizer_share"))
    title = (
        f"{results.where} (mean ± half width of the 95 % t-interval; "
        f"differences paired by seed{goal}; seconds of training, evaluation excluded)"
    )
    return _table(results, title, columns, label_width=15)


def comparison_table(verdicts: Sequence[Verdict], experiment: str) -> Table:
    """The table `paper | ours | difference | verdict`, the scale of ours in its own column."""
    rows = tuple(
        (
            verdict.claim.id,
            verdict.claim.row,
            f"{verdict.claim.place}: {effect_in_words(verdict)}",
            paper_cell(verdict),
            ours_cell(verdict),
            verdict.scale if verdict.effect else NOT_RUN_SCALE,
            _difference_cell(verdict),
            str(verdict),
        )
        for verdict in verdicts
    )
    columns = ("claim", "row", "what", "paper", "ours", "scale", "difference", "verdict")
    title = f"Paper and ours ({experiment})"
    return Table(title, columns, rows, (0, 6, 25, 12, 16, 7, 10, 12))


NOT_RUN_SCALE = quantities.NOTHING


@dataclass(frozen=True)
class _Column:
    header: str
    width: int
    cell: Callable[[Group], str]


def _table(results: Results, title: str, columns: Sequence[_Column], label_width: int) -> Table:
    """A line per contestant, its name, scale and number of ended runs first."""
    rows = tuple(
        (group.label, group.scale, str(len(group.ended)), *(c.cell(group) for c in columns))
        for group in results.groups
    )
    headers = ("optimizer", "scale", "n", *(column.header for column in columns))
    widths = (label_width, 7, 3, *(column.width for column in columns))
    return Table(title, headers, rows, widths)


def _estimated(results: Results, header: str, measure: str, width: int = 15) -> _Column:
    return _Column(header, width, lambda group: _estimate_cell(results, group, measure))


def _difference(results: Results, other: Group, header: str, measure: str) -> _Column:
    """A measure minus that of another contestant."""
    return _Column(header, 24, lambda group: _difference_cell_of(results, group, other, measure))


def _estimate_cell(results: Results, group: Group, measure: str) -> str:
    function = measure_named(measure)
    value = estimate_of(results, group, measure)
    ended, infinite = len(group.ended), function.infinite
    return quantities.estimate(value, function.kind, ended=ended, infinite=infinite)


def _speedup_cell(results: Results, group: Group, measure: str) -> str:
    if results.target is None:
        return quantities.NOTHING
    if results.baseline() is group:
        return "1 (by definition)" if group.ended else quantities.NOTHING
    ratio = speedup_over_baseline(results, group, measure)
    if ratio is None:
        name = results.role("baseline") or ""
        few = len(results.of_contestant(name)) == 0
        return f"no {display_name(name)} run" if few else f"several {display_name(name)} configs"
    return quantities.comparison(ratio, "ratio")


def _difference_cell_of(results: Results, group: Group, other: Group, measure: str) -> str:
    if group is other:
        return "0 (by definition)"
    kind = measure_named(measure).kind
    return quantities.comparison(difference(results, group, other, measure), kind)


def _share_cell(results: Results, group: Group) -> str:
    share = share_of_gain(results, group)
    return quantities.NOTHING if share is None else f"{100 * share:.0f} %"


def effect_in_words(verdict: Verdict) -> str:
    """What the effect of a claim is, such as "final top-1, mL-BFGS − SGD"."""
    claim = verdict.claim
    metric = claim.metric.replace("_", " ").replace("top1", "top-1")
    subject = display_name(claim.optimizer)
    if claim.kind == "share":
        return f"share of seeds: {metric}, {subject}"
    if claim.reference is None:
        return f"{metric}, {subject}"
    reference = display_name(claim.reference)
    if claim.kind == "ratio":
        return f"{metric}, {subject} / {reference}"
    if claim.kind == "speedup":
        return f"{metric}, {reference} / {subject}"
    return f"{metric}, {subject} {quantities.MINUS} {reference}"


def kind_of(verdict: Verdict) -> str:
    """How the numbers of a verdict are printed, see `quantities.number`."""
    if verdict.claim.kind in ("ratio", "speedup"):
        return "ratio"
    return measure_named(verdict.claim.metric).kind


def paper_cell(verdict: Verdict) -> str:
    """What the paper prints for the effect, or the side of it that is claimed."""
    claim = verdict.claim
    sign = {"within": "", "above": "above ", "below": "below "}[claim.rule]
    if claim.paper == OURS:
        sign = f"asked by us: {sign}"
    if claim.printed is None:
        return f"{sign}{1 if claim.kind in ('ratio', 'speedup') else 0}"
    n = f" (n = {claim.printed.n})" if claim.printed.n else ""
    return f"{sign}{claim.printed}{n}".replace("-", quantities.MINUS)


def ours_cell(verdict: Verdict) -> str:
    """Our effect with its interval, or why there is none."""
    effect = verdict.effect
    if effect is None:
        return quantities.NOTHING
    if effect.centre is None:
        return effect.reason
    kind = kind_of(verdict)
    bounds = _without_interval(effect) or quantities.interval(effect.interval, kind)
    return f"{quantities.number(effect.centre, kind)} {bounds}"


def _without_interval(effect: Effect) -> str:
    return f"(n = {effect.n}, no interval)" if effect.interval is None else ""


def _difference_cell(verdict: Verdict) -> str:
    difference = verdict.difference
    if difference is None:
        return quantities.NOTHING
    allowed = f"{verdict.claim.margin:g}"
    sign = {"within": "±", "above": quantities.MINUS, "below": "+"}[verdict.claim.rule]
    return f"{quantities.signed(difference, kind_of(verdict))} (allowed {sign}{allowed})"
