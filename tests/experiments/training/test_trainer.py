"""The loop: what it records, how it ends, and that it goes on with the same numbers."""

from __future__ import annotations

import itertools
import logging
import math
import os
import signal

import pytest
import torch
from torch import nn

from experiments import worker
from experiments.data import build_data
from experiments.errors import UserError
from experiments.models import build_model
from experiments.runs.directory import RunDirectory, RunStatus, read_status
from experiments.runs.metrics import read_metrics
from experiments.runs.outcome import recorded_outcome
from experiments.training.evaluation import evaluate
from experiments.training.task import choose_device
from experiments.training.trainer import Trainer
from tests.experiments.run_configs import (
    assert_same_bits,
    assert_same_run,
    newest_state,
    numbers,
    run_spec,
)

MLBFGS = {
    "name": "mlbfgs",
    "_target_": "mlbfgs.MLBFGS",
    "lr": 0.05,
    "update_interval": 5,
    "history_size": 3,
    "betas": [0.9, 0.9],
}
STEP_KEYS = ["kind", "epoch", "step", "loss", "lr", "train_time_s"]
EPOCH_KEYS = [
    "kind",
    "epoch",
    "step",
    "train_loss",
    "test_loss",
    "test_top1",
    "test_top5",
    "train_time_s",
    "data_time_s",
    "forward_backward_time_s",
    "optimizer_time_s",
    "images_per_second",
    "peak_memory_bytes",
]


def odd(name: str, **arguments: float) -> dict:
    target = f"tests.experiments.optimizers.odd_optimizers.{name}"
    return {"name": "odd", "_target_": target, "lr": 0.1, **arguments}


@pytest.fixture(autouse=True)
def _keep_thread_count():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def records_of(spec, kind):
    return [r for r in read_metrics(spec.directory / "metrics.jsonl") if r["kind"] == kind]


def test_run_writes_the_documented_records(tmp_path):
    spec = run_spec(tmp_path)
    assert Trainer(spec).run() == "done"
    status = read_status(spec.directory)
    assert (status.status, status.epoch, status.step) == ("done", 2, 44)

    steps, epochs = records_of(spec, "step"), records_of(spec, "epoch")
    assert [list(record) for record in steps] == [STEP_KEYS] * 4
    assert [(r["epoch"], r["step"]) for r in steps] == [(0, 10), (0, 20), (1, 30), (1, 40)]
    assert [list(record) for record in epochs] == [EPOCH_KEYS] * 2
    assert [(r["epoch"], r["step"]) for r in epochs] == [(1, 22), (2, 44)]
    times = [record["train_time_s"] for record in read_metrics(spec.directory / "metrics.jsonl")]
    assert times == sorted(times) and times[0] > 0
    first, second = epochs
    for record in epochs:
        parts = ("data_time_s", "forward_backward_time_s", "optimizer_time_s")
        assert record["train_time_s"] == pytest.approx(sum(record[part] for part in parts))
        assert all(record[part] > 0 for part in parts)
        assert 0 < record["test_top1"] <= record["test_top5"] <= 100
        assert record["peak_memory_bytes"] > 2**20
    # 22 full batches of 64 images an epoch.
    seconds = second["train_time_s"] - first["train_time_s"]
    assert second["images_per_second"] == pytest.approx(22 * 64 / seconds)
    # Digits in two epochs: far from chance (10 %), and the loss falls from about ln 10.
    assert second["test_top1"] > 80
    assert second["train_loss"] < first["train_loss"] < math.log(10)


def test_epoch_loss_is_the_mean_over_the_images_of_a_smaller_last_batch_too(tmp_path):
    # 34 images after 22 batches of 64: the mean of means would weigh them as 64.
    spec = run_spec(tmp_path, **{"dataset.drop_last": False, "train.log_interval": 1})
    Trainer(spec).run()
    losses = [record["loss"] for record in records_of(spec, "step")][:23]
    weights = [64] * 22 + [34]
    expected = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
    measured = records_of(spec, "epoch")[0]["train_loss"]
    assert measured == pytest.approx(expected, rel=1e-12)
    assert abs(measured - sum(losses) / 23) > 1e-5


