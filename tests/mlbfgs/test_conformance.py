"""What MLBFGS, SLIMQN and torch's SGD and AdamW survive, and what they are known not to.

`results/conformance.md` is the plugin's own report on the same four optimizers, written by

    pytest --pyargs mlbfgs.testing -p mlbfgs.testing.plugin --optimizer mlbfgs.MLBFGS \
        --optimizer mlbfgs.SLIMQN --optimizer torch.optim.SGD --optimizer torch.optim.AdamW \
        --optimizer-kwargs '{}' --optimizer-kwargs '{}' \
        --optimizer-kwargs '{"momentum": 0.9}' --optimizer-kwargs '{}' \
        --conformance-report results/conformance.md

(which ends with a failure, since torch's optimizers fail some checks). Every expectation below is
exact: an optimizer that fails another check, or one check less, turns its test red.
"""

import logging
from pathlib import Path

import pytest

from mlbfgs import MLBFGS, SLIMQN
from mlbfgs.testing import BoundCheck, Outcome, Subject, conformance_checks, subject_of
from mlbfgs.testing.problems import start
from mlbfgs.testing.report import statuses_in
from mlbfgs.testing.subject import PHASES

REPORT = Path(__file__).parents[2] / "results" / "conformance.md"

SUBJECTS = [
    subject_of(MLBFGS),
    subject_of(SLIMQN),
    subject_of("torch.optim.SGD", {"momentum": 0.9}),
    subject_of("torch.optim.AdamW"),
]

# Outcomes other than a pass, with what the reason must contain.
REFUSED_BY_US = {
    "switch[foreach]": ("unsupported", "foreach"),
    "switch[fused]": ("unsupported", "fused"),
    "switch[capturable]": ("unsupported", "capturable"),
    "differentiable_step": ("unsupported", "differentiable"),
    "sparse_gradients": ("unsupported", "does not support sparse gradients"),
    "complex_parameters": ("unsupported", "must be real"),
}

#: torch creates state in the first step, in the dtype of the parameters; `load_state_dict` keeps
#: the caller's tensors where no cast is needed; a tensor lr is read by the host in every step.
TORCHS_TRAPS = {
    "state_exists_after_construction": ("fail", "exists only after a step"),
    "state_exists_after_add_param_group": ("fail", "exists only after a step"),
    "checkpoint_before_the_first_step_leaves_no_trace": ("fail", "training goes another way"),
    "load_copies": ("fail", "steps after loading change state_dict"),
    "no_host_reads_with_lr_on_device": ("fail", "waits 3 times: item, item, item"),
    **{
        f"{check}[{kind}]": (status, kind)
        for kind in ("bfloat16", "float16")
        for check, status in (
            ("low_precision_load", "unsupported"),
            ("precision_of_state", "fail"),
        )
    },
    "names_of_a_wrapper[module.]": ("fail", "training goes another way"),
    "names_of_a_wrapper[_orig_mod.]": ("fail", "training goes another way"),
    "state_of_another_optimizer": ("fail", "loaded, and then a step fails: KeyError"),
    "load_into_another_block_plan": ("unsupported", "blocks"),
    "memory_is_as_documented": ("unsupported", "history_size"),
}

EXPECTED = {
    "MLBFGS": REFUSED_BY_US,
    "SLIMQN": REFUSED_BY_US,
    "SGD": {
        **TORCHS_TRAPS,
        "switch[capturable]": ("unsupported", "capturable"),
        # the first momentum buffer is a detached copy of the gradient
        "differentiable_step": ("fail", "by differences"),
    },
    "AdamW": {
        **TORCHS_TRAPS,
        "switch[capturable]": ("unsupported", "capturable"),
        "sparse_gradients": ("unsupported", "consider SparseAdam"),
        "refuses_negative[momentum]": ("unsupported", "momentum"),
        "momentum_of_each_group": ("unsupported", "momentum"),
        "load_from_older_state": ("fail", "KeyError: 'exp_avg'"),
    },
}


def every(subjects: list[Subject]) -> list:
    return [
        pytest.param(bound, id=str(bound), marks=[pytest.mark.slow] if bound.check.slow else [])
        for subject in subjects
        for bound in conformance_checks(subject)
    ]


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, str], Outcome]:
    return {}


@pytest.mark.parametrize("bound", every(SUBJECTS))
def test_outcome_is_the_expected_one(bound: BoundCheck, outcomes):
    outcome = bound.run()
    outcomes[bound.check.name, bound.subject.name] = outcome
    if outcome.status == "not run":
        pytest.skip(outcome.reason)
    status, reason = EXPECTED[bound.subject.name].get(bound.check.name, ("pass", ""))
    assert (outcome.status, reason in outcome.reason) == (status, True), (
        f"{outcome.status}: {outcome.reason}\n{outcome.details}"
    )


def test_expectations_name_checks_that_exist():
    names = {bound.check.name for bound in conformance_checks(SUBJECTS[0])}
    for expected in EXPECTED.values():
        assert expected.keys() <= names, expected.keys() - names


def test_every_scheduler_of_torch_is_known(outcomes):
    unknown = [key for key, o in outcomes.items() if "does not know how to make" in o.reason]
    assert unknown == []


