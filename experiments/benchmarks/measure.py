"""What the benchmarks share: seconds of a call, medians, bytes of a state, pairs, files."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.runs.owned_folder import OwnedFolder


def time_of(run: Callable[[], object], device: torch.device | None = None) -> float:
    """Seconds of one call; on a GPU, until it is done with its work."""
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device | None) -> None:
    """Wait for a GPU."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def medians(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each contender; all take turns in every round, the first is discarded."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds + 1):
        for name, run in contenders.items():
            seconds = time_of(run)
            if i:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def state_bytes(state: object) -> int:
    """Bytes of all tensors in an optimizer's state."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(state_bytes(value) for value in state.values())
    if isinstance(state, (list, tuple)):
        return sum(state_bytes(value) for value in state)
    return 0


def pairs_like_training(
    shapes: Sequence[torch.Size], count: int
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Pairs (s, y) whose neighbours are nearly parallel, with curvatures between 0.5 and 2.

    Args:
        shapes: of the parameters.
        count: M, how many pairs.

    Yields:
        s and y, a tensor for each shape.
    """
    generator = torch.Generator().manual_seed(0)
    s = [torch.randn(shape, generator=generator) * 1e-2 for shape in shapes]
    curvature = [0.5 + 1.5 * torch.rand(shape, generator=generator) for shape in shapes]
    for _ in range(count):
        s = [0.9 * v + 1e-3 * torch.randn(v.shape, generator=generator) for v in s]
        yield s, [v * h for v, h in zip(s, curvature, strict=True)]


def folder_for(out: Path, name: str) -> OwnedFolder:
    """The folder of a benchmark's two files, checked before minutes are spent on them.

    Args:
        out: the folder.
        name: of the files, without their endings.

    Raises:
        UserError: it cannot be written, or holds files of these names from elsewhere.
    """
    folder = OwnedFolder(out)
    folder.refuse_foreign([f"{name}.json", f"{name}.md"])
    return folder


def write_measured(folder: OwnedFolder, name: str, result: Mapping[str, Any], page: str) -> None:
    """Print what was measured, then write it: a full disk does not cost the numbers.

    Args:
        folder: where to.
        name: of the files, without their endings.
        result: content of the JSON file.
        page: the same as Markdown.

    Raises:
        UserError: the files cannot be written.
    """
    print(page)
    folder.replace({f"{name}.json": json.dumps(result, indent=2) + "\n", f"{name}.md": page})
