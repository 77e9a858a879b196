"""The plan against what is measured: bytes allocated and sent, FLOPs counted by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments import plan as plan_command
from experiments.composition import compose_config
from experiments.cost_plan import META, CostPlan, make_plan, predict
from experiments.data import build_data
from experiments.data.shapes import DataShape, data_shape
from experiments.models import build_model
from experiments.plan import main, read_hardware
from experiments.runs.spec import RunSpec
from experiments.training.ranks import JoinedRanks
from experiments.training.task import build_task
from mlbfgs.distributed_state import StateShard
from tests.experiments.run_configs import ROOT, run_spec
from tests.gloo import run_ranks

ADAM = {"name": "adam", "_target_": "torch.optim.Adam", "lr": 0.01}
HISTORY = ("s_history", "y_history")
AVERAGES = ("param_progress", "grad_average", "param_snapshot", "grad_snapshot")
DISTRIBUTIONS = ("replicated", "blocks", "sharded")


def quasi_newton(distribution: str) -> dict[str, Any]:
    return {
        "name": "mlbfgs",
        "_target_": "mlbfgs.MLBFGS",
        "lr": 0.05,
        "update_interval": 2,
        "history_size": 3,
        "blocks": 3,
        "distribution": distribution,
    }


def spec_of(folder: Path, optimizer: dict[str, Any]) -> RunSpec:
    return run_spec(
        folder, **{"model": {"name": "mlp", "hidden": [48, 24]}, "optimizer": optimizer}
    )


def planned(spec: RunSpec, world_size: int) -> CostPlan:
    data = data_shape(spec.config.dataset)
    with torch.device(META):
        model = build_model(
            spec.config.model, num_classes=data.num_classes, input_shape=data.input_shape
        )
    return make_plan(
        model.train(),
        OmegaConf.to_container(spec.config.optimizer),
        data,
        batch_size=int(spec.config.train.batch_size),
        micro_batch=None,
        world_size=world_size,
    )


def measured(rank: int, specs: list[RunSpec]) -> list[dict[str, Any]]:
    """Nine real steps: bytes of what lies there afterwards, and of what was sent in the last."""
    results = []
    for spec in specs:
        ranks = JoinedRanks(dist.HashStore(), timeout_s=30.0, local_rank=rank)
        task = build_task(spec, torch.device("cpu"), ranks)
        sent = []
        for batch in list(task.data.train_batches(0))[:9]:
            task.optimizer.zero_grad()
            torch.autograd.backward(cross_entropy(task.parallel(batch.images), batch.labels))
            task.optimizer.step()
            if hasattr(task.optimizer, "communication"):
                sent.append(task.optimizer.communication()["last_step"])
        bytes_of: dict[str, int] = {}
        for state in task.optimizer.state.values():
            for kind, value in state.items():
                if isinstance(value, Tensor):
                    local = value.local if isinstance(value, StateShard) else value
                    bytes_of[kind] = bytes_of.get(kind, 0) + local.nbytes
        buckets = task.parallel._get_ddp_logging_data()["bucket_sizes"]
        results.append(
            {
                "images": len(batch.labels),
                "parameters": sum(p.nbytes for p in task.model.parameters()),
                "gradients": sum(p.grad.nbytes for p in task.model.parameters()),
                "state": bytes_of,
                "buckets": sum(int(size) for size in str(buckets).split(",")),
                "sent": sent[-2:],
            }
        )
    return results


@pytest.mark.slow
def test_memory_and_messages_are_those_of_real_ranks(tmp_path: Path) -> None:
    optimizers = [*(quasi_newton(mode) for mode in DISTRIBUTIONS), ADAM]
    specs = [spec_of(tmp_path, optimizer) for optimizer in optimizers]
    for world_size in (1, 2, 4):
        results = run_ranks(measured, world_size, specs, time_limit_s=240)
        for i, spec in enumerate(specs):
            plan = planned(spec, world_size)
            of_ranks = [result[i] for result in results]
            first = of_ranks[0]
            assert plan.images == max(r["images"] for r in of_ranks)
            assert plan.memory["parameters"] == first["parameters"] == first["gradients"]
            assert plan.memory["gradients"] == first["gradients"]
            if spec.optimizer == "adam":
                kinds = {k.removeprefix("optimizer: "): v for k, v in plan.memory.items()}
                assert {k: kinds[k] for k in first["state"]} == first["state"]
                continue
            for kind, names in (
                ("history", HISTORY),
                ("averages and snapshots", AVERAGES),
                ("momentum_buffer", ("momentum_buffer",)),
            ):
                most = max(sum(r["state"][name] for name in names) for r in of_ranks)
                told = plan.memory[f"optimizer: {kind}"]  # with less than 64 bytes a block and row
                rows = 2 * 3 if kind == "history" else len(names)
                assert most <= told < most + 64 * 3 * rows, (kind, world_size, i)
            check_messages(plan, first, world_size)


def check_messages(plan: CostPlan, first: dict[str, Any], world_size: int) -> None:
    every_step, pairs = dict(plan.messages.every_step), dict(plan.messages.every_interval)
    if world_size == 1:
        assert not every_step and not any(sum(step.values()) for step in first["sent"])
        return
    assert every_step.pop("all-reduce of gradients") == first["buckets"]
    # the ninth step is an ordinary one, the eighth made a pair (T = 2), and not the second
    pair_step, ordinary = first["sent"]
    assert sorted(every_step.values()) == sorted(ordinary.values())
    assert sorted([*every_step.values(), *pairs.values()]) == sorted(pair_step.values())


def test_flops_and_activations_of_a_small_network_by_hand() -> None:
    data = DataShape(num_classes=5, input_shape=(3, 4, 4), train_size=100)
    with torch.device(META):
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 7), nn.ReLU(), nn.Linear(7, 5))
    plan = make_plan(model, ADAM, data, batch_size=20, micro_batch=None, world_size=2)
    # 2 b d_in d_out forward and for each of two gradients; the first layer has one of them
    assert plan.flops == 2 * 10 * (2 * 48 * 7 + 3 * 7 * 5)
    # kept: the images, the ReLU's output (the second layer's input), the log-probabilities, labels
    # and the loss's total weight
    assert plan.memory["activations"] == 4 * 10 * (48 + 7 + 5) + 8 * 10 + 4
    assert plan.steps_per_epoch == 5 and plan.images == 10
    cut = make_plan(model, ADAM, data, batch_size=20, micro_batch=4, world_size=2)
    assert cut.passes == 3 and cut.memory["activations"] < plan.memory["activations"] / 2


def test_activations_are_those_that_a_real_pass_keeps() -> None:
    config = {"name": "cifar_resnet", "depth": 8, "width": 4}
    data = DataShape(num_classes=10, input_shape=(3, 16, 16), train_size=64)
    with torch.device(META):
        meta = build_model(config, num_classes=10, input_shape=data.input_shape).train()
    plan = make_plan(meta, ADAM, data, batch_size=8, micro_batch=None, world_size=1)
    model = build_model(config, num_classes=10, input_shape=data.input_shape).train()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = cross_entropy(model(torch.randn(8, 3, 16, 16)), torch.zeros(8, dtype=torch.int64))
    assert loss.requires_grad
    assert plan.memory["activations"] == pytest.approx(sum(kept.values()), rel=0.02)


def test_prediction_follows_its_formula_and_its_machine() -> None:
    (rtx, a100, h100), assumed = read_hardware()
    data = DataShape(num_classes=5, input_shape=(3, 4, 4), train_size=1000)
    with torch.device(META):
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4000), nn.ReLU(), nn.Linear(4000, 5))
    sharded = {**quasi_newton("sharded"), "blocks": 1}
    plan = make_plan(model, sharded, data, batch_size=100, micro_batch=None, world_size=16)
    p = predict(plan, rtx, assumed)
    assert p.compute_s == pytest.approx(plan.flops / (11.2e12 * 0.5))
    n = plan.parameters
    assert p.optimizer_s == pytest.approx(
        (4 * 3 + 12) * math.ceil(n / 16 / 16) * 16 * 4 / (448e9 * 0.8)
    )
    rate = 1.5625e9 * 0.7  # 16 ranks are two machines of 8
    seconds = {
        "gradients": 2 * 15 / 16 * 4 * n / rate + 4 * 20e-6,
        "parameters": 15 / 16 * (4 * n + 8 * 16) / rate + 4 * 20e-6,
        "projections": 2 * 15 / 16 * 7 * 8 / rate + 4 * 20e-6,
        "products": (2 * 15 / 16 * 8 * 8 / 2) / rate + 4 * 20e-6,
        "gram": (2 * 15 / 16 * 2 * 6 * 8 / 2) / rate + 4 * 20e-6,
    }
    assert p.hidden_s == pytest.approx(2 / 3 * p.compute_s)
    assert p.exposed_s + p.hidden_s == pytest.approx(sum(seconds.values()))
    assert p.epoch_s == pytest.approx(10 * p.step_s)
    faster = [predict(plan, machine, assumed).step_s for machine in (rtx, a100, h100)]
    assert faster == sorted(faster, reverse=True)
    for machine in (rtx, a100, h100):
        keys = {"peak_flops", "memory_bandwidth", "link", "network"}
        assert set(machine.sources) == keys and all(machine.sources.values())


def test_billions_of_parameters_on_1024_ranks_are_planned_without_memory(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--model", "timm:vit_gigantic_patch14_224", "--json", "--images", "1281167"]
    arguments += ["--input", "3,224,224", "--classes", "1000", "train.batch_size=4096"]
    arguments += ["optimizer=mlbfgs", "optimizer.distribution=sharded", "launch.nnodes=128"]
    assert main([*arguments, "launch.nproc=8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] > 1.8e9 and found["world_size"] == 1024
    # the fullest rank keeps its even share of 2 M n numbers (rounded up)
    numbers = found["memory_bytes"]["optimizer: history"] / 4
    assert numbers == pytest.approx(2 * 10 * found["parameters"] / 1024, rel=1e-5)
    assert found["images"] == 4


def test_committed_plans_are_those_of_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["dataset=imagenet", "--model", "torchvision:resnet50", "train.batch_size=512"]
    line += ["optimizer=mlbfgs", "optimizer.update_interval=50", "launch.nproc=8"]
    for name, more in (
        ("blocks", ['optimizer.blocks="resblocks:2"', "optimizer.distribution=blocks"]),
        ("sharded", ["optimizer.distribution=sharded"]),
    ):
        assert main([*line, *more]) == 0
        committed = (ROOT / f"results/benchmarks/plan_resnet50_{name}.txt").read_text()
        assert capsys.readouterr().out == committed, "run make bench-plan"


def test_shapes_are_those_of_the_data(tmp_path: Path) -> None:
    spec = run_spec(tmp_path, **{"dataset.holdout": 200, "dataset.drop_last": False})
    data = build_data(spec.config.dataset, batch_size=64, seed=0, device="cpu")
    shape = data_shape(spec.config.dataset)
    assert shape == DataShape(data.num_classes, data.input_shape, data.train_size, False)
    assert planned(spec, 1).steps_per_epoch == data.batches_per_epoch
    for name, size in (("cifar10", (3, 32, 32)), ("imagenet", (3, 224, 224))):
        config = compose_config([f"dataset={name}"]).dataset
        assert data_shape(config).input_shape == size
    assert data_shape(config) == DataShape(1000, (3, 224, 224), 1_281_167)


def test_report_names_every_assumption_and_every_source(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["experiment=cifar10_resnet18", "optimizer=mlbfgs", "launch.nproc=8"]
    assert main([*line, "optimizer.distribution=blocks", "optimizer.blocks=4"]) == 0
    said = capsys.readouterr().out
    machines, assumed = read_hardware()
    for machine in machines:
        assert machine.name in said
        for source in machine.sources.values():
            assert source in said
    assert "the paper's 2Md/p" in said and "4 of 8 ranks keep nothing" in said
    for word in ("x 0.5", "x 0.15", "x 0.8", "x 0.7", "20 microseconds", "left out: workspaces"):
        assert word in said
    assert assumed.latency_s == 20e-6


@pytest.mark.parametrize(("optimizer", "short"), [("kfac", True), ("adam", False)])
def test_seconds_that_leave_work_out_are_called_a_lower_bound(
    optimizer: str, short: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dataset=digits", "model=mlp", f"optimizer={optimizer}"]) == 0
    assert (f"left out: what {optimizer} computes" in capsys.readouterr().out) == short


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("optimizer=sdg", "did you mean 'sgd'"),
        ("launch.nproc=5000", "5000 ranks cannot share train.batch_size=128 images"),
        ("optimizer.distribution=even", "Invalid distribution: 'even'"),
        ("optimizer.blocks=99", "blocks=99"),
        ("--model torchvision:resnet51 --images 9 --input 3,8,8 --classes 2", "'resnet50'"),
        ("--model keras:resnet50", "must be torchvision:NAME or timm:NAME"),
        ("--images 10", "give all"),
        ("--images 10 --input 3x8x8 --classes 2", "must be C,H,W"),
        ("--utilisation 2", "must be above 0 and at most 1"),
    ],
)
def test_mistakes_are_one_line(line: str, wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith("error: ") and wanted in told[0], told


def test_the_command_needs_no_gpu_and_no_process_group() -> None:
    assert plan_command.HARDWARE_FILE.is_file() and not dist.is_initialized()