def test_recorded_test_results_are_those_of_the_saved_weights(tmp_path):
    spec = run_spec(tmp_path)
    Trainer(spec).run()
    data = build_data(spec.config.dataset, batch_size=64, seed=0, device=torch.device("cpu"))
    model = build_model(
        spec.config.model, num_classes=data.num_classes, input_shape=data.input_shape
    )
    model.load_state_dict(newest_state(spec)["model"])
    batches = list(data.test_batches())
    with torch.no_grad():
        logits = torch.cat([model(batch.images) for batch in batches]).double()
    labels = torch.cat([batch.labels for batch in batches])
    log_p = logits - torch.logsumexp(logits, dim=1, keepdim=True)
    own = log_p[torch.arange(len(labels)), labels]
    rank = (log_p > own[:, None]).sum(dim=1)
    record = records_of(spec, "epoch")[-1]
    assert len(labels) == 355
    assert record["test_loss"] == pytest.approx(-own.mean().item(), rel=1e-5)  # float32 logits
    assert record["test_top1"] == pytest.approx(100 * (rank < 1).double().mean().item())
    assert record["test_top5"] == pytest.approx(100 * (rank < 5).double().mean().item())


def test_evaluation_leaves_batch_norm_alone_and_takes_few_classes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, labels = torch.randn(10, 4) + 5, torch.randint(3, (10,))
    result = evaluate(model, [(images, labels)], device=torch.device("cpu"))
    assert_same_bits(dict(model.state_dict()), before)
    assert result.top5 == 100.0


def test_evaluation_inside_a_run_leaves_batch_norm_alone(tmp_path):
    changes = {"model": {"name": "cifar_resnet", "depth": 8, "width": 2}, "train.epochs": 3}
    rare = run_spec(tmp_path / "rare", **{**changes, "train.eval_interval": 3})
    often = run_spec(tmp_path / "often", **changes)
    for spec in (rare, often):
        assert Trainer(spec).run() == "done"
    names = newest_state(often)["model"]
    assert any("running_mean" in name for name in names)
    assert_same_bits(newest_state(rare)["model"], names)
    tested = [record["test_top1"] is not None for record in records_of(rare, "epoch")]
    assert tested == [False, False, True]
    assert records_of(rare, "epoch")[2]["test_loss"] == records_of(often, "epoch")[2]["test_loss"]


def test_last_epoch_is_always_evaluated(tmp_path):
    spec = run_spec(tmp_path, **{"train.epochs": 3, "train.eval_interval": 2})
    Trainer(spec).run()
    tested = [record["test_top1"] is not None for record in records_of(spec, "epoch")]
    assert tested == [False, True, True]


def test_equal_seeds_start_from_equal_weights_whatever_the_optimizer(tmp_path):
    adam = {"name": "adam", "_target_": "torch.optim.Adam", "lr": 1e-3}
    short = {"train.epochs": 1, "train.log_interval": 1, "schedule": {"name": "constant"}}
    specs = [
        run_spec(tmp_path, **short),
        run_spec(tmp_path, **short, optimizer=adam),
        run_spec(tmp_path, **short, optimizer=MLBFGS),
        run_spec(tmp_path, **short, seed=1),
    ]
    for spec in specs:
        Trainer(spec).run()
    first = [records_of(spec, "step")[0]["loss"] for spec in specs]
    second = [records_of(spec, "step")[1]["loss"] for spec in specs]
    assert first[0] == first[1] == first[2] != first[3]
    assert second[0] != second[1]


def test_learning_rate_of_the_schedule_reaches_every_group(tmp_path):
    spec = run_spec(tmp_path, **{"train.epochs": 4, "schedule.min_lr": 0.01})
    Trainer(spec).run()
    groups = newest_state(spec)["optimizer"]["param_groups"]
    expected = 0.01 + 0.09 * (1 + math.cos(math.pi * 3 / 4)) / 2
    assert [group["lr"] for group in groups] == [pytest.approx(expected)] * len(groups)
    assert records_of(spec, "step")[-1]["lr"] == pytest.approx(expected)


def test_logging_and_checkpoints_do_not_change_the_numbers(tmp_path):
    plain = run_spec(tmp_path / "plain")
    dense = run_spec(
        tmp_path / "dense", **{"train.log_interval": 1, "train.checkpoint_interval": 3}
    )
    for spec in (plain, dense):
        Trainer(spec).run()
    assert_same_bits(newest_state(plain)["model"], newest_state(dense)["model"])
    at_tens = [r for r in numbers(dense.directory) if r["step"] % 10 == 0 or r["kind"] == "epoch"]
    assert at_tens == numbers(plain.directory)


