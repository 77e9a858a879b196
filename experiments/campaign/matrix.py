"""How far campaigns are: a matrix of contestants and seeds, and the time that is left.

The time comes from runs of the same experiment and scale that have been timed, finished or not, and
is scaled by FLOPs for contestants without any; where there are none it is the prediction of
`results/predictions.json`, for a machine whose speed is published.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tabulate import tabulate

from experiments.analysis.judging.costs import Cost, Predictions, cost_of_runs
from experiments.analysis.judging.registry import results_of
from experiments.analysis.measuring.quantities import duration
from experiments.campaign.campaign import Campaign, Plan
from experiments.campaign.states import State, state_of
from experiments.errors import UserError
from experiments.runs.spec import RunSpec

WAITING = "waiting"
# States beside which the epochs trained so far are worth a place.
_WITH_EPOCH = ("running", "interrupted", "crashed", "timeout")


@dataclass(frozen=True)
class Standing:
    """How far one campaign is.

    Attributes:
        campaign: the campaign.
        plan: its runs.
        states: of the runs, by contestant and seed; without those that wait for another.
    """

    campaign: Campaign
    plan: Plan
    states: Mapping[tuple[str, int], State]

    @property
    def total(self) -> int:
        """All runs, those that wait for others too."""
        return len(self.plan.runs) + len(self.plan.waiting)

    @property
    def finished(self) -> int:
        """Runs that are done or diverged."""
        return sum(state.finished for state in self.states.values())

    def headline(self) -> str:
        """The campaign in one line."""
        campaign = self.campaign
        return (
            f"{campaign.experiment}, scale {campaign.scale}, in {campaign.results_dir}: "
            f"{self.total} runs, {self.finished} finished, {self.total - self.finished} to run"
        )

    def table(self) -> str:
        """A line for each contestant, a column for each seed; then what failed, and why."""
        epochs = {(spec.contestant, spec.seed): _epochs(spec) for spec in self.plan.specs}
        waiting = {(name, seed) for name, seed, _ in self.plan.waiting}
        rows = []
        for name in self.campaign.contestants:
            cells = []
            for seed in self.campaign.seeds:
                key = (name, seed)
                shown = WAITING if key in waiting else _cell(self.states[key], epochs[key])
                cells.append(shown)
            rows.append([name, *cells])
        headers = ["", *(f"seed {seed}" for seed in self.campaign.seeds)]
        body = tabulate(rows, headers, tablefmt="plain", disable_numparse=True)
        lines = [f"  {line}".rstrip() for line in body.splitlines()]
        lines += [
            f"  {name} seed {seed} {state.name}: {state.message}"
            for (name, seed), state in self.states.items()
            if state.message and state.name != "done"
        ]
        return "\n".join([*lines, *(f"  {WAITING}: {line}" for _, _, line in self.plan.waiting)])

    def time_left(self, predictions: Predictions) -> Cost | None:
        """Seconds of training that are left; None where nothing tells them."""
        campaign = self.campaign
        epochs = {(spec.contestant, spec.seed): _epochs(spec) for spec in self.plan.specs}
        wanted: Counter[str] = Counter()
        for key, state in self.states.items():
            if not state.finished:
                wanted[key[0]] += 1 - state.epoch / epochs[key]  # type: ignore[assignment]
        wanted.update(name for name, _, _ in self.plan.waiting)
        if not wanted:
            return Cost(0.0, "")
        found = results_of(campaign.results_dir, campaign.experiment)
        results = next((entry for entry in found if entry.scale == campaign.scale), None)
        return cost_of_runs(campaign.experiment, campaign.scale, wanted, results, predictions)


def standing(campaign: Campaign, plan: Plan) -> Standing:
    """Look how far a campaign is.

    Raises:
        UserError: a `status.json` is corrupt.
    """
    states = {(spec.contestant, spec.seed): state_of(spec.directory) for spec in plan.specs}
    return Standing(campaign, plan, states)


def totals(standings: Sequence[Standing]) -> str:
    """All campaigns in one line: how many runs are in which state."""
    counts = Counter(state.name for each in standings for state in each.states.values())
    waiting = sum(len(each.plan.waiting) for each in standings)
    named = [f"{count} {name}" for name, count in counts.most_common()]
    named += [f"{waiting} {WAITING}"] * bool(waiting)
    total = sum(each.total for each in standings)
    return f"{total} runs: {', '.join(named)}"


def time_left_lines(
    standings: Sequence[Standing],
    predictions: Predictions,
    jobs: int,
    missing: Mapping[str, UserError],
) -> list[str]:
    """The time left of every campaign, and together, for people.

    Args:
        standings: of the campaigns.
        predictions: of runs that nobody has timed.
        jobs: processes side by side.
        missing: why the data of an experiment are not there; such a campaign has no time left.
    """
    lines, sums = [], Counter[str]()
    unknown = []
    for each in standings:
        name = each.campaign.experiment
        if each.finished == each.total or name in missing:
            continue
        cost = each.time_left(predictions)
        if cost is None:
            unknown.append(name)
            continue
        lines.append(f"  {name}: {duration(cost.seconds)}, {cost.source}")
        kind = "predicted" if cost.source.startswith("predicted") else "measured"
        sums[kind] += cost.seconds  # type: ignore[assignment]
    if not lines and not unknown:
        return []
    side = f", {jobs} side by side" if jobs > 1 else ""
    known = " and ".join(f"{duration(seconds / jobs)} ({kind})" for kind, seconds in sums.items())
    lines += [f"  {name}: no run to tell it by, and no prediction" for name in unknown]
    return [f"training left{side}: {known or 'unknown'}", *lines]


def _cell(state: State, epochs: int) -> str:
    return f"{state.name} {state.epoch}/{epochs}" if state.name in _WITH_EPOCH else state.name


def _epochs(spec: RunSpec) -> int:
    return int(spec.config.train.epochs)
