"""Stochastic L-BFGS: its definition, its theorem's promise, and what it does in a run."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from experiments.data import Batch
from experiments.errors import UserError
from experiments.optimizers.slbfgs import SLBFGS
from experiments.runs.metrics import read_metrics
from experiments.training.passes import Passes
from experiments.training.trainer import Trainer
from tests.experiments.optimizers.slbfgs_oracle import minimise
from tests.experiments.run_configs import assert_same_run, newest_state, run_spec

IMAGES, FEATURES, BATCH = 60, 4, 10
WEIGHT_DECAY = 0.1


@dataclass
class LogisticData:
    """Two classes in float64; batches by seeds of numpy."""

    images: torch.Tensor
    labels: torch.Tensor
    num_classes = 2
    input_shape = (1, 1, FEATURES)
    train_size = IMAGES
    test_size = 0
    batches_per_epoch = IMAGES // BATCH

    @classmethod
    def make(cls) -> LogisticData:
        rng = np.random.default_rng(0)
        images = rng.normal(size=(IMAGES, FEATURES)) * [1.0, 2.0, 0.5, 3.0]
        labels = (images @ [1.0, -1.0, 2.0, 0.3] + rng.normal(size=IMAGES) > 0).astype(np.int64)
        return cls(torch.from_numpy(images), torch.from_numpy(labels))

    def order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng(100 + epoch).permutation(IMAGES).reshape(-1, BATCH)

    def chosen(self, number: int, count: int) -> np.ndarray:
        return np.random.default_rng(10_000 + number).permutation(IMAGES)[:count]

    def batch(self, indices: np.ndarray) -> Batch:
        return Batch(self.images[indices].view(-1, 1, 1, FEATURES), self.labels[indices])

    def train_batches(self, epoch: int, start: int = 0):
        return (self.batch(indices) for indices in self.order(epoch)[start:])

    def random_batches(self, number: int, count: int):
        chosen = self.chosen(number, count)
        return (self.batch(chosen[i : i + BATCH]) for i in range(0, count, BATCH))

    def test_batches(self):
        return iter(())


class Logistic:
    """Softmax regression on two classes by its formulas: weights (2, F), then biases (2,)."""

    def __init__(self, data: LogisticData):
        x = data.images.numpy()
        self.x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
        self.y = np.eye(2)[data.labels.numpy()]

    def _unpack(self, w: np.ndarray) -> np.ndarray:
        return np.concatenate([w[: 2 * FEATURES].reshape(2, FEATURES), w[2 * FEATURES :, None]], 1)

    def _pack(self, full: np.ndarray) -> np.ndarray:
        return np.concatenate([full[:, :FEATURES].ravel(), full[:, FEATURES]])

    def _probabilities(self, w: np.ndarray, indices: np.ndarray) -> np.ndarray:
        scores = np.exp(self.x[indices] @ self._unpack(w).T)
        return scores / scores.sum(1, keepdims=True)

    def gradient(self, w: np.ndarray, indices: np.ndarray) -> np.ndarray:
        error = self._probabilities(w, indices) - self.y[indices]
        return self._pack(error.T @ self.x[indices] / len(indices)) + WEIGHT_DECAY * w

    def hessian(self, w: np.ndarray, indices: np.ndarray) -> np.ndarray:
        p, x = self._probabilities(w, indices), self.x[indices]
        n = len(w)
        columns = []
        for e in np.eye(n):
            scores = x @ self._unpack(e).T
            error = p * (scores - (p * scores).sum(1, keepdims=True))
            columns.append(self._pack(error.T @ x / len(indices)))
        return np.stack(columns, 1) + WEIGHT_DECAY * np.eye(n)


def softmax_regression() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(FEATURES, 2)).double().train()


def flat(model: nn.Module) -> np.ndarray:
    return np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])


def train(optimizer: SLBFGS, model: nn.Module, data: LogisticData, steps: int) -> list[np.ndarray]:
    iterates = []
    for step in range(steps):
        epoch, index = divmod(step, data.batches_per_epoch)
        batch = data.batch(data.order(epoch)[index])
        optimizer.zero_grad()
        cross_entropy(model(batch.images), batch.labels).backward()
        optimizer.before_step(batch, epoch)
        optimizer.step()
        iterates.append(flat(model))
    return iterates


def bound(model: nn.Module, data: LogisticData, **settings: Any) -> SLBFGS:
    settings = {
        "lr": 0.05,
        "weight_decay": WEIGHT_DECAY,
        "history_size": 3,
        "update_interval": 4,
        "curvature_batch_size": 25,
        **settings,
    }
    optimizer = SLBFGS(model.named_parameters(), **settings)
    optimizer.bind(Passes(model, data, memory_format=torch.contiguous_format))
    return optimizer


@pytest.mark.parametrize("snapshot_interval", [None, 4, 9])
def test_iterates_are_those_of_the_printed_algorithm(snapshot_interval):
    data, model = LogisticData.make(), softmax_regression()
    start, oracle, steps = flat(model), Logistic(data), 40
    m = snapshot_interval or data.batches_per_epoch
    ours = train(bound(model, data, snapshot_interval=snapshot_interval), model, data, steps)
    theirs = minimise(
        start,
        gradient=oracle.gradient,
        hessian=oracle.hessian,
        everything=np.arange(IMAGES),
        batches=[data.order(t // 6)[t % 6] for t in range(steps)],
        # our draw number r - 1 is made when r - 1 averages were there before
        curvature_batches=lambda r: data.chosen(r - 1, 25),
        m=m,
        L=4,
        M=3,
        eta=0.05,
    )
    # 40 steps, 8 pairs through a ring of 3; float64 against float64, other orders of summation
    for t, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12, err_msg=f"step {t}")
    assert np.abs(ours[-1] - start).max() > 0.1


def test_converges_linearly_on_a_strongly_convex_loss_where_sgd_does_not():
    # Moritz et al. 2016, Theorem 1: E f(w_k) - f* <= α^k (f(w_0) - f*), with a fixed step size.
    data, model, epochs = LogisticData.make(), softmax_regression(), 45
    oracle, everything = Logistic(data), np.arange(IMAGES)
    optimizer = bound(model, data, lr=0.1, curvature_batch_size=50, history_size=5)
    iterates = train(optimizer, model, data, epochs * data.batches_per_epoch)
    log = np.log10(
        [
            np.linalg.norm(oracle.gradient(x, everything))
            for x in iterates[:: data.batches_per_epoch]
        ]
    )
    assert log[-1] < -9
    # A straight line: it explains the decades, and no third of the way is much steeper or flatter.
    k = np.arange(epochs)
    assert np.corrcoef(k, log)[0, 1] ** 2 > 0.97
    slopes = [np.polyfit(k[i : i + 15], log[i : i + 15], 1)[0] for i in (0, 15, 30)]
    assert max(slopes) < 0 and min(slopes) > 2.5 * max(slopes)

    model = softmax_regression()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=WEIGHT_DECAY)
    for step in range(epochs * data.batches_per_epoch):
        epoch, index = divmod(step, data.batches_per_epoch)
        batch = data.batch(data.order(epoch)[index])
        sgd.zero_grad()
        cross_entropy(model(batch.images), batch.labels).backward()
        sgd.step()
    assert np.linalg.norm(oracle.gradient(flat(model), everything)) > 1e-3


IN_A_RUN = {
    "name": "slbfgs",
    "_target_": "experiments.optimizers.slbfgs.SLBFGS",
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "history_size": 3,
    "update_interval": 5,
    "curvature_batch_size": 200,
}


def test_run_counts_its_passes_and_records_its_pairs(tmp_path):
    spec = run_spec(tmp_path, optimizer=IN_A_RUN)
    assert Trainer(spec).run() == "done"
    records = read_metrics(spec.directory / "metrics.jsonl")
    passes = [record for record in records if record["kind"] == "passes"]
    pairs = [record for record in records if record["kind"] == "curvature"]
    # 22 batches of 64 images an epoch; each is seen once for the full gradient, once in its step
    assert [record["gradient_images"] for record in passes] == [2 * 22 * 64, 4 * 22 * 64]
    # iterations 10, 15, 20 and so on, counted from 0
    assert [record["step"] for record in pairs] == [11, 16, 21, 26, 31, 36, 41]
    assert [record["hessian_images"] for record in passes] == [3 * 200, 7 * 200]
    assert max(record["pairs"] for record in pairs) == 3
    epochs = [record for record in records if record["kind"] == "epoch"]
    for record, epoch in zip(passes, epochs, strict=True):
        # twice the gradients of the steps, by the same passes, and the products
        assert record["extra_passes_time_s"] > epoch["forward_backward_time_s"]
        assert record["extra_passes_time_s"] < epoch["optimizer_time_s"] < epoch["train_time_s"]
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"] < np.log(10)


def test_pair_of_too_little_curvature_is_skipped_and_counted(tmp_path):
    spec = run_spec(tmp_path, optimizer={**IN_A_RUN, "min_curvature": 1e9}, **{"train.epochs": 1})
    Trainer(spec).run()
    records = read_metrics(spec.directory / "metrics.jsonl")
    pairs = [record for record in records if record["kind"] == "curvature"]
    assert [(r["accepted"], r["skipped"], r["pairs"]) for r in pairs] == [
        (False, count, 0) for count in (1, 2, 3)
    ]
    # H is the identity: the direction is the reduced gradient
    assert all(record["direction_over_gradient"] == pytest.approx(1.0) for record in pairs)


def test_interrupted_run_ends_with_the_same_bits(tmp_path):
    # A network with BatchNorm; an epoch of 22 steps ends between two averages of 5.
    changes = {"model": {"name": "cifar_resnet", "depth": 8, "width": 2}, "optimizer": IN_A_RUN}
    whole = run_spec(tmp_path / "whole", **changes)
    assert Trainer(whole).run() == "done"
    cut = run_spec(tmp_path / "cut", **changes)
    with pytest.raises(SystemExit):
        Trainer(cut, on_epoch=lambda _: os.kill(os.getpid(), signal.SIGTERM)).run()
    assert newest_state(cut)["position"]["step"] == 22
    assert Trainer(cut).run() == "done"
    assert_same_run(cut, whole)


def test_curvature_batch_of_more_than_all_images_is_all_and_told(tmp_path, caplog):
    optimizer = {**IN_A_RUN, "curvature_batch_size": 5000}
    spec = run_spec(tmp_path, optimizer=optimizer, **{"train.epochs": 1})
    assert Trainer(spec).run() == "done"
    assert "curvature_batch_size=5000 is more than the 1442 training images" in caplog.text
    records = read_metrics(spec.directory / "metrics.jsonl")
    assert [r["hessian_images"] for r in records if r["kind"] == "passes"] == [3 * 1442]


@pytest.mark.parametrize(
    ("setting", "value", "wanted"),
    [
        ("update_interval", 0, "Invalid update_interval: 0"),
        ("history_size", True, "Invalid history_size: True"),
        ("min_curvature", -1.0, "Invalid min_curvature: -1.0"),
        ("snapshot_interval", 0, "Invalid snapshot_interval: 0"),
    ],
)
def test_setting_that_will_not_do_is_told(tmp_path, setting, value, wanted):
    spec = run_spec(tmp_path, optimizer={**IN_A_RUN, setting: value})
    with pytest.raises(UserError, match=wanted):
        Trainer(spec).run()


def test_step_without_its_passes_is_an_error():
    data, model = LogisticData.make(), softmax_regression()
    optimizer = SLBFGS(model.parameters())
    with pytest.raises(RuntimeError, match="before_step"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="bind"):
        optimizer.before_step(data.batch(np.arange(3)), 0)
    optimizer = bound(model, data)
    train(optimizer, model, data, 1)
    with pytest.raises(RuntimeError, match="before_step"):
        optimizer.step()
