"""What a new user meets: the optimizers at their defaults on five small problems.

    python -m experiments.benchmarks.first_contact [--problems digits_mlp,...] [--seeds 3]
    python -m experiments.benchmarks.first_contact --join A/first_contact.json B/first_contact.json

Beside SGD and AdamW; batch 64, cosine to zero, three seeds, learning rates 0.01 to 0.3 (AdamW:
3e-4 to 1e-2), all else at the default of its class. Each of the quasi-Newton optimizers runs as its
class has it (the guarded step) and as the papers print it. The problems stand in
`experiments.benchmarks.first_contact_problems`.

The bar is for guarded MLBFGS at lr 0.1, and is judged by the command itself
(`experiments.benchmarks.first_contact_report`). Part of it is a comparison of the arms
`mlbfgs_guarded` and `mlbfgs` of the experiment `controls` on CIFAR-10, read from `results/runs/`
where they are.
`--join` puts together what commands with different problems wrote at one commit.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from experiments.benchmarks.first_contact_problems import Problem, problems, text_digest
from experiments.benchmarks.first_contact_report import DIVERGED_ABOVE, cifar10, judged, markdown
from experiments.benchmarks.measure import folder_for, write_measured
from experiments.entry import entry
from experiments.errors import UserError, nearest
from experiments.given import read_json, user_path
from experiments.runs.provenance import describe_origin
from mlbfgs import MLBFGS, SLIMQN

BATCH = 64
#: The training loss of a run is the mean over its last batches.
LAST = 30
RATES = (0.01, 0.03, 0.1, 0.3)

OPTIMIZERS: dict[str, tuple[Callable[[nn.Module, float], Optimizer], tuple[float, ...]]] = {
    "SGD": (lambda net, lr: SGD(net.parameters(), lr, momentum=0.9), RATES),
    "AdamW": (lambda net, lr: AdamW(net.parameters(), lr), (3e-4, 1e-3, 3e-3, 1e-2)),
    "MLBFGS guarded": (lambda net, lr: MLBFGS(net.named_parameters(), lr), RATES),
    "MLBFGS as printed": (
        lambda net, lr: MLBFGS(net.named_parameters(), lr, variant="paper"),
        RATES,
    ),
    "SLIMQN guarded": (lambda net, lr: SLIMQN(net.named_parameters(), lr), RATES),
    "SLIMQN as printed": (
        lambda net, lr: SLIMQN(net.named_parameters(), lr, variant="paper"),
        RATES,
    ),
}


def train(
    problem: Problem,
    make: Callable[[nn.Module, float], Optimizer],
    lr: float,
    seed: int,
    steps: int | None = None,
) -> dict[str, Any]:
    """One run.

    Args:
        problem: what to train.
        make: (network, lr) -> optimizer.
        lr: learning rate at the beginning.
        seed: of the weights and of the order of the batches.
        steps: None is the problem's own number.

    Returns:
        `first_loss` of the first batch; `train_loss`, mean of the last batches, and `test`, the
        problem's metric, None where not finite; `diverged`; `steps` taken; `seconds`.
    """
    torch.manual_seed(seed)
    net = problem.model()
    optimizer = make(net, lr)
    steps = steps or problem.steps
    schedule = CosineAnnealingLR(optimizer, T_max=steps)
    inputs, targets = problem.train
    losses: list[float] = []
    start = time.perf_counter()
    for batch in itertools.islice(_batches(len(inputs), seed), steps):
        optimizer.zero_grad()
        loss = problem.loss(net(inputs[batch]), targets[batch])
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - start
    last = statistics.fmean(losses[-LAST:])
    return {
        "lr": lr,
        "seed": seed,
        "first_loss": losses[0],
        "train_loss": _finite(last),
        "test": _finite(_tested(problem, net)),
        "diverged": not last <= DIVERGED_ABOVE * losses[0],
        "steps": len(losses),
        "seconds": round(seconds, 2),
    }


def _batches(count: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count // BATCH * BATCH].view(-1, BATCH)


@torch.no_grad()
def _tested(problem: Problem, net: nn.Module) -> float:
    net.eval()
    inputs, targets = problem.test
    outputs = net(inputs)
    if problem.metric == "top1":
        return float(100 * (outputs.argmax(1) == targets).float().mean())
    loss: float = problem.loss(outputs, targets).item()
    return loss


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: a problem is unknown, or there are no seeds.
    """
    known = problems()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--problems", default=",".join(known))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--join", type=user_path, nargs="+", default=[])
    parser.add_argument("--out", type=user_path, default=Path("results/benchmarks"))
    chosen = parser.parse_args(arguments)
    for name in chosen.problems.split(","):
        if name not in known:
            raise UserError(f"--problems {name}: {nearest(name, known)}")
    if chosen.seeds < 1:
        raise UserError(f"--seeds {chosen.seeds} must be at least 1")
    chosen.problems = [known[name] for name in chosen.problems.split(",")]
    return chosen


def trained(chosen: Sequence[Problem], seeds: int) -> dict[str, Any]:
    """All runs of some problems, with their origin."""
    torch.set_num_threads(1)
    logging.getLogger("mlbfgs").setLevel(logging.ERROR)  # most printed runs have much to say
    found: dict[str, Any] = {}
    for problem in chosen:
        runs: dict[str, list[dict[str, Any]]] = {}
        for name, (make, rates) in OPTIMIZERS.items():
            runs[name] = [train(problem, make, lr, seed) for lr in rates for seed in range(seeds)]
            seconds = sum(run["seconds"] for run in runs[name])
            print(f"{problem.name}, {name}: {len(runs[name])} runs, {seconds:.0f} s", flush=True)
        found[problem.name] = {"metric": problem.metric, "steps": problem.steps, "runs": runs}
    return {
        "origin": describe_origin(torch.device("cpu")),
        "python": platform.python_version(),
        "text_sha256": text_digest(),
        "batch": BATCH,
        "problems": found,
    }


def joined(parts: Sequence[Path]) -> dict[str, Any]:
    """What several commands found, as if one had.

    Raises:
        UserError: they are of different commits or texts.
    """
    read = [read_json(path) for path in parts]
    for path, part in zip(parts, read, strict=True):
        if part["origin"]["git"] != read[0]["origin"]["git"]:
            raise UserError(f"--join: {path} was measured at another commit than {parts[0]}")
        if part["text_sha256"] != read[0]["text_sha256"]:
            raise UserError(f"--join: {path} has another text than {parts[0]}: another Python")
    found = {name: problem for part in read for name, problem in part["problems"].items()}
    ordered = {name: found[name] for name in problems() if name in found}
    return {**read[0], "problems": ordered}


@entry
def main(arguments: Sequence[str] | None = None) -> int:
    """Train, judge, write first_contact.json and first_contact.md, print the page."""
    chosen = parse(arguments)
    folder = folder_for(chosen.out, "first_contact")
    result = joined(chosen.join) if chosen.join else trained(chosen.problems, chosen.seeds)
    result["cifar10"] = cifar10(Path("results"))
    result["bar"] = judged(result["problems"], result["cifar10"])
    write_measured(folder, "first_contact", result, markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
