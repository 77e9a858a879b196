"""What KFAC's settings may be, and what its state consists of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from experiments.optimizers.kronecker import (
    Normalization,
    SupportedLayer,
    factor_dtype,
    input_size,
)

Method = Literal["eigen", "cholesky"]


def check_settings(values: Mapping[str, Any]) -> None:
    """Refuse settings out of their range, with messages in torch's own form.

    Args:
        values: KFAC's settings, by name.

    Raises:
        ValueError: names the first setting that will not do.
    """
    if not values["lr"] >= 0.0:
        raise ValueError(f"Invalid learning rate: {values['lr']}")
    for key in ("momentum", "weight_decay"):
        if not values[key] >= 0.0:
            raise ValueError(f"Invalid {key} value: {values[key]}")
    if not 0.0 < values["damping"] < math.inf:
        raise ValueError(f"Invalid damping: {values['damping']} (above 0)")
    if not 0.0 <= values["factor_decay"] < 1.0:
        raise ValueError(f"Invalid factor_decay: {values['factor_decay']} (in [0, 1))")
    if values["kl_clip"] is not None and not values["kl_clip"] > 0.0:
        raise ValueError(f"Invalid kl_clip: {values['kl_clip']} (above 0, or None)")
    for key in ("factor_update_interval", "inverse_update_interval"):
        if not (isinstance(values[key], int) and values[key] >= 1):
            raise ValueError(f"Invalid {key}: {values[key]} (a whole number, at least 1)")
    if values["inverse_update_interval"] < values["factor_update_interval"]:
        raise ValueError(
            f"Invalid inverse_update_interval: {values['inverse_update_interval']} is below "
            f"factor_update_interval={values['factor_update_interval']}, so inverses would be "
            "computed again from the same factors"
        )
    for key, choices in (("method", get_args(Method)), ("normalization", get_args(Normalization))):
        if values[key] not in choices:
            raise ValueError(f"Invalid {key}: {values[key]!r} ({' or '.join(choices)})")
    if values["precondition_weight_decay"] and values["weight_decay"] == 0:
        raise ValueError("Invalid precondition_weight_decay: there is no weight_decay to add")


def new_state(module: SupportedLayer, method: Method) -> dict[str, int | Tensor]:
    """All that a layer will need, so that memory does not grow once training has begun.

    Args:
        module: the layer.
        method: decides what stands for the inverse.

    Returns:
        Counters, factors and inverses of the layer: zeros.
    """
    weight = module.weight
    state: dict[str, int | Tensor] = {"step": 0, "factor_updates": 0, "inversions": 0}
    for side, size in (("inputs", input_size(module)), ("outputs", weight.shape[0])):
        zeros = partial(torch.zeros, dtype=factor_dtype(weight), device=weight.device)
        state[f"{side}_factor"] = zeros(size, size)
        if method == "eigen":
            state[f"{side}_eigenvalues"] = zeros(size)
            state[f"{side}_eigenvectors"] = zeros(size, size)
        else:
            state[f"{side}_inverse"] = zeros(size, size)
    return state


def inverse_entries(state: Mapping[str, Any]) -> list[Tensor]:
    """What of a layer's state stands for the inverse, in the order of the state."""
    ends = ("_eigenvalues", "_eigenvectors", "_inverse")
    return [value for key, value in state.items() if key.endswith(ends)]


def check_state(own: Mapping[str, Any], loaded: Mapping[str, Any]) -> None:
    """Refuse a state that has other entries, or entries of other shapes, than one's own.

    Args:
        own: of one parameter of this optimizer.
        loaded: what is to take its place.

    Raises:
        ValueError: they do not fit.
    """
    if own.keys() != loaded.keys():
        raise ValueError(
            f"the state has the entries {sorted(loaded)} where this KFAC has {sorted(own)}"
        )
    for key, value in own.items():
        if isinstance(value, Tensor) and value.shape != loaded[key].shape:
            raise ValueError(
                f"{key} has shape {tuple(loaded[key].shape)} in the state and "
                f"{tuple(value.shape)} here"
            )
