"""Kernel launches of an optimizer's step, counted on torch's fake CUDA tensors.

A fake tensor has a shape, a dtype and a device, and no numbers, so that a step on "cuda" can be
taken where there is no GPU. Every operation that is neither a view nor an allocation counts one; a
`_foreach` operation counts one, although its kernel is launched once for so many tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

#: What neither reads nor writes numbers.
_FREE = (
    *("empty", "new_empty", "empty_like", "empty_strided", "detach", "alias", "lift_fresh"),
    *("_unsafe_view", "device", "_record_function_enter_new", "_record_function_exit"),
)


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, counts the operations that would be kernel launches on a GPU.

    Attributes:
        counts: how often each operation came, by name.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.counts.values())

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Count one operation and let it go on."""
        name = str(func.overloadpacket.__name__)
        if not func.is_view and name not in _FREE:
            self.counts[name] += 1
        return func(*args, **dict(kwargs or {}))