def test_curvature_is_recorded_once_for_each_pair_update(tmp_path):
    spec = run_spec(tmp_path, optimizer=MLBFGS)
    assert Trainer(spec).run() == "done"
    records = records_of(spec, "curvature")
    steps = [record["step"] for record in records]
    assert steps == sorted(set(steps)) and len(steps) >= 6
    assert {b - a for a, b in itertools.pairwise(steps)} == {5}
    assert all(record["block"] == 0 for record in records)
    assert max(record["pairs"] for record in records) == 3


def test_on_epoch_gets_each_record_once_it_is_on_file(tmp_path):
    spec = run_spec(tmp_path)
    seen = []

    def on_epoch(record):
        assert records_of(spec, "epoch")[-1] == record.as_record()
        seen.append(record.epoch)

    Trainer(spec, on_epoch=on_epoch).run()
    assert seen == [1, 2]


def test_finished_run_is_not_repeated(tmp_path, caplog):
    spec = run_spec(tmp_path)
    Trainer(spec).run()
    files = [path for path in spec.directory.rglob("*") if path.is_file()]
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    with caplog.at_level(logging.INFO):
        assert Trainer(spec).run() == "done"
    assert "already finished" in caplog.text
    del before[spec.directory / "lock"]
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before


@pytest.mark.parametrize("log_interval", [1, 1000])
def test_loss_that_is_not_finite_ends_as_diverged(tmp_path, log_interval):
    spec = run_spec(
        tmp_path,
        **{
            "optimizer.lr": 1e6,
            "train.epochs": 40,
            "train.log_interval": log_interval,
            "train.checkpoint_interval": 1,
            "schedule": {"name": "constant"},
        },
    )
    assert Trainer(spec).run() == "diverged"
    status = read_status(spec.directory)
    assert status.status == "diverged" and f"at step {status.step}" in status.message
    records = read_metrics(spec.directory / "metrics.jsonl")
    assert records[-1]["kind"] == "step" and records[-1]["step"] == status.step
    weights = newest_state(spec)["model"].values()
    assert all(weight.isfinite().all() for weight in weights)
    content = (spec.directory / "metrics.jsonl").read_bytes()
    assert Trainer(spec).run() == "diverged"
    assert (spec.directory / "metrics.jsonl").read_bytes() == content


def test_poisoned_weights_never_become_a_checkpoint(tmp_path):
    # The loss of step 8 is finite, its weights are not; a checkpoint is due right there.
    spec = run_spec(
        tmp_path,
        optimizer=odd("PoisoningSGD", poisons_at=8),
        **{"train.checkpoint_interval": 4, "train.log_interval": 1000},
    )
    assert Trainer(spec).run() == "diverged"
    assert read_status(spec.directory).step == 8
    state = newest_state(spec)
    assert state["position"]["step"] == 4
    assert all(weight.isfinite().all() for weight in state["model"].values())


@pytest.mark.parametrize(("log_interval", "detected"), [(10, 10), (1000, 22)])
def test_divergence_is_detected_at_the_next_log_or_the_end_of_the_epoch(
    tmp_path, log_interval, detected
):
    spec = run_spec(
        tmp_path,
        optimizer=odd("PoisoningSGD", poisons_at=3),
        **{"train.log_interval": log_interval},
    )
    assert Trainer(spec).run() == "diverged"
    assert read_status(spec.directory).step == detected
    last = read_metrics(spec.directory / "metrics.jsonl")[-1]
    assert (last["kind"], last["step"], last["loss"]) == ("step", detected, None)


def test_timeout_is_resumable_with_the_same_numbers(tmp_path):
    whole = run_spec(tmp_path / "whole")
    Trainer(whole).run()
    cut = run_spec(tmp_path / "cut", **{"train.timeout_s": 1e-4})
    assert Trainer(cut).run() == "timeout"
    status = read_status(cut.directory)
    assert status.status == "timeout" and 0 < status.step < 44
    assert Trainer(cut).run() == "timeout"
    assert read_status(cut.directory).step == status.step
    resumed = run_spec(tmp_path / "cut")
    assert Trainer(resumed).run() == "done"
    assert_same_run(resumed, whole)


