"""Which Hessian block each parameter belongs to: pure Python on names and sizes.

A policy is one of

- `None`: the whole model is one block (M's DeiT-Tiny; S's SLIM-QN; the default);
- an integer k: k blocks cut at layer boundaries, the largest as small as possible;
- `"resblocks:r"`: r consecutive ResBlocks a block, the stem in the first and the classifier in the
  last (M: ResNet-18 in 4 blocks and ResNet-50 in 8 are both r = 2; block-wise SLIM-QN is r = 1);
  another module between two of them joins the first. Where the groups do not tell a module's
  place, one called `fc`, `classifier`, `head` or `linear` is the classifier, one called `conv1`,
  `bn1` or `stem` the stem;
- a list of regular expressions: one block for each, a parameter goes to the first that matches its
  name (`re.search`), and every parameter must match one;
- a callable `(names, sizes) -> list of block numbers`.

Parameters whose names match one of the patterns `outside_blocks` are in no block; the policy is
about the others. Every such pattern must match one.

An integer and `"resblocks:r"` keep the parameters of a layer together however they are grouped, and
several parameter groups get the blocks of one, as far as names and the order in each group tell the
model's order (`mlbfgs.model_order`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

import torch
from torch import Tensor

from mlbfgs.model_order import model_order
from mlbfgs.resblocks import resblocks
from mlbfgs.sharding import (
    ALIGNMENT_BYTES,
    DISTRIBUTIONS,
    even_ranges,
    owners_of_blocks,
    padded,
    ranges_of_owners,
)

Assign = Callable[[Sequence[str], Sequence[int]], Sequence[int]]
BlockPolicy = None | int | str | Sequence[str] | Assign


def assign_blocks(
    policy: BlockPolicy,
    names: Sequence[str] | None,
    sizes: Sequence[int],
    groups: Sequence[int] | None = None,
) -> list[int]:
    """The block number of every parameter.

    Args:
        policy: see the module's description.
        names: the parameters' names, in each group in the model's order, or None if they have none
            (then only None, an integer and a callable will do, and every parameter is a layer of
            its own).
        sizes: how many numbers each has.
        groups: number of the parameter group of each; None is one group.

    Returns:
        One number for each parameter, from 0 without gaps.

    Raises:
        ValueError: the policy does not fit the parameters; the message says what would do.
    """
    known = list(names) if names is not None else [f"parameter {i}" for i in range(len(sizes))]
    if policy is None:
        return [0] * len(sizes)
    if callable(policy):
        return _without_gaps(policy(known, sizes), len(sizes))
    if isinstance(policy, bool) or not isinstance(policy, (int, str, Sequence)):
        raise ValueError(
            f"blocks={policy!r}: expected None, a number of blocks, 'resblocks:r', a list of "
            "regular expressions or a callable"
        )
    groups = groups or [0] * len(sizes)
    if isinstance(policy, int):
        if names is None:
            return _even(policy, known, sizes, [0] * len(sizes))
        return _even(policy, [_layer(name) for name in known], sizes, groups)
    if names is None:
        raise ValueError(
            f"blocks={policy!r} goes by parameter names: give the optimizer "
            "model.named_parameters() instead of model.parameters()"
        )
    if isinstance(policy, str):
        return resblocks(policy, known, [_layer(name) for name in known], groups)
    return _by_pattern(policy, known)


def assign_active(
    policy: BlockPolicy,
    outside: Sequence[str],
    names: Sequence[str] | None,
    sizes: Sequence[int],
    groups: Sequence[int],
    active: Sequence[bool],
) -> tuple[list[int], int | None]:
    """The block number of every active parameter, as `assign_outside` gives it.

    A policy sees all parameters, so that names and places mean what they mean in the whole model.
    To an integer, which cuts by size, a parameter that is not active has no numbers.

    Args:
        policy: as in `assign_blocks`.
        outside: as in `assign_outside`.
        names: of all parameters, as in `assign_blocks`.
        sizes: of all parameters.
        groups: of all parameters.
        active: for each parameter whether it is active.

    Returns:
        One number for each active parameter, from 0 without gaps, and the last number if it stands
        for "in no block".

    Raises:
        ValueError: as in `assign_outside`.
    """
    if isinstance(policy, int):
        sizes = [size if here else 0 for size, here in zip(sizes, active, strict=True)]
    assigned, none = assign_outside(policy, outside, names, sizes, groups)
    wanted = [block for block, here in zip(assigned, active, strict=True) if here]
    number = {block: i for i, block in enumerate(sorted(set(wanted)))}
    return [number[block] for block in wanted], None if none is None else number.get(none)


def assign_outside(
    policy: BlockPolicy,
    outside: Sequence[str],
    names: Sequence[str] | None,
    sizes: Sequence[int],
    groups: Sequence[int] | None = None,
) -> tuple[list[int], int | None]:
    """The block number of every parameter, with one more number for those in no block.

    Args:
        policy: see the module's description.
        outside: regular expressions (`re.search`) of parameters in no block.
        names: as in `assign_blocks`.
        sizes: as in `assign_blocks`.
        groups: as in `assign_blocks`.

    Returns:
        One number for each parameter, and the last number if it stands for "in no block".

    Raises:
        ValueError: as in `assign_blocks`; a pattern matches nothing, or everything is outside.
    """
    if not outside:
        return assign_blocks(policy, names, sizes, groups), None
    if isinstance(outside, str):
        raise ValueError(
            f"outside_blocks={outside!r}: expected a list of regular expressions, as [{outside!r}]"
        )
    if names is None:
        raise ValueError(
            f"outside_blocks={list(outside)!r} goes by parameter names: give the optimizer "
            "model.named_parameters() instead of model.parameters()"
        )
    out: set[int] = set()
    for pattern in outside:
        found = {i for i, name in enumerate(names) if re.search(pattern, name)}
        if not found:
            near = get_close_matches(pattern, names, n=1, cutoff=0.3)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise ValueError(
                f"outside_blocks: the pattern {pattern!r} matches no parameter, such as "
                f"{names[0]!r}{hint}"
            )
        out |= found
    within = [i for i in range(len(sizes)) if i not in out]
    if not within:
        raise ValueError(
            f"outside_blocks={list(outside)!r} match every parameter: nothing is left for a block"
        )
    assigned = assign_blocks(
        policy,
        [names[i] for i in within],
        [sizes[i] for i in within],
        None if groups is None else [groups[i] for i in within],
    )
    number = max(assigned) + 1
    blocks = [number] * len(sizes)
    for i, block in zip(within, assigned, strict=True):
        blocks[i] = block
    return blocks, number


def _layer(name: str) -> str:
    """The module a parameter sits in."""
    return name.rpartition(".")[0]


def _even(k: int, layers: Sequence[str], sizes: Sequence[int], groups: Sequence[int]) -> list[int]:
    """K runs of whole layers with the smallest possible largest run."""
    totals: Counter[str] = Counter()
    of_group: dict[int, list[str]] = {}
    for layer, size, group in zip(layers, sizes, groups, strict=True):
        totals[layer] += size
        of_group.setdefault(group, []).append(layer)
    order = model_order(list(of_group.values()), totals)
    if not 1 <= k <= len(order):
        raise ValueError(
            f"blocks={k}: this model can be cut into 1 to {len(order)} blocks of layers"
        )
    runs = [totals[layer] for layer in order]
    low, high = max(runs), sum(runs)
    while low < high:  # the smallest capacity that k blocks can hold, by bisection
        middle = (low + high) // 2
        if _fill(runs, middle, 1)[-1] < k:
            high = middle
        else:
            low = middle + 1
    block_of = dict(zip(order, _fill(runs, low, k), strict=True))
    return [block_of[layer] for layer in layers]


def _fill(runs: Sequence[int], capacity: int, at_least: int) -> list[int]:
    """Fill blocks one after the other; open a new one early where layers would not suffice."""
    blocks: list[int] = []
    block, filled = 0, 0
    for i, size in enumerate(runs):
        left, missing = len(runs) - i, at_least - 1 - block
        if blocks and (filled + size > capacity or (missing > 0 and left <= missing)):
            block, filled = block + 1, 0
        blocks.append(block)
        filled += size
    return blocks


def _by_pattern(patterns: Sequence[str], names: Sequence[str]) -> list[int]:
    compiled = [re.compile(pattern) for pattern in patterns]
    blocks = [next((i for i, c in enumerate(compiled) if c.search(n)), -1) for n in names]
    unmatched = [name for name, block in zip(names, blocks, strict=True) if block < 0]
    if unmatched:
        raise ValueError(
            f"blocks={list(patterns)!r}: no pattern matches {', '.join(unmatched[:5])}"
            f"{f' and {len(unmatched) - 5} more' if len(unmatched) > 5 else ''}; "
            "add '.' as the last pattern to collect the rest in one block"
        )
    for i, pattern in enumerate(patterns):
        if i not in blocks:
            raise ValueError(f"blocks: the pattern {pattern!r} is the first match of no parameter")
    return blocks


def _without_gaps(blocks: Sequence[int], count: int) -> list[int]:
    blocks = list(blocks)
    if len(blocks) != count or set(blocks) != set(range(len(set(blocks)))):
        raise ValueError(
            f"blocks: the callable must return {count} block numbers from 0 without gaps, "
            f"not {blocks[:8]}"
        )
    return blocks


@dataclass(frozen=True)
class BlockPlan:
    """Blocks, their sizes, and the memory of the optimizer: known before the first step.

    Attributes:
        names: the parameters' names.
        sizes: numbers in each parameter.
        blocks: block of each parameter.
        history_size: M.
        state_bytes: averages, snapshots, momentum and history, of one rank: this one, or the one
            that keeps most.
        history_bytes: the history alone.
        kept: numbers that each rank keeps of every vector, padding included; empty where each
            keeps all.
        owners: the rank that owns each block; empty where blocks have no owner.
        outside: the number that stands for "in no block", if there is one.
        padding: numbers of every vector, over all ranks, that only fill it up: each block begins
            at a 64-byte border.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    blocks: tuple[int, ...]
    history_size: int
    state_bytes: int
    history_bytes: int
    kept: tuple[int, ...] = ()
    owners: tuple[int, ...] = ()
    outside: int | None = None
    padding: int = 0

    @property
    def block_sizes(self) -> list[int]:
        """Numbers in each block; those in no block last."""
        totals = [0] * (max(self.blocks, default=-1) + 1)
        for block, size in zip(self.blocks, self.sizes, strict=True):
            totals[block] += size
        return totals

    def __str__(self) -> str:
        """A table of the blocks and a line on memory."""
        n = sum(self.sizes)
        lines = [f"{'block':>5}  {'parameters':>12}  {'share':>6}  first ... last"]
        for block, size in enumerate(self.block_sizes):
            members = [name for name, b in zip(self.names, self.blocks, strict=True) if b == block]
            span = members[0] if len(members) == 1 else f"{members[0]} ... {members[-1]}"
            label = "none" if block == self.outside else block
            lines.append(f"{label:>5}  {size:>12,}  {size / max(n, 1):>6.1%}  {span}")
        for rank, kept in enumerate(self.kept):
            blocks = [str(b) for b, owner in enumerate(self.owners) if owner == rank]
            owned = f", blocks {' '.join(blocks) or 'none'}" if self.owners else ""
            lines.append(f"rank {rank}: {kept:,} numbers ({kept / max(n, 1):.1%}){owned}")
        where = " on one rank" if self.kept else ""
        lines.append(
            f"{n:,} parameters, M = {self.history_size}: {self.state_bytes / 2**20:,.1f} MiB of "
            f"optimizer state{where} ({self.state_bytes / max(n, 1):.0f} bytes a parameter), "
            f"{self.history_bytes / 2**20:,.1f} MiB of it history; {self.padding:,} of padding in "
            "every vector"
        )
        return "\n".join(lines)


