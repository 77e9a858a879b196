"""KFAC in a checkpoint, under bad input, and on its way through a run."""

from __future__ import annotations

import copy
import io
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments.composition import compose_config
from experiments.errors import UserError
from experiments.optimizers import build_optimizer, kronecker
from experiments.optimizers.kfac import KFAC
from experiments.runs.directory import read_status
from experiments.runs.metrics import read_metrics
from experiments.training.trainer import Trainer
from tests.experiments.optimizers.kfac_nets import (
    CONFIG,
    backward,
    batch,
    conv_net,
    train,
)
from tests.experiments.run_configs import (
    ROOT,
    assert_same_bits,
    assert_same_run,
    newest_state,
    run_spec,
    stop_at,
)


def reloaded(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


@pytest.mark.parametrize("method", ["eigen", "cholesky"])
@pytest.mark.parametrize("stop", [4, 5, 8])
def test_resume_is_bit_equal(method: Any, stop: int) -> None:
    settings: Any = {
        "weight_decay": 1e-3,
        "method": method,
        "factor_update_interval": 2,
        "inverse_update_interval": 5,
    }
    net, cut, resumed = (conv_net(torch.float32) for _ in range(3))
    whole = KFAC(net, **settings)
    train(net, whole, range(11))
    first = KFAC(cut, **settings)
    train(cut, first, range(stop))
    second = KFAC(resumed, **settings)
    resumed.load_state_dict(cut.state_dict())
    second.load_state_dict(reloaded(first))
    first.zero_grad()
    train(resumed, second, range(stop, 11))
    assert_same_bits(resumed.state_dict(), net.state_dict())
    assert_same_bits(second.state_dict(), whole.state_dict())


def test_loaded_state_is_a_copy() -> None:
    net = conv_net()
    optimizer, other = KFAC(net), KFAC(conv_net())
    train(net, optimizer, range(2))
    state = optimizer.state_dict()
    other.load_state_dict(state)
    kept = copy.deepcopy(state)
    train(net, optimizer, range(2, 7))
    assert_same_bits(other.state_dict(), kept)


def test_low_precision_parameters_have_float32_factors_also_after_a_load() -> None:
    net = conv_net(torch.bfloat16)
    optimizer, other = KFAC(net), KFAC(conv_net(torch.bfloat16))
    train(net, optimizer, range(3))
    other.load_state_dict(reloaded(optimizer))
    assert_same_bits(other.state_dict(), optimizer.state_dict())
    for p, state in other.state.items():
        assert state["momentum_buffer"].dtype == torch.bfloat16 == p.dtype
    factor = other.state[next(iter(other.state))]["inputs_factor"]
    assert factor.dtype == torch.float32
    assert not torch.equal(factor, factor.bfloat16().float())


def test_memory_is_allocated_at_construction() -> None:
    net = conv_net()
    optimizer = KFAC(net)
    tensors = {
        (id(p), key): value.data_ptr()
        for p, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }
    assert len(tensors) == 4 + 2 * 6
    train(net, optimizer, range(3))
    for p, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                assert tensors.pop((id(p), key)) == value.data_ptr()
    assert tensors == {}


@pytest.mark.parametrize("what", ["method", "shape", "sgd", "missing"])
def test_foreign_state_is_refused_and_changes_nothing(what: str) -> None:
    net = conv_net()
    optimizer = KFAC(net)
    train(net, optimizer, range(2))
    kept = copy.deepcopy(optimizer.state_dict())
    if what == "method":
        other: torch.optim.Optimizer = KFAC(conv_net(), method="cholesky", lr=0.7)
        wanted = "method='cholesky'"
    elif what == "sgd":
        other = torch.optim.SGD(conv_net().parameters(), lr=0.7)
        wanted = "method=None"
    elif what == "shape":
        layers = [nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(13, 3)]
        other = KFAC(nn.Sequential(*layers), lr=0.7)
        wanted = r"has shape \(3, 13\) in the state and \(3, 12\) here"
    else:
        other = KFAC(conv_net(), lr=0.7)
        wanted = "entries"
    state = other.state_dict()
    if what == "missing":
        del state["state"][0]["step"]
    with pytest.raises(ValueError, match=wanted):
        optimizer.load_state_dict(state)
    assert_same_bits(optimizer.state_dict(), kept)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"momentum": -0.1}, "Invalid momentum value: -0.1"),
        ({"weight_decay": -0.1}, "Invalid weight_decay value: -0.1"),
        ({"damping": 0.0}, "Invalid damping: 0.0"),
        ({"factor_decay": 1.0}, "Invalid factor_decay: 1.0"),
        ({"kl_clip": 0.0}, "Invalid kl_clip: 0.0"),
        ({"factor_update_interval": 0}, "Invalid factor_update_interval: 0"),
        ({"inverse_update_interval": 2.5}, "Invalid inverse_update_interval: 2.5"),
        ({"inverse_update_interval": 4}, "below factor_update_interval=5"),
        ({"method": "svd"}, "Invalid method: 'svd' (eigen or cholesky)"),
        ({"normalization": "x"}, "Invalid normalization: 'x' (fisher or pauloski)"),
        ({"precondition_weight_decay": True, "weight_decay": 0.0}, "there is no weight_decay"),
        ({"skip_layers": ["fc9"]}, "the model has no layer 'fc9'"),
        ({"skip_layers": "fc"}, "Invalid skip_layers: 'fc'"),
        ({"skip_layers": ["0", "3"]}, "left out: 0 (skip_layers), 3 (skip_layers)"),
        ({"dampin": 0.1}, "did you mean 'damping'"),
    ],
)
def test_mistakes_are_told_in_one_line(settings: dict[str, Any], wanted: str) -> None:
    config = {**compose_config(["optimizer=kfac"]).optimizer, **settings}
    with pytest.raises(UserError) as told:
        build_optimizer(config, conv_net())
    assert wanted in str(told.value) and "\n" not in str(told.value)


