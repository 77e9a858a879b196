"""Two contestants compared, seed by seed where equal seeds began alike.

A run's initial weights follow from its seed and the config of the network; the order of its images
and their augmentation from the seed, the data set and the batch size (`experiments.training.task`,
`experiments.data`: batches are a pure function of seed, epoch and index). So two runs of one seed
share both if their configs agree in `KEYS` without `FREE`, whatever their optimizers and epochs;
otherwise their seeds have nothing in common, and they are compared as independent samples.
"""

from __future__ import annotations

from experiments.analysis.measuring.comparison import Comparison, compare
from experiments.analysis.measuring.groups import Group, Results, deciding_values

# Config keys, with all below them, that decide initial weights and the order of images.
KEYS = ("model", "dataset", "train.batch_size", "numerics_version")
# Of these, what changes neither: how pixels are scaled, and what is tested on.
FREE = ("dataset.mean", "dataset.std", "dataset.test_limit", "dataset.test_batch_size")


def start_differs(first: Group, second: Group) -> str:
    """The first key in which two contestants begin differently; "" where equal seeds are a pair."""
    left, right = (_start(group) for group in (first, second))
    differing = (key for key in sorted(left | right) if left.get(key) != right.get(key))
    return next(differing, "")


def compare_groups(
    results: Results, subject: Group, reference: Group, measure: str, *, logarithmic: bool = False
) -> Comparison:
    """A measure of the subject minus (or over) that of the reference.

    Args:
        results: what both belong to.
        subject: one contestant.
        reference: the other.
        measure: its name.
        logarithmic: ratio instead of difference.
    """
    return compare(
        results.values(subject, measure),
        results.values(reference, measure),
        logarithmic=logarithmic,
        paired=not start_differs(subject, reference),
    )


def _start(group: Group) -> dict[str, str]:
    return {
        key: repr(value)
        for key, value in deciding_values(group.runs[0]).items()
        if _below(key, KEYS) and not _below(key, FREE)
    }


def _below(key: str, roots: tuple[str, ...]) -> bool:
    return any(key == root or key.startswith(f"{root}.") for root in roots)
