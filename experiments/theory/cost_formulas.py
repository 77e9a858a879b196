"""The complexity tables as functions: S Table 2 and M Table 1, and M Table 2's numbers from them.

MACs and numbers (not bytes) per iteration and node, constants of the O() taken as 1. S's table is
M's for one node, p = 1 (it writes the constants α_i and β_i for the terms in d).

Legend: `b` samples a batch and node, `b_h` (b_H) samples of the Hessian batch, `d` parameters,
`T` update interval, `M` history size, `gamma` (γ) extra backward passes of KFAC, `p` nodes;
`c_fb`, `m_fb` (C_fb, M_fb) MACs and numbers of a forward and backward pass of one sample;
layers (l_i, o_i): l_i inputs and o_i = d_i / l_i outputs of layer i's weight matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

OPTIMIZERS = ("sgd", "kfac", "slbfgs", "mlbfgs")


@dataclass(frozen=True)
class Workload:
    """A network and the settings of a training step.

    Attributes:
        layers: (inputs l_i, outputs d_i / l_i) of every layer that KFAC preconditions.
        d: all parameters.
        c_fb: MACs of forward and backward, one sample.
        m_fb: numbers that a forward and backward pass keeps, one sample.
        b: batch per node.
        b_h: Hessian batch of sL-BFGS.
        T: update interval.
        M: history size.
        gamma: extra backward passes of KFAC.
        p: nodes.
    """

    layers: tuple[tuple[int, int], ...]
    d: float
    c_fb: float
    m_fb: float = 0.0
    b: int = 64
    b_h: int = 1024
    T: int = 20
    M: int = 10
    gamma: float = 1.0
    p: int = 8

    @property
    def inversion(self) -> int:
        """Σ (l_i³ + (d_i/l_i)³)."""
        return sum(i**3 + o**3 for i, o in self.layers)

    @property
    def products(self) -> int:
        """Σ (l_i + d_i/l_i) d_i."""
        return sum((i + o) * i * o for i, o in self.layers)

    @property
    def factors(self) -> int:
        """Σ (l_i² + (d_i/l_i)²)."""
        return sum(i**2 + o**2 for i, o in self.layers)


def forward_backward_compute(w: Workload, optimizer: str) -> float:
    """MACs of the row "Fwd&Bwd", computation: the passes and the estimate of the curvature."""
    passes = w.b * w.c_fb
    return passes + curvature_compute(w, optimizer)


def curvature_compute(w: Workload, optimizer: str) -> float:
    """The same without the passes that SGD needs too: M Table 2's "Ĥ Compute"."""
    return {
        "sgd": 0.0,
        # M Table 1 prints γ b C_fb as all of KFAC's passes; with γ = 1 they are SGD's own.
        "kfac": w.d + (w.gamma - 1) * w.b * w.c_fb + w.inversion / w.T,
        "slbfgs": w.d + w.b * w.c_fb + w.b_h * w.c_fb / w.T,
        "mlbfgs": w.d / w.p,
    }[optimizer]


def optimizer_compute(w: Workload, optimizer: str) -> float:
    """MACs of the row "Opt", computation."""
    return {
        "sgd": w.d,
        "kfac": w.d + 2 * w.products,
        "slbfgs": w.d + 2 * w.M * w.d,
        "mlbfgs": w.d + 2 * w.M * w.d / w.p,
    }[optimizer]


def forward_backward_memory(w: Workload, optimizer: str) -> float:
    """Numbers of the row "Fwd&Bwd", memory."""
    extra = {"sgd": 0.0, "kfac": w.d, "slbfgs": w.d + w.b_h * w.m_fb / w.T, "mlbfgs": w.d / w.p}
    return w.b * w.m_fb + extra[optimizer]


def optimizer_memory(w: Workload, optimizer: str) -> float:
    """Numbers of the row "Opt", memory."""
    return w.d + curvature_memory(w, optimizer)


def curvature_memory(w: Workload, optimizer: str) -> float:
    """The same without the d of any optimizer: M Table 2's "Ĥ Memory"."""
    return {
        "sgd": 0.0,
        "kfac": 2 * w.factors,
        "slbfgs": 2 * w.M * w.d,
        "mlbfgs": 2 * w.M * w.d / w.p,
    }[optimizer]


@dataclass(frozen=True)
class Reading:
    """Another way to read a cell, tried where the printed formula does not give the number.

    Attributes:
        words: what is read otherwise.
        value: the cell under it.
    """

    words: str
    value: Callable[[Workload], float]


def _one_node(w: Workload) -> Workload:
    return replace(w, p=1)


#: Cell (row of M Table 2, optimizer) to its formula, as M Table 1 prints it per node.
CELLS: dict[tuple[str, str], Callable[[Workload], float]] = {
    ("fwd_bwd", "all"): lambda w: w.b * w.c_fb,
    ("h_compute", "kfac"): lambda w: curvature_compute(w, "kfac"),
    ("h_compute", "slbfgs"): lambda w: curvature_compute(w, "slbfgs"),
    ("h_compute", "mlbfgs"): lambda w: curvature_compute(w, "mlbfgs"),
    ("opt", "sgd"): lambda w: optimizer_compute(w, "sgd"),
    ("opt", "kfac"): lambda w: optimizer_compute(w, "kfac"),
    ("opt", "slbfgs"): lambda w: optimizer_compute(w, "slbfgs"),
    ("opt", "mlbfgs"): lambda w: optimizer_compute(w, "mlbfgs"),
    ("h_memory", "kfac"): lambda w: curvature_memory(w, "kfac"),
    ("h_memory", "slbfgs"): lambda w: curvature_memory(w, "slbfgs"),
    ("h_memory", "mlbfgs"): lambda w: curvature_memory(w, "mlbfgs"),
}

#: Other readings, tried in this order.
READINGS: dict[tuple[str, str], tuple[Reading, ...]] = {
    ("h_compute", "kfac"): (
        Reading(
            "γ more forward and backward passes",
            lambda w: curvature_compute(replace(w, gamma=w.gamma + 1), "kfac"),
        ),
        Reading(
            "γ more backward passes alone, 2/3 of C_fb each",
            lambda w: curvature_compute(w, "kfac") + 2 / 3 * w.gamma * w.b * w.c_fb,
        ),
        Reading("the inversion at every iteration, T = 1", lambda w: w.d + w.inversion),
    ),
    ("h_compute", "mlbfgs"): (
        Reading("not divided by p", lambda w: curvature_compute(_one_node(w), "mlbfgs")),
        Reading(
            "both averages, 2d, not divided by p",
            lambda w: 2 * curvature_compute(_one_node(w), "mlbfgs"),
        ),
    ),
    ("opt", "slbfgs"): (
        Reading("summed over the p nodes", lambda w: w.p * optimizer_compute(w, "slbfgs")),
    ),
    ("opt", "mlbfgs"): (
        Reading(
            "not divided by p, the sum over the nodes",
            lambda w: optimizer_compute(_one_node(w), "mlbfgs"),
        ),
    ),
    ("h_memory", "slbfgs"): (
        Reading("summed over the p nodes", lambda w: w.p * curvature_memory(w, "slbfgs")),
    ),
    ("h_memory", "mlbfgs"): (
        Reading(
            "not divided by p, the sum over the nodes",
            lambda w: curvature_memory(_one_node(w), "mlbfgs"),
        ),
    ),
}
