"""Further passes: what they compute, what they leave alone, and that they are counted."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from experiments.data import Batch
from experiments.runs.metrics import read_metrics
from experiments.training.passes import Passes
from experiments.training.trainer import Trainer
from tests.experiments.run_configs import assert_same_run, newest_state, run_spec

BATCH_SIZES = (6, 6, 3)


class SomeData:
    """What `Passes` asks of a data set, without its images."""

    num_classes = 3
    input_shape = (1, 1, 4)
    train_size = sum(BATCH_SIZES)
    test_size = 0
    batches_per_epoch = len(BATCH_SIZES)

    def train_batches(self, epoch, start=0):
        return iter(some_batches(epoch))

    def random_batches(self, number, count):
        return iter(some_batches(number))

    def test_batches(self):
        return iter(())


def some_batches(seed: int = 0) -> list[Batch]:
    torch.manual_seed(seed)
    images = [torch.randn(n, 1, 1, 4, dtype=torch.float64) for n in BATCH_SIZES]
    return [Batch(x, torch.randint(3, (len(x),))) for x in images]


def some_model(*, batch_norm: bool = False) -> nn.Module:
    torch.manual_seed(1)
    middle = nn.BatchNorm1d(5) if batch_norm else nn.Tanh()
    layers = [nn.Flatten(), nn.Linear(4, 5), middle, nn.Linear(5, 3)]
    return nn.Sequential(*layers).double().train()


def passes_over(model: nn.Module) -> Passes:
    return Passes(model, SomeData(), memory_format=torch.contiguous_format)


def elsewhere(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach() + 0.1 * torch.randn_like(p) for p in model.parameters()]


def test_gradient_and_hessian_are_those_of_the_mean_over_all_images():
    model, batches = some_model(), some_batches()
    at, vector = elsewhere(model), [torch.randn_like(p) for p in model.parameters()]
    passes = passes_over(model)
    gradient = passes.gradient(batches, at)
    product = passes.hessian_vector(batches, at, vector)

    images = torch.cat([b.images for b in batches]).flatten(1)
    labels = torch.cat([b.labels for b in batches])
    shapes = [w.shape for w in at]

    def loss(flat):
        parts = flat.split([s.numel() for s in shapes])
        w1, b1, w2, b2 = (x.view(s) for x, s in zip(parts, shapes, strict=True))
        return cross_entropy(torch.tanh(images @ w1.T + b1) @ w2.T + b2, labels)

    flat = torch.cat([w.flatten() for w in at])
    expected = torch.autograd.functional.jacobian(loss, flat)
    hessian = torch.autograd.functional.hessian(loss, flat)
    # float64, sums of 15 images: rounding alone
    torch.testing.assert_close(torch.cat([g.flatten() for g in gradient]), expected)
    v = torch.cat([x.flatten() for x in vector])
    torch.testing.assert_close(torch.cat([x.flatten() for x in product]), hessian @ v)
    assert (passes.counts.gradient_images, passes.counts.hessian_images) == (15, 15)


def test_passes_leave_weights_gradients_and_batch_norm_alone():
    model, batches = some_model(batch_norm=True), some_batches()
    cross_entropy(model(batches[0].images), batches[0].labels).backward()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    passes, at = passes_over(model), elsewhere(model)
    passes.gradient(batches, at)
    passes.hessian_vector(batches, at, at)
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, model.parameters(), strict=True))
    assert all(p.requires_grad for p in model.parameters())


def test_gradient_at_the_models_weights_is_the_training_gradient_with_batch_norm():
    model, batch = some_model(batch_norm=True), some_batches()[0]
    for _ in range(3):  # running statistics that are far from the batch's own
        model(5 + batch.images)
    cross_entropy(model(batch.images), batch.labels).backward()
    again = passes_over(model).gradient([batch], list(model.parameters()))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), again, strict=True))


SLEEP_S = 0.004
SLOW = {
    "name": "slow",
    "_target_": "tests.experiments.optimizers.odd_optimizers.SlowPassesSGD",
    "lr": 0.1,
    "sleep_s": SLEEP_S,
}


def test_passes_are_inside_the_clock_and_on_record(tmp_path):
    spec = run_spec(tmp_path, optimizer=SLOW)
    assert Trainer(spec).run() == "done"
    records = read_metrics(spec.directory / "metrics.jsonl")
    passes = [record for record in records if record["kind"] == "passes"]
    epochs = [record for record in records if record["kind"] == "epoch"]
    assert [record["epoch"] for record in passes] == [1, 2]
    assert [record["gradient_images"] for record in passes] == [22 * 64, 44 * 64]
    assert [record["hessian_images"] for record in passes] == [0, 0]
    for record, epoch in zip(passes, epochs, strict=True):
        assert record["step"] == epoch["step"]
        assert record["extra_passes_time_s"] >= epoch["step"] * SLEEP_S
        assert record["extra_passes_time_s"] < epoch["optimizer_time_s"]
        parts = ("data_time_s", "forward_backward_time_s", "optimizer_time_s")
        assert epoch["train_time_s"] == pytest.approx(sum(epoch[part] for part in parts))


def test_counts_go_on_across_a_resume(tmp_path):
    optimizer = {**SLOW, "sleep_s": 0.0}
    whole = run_spec(tmp_path / "whole", optimizer=optimizer)
    Trainer(whole).run()
    cut = run_spec(tmp_path / "cut", optimizer=optimizer)
    with pytest.raises(SystemExit):
        Trainer(cut, on_epoch=lambda _: os.kill(os.getpid(), signal.SIGTERM)).run()
    assert newest_state(cut)["passes"] == {"gradient_images": 22 * 64, "hessian_images": 0}
    assert Trainer(cut).run() == "done"
    assert_same_run(cut, whole)
