"""What a training on the CPU gains where its process keeps the memory of freed tensors.

    python -m experiments.benchmarks.allocator

Forward and backward passes of the networks of the reduced scales, one thread: in a process whose
allocator is as glibc has it, and in one after `experiments.training.allocator.keep_freed_memory`.
Both are alive at once and take turns, pass by pass, so that the ratio holds on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.benchmarks.contender import OneBatch, forward_backward
from experiments.benchmarks.measure import time_of
from experiments.benchmarks.report import origin_line, table
from experiments.composition import compose_config
from experiments.models import build_model
from experiments.runs.atomic import write_atomically
from experiments.runs.provenance import describe_origin
from experiments.training.allocator import keep_freed_memory
from experiments.training.clock import peak_memory_bytes, restart_peak_memory

#: Experiments whose networks of scale reduced are measured.
EXPERIMENTS = ("ablation", "controls", "blocks_cifar10", "cifar10_vit")
CPU = torch.device("cpu")

_passes: _Passes | None = None


class _Passes:
    """Passes of one network over one batch, in a process of its own."""

    def __init__(self, experiment: str, batch: int):
        torch.manual_seed(0)
        config = compose_config([f"experiment={experiment}", "scale=reduced"])
        data = OneBatch(batch, CPU, experiment)
        self._batch = data.batch
        model = build_model(
            config.model, num_classes=data.num_classes, input_shape=data.input_shape
        )
        self._model: nn.Module = model.to(memory_format=torch.channels_last)

    def run(self) -> float:
        """Seconds of a pass forward and backward."""
        return time_of(lambda: forward_backward(self._model, self._batch))


def _begin(experiment: str, batch: int, keep: bool) -> None:
    """Make this process ready: the initializer of both."""
    global _passes
    torch.set_num_threads(1)
    if keep and not keep_freed_memory():
        raise OSError("this process cannot keep freed memory: no glibc, or its variables are set")
    _passes = _Passes(experiment, batch)
    _passes.run()
    restart_peak_memory(CPU)


def _pass() -> tuple[float, int, int]:
    """Seconds, page faults and the peak of memory so far, of one pass."""
    assert _passes is not None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    seconds = _passes.run()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return seconds, faults, peak_memory_bytes(CPU)


def measure(experiment: str, batch: int, rounds: int) -> dict[str, Any]:
    """Seconds, faults and memory of both processes, and the ratio of the seconds.

    Args:
        experiment: whose network, at scale reduced.
        batch: images.
        rounds: passes of each; the first is discarded.
    """
    taken: dict[str, list[tuple[float, int, int]]] = {"given_back": [], "kept": []}
    with ExitStack() as stack:
        processes = {
            name: stack.enter_context(_process(experiment, batch, keep=name == "kept"))
            for name in taken
        }
        for index in range(rounds + 1):
            for name, process in processes.items():
                one = process.submit(_pass).result()
                if index:
                    taken[name].append(one)
    seconds, faults, peaks = ({n: [o[i] for o in v] for n, v in taken.items()} for i in range(3))
    pairs = zip(seconds["given_back"], seconds["kept"], strict=True)
    return {
        "batch": batch,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "given_back_over_kept": statistics.median(slow / fast for slow, fast in pairs),
        "page_faults": {name: statistics.median(values) for name, values in faults.items()},
        "peak_memory_bytes": {name: max(values) for name, values in peaks.items()},
    }


def _process(experiment: str, batch: int, *, keep: bool) -> Executor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, _begin, (experiment, batch, keep))


def markdown(result: dict[str, Any]) -> str:
    """The page: a row for each network.

    Args:
        result: the content of allocator.json.
    """
    both = ("given_back", "kept")
    rows = [
        [
            f"{name}, batch {one['batch']}",
            *(f"{one['seconds'][which]:.3f}" for which in both),
            f"**{one['given_back_over_kept']:.2f}**",
            *(f"{one['page_faults'][which]:,.0f}" for which in both),
            *(f"{one['peak_memory_bytes'][which] / 2**20:,.0f}" for which in both),
        ]
        for name, one in result["experiments"].items()
    ]
    head = ["network of, at scale reduced", "given back, s", "kept, s", "ratio"]
    head += [f"{what}, {how}" for what in ("faults", "peak MiB") for how in ("given back", "kept")]
    return (
        "# Freed memory: given back to the system, or kept by the process\n\n"
        "A pass forward and backward on the CPU, one thread, float32, channels last: medians of "
        f"{result['rounds']} rounds in which two processes take turns. "
        f"{origin_line(result['origin'])}\n\n{table(head, rows)}\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the JSON file and the table, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch", type=int, default=256, help="images; default: 256")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--experiments", default=",".join(EXPERIMENTS), help="comma-separated")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    chosen = parser.parse_args(arguments)
    # the processes to come read it when they load torch
    os.environ["OMP_NUM_THREADS"] = "1"
    if not keep_freed_memory():
        print("error: no glibc here, or its allocator is set from outside", file=sys.stderr)
        return 2
    result = {
        "origin": describe_origin(CPU),
        "rounds": chosen.rounds,
        "experiments": {
            name: measure(name, chosen.batch, chosen.rounds)
            for name in chosen.experiments.split(",")
        },
    }
    chosen.out.mkdir(parents=True, exist_ok=True)
    write_atomically(chosen.out / "allocator.json", json.dumps(result, indent=2) + "\n")
    page = markdown(result)
    write_atomically(chosen.out / "allocator.md", page)
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
