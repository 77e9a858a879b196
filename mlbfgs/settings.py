"""The settings of the optimizer: which values make sense, and when that is looked at.

`Settings` checks every value where it enters: at construction, in a new group, in a loaded state,
and in the first step after somebody changed it in `param_groups`. A step compares the identity of
the values with those that it checked last, which waits for nothing.

A learning rate may be a tensor, whose number may change in place. On a CPU it is read wherever it
changed. On another device the host would have to wait: there it is read at construction, in a new
group and in a loaded state, and after a change with the next pair of the curvature, every T steps,
for which the host waits anyway. Any other setting that is given as a tensor is read when it is
given, and becomes a number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from operator import is_, itemgetter
from typing import Any, get_args

import torch
from torch import Tensor

from mlbfgs.damping import Bounds
from mlbfgs.direction import DirectionKind
from mlbfgs.values import check_choice, flag, not_negative, plain_number, two_numbers, whole
from mlbfgs.variant import Variant, as_variant


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


def _learning_rate(value: object) -> Any:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if value.dtype == torch.bool or value.is_complex():
            raise ValueError(f"Invalid learning rate: {value!r} (a tensor of a real number)")
        return value
    return not_negative("learning rate", value)


def _betas(value: object) -> tuple[int | float, int | float]:
    number, wanted = plain_number(value), "two numbers, or one for both"
    pair = two_numbers("betas", value, wanted) if number is None else (number, number)
    for i, beta in enumerate(pair):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
    return pair


def _damping(value: object) -> int | float:
    number = plain_number(value)
    if number is None or not 0.0 < number <= 1.0:
        raise ValueError(
            f"Invalid damping: {value!r} (τ0 in (0, 1]; SLIM-QN's tables print 1 - τ0)"
        )
    return number


def _bounds(value: object) -> tuple[int | float, int | float] | None:
    if value is None:
        return None
    wanted = "σ_L < 1 <= σ_H, or None"
    low, high = two_numbers("curvature_bounds", value, wanted)
    if not low < 1.0 <= high:
        raise ValueError(f"Invalid curvature_bounds: {value!r} ({wanted})")
    return low, high


def _direction(value: object) -> object:
    check_choice("direction", value, DIRECTIONS)
    return value


def _count(key: str) -> Callable[[object], int]:
    return lambda value: whole(key, value, "a whole number, at least 1", 1)


#: What each setting of a group becomes, but for `variant`; a value that makes no sense is refused.
FORMS: dict[str, Callable[[object], Any]] = {
    "lr": _learning_rate,
    "momentum": lambda value: not_negative("momentum value", value),
    "weight_decay": lambda value: not_negative("weight_decay value", value),
    "maximize": lambda value: flag("maximize", value, numbers=True),
    "betas": _betas,
    "history_size": _count("history_size"),
    "update_interval": _count("update_interval"),
    "damping": _damping,
    "curvature_bounds": _bounds,
    "direction": _direction,
}
KEYS = (*FORMS, "variant")
_PLAIN = itemgetter(*FORMS)
_ABSENT = object()
#: Settings of the whole optimizer, and torch's, which would have no effect in a group.
NOT_OF_GROUPS = (
    *("blocks", "outside_blocks", "history_dtype", "distribution", "process_group"),
    *("foreach", "fused", "capturable", "differentiable"),
)


def normalize_group(group: dict[str, Any], released: Variant) -> None:
    """Bring settings that can be given in several forms into one, in place, and check all of them.

    A tensor as learning rate is read, which waits for its device.

    Args:
        group: numbers may be NumPy's or fractions; `betas` may be one number for both;
            `curvature_bounds` any two numbers in a row; `variant` anything that `as_variant` reads.
        released: what the variant "released" stands for.

    Raises:
        ValueError: a value is missing, out of its range or of no known form.
    """
    for key in KEYS:
        _normalize(group, key, released)
    if isinstance(group["lr"], Tensor) and group["lr"].device.type != "meta":
        check_rate(group["lr"].item())


def _normalize(group: dict[str, Any], key: str, released: Variant) -> None:
    if key not in group:
        raise ValueError(f"a parameter group has no {key!r}: every group needs {', '.join(KEYS)}")
    value = group[key]
    if key == "variant":
        form: Any = as_variant(value, released)[0].switches()
    else:
        form = FORMS[key](value)
    group[key] = form


def check_rate(rate: object) -> None:
    """Refuse what a tensor holds if it is no learning rate."""
    not_negative("learning rate", rate)


def refuse_in_group(group: Mapping[str, Any], name: str) -> None:
    """Refuse what would have no effect in a group.

    Args:
        group: as the user gave it.
        name: of the optimizer.

    Raises:
        ValueError: the message names the key.
    """
    for key in NOT_OF_GROUPS:
        if group.get(key):
            raise ValueError(
                f"{key}={group[key]!r} in a parameter group has no effect: leave it out, or give "
                f"it to {name} itself if that has it"
            )


def shared_settings(groups: Sequence[Mapping[str, Any]]) -> SharedSettings:
    """Read what the parameter groups share.

    Args:
        groups: the optimizer's `param_groups`, normalized.

    Raises:
        ValueError: two groups differ, or two settings contradict each other.
    """
    first = groups[0]
    for key in SHARED:
        for group in groups[1:]:
            if group[key] != first[key]:
                raise ValueError(
                    f"{key} must be the same in all parameter groups, not {first[key]!r} and "
                    f"{group[key]!r}: there is one curvature history"
                )
    values: dict[str, Any] = {key: first[key] for key in SHARED}
    variant = Variant(**first["variant"])
    if variant.drop_oldest_first and first["history_size"] == 1:
        raise ValueError(
            "variant.drop_oldest_first=True needs a history_size of at least 2: a refused pair "
            "would leave none; set it to False, or keep more pairs"
        )
    return SharedSettings(**{**values, "variant": variant})


class Settings:
    """The settings in an optimizer's groups, checked where they changed.

    Attributes:
        pending: learning rates on a device that changed and have not been read.
    """

    def __init__(self, released: Variant):
        """Nothing is checked so far.

        Args:
            released: what the variant "released" stands for.
        """
        self._released = released
        #: the values of each group that were checked, in the order of `FORMS`; the version of each
        #: tensor among the learning rates that was read; what the groups share
        self._seen: list[tuple[Any, ...]] = []
        self._versions: list[int] = []
        self._with_rates = False
        self._variant: dict[str, Any] = {}
        self._shared: SharedSettings | None = None
        self.pending: list[Tensor] = []

    def shared(self, groups: Sequence[dict[str, Any]]) -> SharedSettings:
        """Check what changed since the last call, and give what the groups share.

        Args:
            groups: the optimizer's `param_groups`; a changed value gets its plain form.

        Raises:
            ValueError: a value is missing or makes no sense, or two groups differ in what they
                share.
        """
        if self._shared is None or len(groups) != len(self._seen):
            self._look_at_all(groups)
        elif changed := [i for i, group in enumerate(groups) if not self._is_as_seen(i, group)]:
            self._look_again(groups, changed)
        if self._with_rates:
            self._look_at_rates()
        assert self._shared is not None
        return self._shared

    def _is_as_seen(self, i: int, group: Mapping[str, Any]) -> bool:
        # the variant's dictionary can be changed in place: it is compared by its values
        try:
            same = all(map(is_, _PLAIN(group), self._seen[i]))
            return same and bool(group["variant"] == self._variant)
        except KeyError:
            return False

    def _look_at_all(self, groups: Sequence[dict[str, Any]]) -> None:
        self._shared = None
        for group in groups:
            for key in KEYS:
                _normalize(group, key, self._released)
        self._remember(groups, shared_settings(groups))

    def _look_again(self, groups: Sequence[dict[str, Any]], changed: Sequence[int]) -> None:
        shared = False
        for i in changed:
            known = dict(zip(FORMS, self._seen[i], strict=True))
            for key in KEYS:
                seen = self._variant if key == "variant" else known[key]
                now = groups[i].get(key, _ABSENT)
                if now is not seen and not (key == "variant" and now == seen):
                    _normalize(groups[i], key, self._released)
                    shared = shared or key in SHARED
        assert self._shared is not None
        self._remember(groups, shared_settings(groups) if shared else self._shared)

    def _remember(self, groups: Sequence[dict[str, Any]], shared: SharedSettings) -> None:
        known = zip(self._seen, self._versions, strict=True)
        read = {id(seen[0]): version for seen, version in known}
        self._versions = [read.get(id(group["lr"]), -1) for group in groups]
        self._seen = [_PLAIN(group) for group in groups]
        self._with_rates = any(isinstance(group["lr"], Tensor) for group in groups)
        self._variant, self._shared = dict(groups[0]["variant"]), shared

    def _look_at_rates(self) -> None:
        for i, (lr, *_) in enumerate(self._seen):
            if not isinstance(lr, Tensor):
                continue
            version = -1 if lr.is_inference() else lr._version
            if version == self._versions[i] != -1:
                continue
            if lr.device.type == "cpu":
                check_rate(lr.item())
            elif all(lr is not other for other in self.pending):
                self.pending.append(lr)
            self._versions[i] = version

    def take(self, rates: Sequence[float]) -> None:
        """Check the numbers of the `pending` learning rates.

        Args:
            rates: what they hold, in their order.

        Raises:
            ValueError: one makes no sense.
        """
        self.pending = []
        try:
            for rate in rates:
                check_rate(rate)
        except ValueError:
            self._versions = [-1] * len(self._versions)  # the next pair asks again
            raise