def plan(
    model: torch.nn.Module,
    blocks: BlockPolicy = None,
    *,
    outside_blocks: Sequence[str] = (),
    history_size: int = 10,
    momentum: float = 0.9,
    history_dtype: torch.dtype | None = None,
    distribution: str = "replicated",
    world_size: int = 1,
) -> BlockPlan:
    """What `MLBFGS(model.named_parameters(), ...)` would do, before anything is allocated.

    Args:
        model: the model. Frozen parameters (`requires_grad` is False) do not count: they have no
            state before they are thawed.
        blocks: block policy.
        outside_blocks: regular expressions of parameters in no block.
        history_size: M.
        momentum: whether a momentum buffer is kept (any value but 0).
        history_dtype: of the history; None is the dtype of the averages.
        distribution: `"replicated"`, `"blocks"` or `"sharded"`.
        world_size: ranks.

    Returns:
        The plan; print it for a table.

    Raises:
        ValueError: the policy does not fit the model.
    """
    named = list(model.named_parameters())
    active = [p.requires_grad for _, p in named]
    assigned, outside = assign_active(
        blocks,
        outside_blocks,
        [name for name, _ in named],
        [p.numel() for _, p in named],
        [0] * len(named),
        active,
    )
    trained = [pair for pair, is_active in zip(named, active, strict=True) if is_active]
    names, sizes = tuple(name for name, _ in trained), tuple(p.numel() for _, p in trained)
    dtype = state_dtype([p for _, p in trained])
    made = BlockPlan(names, sizes, tuple(assigned), history_size, 0, 0, outside=outside)
    unit = alignment(dtype)
    lengths = [padded(size, unit) for size in made.block_sizes]
    kept, owners = _kept(lengths, distribution, world_size, unit)
    most = max(kept, default=sum(lengths))
    history_bytes = 2 * history_size * most * (history_dtype or dtype).itemsize
    vectors = (4 + (momentum != 0)) * most * dtype.itemsize
    return replace(
        made,
        state_bytes=vectors + history_bytes,
        history_bytes=history_bytes,
        kept=kept,
        owners=owners,
        padding=sum(lengths) - sum(sizes),
    )


def _kept(
    sizes: Sequence[int], distribution: str, world_size: int, unit: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What each rank keeps, and which rank owns each block."""
    if distribution not in DISTRIBUTIONS:
        known = ", ".join(repr(name) for name in DISTRIBUTIONS)
        raise ValueError(f"Invalid distribution: {distribution!r} (one of {known})")
    if world_size < 1:
        raise ValueError(f"Invalid world_size: {world_size} (at least 1)")
    if distribution == "blocks":
        owners = owners_of_blocks(sizes, world_size)
        ranges = ranges_of_owners(sizes, owners, world_size)
        return tuple(map(len, ranges)), tuple(owners)
    if distribution == "sharded":
        return tuple(map(len, even_ranges(sum(sizes), world_size, unit=unit))), ()
    return (), ()


def alignment(dtype: torch.dtype) -> int:
    """Numbers of a dtype between two borders of the flat vector that a block may begin at."""
    return ALIGNMENT_BYTES // dtype.itemsize


def state_dtype(params: Sequence[Tensor]) -> torch.dtype:
    """The dtype of averages and arithmetic: float64 if any parameter is, else float32."""
    return torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
