"""Every row of the papers' claims about training has an experiment at three scales, and claims."""

from __future__ import annotations

from functools import cache

import pytest

from experiments.analysis.judging.claims import OURS, Claim, load_claims
from experiments.composition import compose_config
from experiments.contestants import arms, optimizers_with_recipe, options
from experiments.runs.spec import RunSpec

SCALES = ("full", "reduced", "smoke")
# Typed in from the list of the papers' claims that need training: its rows, and what each is about.
ROWS = {
    "M-T3": {"cifar10_resnet18", "cifar100_resnet18", "cifar100_deit_tiny"},
    "M-F3": {"cifar10_resnet18", "cifar100_resnet18", "cifar100_deit_tiny"},
    "M-T4": {"imagenet_resnet50"},
    "M-F4": {"imagenet_resnet50"},
    "S-F2": {"imagenet_resnet50_slimqn"},
    "S-F3": {"imagenet_vit"},
    "S-F4": {"ablation"},
    "M-F5": {"ablation"},
    "S-F5": {"cifar10_resnet18_slimqn"},
    "S-F6": {"cifar10_vit"},
    "S-F7": {"classical_lbfgs"},
    "S-F9": {"blocks_cifar10", "blocks_cifar100"},
    "M-F6": {"blocks_cifar10", "blocks_cifar100"},
    "M-F7": {"pl_condition"},
    "M-F8": {"cifar10_resnet18", "cifar100_resnet18"},
    "M-cost": {"imagenet_resnet50", "cifar10_resnet18", "cifar100_resnet18"},
}


@cache
def claims() -> tuple[Claim, ...]:
    return tuple(claim for claim in load_claims() if claim.kind != "theory")


@pytest.mark.parametrize("row", ROWS)
def test_row_has_claims_of_its_paper_about_its_experiments(row: str) -> None:
    paper = {"S": "SLIM-QN", "M": "mL-BFGS"}[row[0]]
    own = [claim for claim in claims() if claim.row == row and claim.paper != OURS]
    assert {claim.paper for claim in own} == {paper}
    assert {claim.experiment for claim in own} == ROWS[row]


def test_no_other_row_quotes_a_paper() -> None:
    assert {claim.row for claim in claims() if claim.paper != OURS} == set(ROWS)


def test_claims_are_about_contestants_that_have_settings() -> None:
    for claim in claims():
        assert claim.experiment in options("experiment"), claim.id
        known = {*arms(claim.experiment), *optimizers_with_recipe(claim.experiment)}
        assert set(claim.optimizers) <= known, claim.id


@pytest.mark.parametrize("experiment", sorted(set.union(*ROWS.values())))
def test_experiment_composes_at_every_scale(experiment: str) -> None:
    subject = next(claim.optimizer for claim in claims() if claim.experiment == experiment)
    choice = "arm" if subject in arms(experiment) else "optimizer"
    keys = set()
    for scale in SCALES:
        overrides = (f"experiment={experiment}", f"{choice}={subject}", f"scale={scale}")
        spec = RunSpec.from_config(compose_config(overrides))
        assert (spec.experiment, spec.contestant, spec.scale) == (experiment, subject, scale)
        keys.add(spec.key)
    assert len(keys) == len(SCALES)


def test_contradictions_are_mutual() -> None:
    by_id = {claim.id: claim for claim in claims()}
    pairs = {(claim.id, other) for claim in claims() for other in claim.contradicts}
    assert ("M-F6-cifar10-loss-1-2", "S-F9-loss") in pairs
    for claim, other in pairs:
        assert claim in by_id[other].contradicts, (claim, other)
        assert by_id[claim].experiment == by_id[other].experiment
