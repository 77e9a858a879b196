"""Hessian blocks of r consecutive ResBlocks (M: ResNet-18 and ResNet-50 at r = 2; S: r = 1).

What stands before the first ResBlock joins it, what follows one joins it. Where a module stands is
told by a parameter group that has it and ResBlocks too; else by its name, of a classifier or stem.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import cast

_RESBLOCK = re.compile(r"^((?:.*\.)?)layer(\d+)\.(\d+)\.")
#: What ResNets call the modules before and after all of that.
_STEMS = ("conv1", "bn1", "stem")
_CLASSIFIERS = ("fc", "classifier", "head", "linear")


def resblocks(
    policy: str, names: Sequence[str], layers: Sequence[str], groups: Sequence[int]
) -> list[int]:
    """The block number of every parameter under the policy `"resblocks:r"`.

    Args:
        policy: its name and r.
        names: the parameters' names, in each group in the model's order.
        layers: the layer of each parameter.
        groups: number of the parameter group of each.

    Raises:
        ValueError: the policy has another form, there is no ResBlock, or the groups do not tell
            where a module stands.
    """
    match = re.fullmatch(r"resblocks:([1-9]\d*)", policy)
    if match is None:
        raise ValueError(f"blocks={policy!r}: the policy by name is 'resblocks:r' with r >= 1")
    per_block = int(match.group(1))
    matches = [_RESBLOCK.match(name) for name in names]
    keys = [None if m is None else (int(m[2]), int(m[3])) for m in matches]
    inside = next((m[1] for m in matches if m is not None), "")  # "backbone.", "module."
    number = {key: i for i, key in enumerate(sorted({key for key in keys if key is not None}))}
    if not number:
        raise ValueError(
            f"blocks={policy!r}: no parameter is named like layer1.0.conv1.weight, as ResNets' are"
        )
    found = [None if key is None else number[key] for key in keys]
    others = [layer if at is None else None for layer, at in zip(layers, found, strict=True)]
    # What stands before the first ResBlock joins it, what follows one joins it.
    block_of: dict[str, int] = {}
    for module in dict.fromkeys(m for m in others if m is not None):
        after = _resblocks_before(module, others, found, groups, len(number))
        called = module.removeprefix(inside).partition(".")[0]
        if called in _STEMS:
            after = after[:1]
        elif called in _CLASSIFIERS:
            after = after[-1:]
        blocks = {max(at, 0) // per_block for at in after}
        if len(blocks) != 1:
            raise ValueError(
                f"blocks={policy!r}: the parameter groups do not tell where {module!r} stands "
                "among the ResBlocks (a group with both would); give a list of regular "
                "expressions or a callable instead"
            )
        (block_of[module],) = blocks
    return [
        block_of[module] if module is not None else cast(int, at) // per_block
        for module, at in zip(others, found, strict=True)
    ]


def _resblocks_before(
    module: str,
    others: Sequence[str | None],
    found: Sequence[int | None],
    groups: Sequence[int],
    count: int,
) -> range:
    """The ResBlocks that a module may directly follow, -1 for none: what all groups agree on."""
    low, high = -1, count
    for group in dict.fromkeys(groups):
        here = [i for i, g in enumerate(groups) if g == group]
        first = next((i for i in here if others[i] == module), None)
        if first is not None:
            low = max([low, *(at for i in here if i < first and (at := found[i]) is not None)])
            high = min([high, *(at for i in here if i > first and (at := found[i]) is not None)])
    return range(low, high)
