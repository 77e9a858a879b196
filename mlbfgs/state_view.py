"""A view into flat storage that others may take for a tensor of its own.

What `optimizer.state` shows of a parameter is a view into storage that all parameters share. torch
saves, pickles and deep-copies a view together with the whole of its storage, a plain `pickle` once
for each view. A `StateView` is a plain tensor in everything but this: what is saved or copied of it
are its own numbers.
"""

from __future__ import annotations

from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

#: What gives the same view again; everything else gives plain tensors.
_ALIASES = (Tensor.detach, Tensor.data.__get__)  # type: ignore[attr-defined]
_MOVES = (Tensor.to, Tensor.cpu, Tensor.cuda)


class StateView(Tensor):
    """A view that is saved, copied and sent alone; computing with it gives plain tensors."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Compute as with a plain tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            if func in _ALIASES:
                return result.as_subclass(cls)
            # torch moves what it then sends to other ranks, and sends memory as it lies
            return result.contiguous() if func in _MOVES else result

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """A plain tensor with memory of its own."""
        if id(self) not in memo:
            memo[id(self)] = plain(self).clone()
        copied: Tensor = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For `pickle` and `torch.save`: a plain tensor."""
        return apart(plain(self)).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def as_state_view(view: Tensor) -> Tensor:
    """The same view as a `StateView`.

    What is of a subclass already, such as the fake tensors of torch's own tracing, stays as it is.
    """
    return view.as_subclass(StateView) if type(view) is Tensor else view


def plain(view: Tensor) -> Tensor:
    """The same view as a plain tensor."""
    return view.as_subclass(Tensor)


def apart(view: Tensor) -> Tensor:
    """A tensor that can be written into a file without more than its own numbers.

    Args:
        view: a plain tensor.

    Returns:
        The view itself if its storage holds nothing else; else a copy, which lies in host memory,
        because whoever saves a state keeps all copies until the file is written.
    """
    if view.untyped_storage().nbytes() == view.nbytes:
        return view
    return view.clone() if view.device.type in ("cpu", "meta") else view.cpu()


def _send(view: StateView) -> Any:
    """To another process as torch sends tensors: both see the same memory."""
    return reduce_tensor(plain(view))  # type: ignore[no-untyped-call]


ForkingPickler.register(StateView, _send)
