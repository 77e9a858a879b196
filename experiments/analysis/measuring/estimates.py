"""What the seeds of a group say together: an estimate, a speed-up over the baseline."""

from __future__ import annotations

from experiments.analysis.measuring.comparison import Comparison
from experiments.analysis.measuring.groups import Group, Results
from experiments.analysis.measuring.pairing import compare_groups
from experiments.analysis.measuring.statistics import Estimate


def estimate_of(results: Results, group: Group, measure: str) -> Estimate:
    """A measure of all seeds of a group."""
    return Estimate(tuple(results.values(group, measure).values()))


def speedup_over_baseline(results: Results, group: Group, measure: str) -> Comparison | None:
    """The baseline's time over the group's, paired by seed; None without one group of it."""
    baseline = results.baseline()
    if baseline is None:
        return None
    return compare_groups(results, baseline, group, measure, logarithmic=True)
