"""Time of one optimizer step beside its floor in memory traffic.

    python -m experiments.benchmarks.optimizer_step [--rounds 9] [--threads N] [--out DIR]

At the parameter shapes of ResNet-50 (n = 25.6 M) and ResNet-18 (n = 11.7 M), M = 10, full history.
All contenders take turns in every round of one process and medians over the rounds are compared:
on a busy machine the seconds move, the ratios hold. Nothing is warmer than in training: between two
steps of a contender lie the steps of all others, whose memory is many times any cache.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from experiments.benchmarks.measure import (
    folder_for,
    medians,
    pairs_like_training,
    state_bytes,
    time_of,
    write_measured,
)
from experiments.benchmarks.report import markdown
from experiments.benchmarks.textbook import TwoLoopStep
from experiments.entry import entry
from experiments.given import user_path
from experiments.runs.provenance import describe_origin
from mlbfgs import MLBFGS

logger = logging.getLogger(__name__)

HISTORY_SIZE = 10
UPDATE_INTERVAL = 50
#: The last step after which the history has just been filled.
FULL_HISTORY_STEP = (HISTORY_SIZE + 1) * UPDATE_INTERVAL
SETTINGS: dict[str, Any] = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 1e-4}
Pairs = list[tuple[list[Tensor], list[Tensor]]]
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": torchvision.models.resnet50,
    "resnet18": torchvision.models.resnet18,
}
#: What one step must move, in numbers for each parameter, beside reading the history twice (4M):
#: no direction exists before all of g was seen, so that g and θ pass twice.
FLOOR_ITEMS = {
    "gradient, read twice": 2,
    "parameters, read twice (weight decay, update)": 2,
    "parameters, written": 1,
    "parameter average, read and written": 2,
    "parameter snapshot, read": 1,
    "gradient average, read and written": 2,
    "momentum buffer, read and written": 2,
}


def with_history(
    params: list[nn.Parameter],
    pairs: Pairs,
    step: int,
    history_dtype: torch.dtype | None = None,
) -> MLBFGS:
    """An MLBFGS with a full history, about to take step number `step` + 1."""
    optimizer = MLBFGS(
        params,
        **SETTINGS,
        history_size=HISTORY_SIZE,
        update_interval=UPDATE_INTERVAL,
        history_dtype=history_dtype,
        variant="paper",
    )
    state = optimizer.state_dict()
    for i, values in state["state"].items():
        for slot, (s, y) in enumerate(pairs):
            values["s_history"][slot], values["y_history"][slot] = s[i], y[i]
        values["param_progress"].copy_(params[i].detach())
        values.update(step=step, seeded=1, pairs=HISTORY_SIZE)
    optimizer.load_state_dict(state)
    return optimizer


def torch_lbfgs(params: list[nn.Parameter], gradients: list[Tensor]) -> torch.optim.LBFGS:
    """torch.optim.LBFGS with a full history, made by its own steps on a quadratic."""
    optimizer = torch.optim.LBFGS(params, lr=0.1, max_iter=1, history_size=HISTORY_SIZE)
    for _ in range(HISTORY_SIZE + 2):
        for i, p in enumerate(params):
            p.grad = p.detach() * (0.5 + (i % 7) / 4)
        optimizer.step(_no_loss)  # type: ignore[no-untyped-call]
    for p, g in zip(params, gradients, strict=True):
        p.grad = g
    assert len(next(iter(optimizer.state.values()))["old_dirs"]) == HISTORY_SIZE
    return optimizer


def _no_loss() -> float:
    """What torch.optim.LBFGS evaluates here: the gradients are set beforehand."""
    return 0.0


def measure(network: str, rounds: int) -> dict[str, Any]:
    """All numbers at one network's parameter shapes."""
    torch.manual_seed(0)
    model = NETWORKS[network]()
    gradients = [torch.randn_like(p) * 1e-3 for p in model.parameters()]
    shapes = [p.shape for p in model.parameters()]
    n = sum(shape.numel() for shape in shapes)
    pairs = list(pairs_like_training(shapes, HISTORY_SIZE))

    def parameters() -> list[nn.Parameter]:
        copies = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
        for p, g in zip(copies, gradients, strict=True):
            p.grad = g
        return copies

    history = torch.stack([TwoLoopStep.flatten(s) for s, _ in pairs])
    seconds, bytes_of, profile = steps(parameters, pairs, gradients, history, rounds)
    pair_update = max(pair_step(parameters, pairs) - seconds["mlbfgs"], 0.0)

    traffic = 4 * HISTORY_SIZE + sum(FLOOR_ITEMS.values())
    read_bandwidth = history.nbytes / seconds["read"]
    floor = traffic * n * 4 / read_bandwidth
    return {
        "n": n,
        "history_size": HISTORY_SIZE,
        "read_bandwidth_GBps": read_bandwidth / 1e9,
        "copy_bandwidth_GBps": 2 * history.nbytes / seconds["copy"] / 1e9,
        "floor_numbers_per_parameter": traffic,
        "floor_s": floor,
        "mlbfgs_step_s": seconds["mlbfgs"],
        "step_over_floor": seconds["mlbfgs"] / floor,
        "mlbfgs_bfloat16_history_step_s": seconds["mlbfgs_bfloat16_history"],
        "two_loop_step_s": seconds["two_loop"],
        "two_loop_over_step": seconds["two_loop"] / seconds["mlbfgs"],
        "two_loop_in_place_step_s": seconds["two_loop_in_place"],
        "two_loop_in_place_over_step": seconds["two_loop_in_place"] / seconds["mlbfgs"],
        "torch_lbfgs_step_s": seconds["torch_lbfgs"],
        "torch_lbfgs_over_step": seconds["torch_lbfgs"] / seconds["mlbfgs"],
        "sgd_step_s": seconds["sgd"],
        "adamw_step_s": seconds["adamw"],
        "pair_update_s": pair_update,
        "pair_update_amortised_s": pair_update / UPDATE_INTERVAL,
        "state_bytes_per_parameter": {name: b / n for name, b in bytes_of.items()},
        "profile": profile,
    }


