"""The compact form of the L-BFGS matrix, H = γ I + Wᵀ C W.

Byrd, Nocedal and Schnabel, "Representations of quasi-Newton matrices and their use in limited
memory methods", Mathematical Programming 63 (1994), Theorem 2.2. With S = [s_1 ... s_k] and
Y = [ŷ_1 ... ŷ_k] as columns, oldest first, R the upper triangle of SᵀY and D its diagonal,

    H = γ I + [S, γY] [ R⁻ᵀ (D + γ YᵀY) R⁻¹   -R⁻ᵀ ] [ Sᵀ  ]
                      [ -R⁻¹                    0   ] [ γYᵀ ]

so that with the rows of W = [S; Y]ᵀ everything but W itself is a matrix of 2M x 2M numbers that
depends on the Gram matrix W Wᵀ alone. It equals Algorithm 1 of S (Algorithm 2 of M) exactly.

The proof needs of the diagonal of R only that R_ii = 1/ρ_i, where ρ_i is what the recursion
multiplies by. A recursion that divides by s_iᵀŷ_i + ε has therefore the same form, with ε added to
the diagonals of R and D.

Legend: `M` history size; `W: (2M, n)`, rows 0 ... M-1 hold s, rows M ... 2M-1 hold ŷ, in ring
slots; `gram: (2M, 2M)`; `C: (2M, 2M)`; `pairs`: how many pairs were ever accepted.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ring_order(pairs: int, history_size: int) -> list[int]:
    """The filled ring slots, oldest pair first.

    Args:
        pairs: how many pairs were ever accepted; pair number i (from 0) lies in slot i mod M.
        history_size: M.

    Returns:
        Up to M slot numbers.
    """
    return [i % history_size for i in range(max(0, pairs - history_size), pairs)]


def compact_coefficients(
    gram: Tensor, pairs: int, *, ratio_epsilon: float = 0.0, recursion_epsilon: float = 0.0
) -> tuple[Tensor, Tensor]:
    """C and γ of the compact form from the Gram matrix.

    No value is read by the host, so this waits for nothing on an accelerator.

    Args:
        gram: (2M, 2M) float64, W Wᵀ.
        pairs: how many pairs were ever accepted, at least one; the slots follow by `ring_order`.
        ratio_epsilon: added to the denominator of γ (0 in the papers).
        recursion_epsilon: added to every s_iᵀŷ_i that is divided by (0 in the papers).

    Returns:
        C of shape (2M, 2M), zero in the rows and columns of empty slots, and γ = s_kᵀŷ_k / ŷ_kᵀŷ_k
        of the newest pair (M Algorithm 2, line 8), of shape ().
    """
    m = gram.shape[0] // 2
    k = min(pairs, m)
    s = torch.arange(pairs - k, pairs, device=gram.device) % m  # ring_order, on the device
    w = torch.cat([s, s + m])
    ordered = gram.index_select(0, w).index_select(1, w)
    sy, yy = ordered[:k, k:], ordered[k:, k:]
    d = sy.diagonal()
    gamma = d[-1] / (yy[-1, -1] + ratio_epsilon)
    identity = torch.eye(k, dtype=gram.dtype, device=gram.device)
    r = sy.triu()
    if recursion_epsilon != 0:
        r, d = r + recursion_epsilon * identity, d + recursion_epsilon
    r_inverse = torch.linalg.solve_triangular(r, identity, upper=True)
    top_left = r_inverse.T @ (torch.diag(d) + gamma * yy) @ r_inverse
    top_right = -gamma * r_inverse.T
    ordered_c = torch.cat(
        [
            torch.cat([top_left, top_right], dim=1),
            torch.cat([top_right.T, torch.zeros_like(top_left)], dim=1),
        ]
    )
    c = torch.zeros_like(gram)
    c[w.unsqueeze(1), w.unsqueeze(0)] = ordered_c
    return c, gamma