def test_model_without_a_layer_to_precondition_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match=r"Sequential has none; left out: 0 \(groups=2\); use"):
        KFAC(net)


def test_second_parameter_group_is_refused() -> None:
    optimizer = KFAC(conv_net())
    with pytest.raises(ValueError, match="no further group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


@pytest.mark.parametrize("method", ["eigen", "cholesky"])
def test_factors_that_are_not_finite_show_in_the_weights(method: Any) -> None:
    """The run is then recorded as diverged; an exception would call it crashed."""
    net = conv_net()
    optimizer = KFAC(net, method=method, factor_update_interval=1, inverse_update_interval=1)
    images, labels = batch()
    images[0, 0, 0, 0] = math.inf
    backward(net, images, labels)
    optimizer.step()
    assert not torch.isfinite(net[0].weight).any()


def test_damping_below_the_precision_is_told() -> None:
    net = conv_net(torch.float32)
    optimizer = KFAC(net, damping=1e-30, method="cholesky")
    images, labels = batch(examples=1)  # of rank one
    backward(net, 1e3 * images.float(), labels)
    with pytest.raises(RuntimeError, match=r"layer '.*damping=1e-30 is too small"):
        optimizer.step()


# --- through a run --------------------------------------------------------------------------------


def test_run_that_is_cut_ends_with_the_same_bits(tmp_path: Path) -> None:
    """22 steps an epoch; cut at step 25, between updates of the factors and of the inverses."""
    changes = {"optimizer": CONFIG, "train.checkpoint_interval": 5}
    whole, cut = run_spec(tmp_path / "whole", **changes), run_spec(tmp_path / "cut", **changes)
    assert Trainer(whole).run() == "done"
    trainer = Trainer(cut)
    stop_at(25, trainer)
    assert newest_state(cut)["position"]["step"] == 25
    assert Trainer(cut).run() == "done"
    assert_same_run(cut, whole)
    losses = [r["loss"] for r in read_metrics(whole.directory / "metrics.jsonl") if "loss" in r]
    assert losses[-1] < 0.5 * losses[0]


def test_command_trains_in_a_worker(tmp_path: Path) -> None:
    arguments = ["optimizer=kfac", "scale=smoke", "launch=subprocess", f"results_dir={tmp_path}"]
    ended = subprocess.run(
        [sys.executable, "-m", "experiments.train", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    (directory,) = tmp_path.glob("runs/digits_mlp/kfac/smoke-seed0-*")
    status = read_status(directory)
    assert status is not None and status.status == "done"
    epochs = [r for r in read_metrics(directory / "metrics.jsonl") if r["kind"] == "epoch"]
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"]


def test_factor_that_defeats_single_precision_is_solved_in_double(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # LAPACK's failure depends on its version, so that it is played here: the rest is real.
    eigh = torch.linalg.eigh

    def fails_in_single(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        values, vectors = eigh(matrix)
        return values, vectors

    columns = torch.randn(30, 3)
    factor = columns @ columns.T
    monkeypatch.setattr(torch.linalg, "eigh", fails_in_single)
    bases = kronecker.eigenbases(kronecker.Factors(factor, factor))
    values, vectors = bases["inputs_eigenvalues"], bases["inputs_eigenvectors"]
    assert values.dtype == vectors.dtype == torch.float32
    torch.testing.assert_close(vectors @ values.diag() @ vectors.T, factor, rtol=1e-5, atol=1e-5)
