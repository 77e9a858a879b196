"""What a reader must know about runs besides their numbers, a line each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from experiments.analysis.measuring.measures import measure_named
from experiments.analysis.measuring.runs import Run

# Seeds of one config on one machine do the same work. Of the committed runs those of an idle
# machine differ by up to 1.1 times, the demonstration's, of a second each, by up to 1.22.
_STEADY = 1.25


def of_run(run: Run) -> Iterator[str]:
    """What is to be known about a run that is not simply done."""
    if run.status == "running":
        state = run.message or "running, or killed without a trace"
        drawn = "; its curve so far is drawn" if run.epochs else ""
        yield f"{run.name}: unfinished at {run.progress} ({state}); not counted{drawn}"
    elif run.status == "refused":
        yield f"{run.name}: refused ({run.message}); not counted"
    elif run.status in ("timeout", "crashed"):
        reason = f" ({run.message})" if run.message else ""
        yield f"{run.name}: {run.status}{reason}; a miss of its target, no final values"
    elif run.status == "diverged":
        reason = f" ({run.message})" if run.message else ""
        evaluated = measure_named("final_top1")(run) != -math.inf
        counted = "its last evaluated accuracy" if evaluated else "none: below every other"
        yield f"{run.name}: diverged{reason}; counts with {counted}"
    elif not run.epochs:
        yield f"{run.name}: done, but without an epoch record; has no values"
    if run.torn:
        yield f"{run.name}: the last line of metrics.jsonl is torn and left out"


def of_machines(runs: Sequence[Run]) -> Iterator[str]:
    """That runs come from several machines, if they do.

    Args:
        runs: of one experiment and scale.
    """
    counts = Counter(run.machine for run in runs)
    if len(counts) < 2:
        return
    told = "; ".join(
        f"{machine}: {count} of {len(runs)} runs" for machine, count in sorted(counts.items())
    )
    yield f"several machines ({told}): seconds of one are not to be compared with those of another"


def of_ranks(runs: Sequence[Run]) -> Iterator[str]:
    """That runs were trained by several numbers of ranks, if BatchNorm may tell.

    Args:
        runs: of one experiment and scale.
    """
    split = [run for run in runs if not run.config.get("train", {}).get("sync_batchnorm")]
    counts = Counter(ranks for run in split for ranks in run.ranks)
    if len(counts) > 1:
        told = ", ".join(f"{ranks}: {count}" for ranks, count in sorted(counts.items()))
        yield (
            f"several numbers of ranks ({told} runs): BatchNorm, where a network has it, takes the "
            "statistics of one rank's images, so that their numbers differ by more than rounding "
            "(train.sync_batchnorm=true makes them alike)"
        )


def of_roundings(runs: Sequence[Run]) -> Iterator[str]:
    """That runs were made by code that rounds differently, if they were.

    Args:
        runs: of one experiment and scale.
    """
    counts = Counter(rounding for run in runs for rounding in run.roundings)
    if len(counts) > 1:
        told = ", ".join(f"{rounding}: {count}" for rounding, count in sorted(counts.items()))
        yield (
            f"several roundings of the numerics ({told} runs): the same algorithms, whose last "
            "bits differ, as between processors; equal seeds are no equal numbers across them"
        )


def of_seconds(configs: Sequence[Sequence[Run]]) -> Iterator[str]:
    """That the machine was not steady, if the seconds of an epoch show it.

    Runs that diverged are left out: after a number that is not finite the work is another.

    Args:
        configs: for each config the runs of its seeds.
    """
    measure = measure_named("seconds_per_epoch")
    ratios: dict[str, float] = {}
    for runs in configs:
        by_machine: dict[str, list[float]] = {}
        for run in runs:
            seconds = measure(run) if run.status == "done" else None
            if seconds:
                by_machine.setdefault(run.machine, []).append(seconds)
        for found in (found for found in by_machine.values() if len(found) > 1):
            name = runs[0].contestant
            ratios[name] = max(ratios.get(name, 1.0), max(found) / min(found))
    unsteady = {name: ratio for name, ratio in ratios.items() if ratio > _STEADY}
    if unsteady:
        worst = max(unsteady, key=unsteady.__getitem__)
        yield (
            "seconds are rough: on one machine, which was busy or changed its speed, an epoch took "
            f"some seeds up to {unsteady[worst]:.1f} times as long as others ({worst}; more than "
            f"{_STEADY:g} times in {len(unsteady)} of {len(ratios)} contestants with several)"
        )