@pytest.mark.parametrize(
    ("number", "ending"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_signal_ends_at_a_checkpoint_and_the_run_goes_on(tmp_path, number, ending):
    optimizer = odd("NoisySGD")
    whole = run_spec(tmp_path / "whole", optimizer=optimizer, **{"train.epochs": 3})
    Trainer(whole).run()
    cut = run_spec(tmp_path / "cut", optimizer=optimizer, **{"train.epochs": 3})
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ending):
        Trainer(cut, on_epoch=lambda _: os.kill(os.getpid(), number)).run()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    status = read_status(cut.directory)
    assert (status.status, status.step) == ("running", 22)
    torch.manual_seed(99)  # what a new process has in place of the run's random state
    assert Trainer(cut).run() == "done"
    assert_same_run(cut, whole)


@pytest.mark.parametrize("status", ["timeout", "refused", "crashed"])
def test_how_an_earlier_attempt_ended_is_not_told_of_one_that_was_killed(
    tmp_path, monkeypatch, status
):
    spec = run_spec(tmp_path)
    with RunDirectory.open(spec) as directory:
        directory.write_status(RunStatus(status, 1, 22, "told at an earlier attempt"))

    def killed_while_it_builds(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("experiments.training.trainer.TrainingLoop", killed_while_it_builds)
    with pytest.raises(KeyboardInterrupt):
        Trainer(spec).run()
    assert read_status(spec.directory) == RunStatus("running", 1, 22)
    outcome = recorded_outcome(spec.directory, exit_code=-9)
    assert outcome.status == "crashed" and "signal 9" in outcome.message


def test_crash_leaves_a_traceback_and_the_run_goes_on(tmp_path, capsys):
    broken = odd("BrokenSGD", fails_at=15)
    spec = run_spec(tmp_path, optimizer=broken, **{"train.checkpoint_interval": 10})
    with pytest.raises(RuntimeError, match="the optimizer broke"):
        Trainer(spec).run()
    assert read_status(spec.directory).status == "crashed"
    assert "odd_optimizers.py" in (spec.directory / "traceback.txt").read_text()
    # Each process fails at its own 15th step, so each start gets a checkpoint further.
    assert worker.main([str(spec.directory)]) == 1
    assert read_status(spec.directory).message == "RuntimeError: the optimizer broke"
    for _ in range(3):
        code = worker.main([str(spec.directory)])
    assert code == 0
    assert read_status(spec.directory).status == "done"
    assert [record["step"] for record in records_of(spec, "step")] == [10, 20, 30, 40]
    assert not (spec.directory / "traceback.txt").exists()


def test_mistake_in_a_builder_is_recorded_and_told(tmp_path, capsys):
    spec = run_spec(tmp_path, **{"model.hiden": [3]})
    with pytest.raises(UserError, match="hiden"):
        Trainer(spec).run()
    status = read_status(spec.directory)
    assert status.status == "refused" and status.message.startswith("unknown key model.hiden")
    assert worker.main([str(spec.directory)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error


@pytest.mark.parametrize("changed", ["absent", "edited"])
def test_worker_tells_a_config_that_will_not_do_in_one_line(tmp_path, capsys, changed):
    spec = run_spec(tmp_path)
    spec.directory.mkdir(parents=True)
    if changed == "edited":
        run_spec(tmp_path, **{"optimizer.lr": 0.2}).save(spec.directory / "config.yaml")
    assert worker.main([str(spec.directory)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert ("was changed" if changed == "edited" else "no config at") in error


def test_moved_results_still_run(tmp_path):
    spec = run_spec(tmp_path / "before")
    spec.directory.mkdir(parents=True)
    spec.save(spec.directory / "config.yaml")
    (tmp_path / "before").rename(tmp_path / "after")
    moved = tmp_path / "after" / spec.directory.relative_to(tmp_path / "before")
    assert worker.main([str(moved)]) == 0
    assert read_status(moved).status == "done"
    assert not (tmp_path / "before").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_that_is_not_there_is_told():
    with pytest.raises(UserError, match=r"train\.device=cuda"):
        choose_device("cuda")
    assert choose_device("auto").type == "cpu"
