"""What a command asks for, how far its runs are, and which of them it makes."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from experiments.analysis.judging.claims import load_claims
from experiments.analysis.judging.costs import Predictions, Work
from experiments.campaign.campaign import Campaign, Plan
from experiments.campaign.matrix import standing, time_left_lines, totals
from experiments.campaign.running import visible_gpus
from experiments.campaign.selection import select
from experiments.campaign.states import choose, state_of
from experiments.contestants import arms, optimizers_with_recipe, options
from experiments.errors import UserError
from experiments.launching.processes import thread_environment
from experiments.runs.spec import RunSpec
from tests.experiments.run_configs import run_spec

CLAIMS = load_claims()


def named(ids: list[str]) -> dict[str, tuple[str, ...]]:
    return {
        each.experiment: (*each.optimizers, *each.arms) for each in select(ids, CLAIMS).contestants
    }


def test_claim_needs_the_contestants_that_it_names_and_shares_them() -> None:
    assert named(["M-T3-cifar10-resnet18-mlbfgs"]) == {"cifar10_resnet18": ("mlbfgs",)}
    both = named(["M-T3-cifar10-resnet18-mlbfgs", "M-F8-cifar10-resnet18-convergence"])
    assert both == {"cifar10_resnet18": ("kfac", "mlbfgs")}
    assert named(["C-gamma-helps"]) == {"controls": ("mlbfgs", "mlbfgs_gamma_gradient")}


def test_row_is_all_of_its_claims_and_an_experiment_is_whole() -> None:
    assert named(["M-T3"]) == {
        "cifar10_resnet18": ("sgd", "adam", "mlbfgs"),
        "cifar100_resnet18": ("sgd", "adam", "mlbfgs"),
        "cifar100_deit_tiny": ("sgd", "adam", "mlbfgs"),
    }
    found = named(["cifar10_resnet18", "M-T3-cifar10-resnet18-sgd"])
    assert found == {"cifar10_resnet18": optimizers_with_recipe("cifar10_resnet18")}
    assert named(["controls"])["controls"] == arms("controls")


@pytest.mark.parametrize("ids", [[], ["all"]])
def test_all_is_every_claim_of_the_registry(ids: list[str]) -> None:
    found = named(ids)
    for claim in CLAIMS:
        if claim.kind != "theory" and not claim.command:
            assert set(claim.optimizers) <= set(found[claim.experiment])
    chosen = select(ids, CLAIMS)
    assert chosen.claims == CLAIMS and "make theory" in chosen.elsewhere
    assert set(found) <= set(options("experiment"))


def test_claim_of_theory_needs_no_run() -> None:
    chosen = select(["M-L1"], CLAIMS)
    assert chosen.contestants == () and chosen.elsewhere == ("make theory",)
    with pytest.raises(UserError, match="did you mean 'M-T3'"):
        select(["M-T33"], CLAIMS)


def write_status(spec: RunSpec, status: str, epoch: int = 0, message: str = "") -> None:
    spec.directory.mkdir(parents=True, exist_ok=True)
    content = {"status": status, "epoch": epoch, "step": 0, "message": message}
    (spec.directory / "status.json").write_text(json.dumps(content))


@contextmanager
def locked(spec: RunSpec) -> Iterator[None]:
    spec.directory.mkdir(parents=True, exist_ok=True)
    with (spec.directory / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def submit(spec: RunSpec, *, ended: bool) -> None:
    folder = spec.directory / "slurm"
    folder.mkdir(parents=True)
    (folder / "17_submitted.pkl").touch()
    if ended:
        (folder / "17_0_result.pkl").touch()


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, RunSpec]:
    """One run in every state, ten epochs each; `running` is to be locked by the test."""
    names = ("done", "diverged", "crashed", "timeout", "refused", "missing", "running")
    names += ("interrupted", "queued", "came_out")
    specs = {
        name: run_spec(tmp_path, seed=seed, **{"train.epochs": 10})
        for seed, name in enumerate(names)
    }
    for name in ("done", "diverged", "crashed", "timeout", "refused"):
        write_status(specs[name], name, epoch=4, message=f"{name} it is")
    for name in ("running", "interrupted"):
        write_status(specs[name], "running", epoch=5)
    submit(specs["queued"], ended=False)
    submit(specs["came_out"], ended=True)
    return specs


def test_state_tells_a_live_run_from_a_killed_one(runs: dict[str, RunSpec]) -> None:
    with locked(runs["running"]):
        states = {name: state_of(spec.directory).name for name, spec in runs.items()}
    assert states.pop("came_out") == "missing"
    assert all(name == state for name, state in states.items())
    assert state_of(runs["running"].directory).name == "interrupted"  # its process is gone


@pytest.mark.parametrize(
    ("choice", "made"),
    [
        ("unfinished", {"crashed", "timeout", "refused", "missing", "interrupted", "came_out"}),
        ("missing", {"missing", "interrupted", "came_out"}),
        ("failed", {"crashed", "timeout", "refused", "queued"}),
    ],
)
def test_command_makes_what_it_chooses_and_nothing_twice(runs, choice, made) -> None:
    with locked(runs["running"]):
        chosen = choose(list(runs.values()), choice)
    by_seed = {spec.seed: name for name, spec in runs.items()}
    assert {by_seed[spec.seed] for spec in chosen.to_run} == made
    assert {by_seed[spec.seed] for spec in chosen.finished} == {"done", "diverged"}
    others = {"running", "queued"} - made
    assert {by_seed[spec.seed] for spec in chosen.elsewhere} == others
    failed = {"crashed", "timeout", "refused"} - made
    assert {by_seed[spec.seed] for spec in chosen.passed_over} == failed


def campaign(tmp_path: Path, runs: dict[str, RunSpec]) -> tuple[Campaign, Plan]:
    seeds = tuple(spec.seed for spec in runs.values())
    made = Campaign("test", ("sgd",), ("late",), seeds, "smoke", tmp_path)
    waiting = tuple(("late", seed, "late waits") for seed in seeds[:1])
    specs = tuple(("optimizer=sgd", spec) for spec in runs.values())
    late = [
        ("arm=late", run_spec(tmp_path, seed=seed, **{"experiment.arm": "late"}))
        for seed in seeds[1:]
    ]
    return made, Plan((*specs, *late), waiting)


def test_matrix_shows_every_run_and_why_some_failed(tmp_path, runs) -> None:
    with locked(runs["running"]):
        found = standing(*campaign(tmp_path, runs))
    lines = found.table().splitlines()
    cells = lines[1].split("  ")
    wanted = "done,diverged,crashed 4/10,timeout 4/10,refused,missing,running 5/10"
    wanted += ",interrupted 5/10,queued,missing"
    assert [cell.strip() for cell in cells if cell.strip()] == ["sgd", *wanted.split(",")]
    assert lines[2].split()[:3] == ["late", "waiting", "missing"]
    assert "  sgd seed 2 crashed: crashed it is" in lines and "  waiting: late waits" in lines
    assert "20 runs, 2 finished, 18 to run" in found.headline()
    assert totals([found]).startswith("20 runs: 11 missing, ")


def test_time_left_counts_the_epochs_that_are_left(tmp_path, runs) -> None:
    # 100 s a run of SGD; six of ten epochs of three, five of two, all of two; late: 200 s, ten.
    work = {
        ("test", "smoke", name): Work(10, 10, 1.0, seconds)
        for name, seconds in (("sgd", 100.0), ("late", 200.0))
    }
    with locked(runs["running"]):
        found = standing(*campaign(tmp_path, runs))
    left = found.time_left(Predictions("one GPU", work))
    assert left.seconds == pytest.approx(100 * (3 * 0.6 + 2 * 0.5 + 3) + 200 * 10)
    lines = time_left_lines([found], Predictions("one GPU", work), 2, {})
    assert lines[0] == "training left, 2 side by side: 21 min 30 s (predicted)"
    assert "predicted for one GPU" in lines[1]
    assert time_left_lines([found], Predictions("", {}), 1, {})[0] == "training left: unknown"
    assert time_left_lines([found], Predictions("", {}), 1, {"test": UserError("gone")}) == []


def test_gpus_are_those_that_this_process_may_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-aa")
    assert visible_gpus() == ("3", "GPU-aa")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == ()
    assert thread_environment(None) == {}
