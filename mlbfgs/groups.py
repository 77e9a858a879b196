"""Parameter groups: which parameters they hold, under which names, and whether those are known.

Groups are torch's: dictionaries with `params`, where they were given `param_names`, and settings
(`mlbfgs.settings`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

from torch import Tensor

Group = Mapping[str, Any]
Groups = Sequence[Group]


def parameters_of(groups: Groups) -> list[Tensor]:
    """Every parameter once, in the order of the groups."""
    return list(dict.fromkeys(p for group in groups for p in group["params"]))


def names_of(groups: Groups) -> list[str] | None:
    """The parameters' names in the order of `parameters_of`, None where none were given."""
    if "param_names" not in groups[0]:
        return None
    names: dict[Tensor, str] = {}
    for group in groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            names.setdefault(p, name)
    return list(names.values())


def is_active(p: Tensor) -> bool:
    """Whether a parameter may move: a frozen one has no state until it is given a gradient."""
    return p.requires_grad or p.grad is not None


def holds_state(entry: Mapping[str, Any]) -> bool:
    """Whether the state of a parameter holds anything: zeros of before the first step do not."""
    return len(entry) > 0 and entry.get("seeded", 1) != 0


def check_parameters(params: Sequence[Tensor]) -> None:
    """Refuse parameters that one flat vector cannot hold.

    Raises:
        ValueError: a parameter is complex or integer, or they are on several devices.
    """
    for p in params:
        if not p.is_floating_point():
            raise ValueError(f"parameters must be real floating-point tensors, not {p.dtype}")
    devices = sorted({str(p.device) for p in params})
    if len(devices) > 1:
        raise ValueError(
            f"all parameters must be on one device, not on {' and '.join(devices)}: "
            "they share one flat vector"
        )


class KnownParameters:
    """The parameters that a state was laid out for, to notice what others do to the groups."""

    def __init__(self, groups: Groups):
        """Remember which parameters the groups hold now."""
        self._known = [tuple(group["params"]) for group in groups]

    def are_in(self, groups: Groups) -> bool:
        """Whether the groups hold the very same parameters."""
        return len(groups) == len(self._known) and all(
            len(group["params"]) == len(known) and all(map(is_, group["params"], known))
            for group, known in zip(groups, self._known, strict=True)
        )

    def check_exchanged(self, groups: Groups) -> None:
        """Refuse groups that hold others than parameters of the same shapes.

        Raises:
            RuntimeError: parameters or groups are missing or were added.
        """
        now = [[p.shape for p in group["params"]] for group in groups]
        if now != [[p.shape for p in known] for known in self._known]:
            raise RuntimeError(
                "param_groups were changed from outside: parameters may be exchanged for others of "
                "the same shapes, add_param_group adds some, and any other change needs a new "
                "optimizer"
            )
