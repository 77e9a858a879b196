"""What a command asks for: experiments by name, claims by id, rows of claims, or all claims.

A claim needs runs of the contestants that it names; claims of one experiment share them. An
experiment that is asked for by its name is run as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.analysis.judging.claims import Claim
from experiments.contestants import arms, optimizers_with_recipe, options
from experiments.errors import UserError, nearest

ALL = "all"


@dataclass(frozen=True)
class Contestants:
    """Who is to run in one experiment.

    Attributes:
        experiment: its name.
        optimizers: options of the config group `optimizer`.
        arms: arms of the experiment.
    """

    experiment: str
    optimizers: tuple[str, ...]
    arms: tuple[str, ...]


@dataclass(frozen=True)
class Selection:
    """What is asked for.

    Attributes:
        contestants: one entry an experiment, in the order in which they were asked for.
        claims: the claims asked for, those of whole experiments too; in the registry's order.
        whole: experiments to be judged with tables and figures of their own.
        elsewhere: commands that settle what no training run settles.
    """

    contestants: tuple[Contestants, ...]
    claims: tuple[Claim, ...]
    whole: frozenset[str]
    elsewhere: tuple[str, ...]


def select(ids: Sequence[str], claims: Sequence[Claim]) -> Selection:
    """Find what ids ask for.

    Args:
        ids: names of experiments, ids of claims, rows of claims, or `all`; none is all.
        claims: the registry.

    Raises:
        UserError: an id is none of these; an experiment has nobody to run.
    """
    everything = not ids or ALL in ids
    rows = {claim.row for claim in claims}
    by_id = {claim.id: claim for claim in claims}
    whole: dict[str, None] = {}
    asked: dict[str, None] = {}  # ids of claims
    for name in ids:
        if name == ALL:
            continue
        if name in options("experiment"):
            whole[name] = None
        elif name in by_id:
            asked[name] = None
        elif name in rows:
            asked |= {claim.id: None for claim in claims if claim.row == name}
        else:
            valid = (*options("experiment"), *rows, *by_id, ALL)
            raise UserError(
                f"{name!r} is no experiment, no claim and no row of claims; {nearest(name, valid)}"
            )
    if everything:
        asked |= dict.fromkeys(by_id)
    needed: dict[str, dict[str, None]] = {name: {} for name in whole}
    for claim in (by_id[name] for name in asked):
        if claim.kind != "theory" and not claim.command:
            needed.setdefault(claim.experiment, {}).update(dict.fromkeys(claim.optimizers))
    judged = [claim for claim in claims if claim.id in asked or claim.experiment in whole]
    other = (claim for claim in judged if claim.kind == "theory" or claim.command)
    return Selection(
        tuple(
            whole_experiment(name) if name in whole else _of_claims(name, tuple(names))
            for name, names in needed.items()
        ),
        tuple(judged),
        frozenset(needed) if everything else frozenset(whole),
        tuple(dict.fromkeys(claim.settled_by() for claim in other)),
    )


def whole_experiment(experiment: str) -> Contestants:
    """Everybody who takes part in an experiment.

    Raises:
        UserError: nobody does.
    """
    found = Contestants(experiment, optimizers_with_recipe(experiment), arms(experiment))
    if not found.optimizers and not found.arms:
        raise UserError(
            f"experiment {experiment} has neither a recipe nor an arm: name --optimizers"
        )
    return found


def _of_claims(experiment: str, names: Sequence[str]) -> Contestants:
    """The contestants that claims name, in the order of the whole experiment."""
    own_arms = arms(experiment)
    recipes = optimizers_with_recipe(experiment)
    optimizers = [name for name in names if name not in own_arms]
    return Contestants(
        experiment,
        (
            *(name for name in recipes if name in optimizers),
            *(name for name in optimizers if name not in recipes),
        ),
        tuple(name for name in own_arms if name in names),
    )
