"""The bar of the benchmark `first_contact`, and its Markdown page."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks.report import origin_line, table

#: A run whose training loss ends above this share of its first loss has diverged.
DIVERGED_ABOVE = 0.9
SUBJECT, RATE, BASELINE = "MLBFGS guarded", 0.1, "SGD"
POINTS, RELATIVE = 1.0, 0.05
CIFAR_ARMS, CIFAR_SEEDS = ("mlbfgs_guarded", "mlbfgs"), (0, 1, 2)

Run = Mapping[str, Any]


def cifar10(results: Path) -> dict[str, dict[str, float]]:
    """Final top-1 of finished runs of ResNet-8 on CIFAR-10, by arm of `controls` and seed.

    Args:
        results: the directory of results.

    Returns:
        An arm that has no finished run has no seeds.
    """
    found: dict[str, dict[str, float]] = {}
    for arm in CIFAR_ARMS:
        found[arm] = {}
        for seed in CIFAR_SEEDS:
            runs = results.glob(f"runs/controls/{arm}/reduced-seed{seed}-*")
            for run in runs:
                records = map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines())
                epochs = [record for record in records if record["kind"] == "epoch"]
                if json.loads((run / "status.json").read_text("utf-8"))["status"] == "done":
                    found[arm][str(seed)] = epochs[-1]["test_top1"]
    return found


def judged(
    problems: Mapping[str, Any], cifar: Mapping[str, Mapping[str, float]] | None = None
) -> dict[str, Any]:
    """The bar: no divergence, test metric near SGD's best, training loss below SGD's best.

    SGD's best is over its learning rates, of the means over seeds, for either number on its own.

    Args:
        problems: `problems` of first_contact.json.
        cifar: from `cifar10`; where not all seeds are there, that part is not judged.

    Returns:
        For each part of the bar the numbers and `met`.
    """
    part: dict[str, Any] = {}
    if cifar and all(len(seeds) == len(CIFAR_SEEDS) for seeds in cifar.values()):
        ours, printed = (statistics.fmean(cifar[arm].values()) for arm in CIFAR_ARMS)
        part = {"cifar10": {"ours": ours, "printed": printed, "met": ours >= printed - POINTS}}
    divergences, tests, losses = {}, {}, {}
    for name, problem in problems.items():
        runs = problem["runs"]
        guarded = [run for run in runs[SUBJECT] if run["lr"] == RATE]
        divergences[name] = sum(run["diverged"] for run in guarded)
        rates = {run["lr"] for run in runs[BASELINE]}
        theirs = [[run for run in runs[BASELINE] if run["lr"] == lr] for lr in sorted(rates)]
        test, loss = mean(guarded, "test"), mean(guarded, "train_loss")
        top1 = problem["metric"] == "top1"
        best_test = _best([mean(group, "test") for group in theirs], largest=top1)
        best_loss = _best([mean(group, "train_loss") for group in theirs], largest=False)
        near = test >= best_test - POINTS if top1 else test <= best_test * (1 + RELATIVE)
        tests[name] = {"ours": test, "sgd_best": best_test, "met": near}
        losses[name] = {"ours": loss, "sgd_best": best_loss, "met": loss < best_loss}
    lower = sum(loss["met"] for loss in losses.values())
    return {
        "divergences": {"of": divergences, "met": not any(divergences.values())},
        "test": {"of": tests, "met": all(part["met"] for part in tests.values())},
        "train_loss": {"of": losses, "met": lower >= len(problems) - 1},
        **part,
    }


def mean(runs: Sequence[Run], key: str) -> float:
    """Mean over runs; infinite where one has no finite value."""
    values = [run[key] for run in runs]
    return math.inf if None in values else statistics.fmean(values)


def _best(values: Sequence[float], *, largest: bool) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return max(finite) if largest else min(finite)


def markdown(result: Mapping[str, Any]) -> str:
    """The page: the bar, then one table for each problem.

    Args:
        result: the content of first_contact.json.
    """
    bar, problems = result["bar"], result["problems"]
    count = sum(len(p["runs"][SUBJECT]) for p in problems.values()) // 4
    seconds = sum(
        run["seconds"] for p in problems.values() for runs in p["runs"].values() for run in runs
    )
    sections = [
        "# First contact: defaults on five small problems",
        f"Batch {result['batch']}, cosine, one thread, {seconds / 60:.0f} minutes of training. The "
        "digits of scikit-learn; the text is `pydoc_data.topics` of Python "
        f"{result['python']}. {origin_line(result['origin'])}",
        f"The bar, for {SUBJECT} (the class default) at lr {RATE}, beside SGD (momentum 0.9) at "
        "the learning rate that is its best for the number in question, means over seeds:",
        table(
            ["", "measured", "met"],
            [
                [
                    f"runs of {count} that diverged",
                    str(sum(bar["divergences"]["of"].values())),
                    _met(bar["divergences"]),
                ],
                [
                    f"problems of {len(problems)} with a test top-1 at most {POINTS:g} point "
                    f"below, or a test loss at most {RELATIVE:.0%} above",
                    str(sum(part["met"] for part in bar["test"]["of"].values())),
                    _met(bar["test"]),
                ],
                [
                    f"problems with a lower training loss (wanted: {len(problems) - 1})",
                    str(sum(part["met"] for part in bar["train_loss"]["of"].values())),
                    _met(bar["train_loss"]),
                ],
                *_cifar_row(bar.get("cifar10")),
            ],
        ),
    ]
    for name, problem in problems.items():
        unit = "top-1, %" if problem["metric"] == "top1" else "test loss"
        sections += [
            f"## {name}",
            f"{problem['steps']} steps. In each cell training loss (mean of the last batches) / "
            f"{unit}, means over seeds; how many seeds diverged.",
            _problem_table(problem),
        ]
    return "\n\n".join(sections) + "\n"


def _cifar_row(part: Mapping[str, Any] | None) -> list[list[str]]:
    label = f"ResNet-8 on CIFAR-10, reduced: top-1 at most {POINTS:g} point below that as printed"
    if part is None:
        return [[label, "not run", "–"]]
    return [[label, f"{part['ours']:.2f} beside {part['printed']:.2f}", _met(part)]]


def _problem_table(problem: Mapping[str, Any]) -> str:
    rows = []
    for name, runs in problem["runs"].items():
        rates = sorted({run["lr"] for run in runs})
        cells = [_cell([run for run in runs if run["lr"] == lr], lr) for lr in rates]
        rows.append([name, *cells])
    return table(["", "lowest lr", "", "", "highest lr"], rows)


def _cell(runs: Sequence[Run], lr: float) -> str:
    diverged = sum(run["diverged"] for run in runs)
    if diverged == len(runs):
        return f"lr {lr:g}: all diverged"
    shown = f"{_shown(mean(runs, 'train_loss'))} / {_shown(mean(runs, 'test'))}"
    return f"lr {lr:g}: {shown}" + (f", {diverged} diverged" if diverged else "")


def _shown(value: float) -> str:
    return "–" if math.isinf(value) else f"{value:.4g}"


def _met(part: Mapping[str, Any]) -> str:
    return "yes" if part["met"] else "**no**"
