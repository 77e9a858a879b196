"""The state of a parameter where ranks share it: what torch.distributed.checkpoint saves and loads.

A rank's shard holds stretches of parameters. A `StateShard` (`mlbfgs.distributed_state`) says
where in its parameter such a stretch lies, as boxes of the parameter's shape, so that a checkpoint
knows neither ranks nor blocks nor the order of memory. What some ranks saved, other ranks, one
process alone or FSDP2 load; each reads and writes its own part::

    torch.distributed.checkpoint.save({"optimizer": checkpoint_state(optimizer)}, ...)

    state = checkpoint_state(optimizer)  # of the optimizer that goes on
    torch.distributed.checkpoint.load({"optimizer": state}, ...)
    load_checkpoint_state(optimizer, state)
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor
from torch.optim import Optimizer

from mlbfgs.collectives import Collectives
from mlbfgs.growth import AVERAGE
from mlbfgs.layout import Layout, is_dtensor, local
from mlbfgs.state_view import as_state_view

if TYPE_CHECKING:
    from mlbfgs.distributed_state import StateShard


def checkpoint_state(optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state as torch.distributed.checkpoint can save it, and fill it on loading.

    Optimizer.state_dict() has numbers for keys, which that package turns into strings and does not
    find again; so tensors are named here, and everything else is one value.

    Args:
        optimizer: any whose state exists, as that of MLBFGS does from construction on.

    Returns:
        `tensors`, views of the state by `<parameter>.<key>`, where the parameter is its name if the
        optimizer knows it, else its number; and `rest`, bytes.
    """
    packed = optimizer.state_dict()
    names = _names(packed)
    tensors: dict[str, Tensor] = {}
    rest: dict[str, dict[str, Any]] = {}
    for i, values in packed["state"].items():
        # a number that states from before there was a growth limit lack is no tensor to ask for
        mine = {k: v for k, v in values.items() if isinstance(v, Tensor) and k != AVERAGE}
        rest[names[i]] = {k: v for k, v in values.items() if k not in mine}
        tensors.update({f"{names[i]}.{key}": value for key, value in mine.items()})
    buffer = io.BytesIO()
    torch.save({"state": rest, "param_groups": packed["param_groups"]}, buffer)
    return {"tensors": tensors, "rest": buffer.getvalue()}


