"""What ranks tell each other, and how many bytes that takes.

A step needs little from the other ranks, and never their history:

    sum_step      p = W g and gᵀg, (B, 2M + 1) float64, where blocks span ranks   after step 2T
    sum_products  the products of the candidate pairs, some float64 a block       every T steps
    sum_gram      two columns of each Gram matrix, (B, 2, 2M) float64, where
                  blocks span ranks                                               every T steps
    share         the parameters, from the rank that moved them to the others     every step
    compare       which parameters have a gradient, where a pair is used in the
                  step that stores it                                             every T steps

Sharing is an all-gather of uneven parts, made of one broadcast from each rank (of several, where a
part is larger than the buffer): that sends what an all-gather sends, needs no padding, and a buffer
that is small and always the same. Eight bytes in front of each part tell which parameters had a
gradient on the rank that sends them.

Every number of a parameter comes from one rank, and sums are the same on all ranks, so that
parameters are the same to the last bit everywhere.

Legend: `B` blocks, `M` history size, `T` update interval.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from mlbfgs.exchange import Route
from mlbfgs.layout import Layout, Spread, is_dtensor
from mlbfgs.sharding import DISTRIBUTIONS

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Distribution = Literal["replicated", "blocks", "sharded"]
ProcessGroup = dist.ProcessGroup

#: Bytes of each of the two buffers that parameters are shared through.
BUFFER_BYTES = 1 << 24


class Collectives:
    """The ranks that an optimizer works with; alone, every method returns at once.

    Attributes:
        spread: how the flat vector is divided between them.
        rank: this rank's number.
        world_size: how many there are; 1 where nothing is distributed.
        copies: whether parameters are moved by one rank and copied by the others.
        total: bytes by collective since construction.
        in_step: the same since `begin_step`.
        steps: how often a step began.
    """

    def __init__(
        self,
        spread: Spread | None = None,
        group: ProcessGroup | None = None,
        *,
        sums: bool = False,
        copies: bool = False,
    ):
        """Work with a group; `collectives_for` chooses the arguments.

        Args:
            spread: how the flat vector is divided; None is not at all.
            group: the ranks; None is the default group.
            sums: whether blocks span ranks, so that their products are sums over ranks.
            copies: see the class.
        """
        self.spread = spread or Spread()
        self.rank, self.world_size = self.spread.rank, self.spread.world_size
        self.copies = copies and self.world_size > 1
        self.total: Counter[str] = Counter()
        self.in_step: Counter[str] = Counter()
        self.steps = 0
        self._sums = sums and self.world_size > 1
        self._group = group
        self._layout: Layout | None = None
        self._route: Route | None = None
        self._tags: Tensor | None = None
        self._known_tag: tuple[bytes, int] = (b"", 0)
        self._meshes: dict[str, DeviceMesh] = {}

    def mesh(self, device_type: str) -> DeviceMesh:
        """The ranks as torch's DTensors name them, for tensors on devices of a type."""
        from torch.distributed.device_mesh import DeviceMesh

        if device_type not in self._meshes:
            group = self._group or dist.group.WORLD
            assert group is not None
            self._meshes[device_type] = DeviceMesh.from_group(group, device_type)
        return self._meshes[device_type]

    def __deepcopy__(self, memo: dict[int, Any]) -> Collectives:
        """The same ranks, counted from zero."""
        return Collectives(self.spread, self._group, sums=self._sums, copies=self.copies)

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle, the same again in the default group."""
        if self._group is not None:
            raise TypeError("an optimizer with its own process_group cannot be pickled")
        return _restored, (self.spread, self._sums, self.copies)

    def lay_out(self, layout: Layout) -> None:
        """Prepare for a layout: a collective call.

        Raises:
            ValueError: the ranks do not hold the same parameters, groups and blocks.
        """
        if not self.copies:
            return
        described = (
            *(layout.shapes, layout.strides, [p.dtype for p in layout.params]),
            *(layout.group_of, layout.block_of, layout.ranges, self.spread.distribution),
        )
        mine = torch.tensor([_digest(repr(described).encode())], device=layout.device)
        theirs = [torch.empty_like(mine) for _ in range(self.world_size)]
        with self._count("all_gather_layout", self.world_size * mine.nbytes):
            dist.all_gather(theirs, mine, group=self._group)
        tags = torch.cat(theirs)
        if bool((tags != tags[0]).any()):
            others = [rank for rank, tag in enumerate(tags.tolist()) if tag != tags[0]]
            raise ValueError(
                f"ranks {others} have other parameters than rank 0, or in other groups, blocks or "
                "memory formats: every rank must build the same model and optimizer"
            )
        self._route = Route(layout, [p.dtype for p in layout.params], BUFFER_BYTES)
        self._tags = torch.zeros_like(tags)

    def anywhere(self, here: bool, device: torch.device) -> bool:
        """Whether something holds on any rank: a collective call, for which the host waits."""
        if self.world_size == 1:
            return here
        flag = torch.tensor([int(here)], device=device)
        with self._count("all_reduce_load", flag.nbytes):
            dist.all_reduce(flag, group=self._group)
        return bool(flag.item())

    def begin_step(self) -> None:
        """Count the bytes of a new step."""
        self.steps += 1
        self.in_step.clear()

    def sum_step(self, sums: Tensor) -> None:
        """Add up the dot products of a step over the ranks, in place.

        Args:
            sums: (B, k) float64, contiguous, k dot products for each block.
        """
        self._sum("all_reduce_step", sums)

    def sum_owned(self, number: Tensor) -> None:
        """Add up, in place, a number to which each rank has added what its own blocks have to add.

        Args:
            number: float64 of any shape; where blocks span ranks, every rank has all of it already.
        """
        if self.copies and not self._sums:
            with self._count("all_reduce_step", number.nbytes):
                dist.all_reduce(number, group=self._group)

    def sum_gram(self, columns: Tensor) -> None:
        """Add up columns of Gram matrices over the ranks, in place.

        Args:
            columns: float64, contiguous, of any shape.
        """
        self._sum("all_reduce_gram", columns)

    def sum_products(self, partial: Tensor, known: Tensor, owners: Sequence[int | None]) -> Tensor:
        """Bring together, on every rank, what decides about pairs.

        Blocks that span ranks: products of the pairs are sums over ranks, the others are known
        already. Blocks with an owner: both are known to it alone.

        Args:
            partial: (a, B) float64, dot products of this rank's numbers.
            known: (b, B) float64, numbers that the owner of each block knows.
            owners: of each block, None where every rank knows them.

        Returns:
            (a + b, B).
        """
        if not (self._sums or self.copies):
            return torch.cat([partial, known])
        speaks = torch.tensor([(owner or 0) == self.rank for owner in owners], device=known.device)
        numbers = torch.cat([partial, known.where(speaks, torch.zeros_like(known))])
        with self._count("all_reduce_products", numbers.nbytes):
            dist.all_reduce(numbers, group=self._group)
        return numbers

    def _sum(self, name: str, tensor: Tensor) -> None:
        if self._sums:
            with self._count(name, tensor.nbytes):
                dist.all_reduce(tensor, group=self._group)

    def share(self, layout: Layout, grads: Sequence[Tensor | None], *, wait: bool) -> None:
        """Copy every parameter from the rank that moved it to the others.

        Args:
            layout: the one of `lay_out`.
            grads: the gradients, in flat order.
            wait: whether the host may wait for an accelerator; on a CPU it always does.

        Raises:
            RuntimeError: a parameter has a gradient on some ranks only. Ranks of an accelerator see
                it when one of them waits.
        """
        if not self.copies:
            return
        assert self._route is not None and self._tags is not None
        given, tag = self._tag(grads)
        self._exchange(self._route, layout.tensors(), tag, self._tags)
        if (wait or layout.device.type == "cpu") and bool((self._tags != 0).any()):
            self._refuse(layout, given)

    def compare(self, layout: Layout, grads: Sequence[Tensor | None]) -> None:
        """What `share` refuses, before a step that not all ranks would go through alike.

        Args:
            layout: the one of `lay_out`.
            grads: the gradients, in flat order.

        Raises:
            RuntimeError: a parameter has a gradient on some ranks only.
        """
        if not self.copies:
            return
        given, tag = self._tag(grads)
        mine = torch.tensor([tag], device=layout.device)
        theirs = [torch.empty_like(mine) for _ in range(self.world_size)]
        with self._count("all_gather_gradients", self.world_size * mine.nbytes):
            dist.all_gather(theirs, mine, group=self._group)
        if bool((torch.cat(theirs) != tag).any()):
            self._refuse(layout, given)

    def _tag(self, grads: Sequence[Tensor | None]) -> tuple[bytes, int]:
        """Which parameters have a gradient, and a number that tells it."""
        given = bytes(g is not None for g in grads)
        if given != self._known_tag[0]:
            self._known_tag = (given, _digest(given))
        return self._known_tag

    def exchange(self, layout: Layout, tensors: Sequence[Tensor]) -> None:
        """Fill tensors of the parameters' shapes, of which each rank knows its shard.

        Args:
            layout: what each rank keeps.
            tensors: one for each parameter, in flat order, filled in place.
        """
        if self.copies:
            route = Route(layout, [t.dtype for t in tensors], BUFFER_BYTES)
            tags = torch.zeros(self.world_size, dtype=torch.int64, device=layout.device)
            self._exchange(route, tensors, 0, tags)

    def broadcast(self, tensor: Tensor, rank: int) -> Tensor:
        """Give all ranks what one has.

        Args:
            tensor: contiguous; what it holds is replaced on the other ranks.
            rank: the one that has it.

        Returns:
            The tensor.
        """
        with self._count("broadcast_state", tensor.nbytes):
            dist.broadcast(tensor, self._global(rank), group=self._group)
        return tensor

    def _exchange(self, route: Route, tensors: Sequence[Tensor], tag: int, tags: Tensor) -> None:
        """Send and receive all buckets, at most two at a time; note in `tags` which differed."""
        pending: deque[tuple[int, dist.Work]] = deque()

        def finish() -> None:
            k, work = pending.popleft()
            work.wait()
            bucket = route.buckets[k]
            if bucket.rank != self.rank:
                route.unpack(k, tensors)
                if bucket.tagged:
                    tags[bucket.rank].logical_or_(route.tag(k)[0] != tag)

        with self._count("all_gather_parameters", sum(b.nbytes for b in route.buckets)):
            for k, bucket in enumerate(route.buckets):
                if len(pending) == 2:
                    finish()
                if bucket.rank == self.rank:
                    route.pack(k, tensors)
                    if bucket.tagged:
                        route.tag(k).fill_(tag)
                work = dist.broadcast(
                    route.message(k), self._global(bucket.rank), group=self._group, async_op=True
                )
                assert work is not None
                pending.append((k, work))
            while pending:
                finish()

    def _global(self, rank: int) -> int:
        return rank if self._group is None else dist.get_global_rank(self._group, rank)

    def _refuse(self, layout: Layout, given: bytes) -> None:
        """Name a parameter that has a gradient on some ranks only."""
        mine = torch.tensor(list(given), dtype=torch.uint8, device=layout.device)
        theirs = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(theirs, mine, group=self._group)
        have = torch.stack(theirs)
        unequal = (have != have[0]).any(0).nonzero().flatten().tolist()
        rule = "every rank must have gradients for the same parameters, as DDP leaves them"
        if not unequal:  # an accelerator was not asked since
            raise RuntimeError(f"in an earlier step, some ranks lacked a gradient: {rule}")
        i = unequal[0]
        with_it = [rank for rank in range(self.world_size) if have[rank, i]]
        without = [rank for rank in range(self.world_size) if not have[rank, i]]
        raise RuntimeError(
            f"{layout.names[i]} has a gradient on ranks {with_it} but none on ranks {without}"
            f"{f' (and so have {len(unequal) - 1} others)' if len(unequal) > 1 else ''}: {rule}"
        )

    def _count(self, name: str, nbytes: int) -> record_function:
        """Count bytes, and name what follows in traces."""
        self.total[name] += nbytes
        self.in_step[name] += nbytes
        return record_function(f"mlbfgs.{name}")


def collectives_for(
    params: Sequence[Tensor], distribution: str, group: ProcessGroup | None
) -> Collectives:
    """The ranks that share the state of some parameters.

    Args:
        params: all parameters. DTensors (FSDP2) bring their ranks with them.
        distribution: `"replicated"`, `"blocks"` or `"sharded"`.
        group: the ranks; None is the default group.

    Raises:
        ValueError: a value is invalid, has no effect or contradicts the parameters.
    """
    if distribution not in DISTRIBUTIONS:
        known = ", ".join(repr(name) for name in DISTRIBUTIONS)
        raise ValueError(f"Invalid distribution: {distribution!r} (one of {known})")
    if any(is_dtensor(p) for p in params):
        return _over_mesh(params, distribution, group)
    if distribution == "replicated":
        if group is not None:
            raise ValueError(
                "process_group has no effect where every rank keeps everything: "
                "distribution='blocks' or 'sharded' goes with it"
            )
        return Collectives()
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"distribution={distribution!r} needs ranks: call "
            "torch.distributed.init_process_group before building the optimizer"
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("process_group does not contain this rank")
    spread = Spread(distribution, rank, dist.get_world_size(group))
    return Collectives(spread, group, sums=distribution == "sharded", copies=True)


def default_collectives(world_size: int) -> Collectives:
    """The ranks of the default group.

    Args:
        world_size: how many there must be.

    Raises:
        ValueError: there are others, or none.
    """
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 0
    if ranks != world_size:
        raise ValueError(
            f"the state is one rank's part of {world_size}, and here are {ranks} ranks"
        )
    return Collectives(Spread("sharded", dist.get_rank(), world_size), copies=True)


def refuse_flat_shards(params: Sequence[Tensor]) -> None:
    """Refuse what FSDP1 makes of parameters: pieces of a flat vector, other ones on each rank.

    Args:
        params: all parameters. With `ShardingStrategy.NO_SHARD`, every rank has all of each.

    Raises:
        ValueError: they are such pieces.
    """
    flattened = [p for p in params if getattr(p, "_fsdp_flattened", False)]
    if not flattened or dist.get_world_size() == 1:
        return
    # what is not sharded has its own shape, or is one flat parameter of its full size
    whole = [
        p.dim() > 1 or getattr(p, "_sharded_size", 0) == getattr(p, "_unpadded_unsharded_size", 1)
        for p in flattened
    ]
    if not any(whole):
        raise ValueError(
            "parameters are sharded by FSDP1 (FullyShardedDataParallel), whose flat shards tell "
            "neither shapes nor places: shard the model with FSDP2 "
            "(torch.distributed.fsdp.fully_shard) and pass distribution='sharded'"
        )


def _over_mesh(
    params: Sequence[Tensor], distribution: str, group: ProcessGroup | None
) -> Collectives:
    """DTensors: each rank keeps its local tensors, and sums go over the mesh."""
    from torch.distributed.tensor import DTensor, Replicate, Shard  # takes a second to import

    if distribution != "sharded" or group is not None:
        raise ValueError(
            "parameters that are DTensors (FSDP2) are sharded already, by their own device mesh: "
            "pass distribution='sharded' and no process_group"
        )
    homes = set()
    for p in params:
        if not isinstance(p, DTensor):
            raise ValueError(
                "parameters must be all DTensors or none: with fully_shard, wrap the whole model"
            )
        cut = [d for d, placement in enumerate(p.placements) if type(placement) is Shard]
        rest = [placement for placement in p.placements if type(placement) is not Shard]
        if len(cut) != 1 or not all(isinstance(placement, Replicate) for placement in rest):
            raise ValueError(
                f"a parameter is placed as {p.placements}: exactly one mesh dimension may be "
                "Shard, as fully_shard leaves it, and the others Replicate"
            )
        homes.add((p.device_mesh, cut[0]))
    if len(homes) > 1:
        raise ValueError("all parameters must be sharded over the same device mesh")
    ((mesh, dimension),) = homes
    group = mesh.get_group(dimension)
    spread = Spread("replicated", dist.get_rank(group), dist.get_world_size(group))
    return Collectives(spread, group, sums=True)


def _restored(spread: Spread, sums: bool, copies: bool) -> Collectives:
    return Collectives(spread, sums=sums, copies=copies)


def _digest(content: bytes) -> int:
    """63 bits that tell contents apart."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1
