"""What cannot work, told before the first step: a history that no memory holds, pairs too late.

Both are about the optimizers that keep a history of curvature pairs, by the settings that they have
in common: `history_size` M, `update_interval` T, `momentum`, `history_dtype`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.errors import UserError
from mlbfgs import plan

logger = logging.getLogger(__name__)

_GIB = 2**30


def check_pairs(
    optimizer: Mapping[str, Any], *, steps: int, steps_per_epoch: int, scale: str
) -> None:
    """Refuse an update interval so long that no step is ever preconditioned.

    The first pair needs two averages, T steps apart, and comes after 2T steps; H is used from the
    step after it on. At the scale `smoke`, which shows only that everything works, this is logged
    instead.

    Args:
        optimizer: the config's `optimizer`.
        steps: of the whole run.
        steps_per_epoch: batches of an epoch.
        scale: of the run.

    Raises:
        UserError: steps <= 2T.
    """
    interval = optimizer.get("update_interval")
    if not isinstance(interval, int) or "history_size" not in optimizer or steps > 2 * interval:
        return
    most = (steps - 1) // 2
    lower = f"set optimizer.update_interval to {most} or less, or " if most >= 1 else ""
    needed = -(-(2 * interval + 1) // steps_per_epoch)
    message = (
        f"optimizer.update_interval={interval} (T): H is used after 2T = {2 * interval} steps, but "
        f"the run has {steps}: {lower}train for {needed} epochs or more"
    )
    if scale != "smoke":
        raise UserError(message)
    logger.info("%s (scale smoke goes on without)", message)


def check_memory(optimizer: Mapping[str, Any], model: nn.Module, device: torch.device) -> None:
    """Refuse a history larger than the memory that is free, before it is allocated.

    Args:
        optimizer: the config's `optimizer`.
        model: on its device.
        device: where the optimizer's state will be.

    Raises:
        UserError: the state needs more bytes than there are.
    """
    size = optimizer.get("history_size")
    available = available_bytes(device)
    # A spread history has other shares on every rank; settings of a wrong kind are refused later.
    if not isinstance(size, int) or isinstance(size, bool) or size < 1 or available is None:
        return
    if optimizer.get("distribution", "replicated") != "replicated":
        return
    needed, of_one_pair = _state_bytes(optimizer, model, size)
    if needed <= available:
        return
    most = size - -(-(needed - available) // of_one_pair)
    lower = (
        f"lower optimizer.history_size to {most} or less" if most >= 1 else "use a smaller model"
    )
    raise UserError(
        f"optimizer.history_size={size} (M) needs {needed:,} bytes of optimizer state "
        f"({needed / _GIB:.1f} GiB), but {available:,} ({available / _GIB:.1f} GiB) are available "
        f"on {device.type}: {lower}"
    )


def _state_bytes(optimizer: Mapping[str, Any], model: nn.Module, size: int) -> tuple[int, int]:
    """Bytes of the state of MLBFGS (stochastic L-BFGS has the same), and of one pair in it."""
    name = optimizer.get("history_dtype")
    dtype = getattr(torch, name) if isinstance(name, str) else name
    momentum = float(optimizer.get("momentum") or 0.0)
    planned = plan(model, history_size=size, momentum=momentum, history_dtype=dtype)
    return planned.state_bytes, planned.history_bytes // size


def available_bytes(device: torch.device, root: Path = Path("/")) -> int | None:
    """Memory that can still be allocated: of the GPU, or of the machine or container.

    Args:
        device: which memory.
        root: where `proc` and `sys` are.

    Returns:
        Bytes; None where the system does not say (outside Linux).
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free) + unused
    limits = [_meminfo(root / "proc/meminfo"), _cgroup(root / "sys/fs/cgroup")]
    known = [limit for limit in limits if limit is not None]
    return min(known, default=None)


def _meminfo(path: Path) -> int | None:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    kibibytes = fields.get("MemAvailable", "").split()
    return int(kibibytes[0]) * 1024 if kibibytes else None


def _cgroup(folder: Path) -> int | None:
    """What the container may still use; its file cache can be given up (cgroup, version 2)."""
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    if limit == "max":
        return None
    cache = {key: int(value) for key, value in (line.split() for line in lines)}
    return max(0, int(limit) - used + cache.get("inactive_file", 0))
