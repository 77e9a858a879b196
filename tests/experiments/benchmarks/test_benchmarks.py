"""The optimizer benchmark at a tiny network: contenders take the same step, the page is whole."""

import json
import os
import pkgutil
import sys

import pytest
import torch
from torch import nn

from experiments.benchmarks import cost_rounds, optimizer_cost, optimizer_step
from experiments.benchmarks.contender import Contender, OneBatch
from experiments.benchmarks.cost_report import markdown as cost_markdown
from experiments.benchmarks.measure import pairs_like_training
from experiments.benchmarks.optimizer_step import FULL_HISTORY_STEP, SETTINGS, with_history
from experiments.benchmarks.report import markdown
from experiments.benchmarks.textbook import TwoLoopStep
from experiments.errors import UserError


def tiny() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4, 10))


@pytest.fixture(scope="module")
def subject():
    torch.manual_seed(0)
    shapes = [p.shape for p in tiny().parameters()]
    values = [torch.randn(shape) for shape in shapes]
    gradients = [torch.randn(shape) for shape in shapes]
    return values, gradients, list(pairs_like_training(shapes, optimizer_step.HISTORY_SIZE))


def parameters(values, gradients):
    params = [nn.Parameter(v.clone()) for v in values]
    for p, g in zip(params, gradients, strict=True):
        p.grad = g
    return params


@pytest.mark.parametrize("in_place", [False, True])
def test_the_textbook_step_is_the_step_of_mlbfgs(subject, in_place):
    values, gradients, pairs = subject
    ours, theirs = parameters(values, gradients), parameters(values, gradients)
    optimizer = with_history(ours, pairs, FULL_HISTORY_STEP)
    flat = [tuple(TwoLoopStep.flatten(v) for v in pair) for pair in pairs]
    textbook = TwoLoopStep(theirs, flat, **SETTINGS, betas=(0.999, 0.999), in_place=in_place)
    before = [p.detach().clone() for p in ours]
    for _ in range(3):
        optimizer.step()
        textbook.step()
    for a, b, start in zip(ours, theirs, before, strict=True):
        assert not torch.equal(a, start)
        torch.testing.assert_close(a.detach() - start, b.detach() - start, rtol=1e-3, atol=1e-7)


def test_the_whole_benchmark_at_a_tiny_network(monkeypatch, tmp_path):
    monkeypatch.setitem(optimizer_step.NETWORKS, "tiny", tiny)
    result = {
        "origin": {"git": {"commit": "abc", "dirty": False}, "hardware": {"cpu": "some CPU"}},
        "threads": 1,
        "rounds": 2,
        "floor_items": {"history, read twice": 40, **optimizer_step.FLOOR_ITEMS},
        "sizes": {"tiny": optimizer_step.measure("tiny", rounds=2)},
        "end_to_end": optimizer_step.end_to_end("tiny", 2, batch=2, pixels=8),
    }
    numbers = result["sizes"]["tiny"]
    assert json.loads(json.dumps(result)) == result
    assert numbers["floor_numbers_per_parameter"] == 52
    assert numbers["step_over_floor"] == pytest.approx(
        numbers["mlbfgs_step_s"] / numbers["floor_s"]
    )
    memory = numbers["state_bytes_per_parameter"]
    assert memory["mlbfgs"] == 4 * (4 + 2 * 10 + 1)
    assert memory["mlbfgs_bfloat16_history"] == 4 * 5 + 2 * 20
    assert memory["sgd"] == 4
    page = markdown(result)
    assert "Commit abc (clean)" in page and "| **step / floor**" in page
    assert "nan" not in page and "unknown" not in page


CPU = torch.device("cpu")
TINY = cost_rounds.Plan(
    experiment="cifar10_resnet18", width=2, batch=4, rounds=1, heavy_rounds=1, device=CPU
)


# --- the cost table -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured():
    return cost_rounds.measure_together(["kfac", "lbfgs", "slbfgs"], TINY)


