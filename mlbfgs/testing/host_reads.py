"""Count the moments at which an optimizer makes the host wait for a device.

The optimizer runs on torch's device "meta", whose tensors have shapes but no numbers: whatever
needs a number from the device must pass here, while tensors on the CPU (torch's own step counters,
for example) are read freely, as on an accelerator. Each such read is counted and answered with
ones, so that the optimizer goes on as if the numbers were good.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: Operations whose result has a shape, or goes a way, that depends on numbers.
DATA_DEPENDENT = frozenset({
    "equal", "nonzero", "nonzero_numpy", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "is_nonzero", "allclose",
})  # fmt: skip


class HostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, answers reads of meta tensors and remembers them.

    Attributes:
        reads: the operations that read, in order.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reads: list[str] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer one operation."""
        given = dict(kwargs or {})
        name = str(func.overloadpacket.__name__)
        if name == "_local_scalar_dense" and _on_device(args[0]):
            self.reads.append("item")
            return _one(args[0].dtype)
        if name == "_to_copy" and _on_device(args[0]) and _is_host(given.get("device")):
            self.reads.append("copy to the host")
            return torch.ones(args[0].shape, dtype=given.get("dtype") or args[0].dtype)
        if name == "copy_" and _on_device(args[1]) and not _on_device(args[0]):
            self.reads.append("copy to the host")
            return args[0].fill_(1)
        if name in DATA_DEPENDENT and any(_on_device(a) for a in args):
            self.reads.append(name)
            if name in ("equal", "is_nonzero", "allclose"):
                return True
        if name in ("index", "index_put", "index_put_") and _has_mask(args[1]):
            self.reads.append(f"{name} by a mask")
        return func(*args, **given)


def _on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "meta"


def _is_host(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cpu"


def _has_mask(indices: Any) -> bool:
    masks = (torch.bool, torch.uint8)
    return any(isinstance(i, Tensor) and _on_device(i) and i.dtype in masks for i in indices)


def _one(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1
