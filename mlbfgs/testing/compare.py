"""Bit-for-bit comparison of nested state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def first_difference(a: Any, b: Any, path: str = "") -> str | None:
    """Where two nested values differ first, to the last bit.

    Args:
        a: tensors, numbers, strings, None, or dicts, lists and tuples of them.
        b: the same.
        path: how messages call the values.

    Returns:
        One line, or None if they are the same in structure, types, dtypes, shapes and bits.
    """
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return _tensor_difference(a, b, path)
    if type(a) is not type(b):
        return f"{path or 'value'}: {type(a).__name__} became {type(b).__name__}"
    if isinstance(a, Mapping):
        if a.keys() != b.keys():
            return f"{path or 'dict'}: keys {list(a)} became {list(b)}"
        parts = ((a[key], b[key], f"{path}[{key!r}]") for key in a)
    elif isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return f"{path or 'list'}: {len(a)} entries became {len(b)}"
        parts = ((x, y, f"{path}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True)))
    else:
        same = a == b or (a != a and b != b)
        return None if same else f"{path or 'value'}: {a!r} became {b!r}"
    return next((d for x, y, p in parts if (d := first_difference(x, y, p)) is not None), None)


def _tensor_difference(a: Any, b: Any, path: str) -> str | None:
    name = path or "tensor"
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return f"{name}: {type(a).__name__} became {type(b).__name__}"
    for what in ("dtype", "shape", "device"):
        if getattr(a, what) != getattr(b, what):
            return f"{name}: {what} {getattr(a, what)} became {getattr(b, what)}"
    if torch.equal(_bits(a), _bits(b)):
        return None
    gap = (a.detach().double() - b.detach().double()).abs().max().item()
    return f"{name}: values differ by up to {gap:.3g}"


def _bits(t: Tensor) -> Tensor:
    """The bytes of a tensor: unlike `==` they tell -0 from 0 and take a NaN for itself."""
    t = torch.view_as_real(t.detach()) if t.is_complex() else t.detach()
    return t.contiguous().reshape(-1).view(torch.uint8)


def tensors_in(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dicts, lists and tuples, with its path."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_in(item, f"{path}[{key!r}]" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from tensors_in(item, f"{path}[{i}]")