def test_every_optimizer_is_measured_in_all_that_it_does(measured):
    results = measured["optimizers"]
    assert list(results) == ["sgd", "kfac", "lbfgs", "slbfgs"]
    every = {
        name: {event: values["every_steps"] for event, values in result["events"].items()}
        for name, result in results.items()
    }
    assert every == {
        "sgd": {},
        "kfac": {"factors": 5, "inverses": 50},
        "lbfgs": {"pair": 50},
        "slbfgs": {"pair": 20, "full gradient": 12_500},  # an epoch of 4 images a batch
    }
    assert {name: result["steps_measured"] for name, result in results.items()} == {
        "sgd": 1,
        "kfac": 4,
        "lbfgs": 2,
        "slbfgs": 4,
    }
    assert results["lbfgs"]["state_bytes_per_parameter"] == 4 * (2 * 10 + 4)  # M = 10, no momentum
    # A second gradient a step, another one a step for the full pass, and Hessian products.
    assert results["slbfgs"]["passes_s"] > measured["forward_backward_s"]
    assert results["sgd"]["iteration_over_sgd"] == 1.0
    assert results["slbfgs"]["iteration_over_sgd"] > 2.0


def contender(name):
    return Contender(
        name,
        width=2,
        data=OneBatch(4, torch.device("cpu")),
        gradients=[],
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize(
    ("name", "event", "owner", "function"),
    [
        ("soap", "bases", "optimizer.soap.SOAP", "get_orthogonal_matrix_qr"),
        ("shampoo", "roots", "optimizer.shampoo", "compute_power_svd"),
    ],
)
def test_rare_work_of_a_package_is_booked_where_it_is_done(
    monkeypatch, name, event, owner, function
):
    pytest.importorskip("pytorch_optimizer")
    calls = []
    target = f"pytorch_optimizer.{owner}.{function}"
    true = pkgutil.resolve_name(target)
    monkeypatch.setattr(target, lambda *a, **k: (calls.append(a), true(*a, **k))[1])
    data = OneBatch(4, torch.device("cpu"))
    network = optimizer_cost.network(2, torch.device("cpu"), data)
    gradients = [[torch.randn_like(p) for p in network.parameters()]]
    subject = Contender(name, width=2, data=data, gradients=gradients, device=torch.device("cpu"))
    booked, done = [], []
    for _ in range(6):
        before = len(calls)
        kind, _, _ = subject.step()
        booked.append(event in kind)
        done.append(len(calls) > before)
    assert booked == done and sum(done) >= 2


def test_rare_work_is_spread_over_its_interval():
    kfac = contender("kfac")
    factors, both = frozenset({"factors"}), frozenset({"factors", "inverses"})
    kfac.seconds.update(
        {
            frozenset(): [(0.0, 1.0), (0.0, 3.0), (0.0, 2.0)],
            factors: [(0.0, 12.0)],
            both: [(0.0, 112.0)],
        }
    )
    result = kfac.result()
    assert result["ordinary_step_s"] == 2.0
    assert result["events"]["inverses"] == {"every_steps": 50, "extra_s": 100.0}
    assert result["optimizer_s"] == 2.0 + 10.0 / 5 + 100.0 / 50


def test_passes_over_more_than_a_batch_are_taken_in_proportion():
    slbfgs = contender("slbfgs")  # T = 20, b_H = 1024, a full gradient an epoch
    pair, both = frozenset({"pair"}), frozenset({"pair", "full gradient"})
    slbfgs.seconds.update({frozenset(): [(1.0, 0.5)], pair: [(3.0, 2.5)], both: [(4.0, 2.5)]})
    result = slbfgs.result()
    assert result["optimizer_s"] == 0.5 + 2.0 / 20
    assert result["passes_s"] == 1.0 + 2.0 * (1024 / 4) / 20 + 1.0 * 12_500 / 12_500


def test_ratio_is_of_iterations():
    results = {
        "sgd": {"passes_s": 0.0, "optimizer_s": 1.0},
        "other": {"passes_s": 5.0, "optimizer_s": 10.0},
    }
    ratios = cost_rounds.with_ratios(4.0, results)["optimizers"]
    assert ratios["other"]["iteration_over_sgd"] == 19.0 / 5.0


def test_cost_table_says_what_was_measured_and_what_not(measured):
    result = {
        "origin": {"git": {"commit": "abc", "dirty": False}, "hardware": {"cpu": "some CPU"}},
        "network": {"name": "resnet18", "width": 2, "input_shape": [3, 32, 32]},
        "batch": 4,
        "rounds": 1,
        "heavy_rounds": 1,
        "threads": 1,
        "left_out": {"soap": "a package is absent"},
        **measured,
    }
    assert json.loads(json.dumps(result)) == result
    page = cost_markdown(result)
    assert "Commit abc (clean); some CPU." in page and "nan" not in page
    assert "Not measured: soap (a package is absent)." in page
    rows = [line.split() for line in page.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 4 and rows[-1][1] == "slbfgs"  # the dearest iteration last


def test_optimizers_that_cannot_be_built_are_left_out_with_the_reason(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    found, left_out = optimizer_cost.available(None)
    assert set(left_out) == {"shampoo", "soap"} and "not installed" in left_out["soap"]
    assert "slbfgs" in found and "muon" in found
    assert optimizer_cost.main(["--optimizers", "sgdd"]) == 2
    assert "--optimizers 'sgdd' does not exist; did you mean 'sgd'" in capsys.readouterr().err


def test_cost_of_another_experiment_is_its_own_beside_the_printed_ratios(tmp_path, capsys):
    arguments = ["--experiment", "imagenet_resnet50", "--name", "step_cost", "--optimizers"]
    arguments += ["kfac", "--width", "4", "--batch", "2", "--rounds", "1", "--threads", "1"]
    assert optimizer_cost.main([*arguments, "--device", "cpu", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "step_cost.json").read_text())
    assert result["network"] == {"name": "resnet50", "width": 4, "input_shape": [3, 224, 224]}
    # 7.9 and 17 over 7.8 minutes.
    ratios = {"sgd": 1.0, "adam": 1.0, "mlbfgs": 1.013, "kfac": 2.179}
    assert result["printed_over_sgd"] == ratios
    page = capsys.readouterr().out
    assert "ResNet-50 of width 4, 224 x 224" in page and "mlbfgs 1.013, kfac 2.179" in page
    assert "recipes of `imagenet_resnet50`" in page
    assert optimizer_cost.printed_ratios("cifar10_resnet18") == {}


@pytest.mark.slow
def test_each_optimizer_apart_has_a_peak_of_its_own_and_the_same_events(tmp_path, capsys):
    arguments = ["--optimizers", "mlbfgs", "--width", "16", "--batch", "8", "--rounds", "1"]
    arguments += ["--threads", "1", "--apart", "--device", "cpu", "--out", str(tmp_path)]
    assert optimizer_cost.main(arguments) == 0
    result = json.loads((tmp_path / "optimizer_cost.json").read_text())
    found = result["optimizers"]
    assert {name: (list(n["events"]), n["steps_measured"]) for name, n in found.items()} == {
        "sgd": ([], 1),
        "mlbfgs": (["pair"], 2),
    }
    assert found["sgd"]["iteration_over_sgd"] == 1.0
    peaks = {name: numbers["peak_memory_bytes"] for name, numbers in found.items()}
    # 0.7 million parameters with M = 20 pairs, against one momentum.
    assert peaks["mlbfgs"] - peaks["sgd"] > 0.5 * 4 * 40 * 700_000
    page = capsys.readouterr().out
    assert "peak memory, GiB" in page and "in a process of its own" in page


def test_an_optimizer_with_hooks_is_measured_in_real_steps_alone():
    seconds, found = cost_rounds.measure_alone("kfac", TINY)
    assert seconds == [] and found["steps_measured"] == 4
    assert set(found["events"]) == {"factors", "inverses"} and found["peak_memory_bytes"] > 2**20


def exit_at_once(name: str, plan: cost_rounds.Plan) -> None:
    os._exit(1)


def test_an_optimizer_whose_process_dies_is_left_out_by_name(monkeypatch):
    monkeypatch.setattr(cost_rounds, "measure_alone", exit_at_once)
    with pytest.raises(UserError, match="a step of SGD does not fit: lower --batch=4"):
        cost_rounds.measure_apart([], TINY)
