"""Seeds of one config belong together: runs of one experiment and scale, grouped by config.

Two runs are in one group if they are of the same contestant (arm, or optimizer where there is no
arm) and if everything that decides their numbers, except the seed, is equal. Where one contestant
was run under several configs, each config is a group of its own, and `Results.problems` says which
key differs from which in what.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from experiments.analysis.measuring import remarks
from experiments.analysis.measuring.measures import Target, measure_named, target_of
from experiments.analysis.measuring.runs import SCALES, STATUSES, Run, RunSet
from experiments.errors import UserError
from experiments.runs.deciding import LATER_KEYS, is_cosmetic

# Values that a seed's run takes over from another run of the same seed (`experiments.runs.replay`).
PER_SEED_KEYS = ("schedule.source_key", "schedule.multipliers")
_DEFAULT_ROLES = {"baseline": "sgd"}
DISPLAY_NAMES = {
    "sgd": "SGD",
    "adam": "Adam",
    "adamw": "AdamW",
    "slimqn": "SLIM-QN",
    "slimqn_released": "released SLIM-QN",
    "mlbfgs": "mL-BFGS",
    "mlbfgs_released": "released mL-BFGS",
    "kfac": "KFAC",
    "slbfgs": "sL-BFGS",
    "sgd_normalized": "normalised SGD",
    "adagrad": "AdaGrad",
    "adadelta": "AdaDelta",
    "muon": "Muon",
    "lbfgs": "L-BFGS",
    "shampoo": "Shampoo",
    "soap": "SOAP",
}
# Baselines first, so that a table reads like the papers' tables.
_ORDER = (
    *("sgd", "sgd_normalized", "adam", "adamw", "kfac", "slbfgs"),
    *("slimqn", "slimqn_released", "mlbfgs", "mlbfgs_released"),
)
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_ABSENT = object()


@dataclass(frozen=True)
class Group:
    """The seeds of one config.

    Attributes:
        experiment: name of the experiment.
        contestant: name of the arm, or of the optimizer where there is no arm.
        optimizer: name of the optimizer's config.
        scale: full, reduced or smoke.
        differs: the keys (with values) that tell this group from the contestant's other groups;
            empty if there is only one.
        runs: one a seed, by seed.
    """

    experiment: str
    contestant: str
    optimizer: str
    scale: str
    differs: tuple[tuple[str, Any], ...]
    runs: tuple[Run, ...] = field(repr=False)

    @property
    def label(self) -> str:
        """The contestant's name as the papers print it, with what tells its configs apart."""
        name = display_name(self.contestant)
        if not self.differs:
            return name
        settings = ", ".join(f"{key.rsplit('.', 1)[-1]}={_shown(v)}" for key, v in self.differs)
        return f"{name} [{settings}]"

    @property
    def ended(self) -> tuple[Run, ...]:
        """The runs that have trained and are over: neither running nor refused."""
        return tuple(run for run in self.runs if run.status not in ("running", "refused"))

    @property
    def unfinished(self) -> tuple[Run, ...]:
        """The runs that have a curve so far and are not over: shown as such, counted nowhere."""
        return tuple(run for run in self.runs if run.status == "running" and run.epochs)

    @property
    def status_counts(self) -> str:
        """For example "2 done, 1 diverged"."""
        ordered = sorted(self.runs, key=lambda run: STATUSES.index(run.status))
        return ", ".join(f"{n} {state}" for state, n in Counter(r.state for r in ordered).items())


