"""bfloat16 and float16 of the passes, what an overflow leaves alone, and the average of weights."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import register_optimizer_step_post_hook

import mlbfgs
from experiments.data import build_data
from experiments.errors import UserError
from experiments.models import build_model
from experiments.optimizers.kfac import KFAC
from experiments.runs.directory import read_status
from experiments.runs.metrics import read_metrics
from experiments.training import precision as precision_module
from experiments.training.evaluation import evaluate
from experiments.training.precision import Precision
from experiments.training.ranks import ALONE, JoinedRanks
from experiments.training.synchronised_batchnorm import SynchronisedBatchNorm
from experiments.training.trainer import Trainer
from tests.experiments.run_configs import (
    MLBFGS,
    SGD,
    assert_same_bits,
    assert_same_run,
    newest_state,
    run_spec,
    stop_at,
)
from tests.gloo import run_ranks

CPU = torch.device("cpu")
KFAC_CONFIG = {
    "name": "kfac",
    "_target_": "experiments.optimizers.kfac.KFAC",
    "takes_model": True,
    "lr": 0.05,
    "factor_update_interval": 1,
    "inverse_update_interval": 3,
}
SLBFGS = {
    "name": "slbfgs",
    "_target_": "experiments.optimizers.slbfgs.SLBFGS",
    "lr": 0.05,
    "curvature_batch_size": 100,
}
OPTIMIZERS = pytest.mark.parametrize(
    "optimizer", [SGD, MLBFGS, KFAC_CONFIG], ids=lambda optimizer: optimizer["name"]
)
# So large that the first dozen or more of steps overflow.
LARGE_SCALE = 2.0**32


@pytest.fixture(autouse=True)
def _keep_thread_count() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def begin_with_scale(
    patch: pytest.MonkeyPatch, scale: float, *, growth_interval: int = 2000
) -> None:
    scaler = partial(torch.amp.GradScaler, init_scale=scale, growth_interval=growth_interval)
    patch.setattr(precision_module.torch.amp, "GradScaler", scaler)


def records_of(spec: Any, kind: str) -> list[dict[str, Any]]:
    records = read_metrics(spec.directory / "metrics.jsonl")
    return [record for record in records if record["kind"] == kind]


def weights(spec: Any) -> Tensor:
    state = newest_state(spec)
    return torch.cat([value.double().flatten() for value in state["model"].values()])


# --- a whole run --------------------------------------------------------------------------------


@OPTIMIZERS
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_narrow_passes_train_float32_weights_almost_as_float32_does(tmp_path, optimizer, name):
    changes = {"optimizer": optimizer, "train.epochs": 1}
    wide = run_spec(tmp_path / "wide", **changes)
    narrow = run_spec(tmp_path / "narrow", **changes, **{"train.precision": name})
    assert wide.key != narrow.key
    for spec in (wide, narrow):
        assert Trainer(spec).run() == "done"
    state = newest_state(narrow)
    assert {value.dtype for value in state["model"].values()} == {torch.float32}
    kept = [v for s in state["optimizer"]["state"].values() for v in s.values()]
    assert {v.dtype for v in kept if isinstance(v, Tensor)} == {torch.float32}
    difference = (weights(narrow) - weights(wide)).norm() / weights(wide).norm()
    # 22 steps of gradients rounded to 8 or 11 bits: far above float32's rounding, and small; KFAC
    # divides by its smallest eigenvalues.
    assert 1e-5 < difference < (0.25 if optimizer is KFAC_CONFIG else 0.05)
    loss = [records_of(spec, "epoch")[0]["test_loss"] for spec in (narrow, wide)]
    assert loss[0] == pytest.approx(loss[1], rel=0.1)


@OPTIMIZERS
def test_overflows_are_skipped_recorded_and_resumed_bit_by_bit(tmp_path, monkeypatch, optimizer):
    begin_with_scale(monkeypatch, LARGE_SCALE)
    changes = {
        "optimizer": optimizer,
        "train.precision": "float16",
        "train.checkpoint_interval": 5,
        "train.ema": 0.9,
    }
    whole = run_spec(tmp_path / "whole", **changes)
    assert Trainer(whole).run() == "done"
    overflows = records_of(whole, "overflow")
    assert 7 < len(overflows) < 20
    steps = [record["step"] for record in overflows]
    assert [record["overflows"] for record in overflows] == list(range(1, len(steps) + 1))
    scales = [record["loss_scale"] for record in overflows]
    assert scales == [LARGE_SCALE / 2**i for i in range(1, len(steps) + 1)]
    state = newest_state(whole)
    assert state["position"]["step"] == 44 and state["position"]["overflows"] == len(steps)
    assert state["loss_scale"]["scale"] == scales[-1]
    # The schedule went on: the recorded rate of a step is that of a run without overflows.
    plain = run_spec(tmp_path / "plain", **{**changes, "train.precision": "float32"})
    Trainer(plain).run()
    assert [r["lr"] for r in records_of(whole, "step")] == [
        r["lr"] for r in records_of(plain, "step")
    ]
    if optimizer is MLBFGS:
        taken = 44 - len(steps)
        assert state["optimizer"]["state"][0]["step"] == taken
        # Every fourth step that was taken, from the second time on; all overflows came before.
        pairs = [record["step"] for record in records_of(whole, "curvature")]
        assert pairs == [len(steps) + t for t in range(8, taken + 1, 4)]

    cut = run_spec(tmp_path / "cut", **changes)
    stop_at(2, Trainer(cut))  # after two steps that were taken, behind the checkpoint at 5 or 10
    assert newest_state(cut)["position"]["overflows"] > 0
    assert Trainer(cut).run() == "done"
    assert_same_run(cut, whole)
    for key in ("loss_scale", "average"):
        assert_same_bits(newest_state(cut)[key], newest_state(whole)[key], key)


def test_gradients_beyond_float16_at_any_scale_end_as_diverged(tmp_path):
    target = "tests.experiments.optimizers.odd_optimizers.InfiniteGradients"
    optimizer = {"name": "odd", "_target_": target, "lr": 0.1}
    spec = run_spec(tmp_path, optimizer=optimizer, **{"train.precision": "float16"})
    assert Trainer(spec).run() == "diverged"
    status = read_status(spec.directory)
    assert status.step == 17 and "at a loss scale below 1, at step 17" in status.message
    assert [record["loss_scale"] for record in records_of(spec, "overflow")][-2:] == [1.0, 0.5]


# --- an overflow leaves no trace ----------------------------------------------------------------


def conv_net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(2, 8, 2), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(8, 2, 3, 3, generator=generator)
    return images, torch.randint(3, (8,), generator=generator)


def one_step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    step: int,
    *,
    poisoned: bool = False,
    parts: int = 1,
) -> None:
    optimizer.zero_grad()
    images, labels = batch(step)
    for some, theirs in zip(images.chunk(parts), labels.chunk(parts), strict=True):
        with precision.autocast():
            loss = cross_entropy(net(some), theirs) / parts
        torch.autograd.backward(precision.scaled(loss))
    if poisoned:
        for p in net.parameters():
            assert p.grad is not None
            p.grad.fill_(float("inf"))
    precision.step(optimizer)


def subject(name: str, kind: str = "float16") -> tuple[nn.Module, Any, Precision]:
    net = conv_net()
    precision = Precision(kind, CPU)
    optimizer: torch.optim.Optimizer
    if name == "kfac":
        optimizer = KFAC(net, lr=0.1, factor_update_interval=1, inverse_update_interval=2)
    else:
        optimizer = mlbfgs.MLBFGS(net.parameters(), lr=0.1, update_interval=2, history_size=2)
    precision.bind(optimizer, name=name, has_model=name == "kfac")
    return net, optimizer, precision


@pytest.mark.parametrize("name", ["mlbfgs", "kfac"])
@pytest.mark.parametrize("parts", [1, 2])
def test_an_overflow_leaves_no_trace_but_half_the_scale(name, parts):
    met, spared = subject(name), subject(name)
    for step in range(9):
        one_step(*met, step, parts=parts)
        one_step(*spared, step, parts=parts)
        assert not met[2].overflowed
        before = copy.deepcopy((met[1].state_dict(), met[0].state_dict()))
        one_step(*met, 100 + step, poisoned=True, parts=parts)
        assert met[2].overflowed
        assert_same_bits((met[1].state_dict(), met[0].state_dict()), before)
        spared[2].load_state_dict(met[2].state_dict())
    assert met[2].host_scale() == 65536 / 2**9
    assert_same_bits(met[1].state_dict(), spared[1].state_dict())
    assert_same_bits(dict(met[0].state_dict()), dict(spared[0].state_dict()))


def factors(optimizer: KFAC, net: nn.Module) -> list[Tensor]:
    keys = ("inputs_factor", "outputs_factor")
    return [optimizer.state[p][key] for p in net.parameters() if p.dim() > 1 for key in keys]


def test_kfacs_factors_are_those_of_the_unscaled_loss():
    found = {}
    for kind in ("float32", "bfloat16", "float16"):
        net, optimizer, precision = subject("kfac", kind)
        one_step(net, optimizer, precision, 0)
        found[kind] = factors(optimizer, net)
    for kind, tolerance in (("bfloat16", 2e-2), ("float16", 2e-3)):
        for mine, exact in zip(found[kind], found["float32"], strict=True):
            assert mine.dtype == torch.float32
            assert (mine - exact).norm() < tolerance * exact.norm()
        # but for the images themselves
        assert not any(map(torch.equal, found[kind][1:], found["float32"][1:]))


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_kfacs_factors_of_parts_are_computed_in_float32(kind):
    found = []
    for parts in (1, 4):
        net, optimizer, precision = subject("kfac", kind)
        optimizer.share_batches(ALONE)
        one_step(net, optimizer, precision, 0, parts=parts)
        found.append(factors(optimizer, net))
    for whole, parts_ in zip(*found, strict=True):
        # Each image passes alike through the net; products in bfloat16 would differ by 1e-3.
        torch.testing.assert_close(whole, parts_, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_synchronised_batchnorm_of_narrow_numbers_is_torchs(kind):
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(3)
    shared = SynchronisedBatchNorm(copy.deepcopy(plain), ALONE)
    # The sum of a channel is beyond float16, and beyond bfloat16's whole numbers.
    images = (torch.randn(64, 3, 16, 16) + 10).to(kind)
    expected, found = plain(images), shared(images)
    assert found.dtype == expected.dtype == kind
    assert (found - expected).abs().max() < 0.02
    torch.testing.assert_close(shared.running_var, plain.running_var, rtol=1e-5, atol=1e-6)


# --- several ranks ------------------------------------------------------------------------------


def train_with_large_scale(rank: int, specs: list[Any]) -> None:
    ranks = JoinedRanks(torch.distributed.HashStore(), timeout_s=30.0, local_rank=rank)
    with pytest.MonkeyPatch.context() as patch:
        begin_with_scale(patch, LARGE_SCALE)
        for spec in specs:
            Trainer(spec, ranks=ranks).run()


@pytest.mark.slow
def test_two_ranks_skip_the_same_steps_and_resume_bit_by_bit_and_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {
        "model": {"name": "cifar_resnet", "depth": 8, "width": 2},
        "dataset.train_limit": 640,
        "train.micro_batch": 20,
        "train.precision": "float16",
        "train.sync_batchnorm": True,
        "train.ema": 0.9,
        "optimizer": {**MLBFGS, "blocks": 2, "distribution": "blocks", "update_interval": 2},
    }
    whole = run_spec(tmp_path / "whole", **changes)
    begun = run_spec(tmp_path / "two", **changes, **{"train.timeout_s": 1e-9})
    run_ranks(train_with_large_scale, 2, [whole, begun])
    overflows = records_of(whole, "overflow")
    assert 4 < len(overflows) < 18
    # It stopped at the first overflow, where ranks pause.
    assert read_status(begun.directory).step == 1
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    two, one = (run_spec(tmp_path / name, **changes) for name in ("two", "one"))
    run_ranks(train_with_large_scale, 2, [two])
    assert_same_run(two, whole)
    for key in ("loss_scale", "average"):
        assert_same_bits(newest_state(two)[key], newest_state(whole)[key], key)
    begin_with_scale(monkeypatch, LARGE_SCALE)
    assert Trainer(one).run() == "done"
    # One process makes larger passes, of which one more or less may overflow.
    assert records_of(one, "overflow")[: len(overflows) - 2] == overflows[:-2]
    assert records_of(one, "ema")[-1]["step"] == 20


# --- the average of the weights -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["float32", "float16"])
def test_the_average_is_that_of_the_steps_and_is_evaluated_beside_the_weights(
    tmp_path, monkeypatch, name
):
    # So short that overflows come back all along the run.
    begin_with_scale(monkeypatch, LARGE_SCALE, growth_interval=2)
    model = {"name": "cifar_resnet", "depth": 8, "width": 2}
    changes = {"model": model, "dataset.train_limit": 640, "train.eval_interval": 3}
    changes |= {"train.precision": name, "train.epochs": 3}
    plain = run_spec(tmp_path / "plain", **changes)
    spec = run_spec(tmp_path / "ema", **changes, **{"train.ema": 0.8})
    assert Trainer(plain).run() == "done"
    seen: list[dict[str, Tensor]] = []
    trainer = Trainer(spec)
    handle = register_optimizer_step_post_hook(lambda *_: seen.append(state_of(trainer)))
    trained: list[nn.Module] = []

    def state_of(_: Trainer) -> dict[str, Tensor]:
        return {k: v.clone().double() for k, v in trained[0].state_dict().items()}

    def build_and_keep(*arguments: Any, **keywords: Any) -> nn.Module:
        trained.append(build_model(*arguments, **keywords))
        seen.append(state_of(trainer))
        return trained[-1]

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("experiments.training.task.build_model", build_and_keep)
            assert trainer.run() == "done"
    finally:
        handle.remove()
    overflows = [record["step"] for record in records_of(spec, "overflow")]
    assert len(seen) == 1 + 30 - len(overflows)
    assert name == "float32" or overflows[-1] > 20
    expected = seen[0]
    for state in seen[1:]:
        for name, value in state.items():
            tracked = name.endswith("num_batches_tracked")
            expected[name] = value if tracked else 0.8 * expected[name] + 0.2 * value
    average = newest_state(spec)["average"]
    for name, value in average.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=1e-6)
    assert_same_bits(newest_state(spec)["model"], newest_state(plain)["model"])

    data = build_data(spec.config.dataset, batch_size=64, seed=0, device=CPU)
    net = build_model(spec.config.model, num_classes=10, input_shape=data.input_shape)
    net.load_state_dict(average)
    with torch.no_grad():
        result = evaluate(net.eval(), data.test_batches(), device=CPU)
    (record,) = records_of(spec, "ema")  # the epochs that are evaluated
    assert (record["epoch"], record["step"]) == (3, 30)
    assert record["test_loss"] == pytest.approx(result.loss, rel=1e-5)
    assert record["test_top1"] == pytest.approx(result.top1)
    assert record["test_top5"] == pytest.approx(result.top5)
    assert record["test_loss"] != records_of(spec, "epoch")[-1]["test_loss"]
    assert records_of(plain, "ema") == []


# --- what will not do ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.precision": "half"}, "train.precision='half' .* one of float32, bfloat16"),
        ({"train.ema": 1.0}, "train.ema=1.0 .* between 0 and 1"),
        ({"train.compile": "fast"}, "train.compile='fast' .* reduce-overhead or max-autotune"),
        (
            {"train.precision": "bfloat16", "optimizer": SLBFGS},
            "optimizer=slbfgs takes differences of gradients.*train.precision=float32",
        ),
        (
            {
                "train.precision": "float16",
                "optimizer": {
                    "name": "odd",
                    "_target_": "tests.experiments.optimizers.odd_optimizers.SGDWithModel",
                    "takes_model": True,
                    "lr": 0.1,
                },
            },
            "optimizer=odd looks into the backward pass.*train.precision=bfloat16",
        ),
    ],
)
def test_settings_that_will_not_do_are_refused_before_the_first_step(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        Trainer(run_spec(tmp_path, **changes)).run()


def test_a_device_without_the_arithmetic_is_named(tmp_path, monkeypatch):
    def refuse(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("\"slow_conv2d_cpu\" not implemented for 'Half'")

    monkeypatch.setattr(precision_module, "conv2d", refuse)
    spec = run_spec(tmp_path, **{"train.precision": "float16"})
    with pytest.raises(UserError, match=r"float16 does not work on cpu .*use train.precision=fl"):
        Trainer(spec).run()
