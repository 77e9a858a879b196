"""The linear rate (S Theorems 1 and 2, M Theorem 2) and block-diagonal bounds (M Lemma 3).

Least squares ℓ_i(θ) = ½ (a_iᵀθ - b_i)² with b_i = a_iᵀθ*, so that L reaches 0 (which λ-PL and
L >= 0 demand together) and every constant is known:

* Λ = max ‖a_i‖², the smoothness of every ℓ_i;
* λ = 2 λ_min(A), A = mean a_i a_iᵀ: L = ½ eᵀAe and ‖∇L‖² = eᵀA²e >= 2 λ_min(A) L;
* ξ, Ξ: the extreme eigenvalues of the H that the step uses.

The theorem bounds E[L(θ_t)] given θ_{t-1} and H by α L(θ_{t-1}), α = 1 - ηλξ + η²Λ²Ξ². The
expectation over a batch of b samples drawn with replacement is computed, not sampled: with
E[ggᵀ] = (1/b) mean (a_iᵀe)² a_i a_iᵀ + (1 - 1/b) ∇L∇Lᵀ it is
L - η ∇LᵀH∇L + η²/2 tr(H A H E[ggᵀ]). The trajectory is that of `mlbfgs.MLBFGS` on real batches.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.analysis.measuring.statistics import median_interval
from experiments.theory.findings import Findings, Quantity, exact, share
from mlbfgs import MLBFGS

SAMPLES, DIMENSION, BATCH = 40, 6, 4
SIGMA_L, SIGMA_H, HISTORY, INTERVAL = 0.01, 1.5, 5, 5
CONDITION = 1e10  # of H: beyond it float64 no longer knows the smallest eigenvalue
LOST = 1e6  # a run ends where its loss is so many times the first
_DOUBLE = torch.float64


@dataclass(frozen=True)
class LeastSquares:
    """The problem with its constants.

    Attributes:
        a: (N, n) rows a_i.
        target: (N,) b_i.
        solution: (n,) θ*.
        pl: λ.
        smoothness: Λ.
    """

    a: Tensor
    target: Tensor
    solution: Tensor
    pl: float
    smoothness: float

    def loss(self, theta: Tensor) -> float:
        """Mean of ℓ_i."""
        return float(0.5 * (self.a @ theta - self.target).square().mean())

    def expected_decrease(self, theta: Tensor, h: Tensor, lr: float, batch: int) -> float:
        """(L - E[L(θ - η H g)]) / L over batches with replacement, for interpolated targets.

        Not the difference of two losses: at the learning rates of the theorem that would be
        nothing but rounding.
        """
        n_samples = len(self.a)
        curvature = self.a.T @ self.a / n_samples
        residual = self.a @ theta - self.target
        gradient = self.a.T @ residual / n_samples
        second = (self.a * residual.square()[:, None]).T @ self.a / n_samples / batch
        second = second + (1 - 1 / batch) * torch.outer(gradient, gradient)
        linear = lr * float(gradient @ h @ gradient)
        square = lr**2 / 2 * float(torch.trace(h @ curvature @ h @ second))
        return (linear - square) / self.loss(theta)


def problem(seed: int, label_noise: float = 0.0) -> LeastSquares:
    """A random least-squares problem whose samples have smoothness at most 1."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(SAMPLES, DIMENSION, generator=generator, dtype=_DOUBLE)
    a = a * torch.logspace(0, -0.5, DIMENSION, dtype=_DOUBLE)
    a = a / a.square().sum(1).max().sqrt()
    solution = torch.randn(DIMENSION, generator=generator, dtype=_DOUBLE)
    target = a @ solution
    target = target + label_noise * torch.randn(SAMPLES, generator=generator, dtype=_DOUBLE)
    smallest = float(torch.linalg.eigvalsh(a.T @ a / SAMPLES)[0])
    return LeastSquares(a, target, solution, 2 * smallest, float(a.square().sum(1).max()))


def promise(lr: float, pl: float, smoothness: float, low: float, high: float) -> float:
    """1 - α of the theorem: ηλξ - η²Λ²Ξ², the share of the loss that a step takes away."""
    return lr * pl * low - (lr * smoothness * high) ** 2


def best_rate(pl: float, smoothness: float, low: float, high: float) -> float:
    """The η that makes α smallest, λξ / (2Λ²Ξ²)."""
    return pl * low / (2 * (smoothness * high) ** 2)


