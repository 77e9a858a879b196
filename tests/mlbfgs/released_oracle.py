"""What the released optimizers do, line by line, in NumPy: no code of the package.

A transcription of the order of operations of both releases ("block-wise" for mL-BFGS, "full-model"
for SLIM-QN), in which each difference to the printed algorithm is a switch, so that a switch can be
followed alone. It counts what happened, so that a test can tell which branches it has taken.
"""

import math
from collections import Counter

import numpy as np

#: Where everything is as printed.
PRINTED = {
    "averaging": "ema",
    "reset_grad_average": False,
    "pair_momentum": 0.0,
    "averaged_gradient": "decayed",
    "pair_threshold": None,
    "ratio_epsilon": 0.0,
    "recursion_epsilon": 0.0,
    "normalize_direction": False,
    "kl_clip": None,
    "same_step": False,
    "decay_outside_blocks": True,
    "drop_oldest_first": False,
}
BLOCKWISE = {
    **PRINTED,
    "averaging": "sum",
    "reset_grad_average": True,
    "pair_momentum": 0.9,
    "averaged_gradient": "scaled",
    "pair_threshold": -math.inf,
    "ratio_epsilon": 1e-12,
    "normalize_direction": True,
    "same_step": True,
    "decay_outside_blocks": False,
}
FULL = {
    **PRINTED,
    "averaged_gradient": "plain",
    "pair_threshold": 1e-4,
    "ratio_epsilon": 1e-5,
    "recursion_epsilon": 1e-5,
    "kl_clip": 1e-3,
    "same_step": True,
    "drop_oldest_first": True,
}


def two_loop(g, ss, ys, epsilon, ratio_epsilon):
    """The recursion, oldest pair first; H0 is that of the newest."""
    rho = [1 / (s @ y + epsilon) for s, y in zip(ss, ys, strict=True)]
    alpha = [0.0] * len(ss)
    for i in reversed(range(len(ss))):
        alpha[i] = rho[i] * (ss[i] @ g)
        g = g - alpha[i] * ys[i]
    g = (ss[-1] @ ys[-1]) / (ys[-1] @ ys[-1] + ratio_epsilon) * g
    for i in range(len(ss)):
        beta = rho[i] * (ys[i] @ g)
        g = g + (alpha[i] - beta) * ss[i]
    return g


def train(
    theta,
    gradient,
    *,
    steps,
    lr,
    switches,
    betas,
    T,
    M,
    tau0,
    bounds,
    blocks,
    weight_decay,
    momentum,
):
    """Both releases.

    Args:
        theta: (n,) first parameters.
        gradient: (θ, t) -> (n,), t from 1.
        steps: how many.
        lr: learning rate.
        switches: all of `PRINTED`'s keys.
        betas: of the averages of θ and g.
        T: update interval.
        M: history size.
        tau0: 1 - damping.
        bounds: (σ_L, σ_H) or None.
        blocks: slices of θ; what no slice covers is in no block.
        weight_decay: wd.
        momentum: of the heavy ball.

    Returns:
        The iterates after every step, and how often each branch was taken.
    """
    sw, wd, seen = switches, weight_decay, Counter()
    theta, buffer = theta.copy(), np.zeros_like(theta)
    outside = np.ones(len(theta), dtype=bool)
    for b in blocks:
        outside[b] = False
    averages, snapshots = {}, {}
    pairs = {k: ([], []) for k in range(len(blocks))}
    iterates = []

    def average(old, new, beta):
        return beta * old + new if sw["averaging"] == "sum" else beta * old + (1 - beta) * new

    for t in range(1, steps + 1):
        g = gradient(theta, t)
        decayed = g + wd * theta
        entering = {"decayed": decayed, "scaled": (1 + wd) * g, "plain": g}[sw["averaged_gradient"]]
        usable = {k: len(pairs[k][0]) > 0 for k in pairs} if not sw["same_step"] else None
        used = {k: (list(p[0]), list(p[1])) for k, p in pairs.items()}

        for k, b in enumerate(blocks):  # averages, and every T steps a pair
            if t == 1:
                averages[k] = (theta[b].copy(), entering[b].copy())
            else:
                averages[k] = (
                    average(averages[k][0], theta[b], betas[0]),
                    average(averages[k][1], entering[b], betas[1]),
                )
            if t > 1 and t % T == 0:
                if k in snapshots:
                    store_pair(averages[k], snapshots[k], pairs[k], sw, M, tau0, bounds, seen)
                snapshots[k] = averages[k]
                if sw["reset_grad_average"]:
                    averages[k] = (averages[k][0], entering[b].copy())

        if sw["same_step"]:
            usable = {k: len(pairs[k][0]) > 0 for k in pairs}
            used = pairs
        d = decayed.copy()
        if any(usable.values()):
            for k, b in enumerate(blocks):
                if usable[k]:
                    seen["preconditioned"] += 1
                    d[b] = two_loop(
                        decayed[b], *used[k], sw["recursion_epsilon"], sw["ratio_epsilon"]
                    )
            if not sw["decay_outside_blocks"]:
                d[outside] = g[outside]
                seen["outside without decay"] += outside.any()
            if sw["normalize_direction"]:
                d = d / np.sqrt(sum(d[b] @ d[b] for b in blocks))
            if sw["kl_clip"] is not None:
                product = g @ d
                scale = min(1.0, math.sqrt(sw["kl_clip"] / product)) if product > 0 else 1.0
                seen["clipped" if scale < 1 else "not clipped"] += 1
                seen["gᵀd <= 0"] += product <= 0
                d = d * scale
        buffer = momentum * buffer + d
        theta = theta - lr * buffer
        iterates.append(theta.copy())
    return iterates, seen


def store_pair(average, snapshot, pairs, sw, M, tau0, bounds, seen):
    """One pair: difference, average with the last pair, damping, acceptance."""
    ss, ys = pairs
    s, y = average[0] - snapshot[0], average[1] - snapshot[1]
    if sw["pair_momentum"] and ss:
        m = sw["pair_momentum"]
        s, y = (1 - m) * s + m * ss[-1], (1 - m) * y + m * ys[-1]
        seen["averaged with the last pair"] += 1
    mu = (s @ y) / (s @ s + sw["ratio_epsilon"])
    tau = 1.0
    if bounds is not None and mu < bounds[0]:
        tau = (1 - bounds[0]) / (1 - mu)
        seen["damped from below"] += 1
    elif bounds is not None and mu > bounds[1]:
        tau = (bounds[1] - 1) / (mu - 1)
        seen["damped from above"] += 1
    else:
        seen["between the bounds"] += 1
    tau = min(tau, tau0)
    y = tau * y + (1 - tau) * s
    if sw["drop_oldest_first"] and len(ss) == M:
        seen["oldest dropped first"] += 1
        del ss[0], ys[0]
    if sw["pair_threshold"] is not None and s @ y < sw["pair_threshold"]:
        seen["dropped"] += 1
        seen["dropped, and one lost"] += sw["drop_oldest_first"] and len(ss) == M - 1
        return
    seen["kept"] += 1
    ss.append(s)
    ys.append(y)
    if len(ss) > M:
        seen["oldest dropped"] += 1
        del ss[0], ys[0]
