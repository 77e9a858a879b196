"""H applied to vectors that a user gives: p = W v, then H v = γ v + Wᵀ C p, in every block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mlbfgs.direction import hessian_direction
from mlbfgs.flat_state import FlatState, whole_tensors
from mlbfgs.layout import local


def hessian_product(
    flat: FlatState, params: Sequence[Tensor], vectors: Sequence[Tensor]
) -> list[Tensor]:
    """H times a vector.

    Args:
        flat: the state.
        params: the parameters, in any order.
        vectors: one tensor for each of them, of its shape.

    Returns:
        The product in the same order and shapes, in the dtype of the averages; to a frozen
        parameter's vector H is the identity.

    Raises:
        ValueError: there are other than the parameters' numbers or shapes.
    """
    if len(vectors) != len(params):
        raise ValueError(f"{len(vectors)} vectors were given for {len(params)} parameters")
    layout, history = flat.layout, flat.history
    given = dict(zip(params, vectors, strict=True))
    names = dict(zip(layout.params, layout.names, strict=True))
    for p, v in given.items():
        if v.shape != p.shape:
            raise ValueError(
                f"the vector for {names.get(p, 'a frozen parameter')} has shape {tuple(v.shape)}, "
                f"expected {tuple(p.shape)}"
            )
    vector = torch.empty(layout.numel, dtype=layout.dtype, device=layout.device)
    for i, p in enumerate(layout.params):
        layout.put(vector, i, local(given[p]))
    sums = history.new_sums()[0]
    for s in layout.segments:
        history.project(sums, s.block, s.start, s.stop, vector[s.start : s.stop])
    flat.collectives.sum_step(sums)
    direction = hessian_direction(history, sums[:, :-1])
    assert direction.c is not None
    rows = direction.c.to(layout.dtype)
    for s in layout.segments:
        history.combine_(direction.a, rows, s.block, s.start, s.stop, vector[s.start : s.stop])
    product = dict(zip(layout.params, whole_tensors(vector, flat), strict=True))
    return [product[p] if p in product else given[p].to(layout.dtype, copy=True) for p in params]
