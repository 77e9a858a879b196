"""What a comparison shows, in sentences made from its numbers by fixed rules.

A contestant is *above* or *below* another where the interval of the difference, paired by seed,
excludes 0; otherwise the two are not told apart. One seed has no interval and tells nothing apart.
"""

from __future__ import annotations

from experiments.analysis.measuring import quantities
from experiments.analysis.measuring.comparison import Comparison
from experiments.analysis.measuring.contrasts import TOP1, difference, gain_lines
from experiments.analysis.measuring.estimates import estimate_of, speedup_over_baseline
from experiments.analysis.measuring.groups import Group, Results, display_name
from experiments.analysis.measuring.statistics import Estimate


def findings(results: Results) -> list[str]:
    """What the runs of one scale show, a sentence each."""
    told = [_effort(results)]
    for family in results.families():
        told += [*_best(family), *_told_apart(family), *_speed(family), *gain_lines(family)]
    return told


def _effort(results: Results) -> str:
    runs = [run for group in results.groups for run in group.runs]
    begun = sum(len(group.unfinished) for group in results.groups)
    seconds = sum(run.train_time_s for run in runs)
    seeds = sorted({run.seed for run in runs})
    counts = {len(group.ended) for group in results.groups}
    each = "" if len(counts) > 1 else f", {min(counts)} each" if counts else ""
    named = ", ".join(map(str, seeds))
    return (
        f"{len(runs)} runs{f' ({begun} unfinished)' if begun else ''} of "
        f"{len(results.groups)} contestants{each}, "
        f"seed{'s' if len(seeds) > 1 else ''} {named}, {quantities.duration(seconds)} of training"
    )


def _best(results: Results) -> list[str]:
    """Whose mean is the highest; whose median, where a seed without accuracy leaves no mean."""
    found = {group: estimate_of(results, group, TOP1) for group in results.groups}
    known = {group: value for group, value in found.items() if value.median is not None}
    if not known:
        return []
    every = all(value.mean is not None for value in known.values())
    ranks = {group: (v.mean if every else v.median) or 0.0 for group, v in known.items()}
    baseline = results.baseline()
    # of equals the baseline: the others did not get above it
    best = max(known, key=lambda group: (ranks[group], group is baseline))

    def told(group: Group) -> str:
        return (
            _percent(known[group]) if every else f"{quantities.number(ranks[group], 'percent')} %"
        )

    what = f"{'highest ' if len(known) > 1 else ''}{'mean' if every else 'median'}"
    scope = f" of {display_name(results.family[0])} and those beside it" if results.family else ""
    text = f"{what} final top-1{scope}: {best.label}, {told(best)}"
    if baseline in known and baseline is not best:
        text += f"; the baseline {baseline.label} has {told(baseline)}"
    return [text]


def _told_apart(results: Results) -> list[str]:
    over = results.baseline()
    if over is None or not over.ended:
        return []
    sorted_out: dict[str, list[str]] = {"above": [], "below": [], "not told apart from": []}
    single = []
    for group in results.groups:
        if group is over:
            continue
        found = difference(results, group, over, TOP1)
        if found.interval is None:
            single.append(group.label)
            continue
        side = _side(found, 0.0)
        told = quantities.comparison(found, "percent")
        sorted_out[side].append(f"{group.label} ({told} points)")
    lines = [
        f"{side} {over.label} in final top-1: {', '.join(names)}"
        for side, names in sorted_out.items()
        if names
    ]
    if single:
        lines.append(
            f"without an interval, so not told apart from {over.label} in final top-1: "
            f"{', '.join(single)}"
        )
    return lines


def _speed(results: Results) -> list[str]:
    over = results.baseline()
    if over is None or results.target is None:
        return []
    if not _reached(results, over):
        names = [group.label for group in results.groups if _reached(results, group)]
        others = f", which no run of {over.label} did" if over.ended else ""
        alone = f"reached {results.target}{others}: {', '.join(names)}"
        return [*([alone] if names else []), *_misses(results)]
    lines = []
    for measure, unit in (("steps_to_target", "steps"), ("seconds_to_target", "seconds")):
        sides: dict[str, list[str]] = {"faster than": [], "slower than": []}
        for group in results.groups:
            ratio = speedup_over_baseline(results, group, measure)
            if group is over or ratio is None or ratio.interval is None:
                continue
            told = quantities.comparison(ratio, "ratio")
            if ratio.centre is not None:
                told += " times"
            if not _reached(results, group):
                told = "in no run"
            side = _side(ratio, 1.0)
            if side != "not told apart from":
                named = f"{group.label} ({told})"
                sides["faster than" if side == "above" else "slower than"].append(named)
        for side, names in sides.items():
            if names:
                lines.append(f"{side} {over.label} to {results.target}, {unit}: {', '.join(names)}")
    return [*lines, *_misses(results)]


def _reached(results: Results, group: Group) -> bool:
    """Whether a run of the group reached the target."""
    value = estimate_of(results, group, "steps_to_target")
    return value.misses < value.n


def _misses(results: Results) -> list[str]:
    values = {group: estimate_of(results, group, "steps_to_target") for group in results.groups}
    names = [f"{group.label} ({v.misses} of {v.n})" for group, v in values.items() if v.misses]
    return [f"missed {results.target}: {', '.join(names)}"] if names else []


def _side(found: Comparison, neutral: float) -> str:
    assert found.interval is not None
    if found.interval.low > neutral:
        return "above"
    return "below" if found.interval.high < neutral else "not told apart from"


def _percent(value: Estimate) -> str:
    text = quantities.estimate(value, "percent")
    number, bracket, rest = text.partition(" (")
    return f"{number} %{bracket}{rest}"
