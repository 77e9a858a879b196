"""Who is timed when: all optimizers in turns in one process, or each in a process of its own."""

from __future__ import annotations

import logging
import multiprocessing
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from experiments.benchmarks.contender import Contender, OneBatch, forward_backward, network
from experiments.benchmarks.measure import time_of
from experiments.errors import UserError
from experiments.supervision import end_with_parent
from experiments.training.clock import peak_memory_bytes, restart_peak_memory

logger = logging.getLogger(__name__)

#: So many sets of gradients take turns: differences of neighbours make pairs.
GRADIENT_SETS = 3


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured.

    Attributes:
        experiment: whose network, shapes and recipes.
        width: of the network.
        batch: images.
        rounds: of the turns that all take.
        heavy_rounds: in how many of them optimizers take part that need real passes.
        device: where.
        threads: of torch; None is its own choice.
    """

    experiment: str
    width: int
    batch: int
    rounds: int
    heavy_rounds: int
    device: torch.device
    threads: int | None = None


def made_up_gradients(model: nn.Module, device: torch.device) -> list[list[Tensor]]:
    """`GRADIENT_SETS` sets of noise, laid out as the parameters."""
    params = list(model.parameters())
    torch.manual_seed(1)
    gradients = [
        [torch.randn(p.shape, device=device) * 1e-3 for p in params] for _ in range(GRADIENT_SETS)
    ]
    return [
        [torch.empty_like(p).copy_(g) for p, g in zip(params, some, strict=True)]
        for some in gradients
    ]


def measure_together(names: Sequence[str], plan: Plan) -> dict[str, Any]:
    """All numbers of all optimizers, which take turns in every round of this process.

    Args:
        names: options of the config group `optimizer`; `sgd` is always measured.
        plan: what is measured; one more round comes first and is discarded.

    Raises:
        UserError: an optimizer cannot be built.
    """
    device = plan.device
    data = OneBatch(plan.batch, device, plan.experiment)
    plain = network(plan.width, device, data)
    gradients = made_up_gradients(plain, device)
    contenders = {
        name: Contender(name, width=plan.width, data=data, gradients=gradients, device=device)
        for name in _with_sgd(names)
    }
    passes_s: list[float] = []
    for round_ in range(plan.rounds + 1):
        seconds = time_of(lambda: forward_backward(plain, data.batch), device)
        if round_:
            passes_s.append(seconds)
        for contender in contenders.values():
            if not contender.heavy:
                contender.run_cycle(record=round_ > 0)
            elif 0 < round_ <= plan.heavy_rounds:
                contender.run_cycle()
        logger.info("round %d of %d", round_, plan.rounds)
    return with_ratios(
        statistics.median(passes_s), {name: c.result() for name, c in contenders.items()}
    )


def measure_apart(names: Sequence[str], plan: Plan) -> dict[str, Any]:
    """All numbers of all optimizers, one after the other, each in a process of its own.

    So no two of them are in memory at a time, and each has a peak of memory: of a cycle of real
    steps, with forward and backward passes, from a full history on.

    Args:
        names: options of the config group `optimizer`; `sgd` is always measured.
        plan: what is measured.

    Returns:
        As `measure_together`, with `peak_memory_bytes` for each optimizer, and under `lost` those
        whose process died.

    Raises:
        UserError: an optimizer cannot be built, or not even SGD fits into the memory.
    """
    passes_s: list[float] = []
    results: dict[str, dict[str, Any]] = {}
    lost: dict[str, str] = {}
    for name in _with_sgd(names):
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            max_workers=1, mp_context=context, initializer=end_with_parent
        ) as process:
            try:
                seconds, results[name] = process.submit(measure_alone, name, plan).result()
            except BrokenProcessPool:
                lost[name] = "its process died: out of memory?"
                logger.warning("%s: %s", name, lost[name])
                continue
        passes_s += seconds
        peak = results[name]["peak_memory_bytes"] / 2**30
        logger.info("%s is measured, with a peak of %.1f GiB", name, peak)
    if "sgd" not in results:
        raise UserError(f"a step of SGD does not fit: lower --batch={plan.batch}")
    return {**with_ratios(statistics.median(passes_s), results), "lost": lost}


def measure_alone(name: str, plan: Plan) -> tuple[list[float], dict[str, Any]]:
    """One optimizer's numbers, in a process where nothing else is.

    Returns:
        Seconds of forward and backward passes (none where hooks take part in them), and the
        numbers of `Contender.result` with `peak_memory_bytes`.
    """
    if plan.threads is not None:
        torch.set_num_threads(plan.threads)
    device = plan.device
    data = OneBatch(plan.batch, device, plan.experiment)
    contender = Contender(name, width=plan.width, data=data, gradients=None, device=device)
    restart_peak_memory(device)
    contender.run_cycle(record=contender.heavy)
    peak = peak_memory_bytes(device)
    passes_s: list[float] = []
    if contender.heavy:
        for _ in range(plan.heavy_rounds - 1):
            contender.run_cycle()
    else:
        for _ in range(plan.rounds):
            passes_s.append(time_of(lambda: forward_backward(contender.model, data.batch), device))
        contender.gradients = made_up_gradients(contender.model, device)
        for _ in range(plan.rounds):
            contender.run_cycle()
    return passes_s, {**contender.result(), "peak_memory_bytes": peak}


def _with_sgd(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(["sgd", *names]))


def with_ratios(forward_backward_s: float, results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Add what an iteration takes, as a multiple of SGD's."""
    sgd_s = forward_backward_s + results["sgd"]["optimizer_s"]
    for result in results.values():
        iteration_s = forward_backward_s + result["passes_s"] + result["optimizer_s"]
        result["iteration_over_sgd"] = iteration_s / sgd_s
    return {"forward_backward_s": forward_backward_s, "optimizers": dict(results)}