def test_committed_report_is_current(outcomes):
    """Statuses only: what is installed decides about `not run`."""
    committed = statuses_in(REPORT.read_text(encoding="utf-8"))
    assert set(committed) == {
        (bound.check.name, subject.name)
        for subject in SUBJECTS
        for bound in conformance_checks(subject)
    }
    drifted = {
        key: (committed[key], outcome.status)
        for key, outcome in outcomes.items()
        if "not run" not in (committed[key], outcome.status) and committed[key] != outcome.status
    }
    assert drifted == {}, "write the report anew, see the top of this file"


def alternating(names: list[str], sizes: list[int]) -> list[int]:
    """Blocks that are no neighbours: the flat vector has another order than the parameters."""
    return [i % 2 for i in range(len(sizes))]


#: Two blocks without momentum; the shortest interval and history that there are; what the released
#: code does; the controls.
VARIANTS = [
    subject_of(
        MLBFGS, {"blocks": alternating, "momentum": 0.0, "betas": (0.9, 0.8)}, name="two blocks"
    ),
    subject_of(MLBFGS, {"history_size": 1, "update_interval": 1, "lr": 0.01}, name="shortest"),
    subject_of(MLBFGS, {"variant": "released"}, name="released"),
    subject_of(SLIMQN, {"variant": "released"}, name="released SLIMQN"),
    subject_of(MLBFGS, {"direction": "gamma_gradient"}, name="gamma_gradient"),
    subject_of(
        MLBFGS,
        {"direction": "norm_matched_gradient", "variant": "paper"},
        name="norm_matched_gradient",
    ),
    subject_of(MLBFGS, {"direction": "norm_matched_gradient"}, name="guarded norm_matched"),
    subject_of(MLBFGS, {"variant": "paper"}, name="as printed"),
]
#: As long as H g, but along g: too long where the loss is steep, and H g would have turned away.
#: (The guarded step does not let it.)
DIVERGES = {"norm_matched_gradient": {"plain_loop": ("fail", "the loss goes from")}}
#: The switches have their own code in the passes of a step, so that these meet every check.
EVERYWHERE = (
    *("released", "released SLIMQN", "as printed"),
    *("gamma_gradient", "norm_matched_gradient", "guarded norm_matched"),
)


@pytest.mark.parametrize(
    "bound",
    [
        pytest.param(bound, id=str(bound), marks=[pytest.mark.slow] if slow else [])
        for subject in VARIANTS
        for bound in conformance_checks(subject)
        if not bound.check.slow
        if (common := bound.check.section in ("Traps", "State")) or subject.name in EVERYWHERE
        for slow in [not common]
    ],
)
def test_other_settings_pass_traps_and_state_and_switches_all(bound: BoundCheck):
    outcome = bound.run()
    if outcome.status == "not run":
        pytest.skip(outcome.reason)
    expected = {**REFUSED_BY_US, **DIVERGES.get(bound.subject.name, {})}
    status, reason = expected.get(bound.check.name, ("pass", ""))
    assert (outcome.status, reason in outcome.reason) == (status, True), (
        f"{outcome.status}: {outcome.reason}\n{outcome.details}"
    )


@pytest.mark.parametrize("name", ["MLBFGS", "SLIMQN"])
def test_phases_are_what_they_are_called(name, caplog):
    """The schedule of the checks passes a part-filled and an overflowed history."""
    caplog.set_level(logging.WARNING)
    (subject,) = [s for s in SUBJECTS if s.name == name]
    t, m = subject.update_interval, subject.history_size
    run = start(subject)
    pairs = {}
    for phase in PHASES:
        run.advance(subject.steps(phase) - run.step)
        pairs[phase] = max(values["pairs"] for values in run.optimizer.state.values())
    assert 2 * t > subject.steps("in warm-up") > t
    assert pairs["on the step before a pair"] == 0
    assert pairs["on the step of a pair"] == pairs["on the step after a pair"] == 1
    assert subject.steps("in mid-interval") % t not in (0, 1, t - 1)
    assert 0 < pairs["with a part-filled history"] < m
    assert pairs["with a full history"] > m
    assert not caplog.records, "no pair may be skipped on the checks' own problem"


@pytest.mark.slow
@pytest.mark.parametrize(
    "bound",
    [
        pytest.param(bound, id=bound.check.name)
        for bound in conformance_checks(SUBJECTS[0])
        if bound.check.section in ("Traps", "Interface", "State") and not bound.check.slow
    ],
)
def test_pieces_and_tiles_of_five_numbers_change_nothing(bound: BoundCheck, monkeypatch):
    """The problems are tiny; with storage cut this small they cross every border there is."""
    monkeypatch.setattr("mlbfgs.layout.SEGMENT_NUMEL", 5)
    monkeypatch.setattr("mlbfgs.curvature.TILE_NUMEL", 3)
    monkeypatch.setattr("mlbfgs.curvature.SUM_TILE_NUMEL", 2)
    outcome = bound.run()
    assert outcome.status == EXPECTED["MLBFGS"].get(bound.check.name, ("pass",))[0], (
        f"{outcome.status}: {outcome.reason}\n{outcome.details}"
    )