@dataclass(frozen=True)
class Results:
    """All groups of one experiment at one scale.

    Attributes:
        experiment: name of the experiment.
        scale: full, reduced or smoke.
        groups: baselines first.
        target: what every run had to reach; None if there is none, or if the runs disagree.
        problems: one line for everything a reader must know about the runs.
        family: the contestants that these are compared with, their leader first; empty where all of
            the experiment are (see `families`).
    """

    experiment: str
    scale: str
    groups: tuple[Group, ...]
    target: Target | None
    problems: tuple[str, ...]
    family: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """For titles: experiment and scale, and whose family it is."""
        leader = f", beside {display_name(self.family[0])}" if self.family else ""
        return f"{self.experiment}, {self.scale} scale{leader}"

    def of_contestant(self, contestant: str) -> tuple[Group, ...]:
        """The groups of an arm or optimizer: none, one, or one per config."""
        return tuple(group for group in self.groups if group.contestant == contestant)

    def role(self, role: str) -> str | None:
        """Name of the contestant that plays a part, from `experiment.<role>` of the configs.

        In a family that does not have it, its leader plays the part.

        Args:
            role: `baseline` (what speed-ups and gains are over) or `subject` (what the experiment
                is about).

        Returns:
            Its name; where the configs name none or disagree, SGD as the baseline, else None.
        """
        runs = [run for group in self.groups for run in group.runs]
        named = {run.config.get("experiment", {}).get(role) for run in runs}
        (name,) = named if len(named) == 1 else (None,)
        name = _DEFAULT_ROLES.get(role) if name is None else str(name)
        if name is not None and self.family and name not in self.family:
            return self.family[0]
        return name

    def families(self) -> tuple[Results, ...]:
        """The results of contestants that are compared with each other, one for each family.

        Two contestants are of one family if a figure of `experiment.figures` shows both, or if
        others connect them so; the first of a family's first figure leads it. Contestants in no
        figure are with the first family. An experiment whose figures hang together, or that has
        none, is one family: itself.
        """
        families: list[tuple[str, ...]] = []
        for members in self._figure_entry().values():
            touching = [family for family in families if set(family) & set(members)]
            place = families.index(touching[0]) if touching else len(families)
            families = [family for family in families if family not in touching]
            merged = dict.fromkeys(name for names in (*touching, members) for name in names)
            families.insert(place, tuple(merged))
        if len(families) < 2:
            return (self,)
        others = {group.contestant for group in self.groups} - {n for f in families for n in f}
        families[0] += tuple(sorted(others, key=_position))
        found = (
            replace(self, family=family, groups=self._of_contestants(family)) for family in families
        )
        return tuple(results for results in found if results.groups)

    def _of_contestants(self, names: Sequence[str]) -> tuple[Group, ...]:
        return tuple(group for group in self.groups if group.contestant in names)

    def _figure_entry(self) -> dict[str, list[str]]:
        """`experiment.figures`; of configs that disagree (it was changed between runs) any."""
        runs = (run for group in self.groups for run in group.runs)
        entries = (run.config.get("experiment", {}).get("figures") for run in runs)
        return next((dict(entry) for entry in entries if entry), {})

    def figures(self) -> dict[str, list[str]]:
        """Contestants of each figure, from `experiment.figures`; empty where the configs have none.

        Contestants without runs are left out, and so is a figure that then shows nobody whom
        another one does not show.
        """
        entry = self._figure_entry()
        present = {group.contestant for group in self.groups}
        shown = {
            name: [who for who in members if who in present] for name, members in entry.items()
        }
        found: dict[str, list[str]] = {}
        # The larger first: what a smaller one could add is known then.
        for name in sorted(shown, key=lambda name: -len(shown[name])):
            if not any(set(shown[name]) <= set(others) for others in found.values()):
                found[name] = shown[name]
        return {name: found[name] for name in shown if found.get(name)}

    def baseline(self) -> Group | None:
        """The group of the baseline, SGD unless the configs name another, if it is one group."""
        groups = self.of_contestant(self.role("baseline") or "")
        return groups[0] if len(groups) == 1 else None

    def subject(self) -> Group | None:
        """The group that the experiment is about, if the configs name one and it is one group."""
        groups = self.of_contestant(self.role("subject") or "")
        return groups[0] if len(groups) == 1 else None

    def values(self, group: Group, measure: str) -> dict[int, float]:
        """A measure of every run of a group that has it, by seed; infinite for a miss."""
        function = measure_named(measure)
        if measure.endswith("_to_target") and self.target is None:
            return {}
        pairs = ((run.seed, function(run)) for run in group.runs)
        return {seed: value for seed, value in pairs if value is not None}


def display_name(contestant: str) -> str:
    """An optimizer's name as the papers print it; an arm's own name."""
    return DISPLAY_NAMES.get(contestant, contestant)


def group_runs(found: RunSet) -> tuple[Results, ...]:
    """Group the runs of one experiment: one `Results` per scale, full scale first.

    Raises:
        UserError: one config and seed has two run keys, so that neither can be preferred.
    """
    present = {run.scale for run in found.runs}
    results = []
    for scale in (scale for scale in SCALES if scale in present):
        runs = [run for run in found.runs if run.scale == scale]
        results.append(_results_at_scale(runs, found.problems))
        # Directories that could not be read have no scale: they are reported once.
        found = RunSet(found.runs, ())
    return tuple(results)


