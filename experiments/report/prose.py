"""Prose whose numbers come from the results: Markdown templates in `prose/`.

A text names a number, `{{ ours("sgd", "final_top1") }}`, and the page prints it with interval and n
and a link to its runs. A number typed by hand stops the build, and so does a name that the
results do not have, or a statement, `{{ holds(...) }}`, that they contradict.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, TemplateError
from markupsafe import Markup

from experiments.analysis.measuring import quantities
from experiments.analysis.measuring.curves import METRICS, curve
from experiments.analysis.measuring.estimates import estimate_of
from experiments.analysis.measuring.groups import Group, Results
from experiments.analysis.measuring.measures import FALLING_METRICS, measure_named
from experiments.analysis.measuring.pairing import compare_groups
from experiments.errors import UserError, nearest
from experiments.given import read_text
from experiments.report.markdown import Later, to_html

FOLDER = Path(__file__).resolve().parent / "prose"
_PLACEHOLDER = re.compile(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}|`[^`]*`", re.S)
# Around what comes from the results, which Markdown is not to read.
_MARKS = "\ue002\ue003"
# Numbers that are names: ResNet-18, CIFAR-10, Table 3, section 5.1, patch 16.
_NAME = re.compile(
    r"[A-Za-zé]+-\d+|\b(?:Table|Figure|Section|Appendix|Lemma|Theorem|Algorithm) [A-Z]?\.?\d[\d.]*"
)
_DIGITS = re.compile(r"\d[\d.,]*")


def experiment_prose(
    experiment: str, all_results: Sequence[Results], folder: Path = FOLDER
) -> Markup:
    """What is said about an experiment, its title first; empty where nothing is written.

    Args:
        experiment: its name; the file is `<name>.md`.
        all_results: its runs, one entry per scale.
        folder: with the texts.

    Raises:
        UserError: a typed number, an unknown name, or a statement that does not hold.
    """
    if "/" in experiment:
        return Markup("")
    later = Later(_MARKS)
    return render(folder / f"{experiment}.md", _functions(all_results, later), later)


def render(path: Path, values: Mapping[str, Any], later: Later) -> Markup:
    """Fill one text; empty where the file does not exist.

    Args:
        path: the Markdown template.
        values: what its placeholders may name.
        later: what the placeholders leave to be put in.

    Raises:
        UserError: as `experiment_prose`.
    """
    if not path.is_file():
        return Markup("")
    text = read_text(path)
    refuse_typed_numbers(text, path.name)
    environment = Environment(undefined=StrictUndefined, autoescape=False)
    try:
        filled = environment.from_string(text).render(values)
        return Markup(later.put_into(to_html(filled, lower=0)))
    except (TemplateError, TypeError) as error:
        raise UserError(f"prose/{path.name}: {error}") from error
    except UserError as error:
        raise UserError(f"prose/{path.name}: {error}") from error


def refuse_typed_numbers(text: str, name: str) -> None:
    """Check that every number of a text is a placeholder, a piece of code, or part of a name.

    Raises:
        UserError: one is not; the message names the line.
    """
    bare = _PLACEHOLDER.sub(lambda found: "\n" * found[0].count("\n"), text)
    for number, line in enumerate(bare.splitlines(), start=1):
        found = _DIGITS.search(_NAME.sub("", line))
        if found:
            raise UserError(
                f"prose/{name}, line {number}: the number {found[0]!r} is typed; "
                'name its source instead, such as {{ ours("sgd", "final_top1") }}'
            )


def _functions(all_results: Sequence[Results], later: Later) -> dict[str, Callable[..., Any]]:
    def at(scale: str | None) -> Results:
        known = {results.scale: results for results in all_results}
        name = next(iter(known)) if scale is None else scale
        if name not in known:
            raise UserError(f"no runs at scale {name!r}: {nearest(name, known)}")
        return known[name]

    def group_of(results: Results, contestant: str) -> Group:
        groups = results.of_contestant(contestant)
        if len(groups) != 1:
            names = [group.contestant for group in results.groups]
            raise UserError(f"{len(groups)} groups of {contestant!r}: {nearest(contestant, names)}")
        return groups[0]

    def traced(results: Results, groups: Sequence[Group], text: str) -> str:
        return later.mark(_traced(results, groups, text))

    def ours(contestant: str, measure: str, scale: str | None = None) -> str:
        results = at(scale)
        group = group_of(results, contestant)
        value = estimate_of(results, group, measure)
        told = measure_named(measure)
        text = quantities.estimate(value, told.kind, infinite=told.infinite)
        return traced(results, [group], text)

    def difference(subject: str, reference: str, measure: str, scale: str | None = None) -> str:
        results = at(scale)
        first, second = group_of(results, subject), group_of(results, reference)
        found = compare_groups(results, first, second, measure)
        kind = measure_named(measure).kind
        return traced(results, [first, second], quantities.comparison(found, kind))

    def setting(path: str, scale: str | None = None) -> str:
        runs = [run for group in at(scale).groups for run in group.runs]
        values = {str(_lookup(run.config, path)) for run in runs}
        if len(values) != 1:
            raise UserError(f"{path} differs between the runs: {', '.join(sorted(values))}")
        return later.mark(escape(values.pop()))

    def holds(
        subject: str,
        relation: str,
        reference: str,
        measure: str,
        scale: str | None = None,
        margin: float = 0.0,
    ) -> str:
        """Where the interval of the difference lies.

        "above" or "below" 0; "not apart from": it holds 0; "within": it lies within `margin` of 0,
        in the measure's unit.
        """
        results = at(scale)
        first, second = group_of(results, subject), group_of(results, reference)
        bounds = compare_groups(results, first, second, measure).interval
        sides = {
            "above": bounds is not None and bounds.low > 0,
            "below": bounds is not None and bounds.high < 0,
            "not apart from": bounds is not None and bounds.low <= 0 <= bounds.high,
            "within": bounds is not None and max(-bounds.low, bounds.high) <= margin,
        }
        if relation not in sides:
            raise UserError(f"relation {relation!r}: {nearest(relation, sides)}")
        if not sides[relation]:
            raise UserError(
                f"the text says that {measure} of {subject} is {relation} that of {reference}, "
                f"the runs say {quantities.interval(bounds, measure_named(measure).kind)}"
            )
        return ""

    def has(scale: str, *contestants: str) -> bool:
        """Whether there are several seeds of each at this scale: to ask before speaking of it."""
        found = [results for results in all_results if results.scale == scale]
        groups = [found[0].of_contestant(name) for name in contestants] if found else []
        return bool(found) and all(len(g) == 1 and len(g[0].ended) > 1 for g in groups)

    def unfinished(scale: str, contestant: str) -> bool:
        """Whether there is a run of it at this scale that has begun and is not over."""
        found = [results for results in all_results if results.scale == scale]
        return any(group.unfinished for r in found for group in r.of_contestant(contestant))

    def so_far(contestant: str, metric: str, scale: str | None = None) -> str:
        """The last value of a metric in each run that is not over, and the epoch it is of."""
        results = at(scale)
        group = group_of(results, contestant)
        if metric not in METRICS:
            raise UserError(f"metric {metric!r}: {nearest(metric, METRICS)}")
        kind, unit = ("loss", "") if metric in FALLING_METRICS else ("percent", " %")
        told = [
            f"{quantities.number(float(trace.y[-1]), kind)}{unit} at epoch {trace.x[-1]:g}"
            for trace in curve(group, metric, "epoch").unfinished
        ]
        if not told:
            raise UserError(f"no unfinished run of {contestant!r}")
        return traced(results, [group], "; ".join(told))

    functions = (ours, difference, setting, holds, has, unfinished, so_far)
    return {function.__name__: function for function in functions}


def _traced(results: Results, groups: Sequence[Group], text: str) -> Markup:
    names = [f"source-{results.scale}-{results.groups.index(group)}" for group in groups]
    link = Markup('<a class="n" href="#{0}" data-src="{1}">{2}</a>')
    return link.format(names[0], " ".join(names), text)


def _lookup(node: Any, path: str) -> Any:
    for part in path.split("."):
        if not isinstance(node, Mapping) or part not in node:
            raise UserError(f"no setting {path!r}")
        node = node[part]
    return node
