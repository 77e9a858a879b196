"""Real processes that talk over gloo, each with a time limit: how tests run several ranks.

Ranks are forked from a process that has imported torch once, so that starting them costs a fraction
of a second. A rank that raises, dies or hangs fails the call with what every rank had to say.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import multiprocessing.connection
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOADED = [
    *("torch", "torch.distributed", "torch.distributed.checkpoint", "mlbfgs"),
    *("experiments.training.sharded_checkpoint", "experiments.training.trainer"),
]
#: Seconds that the others get to notice that a rank failed.
GRACE_S = 5.0


class RankError(AssertionError):
    """A rank raised, died or took too long."""


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    time_limit_s: float = 60.0,
    collective_limit_s: float = 30.0,
) -> list[Any]:
    """Call `function(rank, *arguments)` in as many processes, inside one gloo process group.

    Args:
        function: importable by its name; its result can be pickled.
        world_size: how many processes.
        arguments: can be pickled.
        time_limit_s: for everything; then the processes are ended.
        collective_limit_s: after which a collective that waits for a rank raises.

    Returns:
        The results, by rank.

    Raises:
        RankError: see there.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    packed = _packed(arguments)
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes, pipes = [], []
        for rank in range(world_size):
            here, there = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank,
                args=(there, function, rank, world_size, store, collective_limit_s, packed),
                daemon=True,
            )
            process.start()
            there.close()
            processes.append(process)
            pipes.append(here)
        try:
            outcomes = _collect(pipes, time_limit_s)
        finally:
            for process in processes:
                process.kill()
                process.join()
    if all(ok for ok, _ in outcomes):
        return [value for _, value in outcomes]
    said = [f"rank {rank}: {text}" for rank, (ok, text) in enumerate(outcomes) if not ok]
    raise RankError("\n".join(said))


def _collect(
    pipes: list[multiprocessing.connection.Connection], time_limit_s: float
) -> list[tuple[bool, Any]]:
    outcomes: dict[int, tuple[bool, Any]] = {}
    deadline = time.monotonic() + time_limit_s
    while len(outcomes) < len(pipes) and time.monotonic() < deadline:
        left = [pipe for i, pipe in enumerate(pipes) if i not in outcomes]
        for ready in multiprocessing.connection.wait(left, deadline - time.monotonic()):
            i = pipes.index(ready)  # type: ignore[arg-type]
            try:
                outcomes[i] = _unpacked(pipes[i].recv_bytes())
            except EOFError:
                outcomes[i] = (False, "died")
            if not outcomes[i][0]:
                deadline = min(deadline, time.monotonic() + GRACE_S)
    return [outcomes.get(i, (False, "took too long")) for i in range(len(pipes))]


def _rank(
    pipe: multiprocessing.connection.Connection,
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    store: str,
    collective_limit_s: float,
    arguments: bytes,
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=collective_limit_s),
        )
        outcome = (True, function(rank, *_unpacked(arguments)))
        dist.destroy_process_group()
    except BaseException:
        outcome = (False, traceback.format_exc())
    with contextlib.suppress(BrokenPipeError):
        pipe.send_bytes(_packed(outcome))


def _packed(value: Any) -> bytes:
    # pickled by multiprocessing, a tensor would stay in the memory of the process that sent it
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=False)
