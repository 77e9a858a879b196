"""Every rule of a verdict, with runs whose answer is known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.analysis.judging.claims import Claim, Printed
from experiments.analysis.judging.verdicts import decide, judge, judge_experiment, zone_of
from experiments.analysis.measuring.groups import group_runs
from experiments.analysis.measuring.runs import load_runs
from experiments.analysis.measuring.statistics import Interval
from tests.experiments.analysis.run_factory import FakeRun, write_runs

VALUE = Claim(
    id="X",
    row="X",
    paper="mL-BFGS",
    place="Table 1",
    statement="top-1",
    experiment="toy",
    metric="final_top1",
    kind="value",
    optimizer="mlbfgs",
    reference=None,
    printed=Printed(90.0, 0.1),
    margin=0.5,
    rule="within",
    judged_at=("full", "reduced"),
    deterministic=False,
    contradicts=(),
    presupposes="",
    command="",
    note="",
)
DIFFERENCE = replace(VALUE, kind="difference", reference="sgd", printed=Printed(-0.2))
ORDERING = replace(DIFFERENCE, kind="ordering", printed=None, margin=0.0, rule="above")
SPEEDUP = replace(ORDERING, kind="speedup", metric="steps_to_target")


def runs(optimizer, finals, **fields):
    return [
        FakeRun(optimizer=optimizer, seed=seed, top1=(50.0, final), loss=(2.0, 1.0), **fields)
        for seed, final in enumerate(finals)
    ]


def judged(tmp_path, claim, *groups):
    write_runs(tmp_path, *(run for group in groups for run in group))
    (results,) = group_runs(load_runs(tmp_path, "toy"))
    return judge(claim, results)


# t at two degrees of freedom is 4.303 and s of (x-d, x, x+d) is d: half width 2.484 d.
@pytest.mark.parametrize(
    ("finals", "outcome"),
    [
        ((89.9, 90.0, 90.1), "reproduced"),  # [89.75, 90.25] inside [89.5, 90.5]
        ((90.0, 91.0, 92.0), "inconclusive"),  # [88.5, 93.5] reaches in and out
        ((91.9, 92.0, 92.1), "not reproduced"),  # [91.75, 92.25] outside
        ((85.0, 90.0, 95.0), "inconclusive"),  # right on the spot, but too wide to say so
    ],
)
def test_value_is_judged_by_its_interval(tmp_path, finals, outcome):
    verdict = judged(tmp_path, VALUE, runs("mlbfgs", finals))
    assert verdict.outcome == outcome
    assert str(verdict) == f"{outcome} at reduced scale"


@pytest.mark.parametrize(
    ("finals", "first"),
    [
        ((90.1, 90.4, 89.7, 90.0, 90.0, 90.1), "inconclusive"),  # ± 0.87 of three, ± 0.24 of six
        ((90.0, 90.1, 89.9, 90.0, 90.1, 90.0), None),  # the three say the same
    ],
)
def test_seeds_that_came_in_later_and_changed_the_verdict_are_told(tmp_path, finals, first):
    verdict = judged(tmp_path, VALUE, runs("mlbfgs", finals))
    assert verdict.outcome == "reproduced" and verdict.first_look == first
    assert verdict.after_a_look == (f"{first} with seeds 0, 1, 2 alone" if first else "")


@pytest.mark.parametrize(
    ("without", "outcome"), [("diverged", "reproduced"), ("done", "inconclusive")]
)
def test_what_is_presupposed_must_be_reproduced(tmp_path, without, outcome):
    base = replace(VALUE, metric="diverged", kind="share", printed=Printed(0.5), margin=0.0)
    diverges = replace(base, id="diverges", optimizer="sgd", rule="above")
    prevents = replace(base, id="prevents", rule="below", presupposes="diverges")
    write_runs(
        tmp_path,
        *runs("sgd", (50.0,) * 6, status=without),
        *runs("mlbfgs", (90.0,) * 6),
    )
    found = group_runs(load_runs(tmp_path, "toy"))
    first, second = judge_experiment([diverges, prevents], "toy", found)
    assert (first.outcome == "reproduced") == (outcome == "reproduced")
    assert second.outcome == outcome
    if outcome == "inconclusive":
        assert "presupposes diverges, which is not reproduced at reduced scale" in second.reason
        assert second.more.seeds is None
    still_false = replace(prevents, optimizer="sgd")
    (_, third) = judge_experiment([diverges, still_false], "toy", found)
    assert third.outcome == ("not reproduced" if without == "diverged" else "inconclusive")


def test_full_scale_speaks_for_the_paper(tmp_path):
    verdict = judged(tmp_path, VALUE, runs("mlbfgs", (89.9, 90.0, 90.1), scale="full"))
    assert str(verdict) == "reproduced" and verdict.command == ""


def test_claim_names_an_arm_where_it_may_name_an_optimizer(tmp_path):
    ours = runs("mlbfgs", (90.0, 91.0, 92.0), arm="hessian")
    theirs = runs("mlbfgs", (89.0, 89.9, 91.1), arm="gamma", settings={"lr": 0.2})
    (results,) = group_runs(load_runs(write_runs(tmp_path, *ours, *theirs), "toy"))
    claim = replace(ORDERING, optimizer="hessian", reference="gamma")
    assert judge(claim, results).outcome == "reproduced"
    assert judge(replace(claim, rule="below"), results).outcome == "not reproduced"
    assert judge(ORDERING, results).reason == "no ended run of mL-BFGS"


def test_claim_on_a_contestant_whose_seeds_have_only_begun_names_them(tmp_path):
    begun = [replace(run, status="running") for run in runs("mlbfgs", (90.0, 91.0))]
    verdict = judged(tmp_path, ORDERING, [*begun, *runs("sgd", (89.0, 89.9))])
    assert str(verdict) == "not run"
    assert verdict.reason == "no ended run of mL-BFGS; begun: seed 0, 1"


def test_reduced_scale_keeps_the_command_that_would_settle_it(tmp_path):
    verdict = judged(tmp_path, VALUE, runs("mlbfgs", (89.9, 90.0, 90.1)))
    assert verdict.command.endswith("--scale full")


@pytest.mark.parametrize(
    ("shift", "outcome"), [(-0.2, "reproduced"), (-3.0, "not reproduced"), (0.3, "reproduced")]
)
def test_difference_is_paired_by_seed(tmp_path, shift, outcome):
    reference = (80.0, 90.0, 85.0)  # seeds differ by much more than the optimizers do
    subject = tuple(value + shift for value in reference)
    verdict = judged(tmp_path, DIFFERENCE, runs("sgd", reference), runs("mlbfgs", subject))
    assert verdict.outcome == outcome
    assert verdict.effect.centre == pytest.approx(shift)


@pytest.mark.parametrize(
    ("shifts", "outcome"),
    [
        ((1.0, 1.1, 1.2), "reproduced"),
        ((-1.0, -1.1, -1.2), "not reproduced"),
        ((-1.0, 0.5, 1.0), "inconclusive"),
        ((0.0, 0.0, 0.0), "inconclusive"),  # a tie is neither above nor below
    ],
)
def test_ordering_needs_an_interval_on_its_side(tmp_path, shifts, outcome):
    subject = [80.0 + shift for shift in shifts]
    verdict = judged(tmp_path, ORDERING, runs("sgd", (80.0,) * 3), runs("mlbfgs", subject))
    assert verdict.outcome == outcome


@pytest.mark.parametrize(
    ("statuses", "outcome"),
    [
        (("diverged",) * 6, "reproduced"),  # [0.54, 1]
        (("diverged",) * 3, "inconclusive"),  # [0.29, 1]: three seeds that agree are too few
        (("diverged",) * 3 + ("done",) * 3, "inconclusive"),  # [0.12, 0.88]
        (("done",) * 6, "not reproduced"),  # [0, 0.46]
        (("diverged",) * 6 + ("crashed",), "reproduced"),  # who crashed says nothing
    ],
)
def test_what_happens_is_judged_by_its_share_of_the_seeds(tmp_path, statuses, outcome):
    share = replace(
        VALUE, kind="share", metric="diverged", printed=Printed(0.5), margin=0.0, rule="above"
    )
    group = [FakeRun(optimizer="mlbfgs", seed=s, status=e) for s, e in enumerate(statuses)]
    verdict = judged(tmp_path, share, group)
    happened = sum(status == "diverged" for status in statuses)
    counted = len(statuses) - statuses.count("crashed")
    assert verdict.outcome == outcome
    assert verdict.effect.centre == happened / counted
    assert verdict.effect.reason.startswith(f"in {happened} of {counted} seeds")
    more = None if verdict.more is None else verdict.more.seeds
    assert more == {3: 3 if counted == 3 else None}.get(happened)
    if counted == 6 and happened == 6:
        assert (verdict.effect.interval.low, verdict.effect.interval.high) == (
            pytest.approx(0.025 ** (1 / 6)),  # the share at which six of six happen in 2.5 %
            1.0,
        )


def test_speedup_is_judged_as_a_ratio(tmp_path):
    slow = [FakeRun(seed=s, top1=(1.0, 1.0, 1.0, 95.0), loss=(1.0,) * 4) for s in range(3)]
    fast = [FakeRun("mlbfgs", seed=s, top1=(1.0, 95.0), loss=(1.0,) * 2) for s in range(3)]
    verdict = judged(tmp_path, SPEEDUP, slow, fast)
    assert verdict.effect.centre == pytest.approx(2.0)
    assert verdict.outcome == "reproduced"


@pytest.mark.parametrize(("seeds", "outcome"), [(6, "not reproduced"), (5, "inconclusive")])
def test_subject_that_always_misses_is_not_faster_where_the_seeds_are_many(
    tmp_path, seeds, outcome
):
    verdict = judged(
        tmp_path, SPEEDUP, runs("sgd", (95.0,) * seeds), runs("mlbfgs", (60.0,) * seeds)
    )
    assert verdict.outcome == outcome
    assert f"{seeds} of {seeds} missed" in verdict.reason


def test_some_misses_are_inconclusive_and_counted(tmp_path):
    verdict = judged(
        tmp_path, SPEEDUP, runs("sgd", (95.0,) * 3), runs("mlbfgs", (95.0, 60.0, 95.0))
    )
    assert verdict.outcome == "inconclusive"
    assert verdict.reason == "not computable: 1 of 3 missed"


@pytest.mark.parametrize(
    ("missed", "outcome"), [(0, "reproduced"), (1, "inconclusive"), (5, "inconclusive")]
)
def test_six_seeds_judge_a_speedup_by_the_median_in_spite_of_misses(tmp_path, missed, outcome):
    # SGD needs two epochs; mL-BFGS one, but for the runs that never get there.
    slow = [FakeRun(seed=s, top1=(1.0, 95.0), loss=(1.0,) * 2) for s in range(6)]
    fast = [
        FakeRun("mlbfgs", seed=s, top1=(1.0, 1.0) if s < missed else (95.0, 95.0), loss=(1.0,) * 2)
        for s in range(6)
    ]
    assert judged(tmp_path, SPEEDUP, slow, fast).outcome == outcome


def test_reference_that_misses_makes_the_subject_faster_by_the_median(tmp_path):
    # Two of six runs of SGD never get there: infinitely faster there, twice as fast elsewhere.
    slow = [FakeRun(seed=s, top1=(1.0, 1.0 if s < 2 else 95.0), loss=(1.0,) * 2) for s in range(6)]
    fast = [FakeRun("mlbfgs", seed=s, top1=(95.0, 95.0), loss=(1.0,) * 2) for s in range(6)]
    verdict = judged(tmp_path, SPEEDUP, slow, fast)
    assert verdict.outcome == "reproduced" and verdict.effect.missed == 2
    assert verdict.effect.interval == Interval(pytest.approx(2.0), math.inf)


def test_verdict_at_another_batch_size_is_not_paired(tmp_path):
    # Seeds differ by ten points: pairs would show the half point, two samples do not.
    theirs = runs("sgd", (80.0, 90.0, 85.0))
    ours = runs("mlbfgs", (80.5, 90.5, 85.5), extra_config={"train": {"batch_size": 64}})
    verdict = judged(tmp_path, ORDERING, theirs, ours)
    assert verdict.outcome == "inconclusive" and verdict.effect.paired is False
    assert "not paired by seed: train.batch_size differs" in verdict.reason
    assert verdict.more is not None and verdict.more.seeds is None


@pytest.mark.parametrize(("other", "outcome"), [("old", "reproduced"), ("new", "inconclusive")])
def test_seconds_of_several_machines_judge_nothing(tmp_path, other, outcome):
    seconds = replace(SPEEDUP, metric="seconds_to_target")
    slow = runs("sgd", (95.0,) * 3, seconds_per_epoch=20.0, hardware={"gpu": "old"})
    fast = runs("mlbfgs", (95.0,) * 3, hardware={"gpu": other})
    verdict = judged(tmp_path, seconds, slow, fast)
    assert verdict.outcome == outcome
    assert ("several machines" in verdict.reason) == (outcome == "inconclusive")
    write_runs(tmp_path / "steps", *slow, *runs("mlbfgs", (95.0,) * 3, hardware={"gpu": other}))
    (results,) = group_runs(load_runs(tmp_path / "steps", "toy"))
    assert "machines" not in judge(SPEEDUP, results).reason


def test_subject_that_always_diverges_is_not_reproduced(tmp_path):
    lost = [FakeRun("mlbfgs", seed=s, status="diverged", top1=(), loss=()) for s in range(6)]
    assert judged(tmp_path, VALUE, lost).outcome == "not reproduced"
    pair = judged(tmp_path / "pair", DIFFERENCE, lost, runs("sgd", (90.0, 90.1, 90.2) * 2))
    assert pair.outcome == "not reproduced"


def test_one_seed_gives_no_interval_unless_the_number_is_exact(tmp_path):
    verdict = judged(tmp_path, VALUE, runs("mlbfgs", (90.0,)))
    assert (verdict.outcome, verdict.reason) == ("inconclusive", "n = 1, no interval")
    exact = replace(VALUE, deterministic=True)
    assert judged(tmp_path / "exact", exact, runs("mlbfgs", (90.0,))).outcome == "reproduced"


def test_scale_that_may_not_judge_shows_its_number_only(tmp_path):
    claim = replace(VALUE, judged_at=("full",))
    verdict = judged(tmp_path, claim, runs("mlbfgs", (89.9, 90.0, 90.1)))
    assert verdict.outcome == "not run" and "full scale only" in verdict.reason
    assert verdict.effect.centre == pytest.approx(90.0)
    assert verdict.command.endswith("--scale full")


def test_no_runs_give_the_command(tmp_path):
    (verdict,) = judge_experiment([DIFFERENCE, replace(VALUE, experiment="other")], "toy", [])
    assert str(verdict) == "not run"
    assert "--optimizers sgd,mlbfgs" in verdict.command
    one_side = judged(tmp_path, DIFFERENCE, runs("mlbfgs", (90.0, 91.0)))
    assert (one_side.outcome, one_side.reason) == ("not run", "no ended run of SGD")


def test_several_configs_of_one_optimizer_are_not_chosen_from(tmp_path):
    other = runs("mlbfgs", (90.0,), settings={"lr": 9})
    verdict = judged(tmp_path, VALUE, runs("mlbfgs", (89.9, 90.0, 90.1)), other)
    assert verdict.outcome == "inconclusive"
    assert "optimizer.lr" in verdict.reason


def test_crashed_run_is_said_to_have_no_value(tmp_path):
    crashed = FakeRun("mlbfgs", seed=9, status="crashed")
    verdict = judged(tmp_path, VALUE, [*runs("mlbfgs", (89.9, 90.0, 90.1)), crashed])
    assert verdict.outcome == "reproduced"
    assert verdict.reason == "1 of 4 ended runs have no value"


def test_zone_has_no_binary_rounding():
    claim = replace(VALUE, printed=Printed(94.1), margin=0.3)
    assert zone_of(claim) == Interval(93.8, 94.4)
    assert zone_of(SPEEDUP) == Interval(1.0, math.inf)
    assert zone_of(replace(ORDERING, rule="below")) == Interval(-math.inf, 0.0)


bounds = st.tuples(st.floats(-10, 10), st.floats(-10, 10)).map(sorted).map(lambda b: Interval(*b))


@given(bounds, bounds, st.floats(0, 5))
def test_wider_zone_never_takes_a_reproduction_back(interval, zone, extra):
    wider = Interval(zone.low - extra, zone.high + extra)
    if decide(interval, zone, "within") == "reproduced":
        assert decide(interval, wider, "within") == "reproduced"
    if decide(interval, wider, "within") == "not reproduced":
        assert decide(interval, zone, "within") == "not reproduced"
