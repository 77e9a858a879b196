"""The state of a parameter where ranks share it: what torch.distributed.checkpoint saves and loads.

A rank's shard holds stretches of parameters. A `StateShard` says where in its parameter such a
stretch lies, as boxes of the parameter's shape, so that a checkpoint knows neither ranks nor
blocks nor the order of memory. What some ranks saved, other ranks, one process alone or FSDP2 load;
each reads and writes its own part::

    torch.distributed.checkpoint.save({"optimizer": checkpoint_state(optimizer)}, ...)

    state = checkpoint_state(optimizer)  # of the optimizer that goes on
    torch.distributed.checkpoint.load({"optimizer": state}, ...)
    load_checkpoint_state(optimizer, state)
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mlbfgs.collectives import Collectives
from mlbfgs.growth import AVERAGE
from mlbfgs.layout import Layout, is_dtensor
from mlbfgs.sharding import Box, boxes

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem

#: What to do about a state that a rank cannot load.
_REMEDY = (
    "each rank loads what it saved itself, or save and load with torch.distributed.checkpoint "
    "(docs/distributed.md)"
)
_ELEMENTWISE = ("aten.detach.default", "aten.clone.default", "aten._to_copy.default")


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


class StateShard(Tensor):
    """What one rank keeps of one tensor of a parameter's state.

    It has the shape of the whole tensor, `(*shape)` or with rows of history in front
    `(M, *shape)`, and implements what torch.distributed.checkpoint asks of a tensor that several
    ranks hold. It can be copied and moved to another device or dtype, but not computed with.

    Attributes:
        local: (k,) or (M, k), the stretch in the order of the parameter's memory.
        param_strides: strides of the parameter.
        stretches: (start, stop) of every rank's stretch.
        rank: whose stretch `local` is.
    """

    local: Tensor
    param_strides: tuple[int, ...]
    stretches: tuple[tuple[int, int], ...]
    rank: int

    def __new__(
        cls,
        local: Tensor,
        shape: Sequence[int],
        param_strides: Sequence[int],
        stretches: Sequence[tuple[int, int]],
        rank: int,
    ) -> StateShard:
        """Wrap a stretch.

        Args:
            local: see the class.
            shape: of the parameter, without rows.
            param_strides: see the class.
            stretches: see the class.
            rank: see the class.
        """
        rows = tuple(local.shape[:-1])
        shard = Tensor._make_wrapper_subclass(
            cls, (*rows, *shape), dtype=local.dtype, device=local.device
        )
        shard.local = local
        shard.param_strides = tuple(param_strides)
        shard.stretches = tuple(stretches)
        shard.rank = rank
        return shard

    @property
    def param_shape(self) -> tuple[int, ...]:
        """The parameter's shape, without rows."""
        return tuple(self.shape[self.local.dim() - 1 :])

    def with_local(self, local: Tensor) -> StateShard:
        """The same place with other numbers."""
        return StateShard(local, self.param_shape, self.param_strides, self.stretches, self.rank)

    def lies_as(self, other: StateShard) -> bool:
        """Whether every rank holds the same numbers of both, in the same order."""
        same_order = memory_order_of(self) == memory_order_of(other)
        return same_order and self.shape == other.shape and self.stretches == other.stretches

    def is_foreign(self, collectives: Collectives) -> bool:
        """Whether it is the part of another one of these ranks."""
        return len(self.stretches) == collectives.world_size and self.rank != collectives.rank

    def whole(self, collectives: Collectives) -> Tensor:
        """The whole tensor: a collective call, for which every rank needs memory.

        Args:
            collectives: the ranks that hold the other stretches.

        Returns:
            A tensor of shape `self.shape`.

        Raises:
            ValueError: it was written by other ranks, or is another rank's part.
        """
        ranks = len(self.stretches)
        if ranks != collectives.world_size:
            raise ValueError(
                f"the state is one rank's part of {ranks}, but {collectives.world_size} load it: "
                f"{_REMEDY}"
            )
        if self.is_foreign(collectives):
            raise ValueError(
                f"the state is rank {self.rank}'s part of {ranks}, but loaded by rank "
                f"{collectives.rank}: {_REMEDY}"
            )
        rows, numel = self.local.shape[:-1], math.prod(self.param_shape)
        flat = self.local.new_empty((*rows, numel))
        for rank, (start, stop) in enumerate(self.stretches):
            part = self.local if rank == self.rank else flat.new_empty((*rows, stop - start))
            flat[..., start:stop] = collectives.broadcast(part.contiguous(), rank)
        strides = (numel, *self.param_strides) if rows else self.param_strides
        return flat.as_strided(self.shape, strides)

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        """For torch.distributed.checkpoint: what to write."""
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets, i),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for i, chunk in enumerate(self.__create_chunk_list__())
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """For torch.distributed.checkpoint: which boxes lie here."""
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        rows = tuple(self.local.shape[:-1])
        zeros = (0,) * len(rows)
        return [
            ChunkStorageMetadata(
                torch.Size((*zeros, *box.offsets)), torch.Size((*rows, *box.sizes))
            )
            for box in self._boxes()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """For torch.distributed.checkpoint: the box that begins at an index, as a view."""
        rows = tuple(self.local.shape[:-1])
        for box in self._boxes():
            if index.offset is None or tuple(index.offset)[len(rows) :] == box.offsets:
                start = box.start - self.stretches[self.rank][0]
                part = self.local[..., start : start + math.prod(box.sizes)]
                shaped = part.view((*rows, *box.memory_sizes))
                order = (*range(len(rows)), *(len(rows) + d for d in box.to_shape))
                return shaped.permute(order)
        raise ValueError(f"{index.fqn}: no box of this rank begins at {index.offset}")

    def _boxes(self) -> list[Box]:
        stretch = range(*self.stretches[self.rank])
        return boxes(self.param_shape, self.param_strides, stretch)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Copies and moves; refuse the rest."""
        kwargs = kwargs or {}
        if str(func) in _ELEMENTWISE:
            return args[0].with_local(func(args[0].local, *args[1:], **kwargs))
        if str(func) == "aten.copy_.default" and all(isinstance(a, cls) for a in args[:2]):
            if not args[0].lies_as(args[1]):
                raise ValueError("the two states are divided between the ranks in different ways")
            args[0].local.copy_(args[1].local, *args[2:], **kwargs)
            return args[0]
        raise NotImplementedError(
            f"{func}: a StateShard is one rank's part of a tensor; compute with its `local`"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> StateShard:
        """A copy with memory of its own."""
        return self.with_local(self.local.detach().clone())

    def __reduce_ex__(self, _: Any) -> tuple[Any, ...]:
        """For pickle."""
        local = self.local.detach().clone()
        where = (self.param_shape, self.param_strides, self.stretches, self.rank)
        return StateShard, (local, *where)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Where it lies."""
        start, stop = self.stretches[self.rank]
        return (
            f"StateShard(shape={tuple(self.shape)}, numbers {start} to {stop} of "
            f"{math.prod(self.param_shape)}, rank {self.rank} of {len(self.stretches)})"
        )


def memory_order_of(shard: StateShard) -> tuple[int, ...]:
    """The strides of a shard's parameter that matter."""
    sizes = zip(shard.param_strides, shard.param_shape, strict=True)
    return tuple(stride for stride, size in sizes if size > 1)


def shown(flat: Tensor, layout: Layout, i: int, collectives: Collectives) -> Tensor:
    """Parameter i's part of flat storage, as `optimizer.state` shows it.

    Args:
        flat: (n,) or (M, n).
        layout: what each rank keeps.
        i: position in `Layout.params`.
        collectives: the ranks.

    Returns:
        A view: of the parameter's shape where this rank keeps all, a DTensor where the parameter is
        one, else a StateShard.
    """
    param, view = layout.params[i], layout.view(flat, i)
    if is_dtensor(param):
        return _dtensor(view, param)
    if not collectives.copies or view.numel() == 0 == math.prod(layout.shapes[i]):
        return view
    stretches = [layout.stretch(i, shard) for shard in layout.ranges]
    return StateShard(
        layout.stretch_view(flat, i),
        layout.shapes[i],
        layout.strides[i],
        [(s.start, s.stop) for s in stretches],
        collectives.rank,
    )


def own_part(
    value: Tensor, like: Tensor, layout: Layout, i: int, collectives: Collectives
) -> Tensor:
    """This rank's part of a given tensor of parameter i's state.

    Args:
        value: the whole tensor, or what `shown` showed, under any layout of the same ranks.
        like: what `shown` shows now.
        layout: what each rank keeps now.
        i: position in `Layout.params`.
        collectives: the ranks; they all call this together.

    Returns:
        A tensor of the shape of `layout.view`.

    Raises:
        ValueError: the shape is another one, or the value is a part of what other ranks wrote or
            another rank's part.
    """
    if isinstance(value, StateShard):
        own = not value.is_foreign(collectives)
        if own and isinstance(like, StateShard) and value.lies_as(like):
            return value.local
        value = value.whole(collectives)
    if is_dtensor(value) and not is_dtensor(like):
        value = value.full_tensor()  # type: ignore[attr-defined]
    if tuple(value.shape) != tuple(like.shape):
        raise ValueError(f"has shape {tuple(value.shape)}, expected {tuple(like.shape)}")
    if is_dtensor(like):
        return _local_part(value, like)
    if not isinstance(like, StateShard):
        return value
    start, stop = like.stretches[like.rank]
    if value.dim() == len(layout.shapes[i]):
        return layout.part(value, i, start, stop).reshape(-1)
    return torch.stack([layout.part(row, i, start, stop).reshape(-1) for row in value])


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
    given = [v for entry in values.values() for v in entry.values() if isinstance(v, StateShard)]
    if not given:
        return
    foreign = next((v for v in given if v.is_foreign(collectives)), None)
    if collectives.anywhere(foreign is not None, layout.device):
        if foreign is not None:
            foreign.whole(collectives)
        raise ValueError(f"another rank was given the state of a rank that it is not: {_REMEDY}")


def _dtensor(view: Tensor, param: Tensor) -> Tensor:
    """A DTensor placed like a parameter, over a view of its shape or of rows of it."""
    from torch.distributed.tensor import DTensor, Shard

    assert isinstance(param, DTensor)
    rows = tuple(view.shape[: view.dim() - param.dim()])
    placements = [
        Shard(placement.dim + len(rows)) if isinstance(placement, Shard) else placement
        for placement in param.placements
    ]
    shape = torch.Size((*rows, *param.shape))
    strides = (param.numel(), *param.stride()) if rows else param.stride()
    made = DTensor.from_local(
        view, param.device_mesh, placements, run_check=False, shape=shape, stride=strides
    )
    return made


def _local_part(value: Tensor, like: Tensor) -> Tensor:
    """The local part of a tensor that is whole or distributed somehow, placed like another."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    if not isinstance(value, DTensor):
        # every rank cuts its own part out of what it was given: no communication
        value = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return value.redistribute(like.device_mesh, like.placements).to_local()
