"""The state of a parameter where ranks share it, as torch's own distributed tensors.

Under FSDP2 a parameter is a DTensor, and so are the tensors of its state (`StateDTensor`). Where
every rank has the whole parameter and a stretch of its state, that stretch is no box of the
parameter's shape, which is all that a DTensor's placements can say; so `StateShard` says itself
where it lies, as boxes, and answers as a DTensor whatever torch's checkpoint functions ask one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.utils._pytree import tree_map, tree_map_only

from mlbfgs.collectives import Collectives, default_collectives
from mlbfgs.sharding import Box, boxes
from mlbfgs.state_view import apart

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem

#: What to do about a state that a rank cannot load.
REMEDY = (
    "each rank loads what it saved itself, or save and load with torch.distributed.checkpoint "
    "(docs/distributed.md)"
)
_aten = torch.ops.aten
#: Operations on each number alone that are not marked as such.
_ELEMENTWISE = {
    *(_aten.detach.default, _aten.alias.default, _aten.clone.default, _aten._to_copy.default),
    *(_aten.copy_.default, _aten._pin_memory.default, _aten.zero_.default, _aten.fill_.Scalar),
    *(_aten.empty_like.default, _aten.zeros_like.default, _aten.ones_like.default),
    *(_aten.full_like.default, _aten.rand_like.default, _aten.randn_like.default),
}
_NEW = {_aten.new_empty.default, _aten.new_zeros.default, _aten.new_ones.default}


class StateDTensor(DTensor):
    """A DTensor over a view into flat storage, saved and copied without the rest of it.

    A DTensor that begins somewhere in a storage can be neither saved nor deep-copied; this one
    says that it begins where its storage does.
    """

    @classmethod
    def over(cls, placed: DTensor) -> StateDTensor:
        """The same local tensor, placed the same."""
        at_zero = placed._local_tensor.new_empty(()).expand(placed._local_tensor.shape)
        made: StateDTensor = cls(at_zero, placed._spec, requires_grad=False)
        made._local_tensor = placed._local_tensor
        return made

    def with_local(self, local: Tensor) -> DTensor:
        """Another local tensor, placed the same."""
        return DTensor.from_local(
            local,
            self.device_mesh,
            self.placements,
            run_check=False,
            shape=self.shape,
            stride=self.stride(),
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Compute as a DTensor does."""
        if func in (_aten.detach.default, _aten.alias.default):
            return cls.over(args[0])
        result = super().__torch_dispatch__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        return args[0] if _in_place(func) else result

    def share_memory_(self) -> StateDTensor:
        """Move the storage of all of the state here to memory that processes share."""
        self._local_tensor.share_memory_()  # type: ignore[no-untyped-call]
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> DTensor:
        """A DTensor with memory of its own."""
        if id(self) not in memo:
            memo[id(self)] = self.with_local(self._local_tensor.clone())
        copied: DTensor = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For pickle: a DTensor."""
        local = apart(self._local_tensor)
        made = DTensor(local, self._spec, requires_grad=False)
        if local.storage_offset() != 0:
            made = DTensor(local.clone(), self._spec, requires_grad=False)
        return made.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


class StateShard(DTensor):
    """What one rank keeps of one tensor of a parameter's state.

    It has the shape of the whole tensor, `(*shape)` or with rows of history in front
    `(M, *shape)`, and implements what torch.distributed.checkpoint asks of a tensor that several
    ranks hold. It can be copied, moved to another device or dtype and worked on number by number;
    what asks for all numbers (a norm, `torch.equal`) gathers them, as `full_tensor()` does, and is
    called by all ranks together, as with any DTensor.

    Attributes:
        param_strides: strides of the parameter.
        stretches: (start, stop) of every rank's stretch.
        rank: whose stretch `local` is.
        collectives: the ranks that hold the other stretches; None if it was read from a file.
    """

    param_strides: tuple[int, ...]
    stretches: tuple[tuple[int, int], ...]
    rank: int
    collectives: Collectives | None

    def __new__(
        cls,
        local: Tensor,
        shape: Sequence[int],
        param_strides: Sequence[int],
        stretches: Sequence[tuple[int, int]],
        rank: int,
        collectives: Collectives | None = None,
    ) -> StateShard:
        """Wrap a stretch.

        Args:
            local: (k,) or (M, k), the stretch in the order of the parameter's memory.
            shape: of the parameter, without rows.
            param_strides: see the class.
            stretches: see the class.
            rank: see the class.
            collectives: see the class.
        """
        rows = tuple(local.shape[:-1])
        shard = Tensor._make_wrapper_subclass(
            cls, (*rows, *shape), dtype=local.dtype, device=local.device
        )
        shard._local_tensor = local
        shard.param_strides = tuple(param_strides)
        shard.stretches = tuple((start, stop) for start, stop in stretches)
        shard.rank = rank
        shard.collectives = collectives
        return shard

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is left to do."""

    @property
    def local(self) -> Tensor:
        """(k,) or (M, k), the stretch in the order of the parameter's memory."""
        return self._local_tensor

    @property
    def param_shape(self) -> tuple[int, ...]:
        """The parameter's shape, without rows."""
        return tuple(self.shape[self.local.dim() - 1 :])

    def with_local(self, local: Tensor) -> StateShard:
        """The same place with other numbers."""
        where = (self.param_shape, self.param_strides, self.stretches, self.rank)
        return StateShard(local, *where, self.collectives)

    def lies_as(self, other: StateShard) -> bool:
        """Whether every rank holds the same numbers of both, in the same order."""
        same_order = memory_order_of(self) == memory_order_of(other)
        return same_order and self.shape == other.shape and self.stretches == other.stretches

    # --- what the ranks have together ------------------------------------------------------------

    def is_foreign(self, collectives: Collectives) -> bool:
        """Whether it is the part of another one of these ranks."""
        return len(self.stretches) == collectives.world_size and self.rank != collectives.rank

    def whole(self, collectives: Collectives) -> Tensor:
        """The whole tensor: a collective call, for which every rank needs memory.

        Args:
            collectives: the ranks that hold the other stretches.

        Returns:
            A plain tensor of shape `self.shape`, on the device of `local`.

        Raises:
            ValueError: it was written by other ranks, or is another rank's part.
        """
        self.check_ranks(collectives)
        rows, numel = self.local.shape[:-1], math.prod(self.param_shape)
        flat = self.local.new_empty((*rows, numel))
        for rank, (start, stop) in enumerate(self.stretches):
            if start < stop:
                own = rank == self.rank
                part = self.local if own else flat.new_empty((*rows, stop - start))
                flat[..., start:stop] = collectives.broadcast(part.contiguous(), rank)
        strides = (numel, *self.param_strides) if rows else self.param_strides
        return flat.as_strided(self.shape, strides)

    def check_ranks(self, collectives: Collectives) -> None:
        """Refuse a part that is not this rank's among these.

        Raises:
            ValueError: it was written by other ranks, or is another rank's part.
        """
        ranks = len(self.stretches)
        if ranks != collectives.world_size:
            raise ValueError(
                f"the state is one rank's part of {ranks}, but {collectives.world_size} load it: "
                f"{REMEDY}"
            )
        if self.is_foreign(collectives):
            raise ValueError(
                f"the state is rank {self.rank}'s part of {ranks}, but loaded by rank "
                f"{collectives.rank}: {REMEDY}"
            )

    def stretch_of(self, whole: Tensor) -> Tensor:
        """This rank's numbers of a whole tensor, (k,) or (M, k), copied.

        Args:
            whole: of shape `self.shape`, in any order of memory.
        """
        found = whole.new_empty(self.local.shape)
        place = self.with_local(found)
        for box in self._boxes():
            part = whole
            for dim, (first, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
                part = part.narrow(whole.dim() - len(box.sizes) + dim, first, size)
            place._box(box).copy_(part)
        return found

    # --- as a DTensor ----------------------------------------------------------------------------

    @property
    def device_mesh(self) -> DeviceMesh:
        """The ranks, as torch's DTensors name them."""
        if self.collectives is None:
            self.collectives = default_collectives(len(self.stretches))
            self.check_ranks(self.collectives)
        return self.collectives.mesh(self.device.type)

    @property
    def placements(self) -> tuple[Placement, ...]:
        """It takes and gives whole tensors."""
        return (Replicate(),)

    def to_local(self, **_: Any) -> StateShard:
        """The same: copying a whole tensor into it, as torch does, writes this rank's stretch."""
        return self

    def full_tensor(self, **_: Any) -> Tensor:
        """The whole tensor: all ranks call this together. See `whole`."""
        assert self.device_mesh is not None  # finds the ranks
        assert self.collectives is not None
        return self.whole(self.collectives).contiguous()  # torch sends memory as it lies

    def redistribute(
        self,
        device_mesh: DeviceMesh | None = None,
        placements: Sequence[Placement] | None = None,
        **kwargs: Any,
    ) -> DTensor:
        """A DTensor placed otherwise: all ranks call this together."""
        everywhere = DTensor.from_local(self.full_tensor(), self.device_mesh, [Replicate()])
        return everywhere.redistribute(device_mesh, placements, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Work on each number alone where it lies; gather for what asks for all of them."""
        kwargs = kwargs or {}
        shards: list[StateShard] = []
        tree_map_only(cls, shards.append, (args, kwargs))
        first = shards[0]
        if func in _NEW:
            same = tuple(args[1]) == tuple(first.shape)
            size = first.local.shape if same else args[1]
            made = func(first.local, size, *args[2:], **kwargs)
            return first.with_local(made) if same else made
        if func not in _ELEMENTWISE and (
            torch.Tag.pointwise not in func.tags or func is _aten.equal.default
        ):
            return first._gathered(func, args, kwargs)
        args_here, kwargs_here = tree_map(first._here, (args, kwargs))
        result = func(*args_here, **kwargs_here)
        return args[0] if _in_place(func) else first.with_local(result)

    def _gathered(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of an operation on whole tensors, which nobody can write back to the ranks."""
        results = [result.alias_info for result in func._schema.returns]
        if func._schema.is_mutable or any(alias is not None for alias in results):
            raise NotImplementedError(
                f"{func}: a StateShard is one rank's part of a tensor, which cannot be changed or "
                "viewed so; use its `local`, or on all ranks `full_tensor()`"
            )
        whole_args, whole_kwargs = tree_map_only(
            StateShard, lambda shard: shard.full_tensor(), (args, kwargs)
        )
        return func(*whole_args, **whole_kwargs)

    def _here(self, value: Any) -> Any:
        """This rank's stretch of an operand."""
        if isinstance(value, StateShard):
            if not value.lies_as(self):
                raise ValueError("the two states are divided between the ranks in different ways")
            return value.local
        if isinstance(value, Tensor) and value.dim() > 0:
            if tuple(value.shape) != tuple(self.shape):
                raise ValueError(f"has shape {tuple(value.shape)}, expected {tuple(self.shape)}")
            return self.stretch_of(value)
        return value

    # --- for torch.distributed.checkpoint --------------------------------------------------------

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        """What to write."""
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
        """Which boxes lie here."""
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
        """The box that begins at an index, as a view."""
        rows = self.local.dim() - 1
        for box in self._boxes():
            if index.offset is None or tuple(index.offset)[rows:] == box.offsets:
                return self._box(box)
        raise ValueError(f"{index.fqn}: no box of this rank begins at {index.offset}")

    def _box(self, box: Box) -> Tensor:
        rows = tuple(self.local.shape[:-1])
        start = box.start - self.stretches[self.rank][0]
        shaped = self.local[..., start : start + math.prod(box.sizes)].view(
            (*rows, *box.memory_sizes)
        )
        return shaped.permute((*range(len(rows)), *(len(rows) + d for d in box.to_shape)))

    def _boxes(self) -> list[Box]:
        stretch = range(*self.stretches[self.rank])
        return boxes(self.param_shape, self.param_strides, stretch)

    # --- copies ----------------------------------------------------------------------------------

    def share_memory_(self) -> StateShard:
        """Move the storage of all of the state here to memory that processes share."""
        self.local.share_memory_()  # type: ignore[no-untyped-call]
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> StateShard:
        """A copy with memory of its own."""
        if id(self) not in memo:
            memo[id(self)] = self.with_local(self.local.detach().clone())
        copied: StateShard = memo[id(self)]
        return copied

    def __reduce_ex__(self, _: Any) -> tuple[Any, ...]:
        """For pickle."""
        from mlbfgs.checkpoint import restored_shard  # imports nothing of torch.distributed

        where = (self.param_shape, self.param_strides, self.stretches, self.rank)
        return restored_shard, (apart(self.local.detach()), *where)

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


def _in_place(func: Any) -> bool:
    """Whether an operation writes into its first argument and returns it."""
    name: str = func._schema.name
    return name.endswith("_") and not name.endswith("__")
