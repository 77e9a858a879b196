"""Both papers' algorithms as printed: slow, readable, and the oracle of the tests.

S is SLIM-QN ("A stochastic, light, momentumized quasi-Newton optimizer for deep neural networks"),
M is mL-BFGS (TMLR 2023). Read this file beside them: every line of the printed algorithms stands
here once, with its number. Nothing here is used by the optimizers of this package.

Symbols: `theta`, `g`: (n,) parameters and gradient of one block; `s`, `y`: (n,) a pair; `rho_i` is
s_iᵀy_i as both papers define it (not its inverse, which Eq. (4) of M calls rho); `M` history size,
`T` update interval (S calls it L); `k` numbers the pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


def hessian_vector(g: Tensor, ss: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """H g by the two-loop recursion (S, Algorithm 1; M, Algorithm 2).

    Args:
        g: (n,) the vector.
        ss: M vectors s_i of shape (n,), oldest first.
        ys: M vectors y_i (damped), oldest first.

    Returns:
        (n,) the direction H g.
    """
    m = len(ss)
    rho = [ss[i] @ ys[i] for i in range(m)]  # lines 1-3
    alpha = [torch.zeros_like(rho[0])] * m
    g = g.clone()
    for i in range(m):  # lines 4-7
        alpha[i] = ss[m - i - 1] @ g / rho[m - i - 1]
        g = g - alpha[i] * ys[m - i - 1]
    g = (ss[m - 1] @ ys[m - 1]) / (ys[m - 1] @ ys[m - 1]) * g  # line 8 of M, 6 of S: H0
    for i in range(m):  # lines 9-12
        beta = ys[i] @ g / rho[i]
        g = g + (alpha[m - i - 1] - beta) * ss[i]
    return g


def damping_coefficient(mu: float, tau0: float, sigma_l: float, sigma_h: float) -> float:
    """The coefficient τ of adaptive damping (S, Eq. (4); M, below Eq. (7)).

    Args:
        mu: curvature ratio sᵀy / sᵀs.
        tau0: constant coefficient, 0 < τ0 < 1.
        sigma_l: lower threshold σ_L < 1.
        sigma_h: upper threshold σ_H > 1. S prints σ_H = 1 for its experiments, against its own
            rule; the formula then gives τ = 0 for μ > 1, and 0/0 at μ = 1, which is taken as τ0.

    Returns:
        τ of ŷ = τ y + (1 - τ) s.
    """
    if mu <= sigma_l:
        return min((1 - sigma_l) / (1 - mu), tau0)
    if mu >= sigma_h:
        return min((sigma_h - 1) / (mu - 1), tau0) if mu != 1 else tau0
    return tau0


@dataclass
class Block:
    """What the algorithms keep for one parameter block."""

    param_average: Tensor  # M_θ
    grad_average: Tensor  # M_g
    param_snapshot: Tensor | None = None  # M_θ at the last multiple of T
    grad_snapshot: Tensor | None = None
    ss: list[Tensor] = field(default_factory=list)
    ys: list[Tensor] = field(default_factory=list)
    momentum_buffer: Tensor | None = None


def minimise(
    theta: Tensor,
    gradient: Callable[[Tensor, int], Tensor],
    *,
    steps: int,
    lr: float,
    T: int,
    M: int,
    beta1: float,
    beta2: float,
    tau0: float,
    sigma_l: float,
    sigma_h: float,
    blocks: Sequence[slice] | None = None,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
) -> list[Tensor]:
    """Algorithm 1 of M; with one block also Algorithm 2 of S.

    Line numbers are M's unless marked. Weight decay is S's line 4, heavy-ball momentum what S says
    it omits ("we add momentum to the parameter update after pre-conditioning following the same
    procedure as in SGD with momentum").

    Args:
        theta: (n,) the initial parameters.
        gradient: (θ, t) -> (n,), t counted from 1.
        steps: number of iterations.
        lr: learning rate η.
        T: update interval.
        M: history size.
        beta1: coefficient of the parameter average (M has one β for both).
        beta2: coefficient of the gradient average.
        tau0: constant damping coefficient.
        sigma_l: lower damping threshold.
        sigma_h: upper damping threshold.
        blocks: slices of θ; None is one block.
        weight_decay: added to the gradient as wd·θ before anything else.
        momentum: heavy-ball coefficient on the step.

    Returns:
        The iterates θ_1 ... θ_steps, each (n,), after every step.
    """
    theta = theta.clone()
    slices = list(blocks) if blocks is not None else [slice(0, theta.numel())]
    state: list[Block] = []
    iterates: list[Tensor] = []
    for t in range(1, steps + 1):  # line 2
        g = gradient(theta, t)  # lines 3-4
        g = g + weight_decay * theta  # S, line 4
        if t == 1:  # line 1: M_θ0 = θ_0, M_g0 = g_0
            state = [Block(theta[b].clone(), g[b].clone()) for b in slices]
        updated = theta.clone()
        for b, block in zip(slices, state, strict=True):  # line 5
            # line 6
            block.param_average = beta1 * block.param_average + (1 - beta1) * theta[b]
            block.grad_average = beta2 * block.grad_average + (1 - beta2) * g[b]
            if t <= 2 * T:  # lines 7-8
                step = g[b]
            else:  # lines 9-11
                step = hessian_vector(g[b], block.ss, block.ys)
            if momentum:
                previous = block.momentum_buffer
                step = step if previous is None else momentum * previous + step
                block.momentum_buffer = step
            updated[b] = theta[b] - lr * step
            if t % T == 0 and t > T:  # lines 13-17
                assert block.param_snapshot is not None and block.grad_snapshot is not None
                s = block.param_average - block.param_snapshot  # line 14
                y = block.grad_average - block.grad_snapshot
                mu = float(s @ y / (s @ s))
                tau = damping_coefficient(mu, tau0, sigma_l, sigma_h)
                block.ss = [*block.ss, s][-M:]  # line 16: the oldest pair leaves
                block.ys = [*block.ys, tau * y + (1 - tau) * s][-M:]  # line 15
            if t % T == 0:
                block.param_snapshot = block.param_average.clone()
                block.grad_snapshot = block.grad_average.clone()
        theta = updated  # line 20: every block is up to date
        iterates.append(theta.clone())
    return iterates
