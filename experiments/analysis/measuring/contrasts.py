"""What separates the contestants from the one an experiment is about, and who shares its gain.

With S the subject and B the baseline (`experiment.subject`, `experiment.baseline` of the configs),
C another contestant and top-1 the final one, all differences paired by seed:

    difference   C - S
    gain         S - B
    share        (C - B) / (S - B), of the means over the seeds that C, S and B have in common

A share says how much of the gain a contestant gets without what makes the subject special. It is
given only where the interval of the gain excludes 0: a part of nothing is no number.
"""

from __future__ import annotations

from collections.abc import Mapping

from experiments.analysis.measuring import quantities
from experiments.analysis.measuring.comparison import Comparison
from experiments.analysis.measuring.curvature import is_control
from experiments.analysis.measuring.groups import Group, Results
from experiments.analysis.measuring.pairing import compare_groups

TOP1, LOSS = "final_top1", "final_train_loss"


def difference(results: Results, group: Group, other: Group, measure: str) -> Comparison:
    """A measure of a group minus that of another, paired by seed."""
    return compare_groups(results, group, other, measure)


def gain_is_certain(results: Results) -> bool:
    """Whether the subject's gain over the baseline has an interval above 0."""
    subject, baseline = results.subject(), results.baseline()
    if subject is None or baseline is None or subject is baseline:
        return False
    bounds = difference(results, subject, baseline, TOP1).interval
    return bounds is not None and bounds.low > 0


def share_of_gain(results: Results, group: Group) -> float | None:
    """The part of the subject's gain that a group gets, 1 for all; None where it is no number."""
    subject, baseline = results.subject(), results.baseline()
    if subject is None or baseline is None or not gain_is_certain(results):
        return None
    values = [results.values(each, TOP1) for each in (group, subject, baseline)]
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in values)))
    if not seeds:
        return None
    ours, theirs, base = (_mean(by_seed, seeds) for by_seed in values)
    return (ours - base) / (theirs - base)


def gain_lines(results: Results) -> tuple[str, ...]:
    """The gain in words: its size, and what the controls without curvature get of it."""
    subject, baseline = results.subject(), results.baseline()
    if subject is None or baseline is None or subject is baseline:
        return ()
    gain = quantities.comparison(difference(results, subject, baseline, TOP1), "percent")
    head = f"final top-1 of {subject.label} over {baseline.label}: {gain} points"
    controls = [g for g in results.groups if g.ended and g is not baseline and is_control(g)]
    if not controls:
        return (head,)
    if not gain_is_certain(results):
        return (f"{head}; its interval does not lie above 0, so there is no gain to be shared",)
    lines = [head]
    for group in controls:
        share = share_of_gain(results, group)
        own = quantities.comparison(difference(results, group, baseline, TOP1), "percent")
        part = "no seed in common" if share is None else f"{100 * share:.0f} % of the gain"
        lines.append(f"{group.label}, without curvature direction: {own} points, {part}")
    return tuple(lines)


def _mean(by_seed: Mapping[int, float], seeds: list[int]) -> float:
    return sum(by_seed[seed] for seed in seeds) / len(seeds)
