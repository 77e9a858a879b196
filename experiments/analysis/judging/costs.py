"""What runs that do not exist would cost: from runs that do, or from a prediction.

`results/predictions.json` (`python -m experiments.predictions`) holds, for every contestant that a
claim names, at full and reduced scale, the FLOPs of a run and the seconds that they would take on a
machine whose speed is published. Where runs of the same experiment and scale have been timed, the
seconds are theirs: of the contestant itself, or of the others, scaled by FLOPs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.analysis.judging.settling import seconds_of_a_run
from experiments.analysis.measuring.groups import Results, display_name
from experiments.errors import UserError, one_line
from experiments.given import MALFORMED, read_json

PREDICTIONS = "predictions.json"


@dataclass(frozen=True)
class Work:
    """One run that was counted and not made.

    Attributes:
        epochs: of the run.
        steps: of the run.
        flops: of its forward and backward passes.
        seconds: predicted on the machine that `Predictions.machine` names.
        lower_bound: whether they leave some of the optimizer's work out.
    """

    epochs: int
    steps: int
    flops: float
    seconds: float
    lower_bound: bool = False


@dataclass(frozen=True)
class Predictions:
    """The counted runs.

    Attributes:
        machine: what their seconds are of.
        runs: by experiment, scale and contestant.
    """

    machine: str
    runs: Mapping[tuple[str, str, str], Work]

    def of(self, experiment: str, scale: str, contestant: str) -> Work | None:
        """One run; None where it was not counted."""
        return self.runs.get((experiment, scale, contestant))


@dataclass(frozen=True)
class Cost:
    """Seconds of training.

    Attributes:
        seconds: of all runs together, one after the other.
        source: where they come from, in words.
    """

    seconds: float
    source: str


NO_PREDICTIONS = Predictions("", {})


def load_predictions(path: Path) -> Predictions:
    """Read the counted runs; none where there is no file.

    Raises:
        UserError: the file is not what `python -m experiments.predictions` writes.
    """
    if not path.exists():
        return NO_PREDICTIONS
    try:
        content = read_json(path)
        runs = {
            (experiment, scale, contestant): Work(**work)
            for experiment, scales in content["runs"].items()
            for scale, contestants in scales.items()
            for contestant, work in contestants.items()
        }
        return Predictions(str(content["machine"]), runs)
    except MALFORMED as error:
        reason = one_line(error)
        raise UserError(
            f"{path} is no file of predictions ({reason}): run python -m experiments.predictions"
        ) from error


def cost_of_runs(
    experiment: str,
    scale: str,
    wanted: Mapping[str, int],
    results: Results | None,
    predictions: Predictions,
) -> Cost | None:
    """What runs of one experiment at one scale would cost.

    Args:
        experiment: name of the experiment.
        scale: of the runs.
        wanted: number of runs by contestant.
        results: the runs that there are at this scale; None if there are none.
        predictions: the counted runs.

    Returns:
        The cost; None where nothing tells it.
    """
    if results is not None:
        measured = _measured(experiment, scale, wanted, results, predictions)
        if measured is not None:
            return measured
    works = {name: predictions.of(experiment, scale, name) for name in wanted}
    seconds = [count * work.seconds for work, count in _both(works, wanted) if work is not None]
    if len(seconds) < len(wanted):
        return None
    source = f"predicted for {predictions.machine}"
    short = [display_name(name) for name, work in works.items() if work and work.lower_bound]
    if short:
        source += f", at least: without all that {' and '.join(short)} computes"
    return Cost(math.fsum(seconds), source)


def _measured(
    experiment: str,
    scale: str,
    wanted: Mapping[str, int],
    results: Results,
    predictions: Predictions,
) -> Cost | None:
    """From the runs of the same experiment; contestants without any are scaled by FLOPs."""
    timed = {
        group.contestant: seconds
        for group in results.groups
        if (seconds := seconds_of_a_run(group)) is not None
    }
    rates = [
        seconds / work.flops
        for name, seconds in timed.items()
        if (work := predictions.of(experiment, scale, name)) is not None
    ]
    total, scaled = 0.0, False
    for name, count in wanted.items():
        seconds = timed.get(name)
        if seconds is None:
            work = predictions.of(experiment, scale, name)
            if work is None or not rates:
                return None
            seconds, scaled = work.flops * math.fsum(rates) / len(rates), True
        total += count * seconds
    note = "; contestants not run yet scaled by FLOPs" if scaled else ""
    return Cost(total, f"measured on {hardware(results, tuple(timed))}{note}")


def hardware(results: Results, contestants: Sequence[str]) -> str:
    """The machines that runs were made on, as `meta.json` names them."""
    names = {
        run.machine
        for group in results.groups
        for run in group.runs
        if group.contestant in contestants
    }
    return " and ".join(sorted(names))


def _both(
    works: Mapping[str, Work | None], wanted: Mapping[str, int]
) -> list[tuple[Work | None, int]]:
    return [(works[name], wanted[name]) for name in wanted]
