"""Makes the runs of a campaign: in a pool of processes, under torchrun, or through a scheduler."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

from experiments.campaign.progress import Progress
from experiments.launching.launch import launch
from experiments.launching.pool import WorkerPool
from experiments.launching.processes import endings_raised
from experiments.runs.directory import InUseError
from experiments.runs.outcome import Outcome, elsewhere, finished_outcome, freeze
from experiments.runs.spec import RunSpec

# Launchers whose runs a process of the pool makes; the others start processes of their own.
_POOLED = ("local", "subprocess")


def run_missing(specs: Sequence[RunSpec], *, jobs: int) -> list[Outcome]:
    """Run what is not finished, and say what became of every run.

    Args:
        specs: the runs.
        jobs: processes side by side; each gets its share of the cores, and a GPU of its own where
            there are several.

    Returns:
        One outcome per run, those that were finished before first. Runs that another process has
        are left alone, `elsewhere`.

    Raises:
        UserError: the directory of a run cannot be used, or a launcher cannot start it.
    """
    outcomes, missing = [], []
    for spec in specs:
        finished = finished_outcome(spec)
        if finished is None:
            missing.append(spec)
        else:
            outcomes.append(finished)
    if not missing:
        return outcomes
    pooled = [spec for spec in missing if spec.config.launch.name in _POOLED]
    others = [spec for spec in missing if spec.config.launch.name not in _POOLED]
    left, frozen = [], []
    for spec in pooled:
        try:
            freeze(spec)
            frozen.append(spec)
        except InUseError as error:
            left.append(elsewhere(spec, error))
    progress = Progress([*frozen, *others], finished_before=len(outcomes))
    outcomes += [*left, *_run_in_pool(frozen, jobs, progress)]
    for spec in others:
        progress.show((spec.directory,))
        try:
            outcomes.append(launch(spec))
        except InUseError as error:
            outcomes.append(elsewhere(spec, error))
        progress.ended(outcomes[-1])
    return outcomes


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return tuple(entry.strip() for entry in listed.split(",") if entry.strip())
    if shutil.which("nvidia-smi") is None:
        return ()
    import torch  # takes seconds, which a machine without a GPU does not spend

    return tuple(map(str, range(torch.cuda.device_count())))


def _run_in_pool(specs: Sequence[RunSpec], jobs: int, progress: Progress) -> list[Outcome]:
    if not specs:
        return []
    outcomes = []
    threads = None if jobs == 1 else max(1, available_cores() // jobs)
    gpus = visible_gpus() if jobs > 1 else ()
    with endings_raised(), WorkerPool(min(jobs, len(specs)), threads, gpus) as pool:
        for report in pool.outcomes([spec.directory for spec in specs]):
            if isinstance(report, Outcome):
                outcomes.append(report)
                progress.ended(report)
            else:
                progress.show(report)
    return outcomes