@dataclass
class Trace:
    """What one run showed.

    Attributes:
        own: expected decrease over the promised one, 1 - α, at every step, with ξ and Ξ of the H
            in use and the η that is best for them; at least 1 if the theorem holds.
        stated: the same with ξ = 1/σ_H, Ξ = (M+1)/σ_L and the η that is best for those.
        losses: L along the run.
        block_gap: largest difference between the extreme eigenvalues of H and of its blocks.
        off_block: largest entry of H outside its blocks.
    """

    own: list[float]
    stated: list[float]
    losses: list[float]
    block_gap: float = 0.0
    off_block: float = 0.0


def follow(
    task: LeastSquares, seed: int, *, lr: float | None, blocks: int, steps: int, batch: int = BATCH
) -> Trace:
    """Train with the real optimizer and check the theorem at every step.

    Args:
        task: the problem.
        seed: of the batches and the start.
        lr: learning rate; None: at every step the one that makes α smallest.
        blocks: of the Hessian, each of n / blocks neighbouring parameters.
        steps: of training.
        batch: samples a batch, drawn with replacement.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    start = task.solution + torch.randn(DIMENSION, generator=generator, dtype=_DOUBLE)
    params = [nn.Parameter(part.clone()) for part in start.chunk(blocks)]
    optimizer = MLBFGS(
        params,
        lr=0.0 if lr is None else lr,
        momentum=0.0,
        betas=0.9,
        variant="paper",
        history_size=HISTORY,
        update_interval=INTERVAL,
        curvature_bounds=(SIGMA_L, SIGMA_H),
        blocks=lambda names, sizes: list(range(len(sizes))),
    )
    trace = Trace([], [], [])
    stated = (1 / SIGMA_H, (HISTORY + 1) / SIGMA_L)
    h = torch.eye(DIMENSION, dtype=_DOUBLE)
    for step in range(1, steps + 1):
        theta = torch.cat([p.detach() for p in params])
        trace.losses.append(task.loss(theta))
        if trace.losses[-1] > LOST * trace.losses[0]:
            return trace
        if step > 2 * INTERVAL and (step - 1) % INTERVAL == 0:  # a new pair entered
            h = _inverse_hessian(optimizer, params)
        spectrum = torch.linalg.eigvalsh(h)
        actual = (float(spectrum[0]), float(spectrum[-1]))
        accurate = 0 < actual[1] < CONDITION * actual[0]
        if accurate:
            for (low, high), ratios in ((actual, trace.own), (stated, trace.stated)):
                rate = best_rate(task.pl, task.smoothness, low, high)
                promised = promise(rate, task.pl, task.smoothness, low, high)
                ratios.append(task.expected_decrease(theta, h, rate, batch) / promised)
        if lr is None:
            if not accurate:  # neither are ξ and the η that follows from it
                return trace
            optimizer.param_groups[0]["lr"] = best_rate(task.pl, task.smoothness, *actual)
        _check_blocks(trace, h, spectrum, blocks)
        rows = torch.randint(SAMPLES, (batch,), generator=generator)
        residual = task.a[rows] @ theta - task.target[rows]
        gradient = task.a[rows].T @ residual / batch
        for p, g in zip(params, gradient.chunk(blocks), strict=True):
            p.grad = g.clone()
        optimizer.step()
    trace.losses.append(task.loss(torch.cat([p.detach() for p in params])))
    return trace


def run(seeds: int = 10, steps: int = 200) -> Findings:
    """Settle S-Th1, M-Th2, M-L3 and S-Th2.

    Args:
        seeds: problems and runs.
        steps: of every run.
    """
    logging.getLogger("mlbfgs").setLevel(logging.ERROR)
    found = Findings("linear_rate", settings={"seeds": seeds, "steps": steps, "batch": BATCH})
    found.settings.update(samples=SAMPLES, dimension=DIMENSION, M=HISTORY, T=INTERVAL)
    tasks = [problem(seed) for seed in range(seeds)]
    rows = []
    for blocks in (1, 3):
        best = [follow(t, s, lr=None, blocks=blocks, steps=steps) for s, t in enumerate(tasks)]
        fixed = [follow(t, s, lr=0.05, blocks=blocks, steps=steps) for s, t in enumerate(tasks)]
        both = [*best, *fixed]
        cases = sum(len(trace.own) for trace in both)
        words = f"smallest expected over promised decrease, all steps, {blocks} block(s), "
        own = min(min(trace.own) for trace in both)
        found.add(f"own_{blocks}", exact(own, f"{words}ξ and Ξ of H itself", cases))
        stated = min(min(trace.stated) for trace in both)
        words += "stated ξ = 1/σ_H, Ξ = (M+1)/σ_L"
        found.add(f"stated_{blocks}", exact(stated, words, cases))
        lost = sum(max(trace.losses) > trace.losses[0] for trace in fixed)
        words = f"share of runs at η = 0.05 that exceed their first loss, {blocks} block(s)"
        found.add(f"lost_{blocks}", share(lost, seeds, words))
        rate = median_interval([_log_rate(trace) for trace in fixed])[0]
        rows.append([blocks, own, stated, rate, f"{lost}/{seeds}"])
        if blocks > 1:
            gap = max(trace.block_gap for trace in both)
            words = "relative difference of the extreme eigenvalues of H and of its blocks, largest"
            found.add("block_gap", exact(gap, words, cases))
            off = max(trace.off_block for trace in both)
            found.add("off_block", exact(off, "largest entry of H outside its blocks", cases))
        else:
            found.series["interpolated"] = [trace.losses for trace in fixed]
    columns = ("blocks", "own ξ, Ξ", "stated ξ, Ξ", "median log10 L per 100 steps", "lost")
    title = "Expected over promised decrease, smallest of all steps; what η = 0.05 does"
    found.table(title, columns, rows)
    _label_noise(found, seeds, steps)
    _guarantee(found)
    return found


def _label_noise(found: Findings, seeds: int, steps: int) -> None:
    """The same with targets that no θ fits: λ-PL fails at the minimum."""
    noisy = [problem(seed, label_noise=0.1) for seed in range(seeds)]
    traces = [follow(t, s, lr=0.05, blocks=1, steps=steps) for s, t in enumerate(noisy)]
    found.series["label_noise"] = [trace.losses for trace in traces]
    lowest = [min(trace.losses) / trace.losses[0] for trace in traces]
    words = "median of the lowest loss reached over the first, targets with noise 0.1"
    middle, bounds = median_interval(lowest)
    quantity = Quantity(middle, bounds.low, bounds.high, seeds, words)
    found.add("label_noise_floor", quantity)
    found.notes.append(
        "M's Theorem 2 does not ask for interpolation, S's does (AS 3); but λ-PL with L >= 0 "
        "implies it. Where no θ fits all samples the loss does not go to zero."
    )


def _guarantee(found: Findings) -> None:
    """What the theorem promises with Lemma 4's constants at the papers' settings."""
    low, high = 1 / 1.5, (10 + 1) / 0.01
    lr = best_rate(2.0, 1.0, low, high)
    words = "1 - α at the best η, λ = 2, Λ = 1 (½‖θ‖²), M's σ_L, σ_H and M = 10"
    found.add("best_promise", exact(promise(lr, 2.0, 1.0, low, high), words))
    found.add("best_lr", exact(lr, "that best η"))
    alpha = 1 - promise(0.1, 2.0, 1.0, low, high)
    found.add("alpha_at_0_1", exact(alpha, "α at the papers' η = 0.1 on the same problem"))
    found.notes.append(
        "With the stated constants the rate says nothing at a usable learning rate: α < 1 only for "
        "η < λξ/(Λ²Ξ²), a millionth of the papers' η."
    )


def _inverse_hessian(optimizer: MLBFGS, params: list[nn.Parameter]) -> Tensor:
    columns = [
        torch.cat(optimizer.hessian_vector(row.chunk(len(params))))
        for row in torch.eye(DIMENSION, dtype=_DOUBLE)
    ]
    h = torch.stack(columns, dim=1)
    return (h + h.T) / 2  # symmetric up to rounding


def _check_blocks(trace: Trace, h: Tensor, spectrum: Tensor, blocks: int) -> None:
    size = DIMENSION // blocks
    block_of = torch.arange(DIMENSION) // size
    inside = block_of[:, None] == block_of[None, :]
    trace.off_block = max(trace.off_block, float(h[~inside].abs().max()) if blocks > 1 else 0.0)
    parts = [h[i : i + size, i : i + size] for i in range(0, DIMENSION, size)]
    extremes = [torch.linalg.eigvalsh(part) for part in parts]
    lowest = min(float(e[0]) for e in extremes)
    highest = max(float(e[-1]) for e in extremes)
    gap = max(abs(lowest - float(spectrum[0])), abs(highest - float(spectrum[-1])))
    trace.block_gap = max(trace.block_gap, gap / float(spectrum[-1]))


def _log_rate(trace: Trace) -> float:
    steps = len(trace.losses) - 1
    ratio = torch.tensor(trace.losses[-1] / trace.losses[0], dtype=_DOUBLE)
    return float(torch.log10(ratio)) * 100 / steps
