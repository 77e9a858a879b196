"""Loss and gradient norm along a run: right numbers, and the run has the same bits without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from experiments.errors import UserError
from experiments.runs.metrics import read_metrics
from experiments.runs.spec import RunSpec
from experiments.training.gradient_record import GradientRecorder
from experiments.training.task import build_task
from experiments.training.trainer import Trainer
from tests.experiments.run_configs import (
    SGD,
    assert_same_bits,
    newest_state,
    numbers,
    run_spec,
    stop_at,
)

RESNET = {"name": "cifar_resnet", "depth": 8, "width": 4, "zero_init_residual": False}
SMALL = {"dataset.train_limit": 200, "dataset.test_limit": 100, "model": RESNET}


def wanted(folder: Path, **changes: Any) -> RunSpec:
    values = {"interval": 1, "images": 150, **changes}
    return run_spec(folder, **SMALL, **{"train.gradient_record": values})


def gradients(spec: RunSpec) -> list[dict[str, Any]]:
    records = read_metrics(spec.directory / "metrics.jsonl")
    return [record for record in records if record["kind"] == "gradient"]


KFAC = {
    "name": "kfac",
    "_target_": "experiments.optimizers.kfac.KFAC",
    "takes_model": True,
    "lr": 0.01,
}


@pytest.mark.parametrize("optimizer", [SGD, KFAC], ids=lambda config: config["name"])
def test_run_has_the_same_bits_with_and_without_the_records(
    tmp_path: Path, optimizer: dict[str, Any]
) -> None:
    # BatchNorm and momentum: what a pass in training mode, or p.grad, could disturb; KFAC listens
    # to the layers of the model.
    config = {**SMALL, "optimizer": optimizer}
    plain = run_spec(tmp_path, **config)
    values = {"interval": 1, "images": 150}
    recorded = run_spec(tmp_path, **config, **{"train.gradient_record": values})
    assert plain.key != recorded.key
    for spec in (plain, recorded):
        assert Trainer(spec).run() == "done"
    kept = [record for record in numbers(recorded.directory) if record["kind"] != "gradient"]
    assert kept == numbers(plain.directory)
    left, right = newest_state(plain), newest_state(recorded)
    for key in ("model", "optimizer", "loss_sum", "rng"):
        assert_same_bits(left[key], right[key], key)
    found = gradients(recorded)
    assert [record["epoch"] for record in found] == [0, 1, 2]
    assert [record["step"] for record in found] == [0, 3, 6]
    assert all(record["images"] == 150 and record["gradient_time_s"] > 0 for record in found)
    assert not gradients(plain)


def test_record_is_loss_and_gradient_of_the_images_drawn(tmp_path: Path) -> None:
    task = build_task(wanted(tmp_path), torch.device("cpu"))
    recorder = GradientRecorder(task, {"interval": 1, "images": 150}, epochs=2)
    task.model.eval()
    record = recorder.measure(0, 0)
    assert not task.model.training
    # The same by hand: batches of 64, 64 and 22, the mean over images, double backward passes.
    task.model.train()
    loss_sum, total = 0.0, None
    for images, labels in task.data.random_batches(0, 150):
        task.model.zero_grad()
        loss = cross_entropy(task.model(images), labels)
        torch.autograd.backward(loss * (len(labels) / 150))
        loss_sum += loss.item() * len(labels) / 150
        flat = torch.cat([p.grad.flatten() for p in task.model.parameters() if p.grad is not None])
        total = flat.double() if total is None else total + flat.double()
    assert total is not None
    # float32 gradients of three batches, added in another order.
    assert record.loss == pytest.approx(loss_sum, rel=1e-6)
    assert record.squared_norm == pytest.approx(total.square().sum().item(), rel=1e-5)
    assert recorder.measure(1, 3).loss == record.loss  # the same images, whatever the epoch


def test_records_come_at_the_interval_and_at_the_end(tmp_path: Path) -> None:
    task = build_task(wanted(tmp_path), torch.device("cpu"))
    recorder = GradientRecorder(task, {"interval": 3, "images": None}, epochs=7)
    assert [epoch for epoch in range(8) if recorder.is_due(epoch)] == [0, 3, 6, 7]
    assert recorder.measure(0, 0).images == task.data.train_size == 200
    with pytest.raises(UserError, match=r"images=201, but there are 200 training images"):
        GradientRecorder(task, {"interval": 1, "images": 201}, epochs=2)


def test_resumed_run_has_each_record_once(tmp_path: Path) -> None:
    spec, whole = wanted(tmp_path / "a"), wanted(tmp_path / "b")
    stop_at(4, Trainer(spec))
    for each in (spec, whole):
        assert Trainer(each).run() == "done"
    assert numbers(spec.directory) == numbers(whole.directory)
    assert len(gradients(spec)) == 3


@pytest.mark.parametrize(
    "value", [1, True, {"interval": 1}, {"interval": 0, "images": 1}, {"interval": 1, "images": 0}]
)
def test_wrong_setting_is_one_line(tmp_path: Path, value: Any) -> None:
    with pytest.raises(UserError, match=r"train\.gradient_record=.* must be null or {interval"):
        run_spec(tmp_path, **{"train.gradient_record": value})