def load_checkpoint_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Continue from a state that `checkpoint_state` gave and torch.distributed.checkpoint filled.

    Args:
        optimizer: the one that gave the state; every rank of it calls this.
        state: see there. Its tensors are the optimizer's own, so that they are overwritten already.

    Raises:
        ValueError: groups or shapes do not fit.
    """
    packed = optimizer.state_dict()
    rest = torch.load(io.BytesIO(state["rest"]), weights_only=True)
    numbers = {name: i for i, name in _names(packed).items()}
    loaded: dict[int, dict[str, Any]] = {
        numbers[name]: dict(values) for name, values in rest["state"].items() if name in numbers
    }
    for name, tensor in state["tensors"].items():
        param, _, key = name.rpartition(".")
        loaded.setdefault(numbers[param], {})[key] = tensor
    optimizer.load_state_dict({"state": loaded, "param_groups": rest["param_groups"]})


def _names(packed: Mapping[str, Any]) -> dict[int, str]:
    """The name of each number in a state dict."""
    names: dict[int, str] = {}
    for group in packed["param_groups"]:
        known = group.get("param_names") or [str(i) for i in group["params"]]
        names.update(zip(group["params"], known, strict=True))
    return names


def restored_shard(
    local: Tensor,
    shape: Sequence[int],
    param_strides: Sequence[int],
    stretches: Sequence[tuple[int, int]],
    rank: int,
) -> StateShard:
    """A `StateShard` read from a file; its arguments."""
    from mlbfgs.distributed_state import StateShard  # takes a second to import

    return StateShard(local, shape, param_strides, stretches, rank)


#: So that `torch.load` reads them without further ado; the second is what older files have.
torch.serialization.add_safe_globals(
    [restored_shard, (restored_shard, "mlbfgs.checkpoint.StateShard")]
)


def __getattr__(name: str) -> Any:
    """`StateShard`, where it used to be."""
    if name != "StateShard":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mlbfgs.distributed_state import StateShard

    return StateShard


def is_shard(value: object) -> TypeGuard[StateShard]:
    """Whether a tensor of a state is a `StateShard`."""
    # without the import there is none
    module = sys.modules.get("mlbfgs.distributed_state")
    return module is not None and isinstance(value, module.StateShard)


def shown(flat: Tensor, layout: Layout, i: int, collectives: Collectives) -> Tensor:
    """Parameter i's part of flat storage, as `optimizer.state` shows it.

    Args:
        flat: (n,) or (M, n).
        layout: what each rank keeps.
        i: position in `Layout.params`.
        collectives: the ranks.

    Returns:
        A view: a `StateView` of the parameter's shape where this rank keeps all, a `StateDTensor`
        where the parameter is a DTensor, else a `StateShard`.
    """
    param, view = layout.params[i], layout.view(flat, i)
    if is_dtensor(param):
        return _dtensor(view, param)
    if not collectives.copies or view.numel() == 0 == math.prod(layout.shapes[i]):
        return as_state_view(view)
    from mlbfgs.distributed_state import StateShard

    stretches = [layout.stretch(i, shard) for shard in layout.ranges]
    return StateShard(
        layout.stretch_view(flat, i),
        layout.shapes[i],
        layout.strides[i],
        [(s.start, s.stop) for s in stretches],
        collectives.rank,
        collectives,
    )


def own_part(value: Tensor, like: Tensor, collectives: Collectives) -> Tensor:
    """This rank's part of a given tensor of a parameter's state.

    Args:
        value: the whole tensor, or what `shown` showed, under any layout of the same ranks.
        like: what `shown` shows now.
        collectives: the ranks; they all call this together.

    Returns:
        A tensor of the shape of `layout.view`.

    Raises:
        ValueError: the shape is another one, or the value is a part of what other ranks wrote or
            another rank's part.
    """
    if is_shard(value):
        own = not value.is_foreign(collectives)
        if own and is_shard(like) and value.lies_as(like):
            return value.local
        value = value.whole(collectives)
    elif is_dtensor(value) and (is_shard(like) or not is_dtensor(like)):
        value = value.full_tensor()  # type: ignore[attr-defined]
    if tuple(value.shape) != tuple(like.shape):
        raise ValueError(f"has shape {tuple(value.shape)}, expected {tuple(like.shape)}")
    if is_shard(like):
        return like.stretch_of(value)
    return _local_part(value, like) if is_dtensor(like) else value


def same_memory(value: Tensor, shown_now: Tensor) -> bool:
    """Whether a tensor of a state is what `shown` shows, or another view of the same numbers."""
    if is_shard(value) or is_shard(shown_now):
        if not (is_shard(value) and is_shard(shown_now) and value.lies_as(shown_now)):
            return False
        value, shown_now = value.local, shown_now.local
    a, b = local(value), local(shown_now)
    seen = [(t.shape, t.stride(), t.dtype, t.device, t.data_ptr()) for t in (a, b)]
    return a.numel() == b.numel() == 0 or seen[0] == seen[1]


def refuse_foreign_parts(
    values: Mapping[Tensor, Mapping[str, Any]], layout: Layout, collectives: Collectives
) -> None:
    """On all ranks, refuse a state of which some rank has another's part: a collective call.

    Args:
        values: for each parameter its state.
        layout: what each rank keeps.
        collectives: the ranks.

    Raises:
        ValueError: on a rank that has another's part, it says whose; on the others, that there is
            one.
    """
    given = [v for entry in values.values() for v in entry.values() if is_shard(v)]
    if not given:
        return
    from mlbfgs.distributed_state import REMEDY

    foreign = next((v for v in given if v.is_foreign(collectives)), None)
    if collectives.anywhere(foreign is not None, layout.device):
        if foreign is not None:
            foreign.whole(collectives)
        raise ValueError(f"another rank was given the state of a rank that it is not: {REMEDY}")


def _dtensor(view: Tensor, param: Tensor) -> Tensor:
    """A DTensor placed like a parameter, over a view of its shape or of rows of it."""
    from torch.distributed.tensor import DTensor, Shard

    from mlbfgs.distributed_state import StateDTensor

    assert isinstance(param, DTensor)
    rows = tuple(view.shape[: view.dim() - param.dim()])
    placements = [
        Shard(placement.dim + len(rows)) if isinstance(placement, Shard) else placement
        for placement in param.placements
    ]
    shape = torch.Size((*rows, *param.shape))
    strides = (param.numel(), *param.stride()) if rows else param.stride()
    placed = DTensor.from_local(
        view, param.device_mesh, placements, run_check=False, shape=shape, stride=strides
    )
    return StateDTensor.over(placed)


def _local_part(value: Tensor, like: Tensor) -> Tensor:
    """The local part of a tensor that is whole or distributed somehow, placed like another."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    if not isinstance(value, DTensor):
        # every rank cuts its own part out of what it was given: no communication
        value = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return value.redistribute(like.device_mesh, like.placements).to_local()
