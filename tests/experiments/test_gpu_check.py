"""The GPU check on a CPU: the same code, and every way in which a check can end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from experiments.composition import compose_config
from experiments.gpu_check import __main__ as command
from experiments.gpu_check import trainings
from experiments.gpu_check.outcome import Check, NotOnThisDeviceError, RefusedError, run_checks
from experiments.gpu_check.trainings import Scope, all_experiments
from experiments.runs.spec import RunSpec
from experiments.training.schedules import check_schedule
from mlbfgs.testing.problems import NoisyQuadratic, make_params

CPU = torch.device("cpu")


def scope(folder: Path, scale: str = "smoke") -> Scope:
    return Scope(CPU, scale, ["digits_mlp"], ["float32", "bfloat16"], folder)


def test_the_twin_trains_and_says_what_only_a_gpu_can_show(tmp_path, capsys):
    out = tmp_path / "check.json"
    arguments = ["--device", "cpu", "--experiments", "digits_mlp", "--parts", "train,wait"]
    assert command.main([*arguments, "--precisions", "float32,float16", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert (report["device"], report["scale"], report["failed"]) == ("cpu", "smoke", [])
    assert report["counts"] == {"not on this device": 5, "pass": 2}
    trained = [check for check in report["checks"] if check["status"] == "pass"]
    names = [check["name"] for check in trained]
    assert names == [f"train/digits_mlp/mlbfgs/{precision}" for precision in ("float32", "float16")]
    for check in trained:
        assert check["steps"] >= trainings.STEPS and check["seconds_per_step"] > 0
        assert check["peak_memory_bytes"] > 2**20
    # Another arithmetic: the same loss but for its rounding.
    first = [check["first_loss"] for check in trained]
    assert first[0] != first[1] and first[0] == pytest.approx(first[1], rel=1e-2)
    assert f"5 not on this device, 2 pass: {out}" in capsys.readouterr().out


def test_a_failure_is_named_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    def broken() -> dict:
        raise RuntimeError("a kernel\nis missing")

    def absent() -> dict:
        raise NotOnThisDeviceError("no tensor cores")

    def refused() -> dict:
        raise RefusedError("use float32")

    def checks(*_: object) -> Iterator[Check]:
        yield Check("a", broken)
        yield Check("b", absent)
        yield Check("c", refused)
        yield Check("d", lambda: {"answer": 42})

    monkeypatch.setattr(command, "checks", checks)
    out = tmp_path / "check.json"
    assert command.main(["--device", "cpu", "--out", str(out)]) == 1
    report = json.loads(out.read_text())
    assert report["failed"] == ["a"] and "FAILED a" in capsys.readouterr().out
    a, b, c, d = report["checks"]
    assert a["reason"] == "RuntimeError: a kernel is missing" and "broken" in str(a["traceback"])
    assert (b["status"], b["reason"]) == ("not on this device", "no tensor cores")
    assert (c["status"], d["status"], d["answer"]) == ("refused", "pass", 42)


def test_no_check_begins_after_the_time_limit():
    (record,) = run_checks(iter([Check("late", dict)]), CPU, limit_s=-1.0)
    assert record == {"name": "late", "status": "not run", "reason": "--limit-s -1 was over"}


def test_another_loss_than_that_of_float32_is_a_failure(tmp_path):
    losses = {"digits_mlp/sgd": 99.0}
    check = trainings._check(scope(tmp_path), "digits_mlp", "sgd", "bfloat16", losses)
    with pytest.raises(AssertionError, match=r"in bfloat16, not 99\.0000"):
        check.run()


def test_what_the_suite_refuses_in_a_narrow_format_is_no_failure(tmp_path):
    check = trainings._check(scope(tmp_path), "digits_mlp", "slbfgs", "bfloat16", {})
    with pytest.raises(RefusedError, match=r"train\.precision=float32"):
        check.run()


def test_every_experiment_composes_at_the_papers_size_too(tmp_path):
    # Without a GPU nothing else would see a setting that does not fit there.
    assert len(all_experiments()) >= 17
    for experiment in all_experiments():
        subject = trainings._subject(experiment)
        choice = subject if subject.startswith("arm=") else f"optimizer={subject}"
        overrides = trainings._overrides(scope(tmp_path, "full"), experiment, choice, "float16")
        spec = RunSpec.from_config(compose_config(overrides))
        assert (spec.scale, spec.config.train.precision) == ("full", "float16")
        check_schedule(
            spec.config.schedule,
            base_lr=spec.config.optimizer.lr,
            epochs=spec.config.train.epochs,
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "trian"], "--parts 'trian' does not exist; did you mean 'train'"),
        (["--experiments", "digits"], "--experiments 'digits' does not exist"),
        (["--precisions", "float8"], "--precisions 'float8' does not exist"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, capsys):
    assert command.main(["--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_machine_without_a_gpu_is_told_the_option_that_works(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 2
    said = capsys.readouterr().err
    assert said == "error: --device cuda, but torch sees no GPU; --device cpu tries the rest\n"


def test_the_problems_of_the_conformance_list_follow_torchs_default_device():
    with torch.device("meta"):
        params = make_params()
        problem = NoisyQuadratic(params)
        problem.set_gradients(1)
    assert {p.device.type for p in params} == {"meta"}
    assert {p.grad.device.type for p in params if p.grad is not None} == {"meta"}
    assert {p.device.type for p in make_params()} == {"cpu"}