def steps(
    parameters: Callable[[], list[nn.Parameter]],
    pairs: Pairs,
    gradients: list[Tensor],
    history: Tensor,
    rounds: int,
) -> tuple[dict[str, float], dict[str, int], dict[str, float]]:
    """Median seconds and state bytes of all contenders, and the profile of ours."""
    ours = with_history(parameters(), pairs, FULL_HISTORY_STEP)
    rounded = with_history(parameters(), pairs, FULL_HISTORY_STEP, torch.bfloat16)
    flatten = TwoLoopStep.flatten
    separate = [(flatten(s), flatten(y)) for s, y in pairs]
    rest: dict[str, Any] = {**SETTINGS, "betas": (0.999, 0.999)}
    printed = TwoLoopStep(parameters(), separate, **rest, in_place=False)
    in_place = TwoLoopStep(parameters(), separate, **rest, in_place=True)
    lbfgs = torch_lbfgs(parameters(), gradients)
    sgd = torch.optim.SGD(parameters(), **SETTINGS, foreach=True)
    adamw = torch.optim.AdamW(parameters(), lr=1e-4, foreach=True)
    target = torch.empty_like(history)
    contenders: dict[str, Callable[[], object]] = {
        "read": lambda: [torch.dot(a, b) for a, b in zip(history[::2], history[1::2], strict=True)],
        "copy": lambda: target.copy_(history),
        "mlbfgs": ours.step,
        "mlbfgs_bfloat16_history": rounded.step,
        "two_loop": printed.step,
        "two_loop_in_place": in_place.step,
        "torch_lbfgs": lambda: lbfgs.step(_no_loss),  # type: ignore[no-untyped-call]
        "sgd": sgd.step,
        "adamw": adamw.step,
    }
    seconds = medians(contenders, rounds)
    optimizers: dict[str, torch.optim.Optimizer] = {
        "mlbfgs": ours,
        "mlbfgs_bfloat16_history": rounded,
        "torch_lbfgs": lbfgs,
        "sgd": sgd,
        "adamw": adamw,
    }
    sizes = {name: state_bytes(dict(opt.state)) for name, opt in optimizers.items()}
    return seconds, sizes, profile_of(ours)


def pair_step(parameters: Callable[[], list[nn.Parameter]], pairs: Pairs) -> float:
    """Median seconds of a step that ends with a pair update."""
    times = []
    for _ in range(3):
        optimizer = with_history(parameters(), pairs, FULL_HISTORY_STEP + UPDATE_INTERVAL - 1)
        times.append(time_of(optimizer.step))
        assert optimizer.curvature_records()[0]["accepted"]
    return statistics.median(times)


def profile_of(optimizer: MLBFGS) -> dict[str, float]:
    """Share of each torch operation in the time of one ordinary step, the largest first."""
    logging.getLogger("torch.profiler").setLevel(logging.ERROR)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        optimizer.step()
    own = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    total = sum(own.values())
    largest = sorted(own, key=lambda key: -own[key])[:8]
    return {key: own[key] / total for key in largest}


def end_to_end(network: str, rounds: int, *, batch: int = 16, pixels: int = 224) -> dict[str, Any]:
    """The optimizers' seconds beside forward and backward of a whole network."""
    torch.manual_seed(0)
    model = NETWORKS[network]().to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, pixels, pixels).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,))

    def forward_backward() -> None:
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]

    forward_backward()
    params = list(model.parameters())
    pairs = list(pairs_like_training([p.shape for p in params], HISTORY_SIZE))
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    ours = with_history(params, pairs, FULL_HISTORY_STEP)
    sgd = torch.optim.SGD(copies, **SETTINGS, foreach=True)
    for copy, p in zip(copies, params, strict=True):
        copy.grad = torch.randn_like(p) * 1e-3
    contenders: dict[str, Callable[[], object]] = {
        "forward_backward": forward_backward,
        "mlbfgs": ours.step,
        "sgd": sgd.step,
    }
    seconds = medians(contenders, rounds)
    passes = seconds["forward_backward"]
    return {
        "network": f"{network}, {pixels} px, batch {batch}, float32, channels last",
        "forward_backward_s": passes,
        "mlbfgs_step_s": seconds["mlbfgs"],
        "sgd_step_s": seconds["sgd"],
        "mlbfgs_share_of_forward_backward": seconds["mlbfgs"] / passes,
        "sgd_share_of_forward_backward": seconds["sgd"] / passes,
        "iteration_over_sgd": (passes + seconds["mlbfgs"]) / (passes + seconds["sgd"]),
        "paper_iteration_over_sgd": 7.9 / 7.8,  # M Table 4, minutes an epoch, 8 GPUs
    }


@entry
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write optimizer_step.json and optimizer_step.md, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=None, help="default: torch's own choice")
    parser.add_argument("--out", type=user_path, default=Path("results/benchmarks"))
    chosen = parser.parse_args(arguments)
    folder = folder_for(chosen.out, "optimizer_step")
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    result = {
        "origin": describe_origin(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "rounds": chosen.rounds,
        "floor_items": {"history, read twice": 4 * HISTORY_SIZE, **FLOOR_ITEMS},
        "sizes": {name: measure(name, chosen.rounds) for name in NETWORKS},
        "end_to_end": end_to_end("resnet50", max(3, chosen.rounds // 2)),
    }
    write_measured(folder, "optimizer_step", result, markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
