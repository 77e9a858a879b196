"""The complexity tables: S Table 2, M Table 1 (formulas and measured twins), M Table 2 (its cells).

`python -m experiments.theory.complexity --T 50 --M 20` prints the tables under other settings.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace

from tabulate import tabulate

from experiments.entry import entry
from experiments.theory import cost_formulas
from experiments.theory.cost_formulas import CELLS, OPTIMIZERS, READINGS, Workload
from experiments.theory.findings import Findings, exact
from experiments.theory.networks import resnet50_workload
from experiments.theory.twins import Twin, measure, workload

SETTINGS = ("b", "b_h", "T", "M", "gamma", "p")
TWIN_INTERVAL, TWIN_SIZES = 32, (5, 10)
_ROWS: dict[str, Callable[[Workload, str], float]] = {
    "Fwd&Bwd, MACs": cost_formulas.forward_backward_compute,
    "Opt, MACs": cost_formulas.optimizer_compute,
    "Fwd&Bwd, numbers": cost_formulas.forward_backward_memory,
    "Opt, numbers": cost_formulas.optimizer_memory,
}


def run() -> Findings:
    """Settle S-T2, M-T1 and M-T2."""
    found = Findings("complexity")
    resnet50 = resnet50_workload()
    for name in (*SETTINGS, "d", "c_fb", "m_fb", "inversion", "products", "factors"):
        found.settings[name] = getattr(resnet50, name)
    found.settings["layers"] = len(resnet50.layers)
    for (row, optimizer), formula in CELLS.items():
        words = f"{row} of {optimizer}, ResNet-50/ImageNet, by M Table 1's formula, per node"
        found.add(f"{row}_{optimizer}", exact(formula(resnet50), words))
    found.series["readings"] = {
        f"{row}_{optimizer}": [[reading.words, reading.value(resnet50)] for reading in readings]
        for (row, optimizer), readings in READINGS.items()
    }
    for title, w in (
        ("M Table 1 on ResNet-50/ImageNet, per node, p = 8", resnet50),
        ("S Table 2 on the same (M Table 1 at p = 1)", replace(resnet50, p=1)),
    ):
        found.table(title, ("row", *OPTIMIZERS), formula_rows(w))
    _twins(found)
    return found


def formula_rows(w: Workload) -> list[list[str | float]]:
    """Every row of M Table 1, in MACs and numbers, constants taken as 1."""
    return [[name, *(row(w, optimizer) for optimizer in OPTIMIZERS)] for name, row in _ROWS.items()]


def cell_rows(w: Workload) -> list[list[str | float]]:
    """Every cell of M Table 2 by formula, then under its other readings."""
    rows: list[list[str | float]] = []
    for (row, optimizer), formula in CELLS.items():
        rows.append([row, optimizer, "as printed", formula(w)])
        for reading in READINGS.get((row, optimizer), ()):
            rows.append([row, optimizer, reading.words, reading.value(w)])
    return rows


@entry
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables at other settings."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.theory.complexity",
        description="M Tables 1 and 2 for ResNet-50/ImageNet at any setting.",
    )
    types = {field.name: field.type for field in fields(Workload)}
    for name in SETTINGS:
        convert = float if types[name] == "float" else int
        parser.add_argument(f"--{name}", type=convert, help="default: M Table 2's")
    options = {key: value for key, value in vars(parser.parse_args(arguments)).items() if value}
    w = replace(resnet50_workload(), **options)
    print(", ".join(f"{name} = {getattr(w, name):g}" for name in (*SETTINGS, "d", "c_fb")), "\n")
    print(tabulate(formula_rows(w), headers=("per node", *OPTIMIZERS), floatfmt=".4g"), "\n")
    print(tabulate(cell_rows(w), headers=("row", "optimizer", "reading", "value"), floatfmt=".4g"))
    return 0


def _twins(found: Findings) -> None:
    """What the real optimizers keep and compute, beside the formulas of the same network."""
    small, large = TWIN_SIZES
    rows: list[list[str | float]] = []
    twins: dict[tuple[str, int], Twin] = {}
    for m in TWIN_SIZES:
        w = workload(m, TWIN_INTERVAL)
        for name in OPTIMIZERS:
            twin = twins[name, m] = measure(name, m, TWIN_INTERVAL)
            formulas = (
                cost_formulas.optimizer_memory(w, name) / w.d,
                cost_formulas.optimizer_compute(w, name) / w.d,
            )
            ours = (twin.state_numbers, twin.products, twin.elementwise, twin.passes)
            rows.append([name, m, formulas[0], ours[0] / w.d, formulas[1]])
            rows[-1] += [value / w.d for value in ours[1:]]
    columns = ("optimizer", "M", "memory, formula / d", "state numbers / d", "Opt, formula / d")
    measured = ("products / d", "elementwise / d", "further passes, MACs / d")
    found.table(
        f"Measured twins: per step, T = {TWIN_INTERVAL}, one node", (*columns, *measured), rows
    )
    d = workload(small, TWIN_INTERVAL).d
    for name in ("mlbfgs", "slbfgs"):
        for quantity, words in (("state_numbers", "numbers kept"), ("products", "multiply-adds")):
            values = [float(getattr(twins[name, m], quantity)) for m in TWIN_SIZES]
            slope = (values[1] - values[0]) / ((large - small) * d)
            about = f"{words} by {name} per parameter and pair of the history, measured"
            found.add(f"twin_{name}_{quantity}_slope", exact(slope, about, 2))
    w, kfac = workload(small, TWIN_INTERVAL), twins["kfac", small]
    expected = cost_formulas.optimizer_memory(w, "kfac")
    about = "numbers kept by KFAC over d + 2 Σ (l² + (d/l)²), measured"
    found.add("twin_kfac_memory", exact(kfac.state_numbers / expected, about))
    about = "multiply-adds of KFAC's step over 2 Σ (l + d/l) d, measured"
    found.add("twin_kfac_opt", exact(kfac.products / (2 * w.products), about))
    about = "Σ n³ of what KFAC factorises per step over Σ (l³ + (d/l)³) / T, measured"
    found.add("twin_kfac_inversion", exact(kfac.factorisations * w.T / w.inversion, about))
    expected = cost_formulas.curvature_compute(w, "slbfgs") - w.d
    about = "multiply-adds of sL-BFGS's further passes over b C_fb + b_H C_fb / T, measured"
    found.add("twin_slbfgs_passes", exact(twins["slbfgs", small].passes / expected, about))
    found.notes.append(
        "The formulas count 2Md multiply-adds for H g: one dot product per vector of the history. "
        "The two-loop recursion, and the compact form used here, also add every vector once: 4Md; "
        "the rest is the Gram matrix of a new pair, 4Md/T. sL-BFGS needs a full gradient besides, "
        "and a Hessian product costs about two passes; b C_fb + b_H C_fb / T counts neither."
    )


if __name__ == "__main__":
    sys.exit(main())