def _results_at_scale(runs: Sequence[Run], problems: Sequence[str]) -> Results:
    groups: list[Group] = []
    lines = [*problems, *(line for run in runs for line in remarks.of_run(run))]
    for contestant in sorted({run.contestant for run in runs}, key=_position):
        variants = _variants([run for run in runs if run.contestant == contestant])
        groups += variants
        if len(variants) > 1:
            lines.append(_conflict(variants))
    target, complaint = _common_target(runs)
    lines += [complaint] if complaint else []
    lines += [*remarks.of_machines(runs), *remarks.of_ranks(runs)]
    lines += remarks.of_roundings(runs)
    lines += [*remarks.of_seconds([group.runs for group in groups])]
    return Results(runs[0].experiment, runs[0].scale, tuple(groups), target, tuple(lines))


def _variants(runs: Sequence[Run]) -> list[Group]:
    """One group per config among the runs of one contestant, by run key of the first seed."""
    by_config: dict[str, list[Run]] = {}
    for run in runs:
        by_config.setdefault(repr(sorted(deciding_values(run).items())), []).append(run)
    members = list(by_config.values())
    configs = [deciding_values(group[0]) for group in members]
    keys = sorted({key for config in configs for key in config})
    differing = [k for k in keys if len({repr(c.get(k, _ABSENT)) for c in configs}) > 1]
    groups = []
    for group, config in zip(members, configs, strict=True):
        for first, second in pairwise(group):
            if first.seed == second.seed:
                raise UserError(
                    f"{first.path} and {second.path.name} have one config and one seed but two "
                    "run keys (the numerics changed between them): move one out of the results"
                )
        told = tuple((key, config.get(key, "(absent)")) for key in differing)
        run = group[0]
        identity = (run.experiment, run.contestant, run.optimizer, run.scale)
        groups.append(Group(*identity, told, tuple(group)))
    return groups


def deciding_values(run: Run) -> dict[str, Any]:
    """The leaves of a run's config that decide its numbers, by dotted path, without the seed."""
    values = {
        path: value
        for path, value in _leaves(run.config, "")
        if not is_cosmetic(path)
        # A copy of the seed further down in the config is the seed too.
        and not (path.rsplit(".", 1)[-1] == "seed" and value == run.seed)
        and path not in PER_SEED_KEYS
        and not (path in LATER_KEYS and repr(value) == repr(LATER_KEYS[path]))
    }
    values["numerics_version"] = run.numerics  # the rounding parts no runs
    return values


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from _leaves(child, f"{path}.{key}" if path else str(key))
    elif isinstance(value, float) and value.is_integer():
        yield path, int(value)  # 1.0 and 1 are one value, and one run key
    else:
        yield path, value


def _conflict(variants: Sequence[Group]) -> str:
    first = variants[0]
    told = "; ".join(
        f"{', '.join(f'{key}={_shown(value)}' for key, value in group.differs)} "
        f"(run keys {', '.join(run.key for run in group.runs)})"
        for group in variants
    )
    return (
        f"{first.contestant} at {first.scale} scale was run under {len(variants)} configs, "
        f"which are separate rows: {told}"
    )


def _shown(value: Any) -> str:
    """A config value in a message: 1e30 and not its 31 digits."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:.10g}" if is_number else str(value)


def _common_target(runs: Sequence[Run]) -> tuple[Target | None, str]:
    targets = {run: target_of(run) for run in runs}
    if len(set(targets.values())) <= 1:
        return targets[runs[0]], ""
    first = runs[0]
    other = next(run for run in runs if targets[run] != targets[first])
    return None, (
        f"targets differ, so nothing is compared by them: {targets[first] or 'none'} in "
        f"{first.name}, {targets[other] or 'none'} in {other.name}"
    )


def _position(contestant: str) -> tuple[int, list[str], list[float], str]:
    """The papers' order, then by name; numbers in a name count as numbers: 64 before 128."""
    known = contestant in _ORDER
    words, numbers = _NUMBER.split(contestant), map(float, _NUMBER.findall(contestant))
    place = _ORDER.index(contestant) if known else len(_ORDER)
    return (place, words, list(numbers), contestant)  # 0.5 and 0.50 are two names
