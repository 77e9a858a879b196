"""The settings of the optimizer: what the groups share, and which values make sense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, get_args

from torch import Tensor

from mlbfgs.damping import Bounds
from mlbfgs.direction import DirectionKind
from mlbfgs.variant import Variant, as_variant, check_choice


@dataclass(frozen=True)
class SharedSettings:
    """Settings of the one curvature history: the same in every parameter group.

    Attributes:
        betas: β1 of the parameters' average and β2 of the gradients'.
        history_size: M.
        update_interval: T, in steps.
        damping: τ0.
        curvature_bounds: (σ_L, σ_H) or None.
        direction: what stands for H g.
        variant: the switches of the released code.
    """

    betas: tuple[float, float]
    history_size: int
    update_interval: int
    damping: float
    curvature_bounds: Bounds | None
    direction: DirectionKind
    variant: Variant


DIRECTIONS = get_args(DirectionKind)
#: The names of the settings that groups share.
SHARED = tuple(field.name for field in fields(SharedSettings))


def shared_settings(groups: Sequence[Mapping[str, Any]]) -> SharedSettings:
    """Read what the parameter groups share.

    Args:
        groups: the optimizer's `param_groups`.

    Raises:
        ValueError: two groups differ, or a direction was set that there is not.
    """
    first = groups[0]
    for key in SHARED:
        for group in groups[1:]:
            if group[key] != first[key]:
                raise ValueError(
                    f"{key} must be the same in all parameter groups, not {first[key]!r} and "
                    f"{group[key]!r}: there is one curvature history"
                )
    check_choice("direction", first["direction"], DIRECTIONS)
    values: dict[str, Any] = {key: first[key] for key in SHARED}
    return SharedSettings(**{**values, "variant": Variant(**first["variant"])})


def normalize_group(group: dict[str, Any], released: Variant) -> None:
    """Bring settings that can be given in several forms into one, in place, and check all of them.

    Args:
        group: `betas` may be one number for both; `curvature_bounds` any two numbers in a row;
            `variant` anything that `as_variant` reads.
        released: what the variant "released" stands for.

    Raises:
        ValueError: a value is out of its range or of no known form.
    """
    betas, bounds = group["betas"], group["curvature_bounds"]
    if isinstance(betas, Real):
        group["betas"] = (betas, betas)
    else:
        group["betas"] = _two_numbers("betas", betas, "two numbers, or one for both")
    if bounds is not None:
        wanted = "σ_L < 1 <= σ_H, or None"
        group["curvature_bounds"] = _two_numbers("curvature_bounds", bounds, wanted)
    group["variant"] = as_variant(group["variant"], released)[0].switches()
    check_group(group)


def _two_numbers(key: str, value: object, wanted: str) -> tuple[float, float]:
    pair = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    if len(pair) != 2 or not all(isinstance(number, Real) for number in pair):
        raise ValueError(f"Invalid {key}: {value!r} ({wanted})")
    return pair


def check_group(group: Mapping[str, Any]) -> None:
    """Refuse settings of one group that are out of range, with messages in torch's own form.

    Raises:
        ValueError: a value is out of its range.
    """
    lr, (beta1, beta2) = group["lr"], group["betas"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
    elif not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")
    for key in ("momentum", "weight_decay"):
        if not group[key] >= 0.0:
            raise ValueError(f"Invalid {key} value: {group[key]}")
    for i, beta in enumerate((beta1, beta2)):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
    for key in ("history_size", "update_interval"):
        if not (isinstance(group[key], int) and group[key] >= 1):
            raise ValueError(f"Invalid {key}: {group[key]} (a whole number, at least 1)")
    if not 0.0 < group["damping"] <= 1.0:
        raise ValueError(
            f"Invalid damping: {group['damping']} (τ0 in (0, 1]; SLIM-QN's tables print 1 - τ0)"
        )
    bounds = group["curvature_bounds"]
    if bounds is not None and not bounds[0] < 1.0 <= bounds[1]:
        raise ValueError(f"Invalid curvature_bounds: {bounds} (σ_L < 1 <= σ_H, or None)")
    check_choice("direction", group["direction"], DIRECTIONS)
