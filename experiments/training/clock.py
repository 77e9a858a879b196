"""Training seconds, split into data, forward/backward, optimizer and its further passes.

The clock runs only between `start` and `stop`, where the device is synchronised; evaluation,
checkpoints and logging happen while it stands. In between, `lap` says which part the time since
the last mark belongs to. On the CPU a mark is a reading of the system's clock. On a GPU it is an
event in the stream, read at `stop`, so that measuring the parts does not make the host wait for
the device in every step; the parts are consecutive, and their sum is the training time.
"""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import torch

logger = logging.getLogger(__name__)

Part = Literal["data", "forward_backward", "extra_passes", "optimizer"]
PARTS: tuple[Part, ...] = get_args(Part)

_new_event: Callable[..., torch.cuda.Event] = torch.cuda.Event  # torch leaves it untyped


class TrainingClock:
    """Cumulative training seconds.

    Args:
        device: where the training runs; synchronised at the edges if it is a GPU.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._seconds: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
        self._running = False
        self._mark_s = 0.0
        self._events: list[tuple[Part | None, torch.cuda.Event]] = []

    def start(self) -> None:
        """Let the clock run; it was standing."""
        assert not self._running
        self._running = True
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self._record(None)
        self._mark_s = time.perf_counter()

    def lap(self, part: Part | None) -> None:
        """Add the time since the last mark to a part; None leaves it out of the clock."""
        assert self._running
        if self._device.type == "cuda":
            self._record(part)
            return
        now_s = time.perf_counter()
        if part is not None:
            self._seconds[part] += now_s - self._mark_s
        self._mark_s = now_s

    def stop(self) -> None:
        """Let the clock stand; the time since the last mark is not counted."""
        assert self._running
        self._running = False
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            for (_, begin), (part, end) in zip(self._events, self._events[1:], strict=False):
                if part is not None:
                    self._seconds[part] += begin.elapsed_time(end) / 1000.0  # milliseconds
            self._events.clear()

    @property
    def train_time_s(self) -> float:
        """All training seconds up to the last `stop`."""
        return sum(self._seconds.values())

    def seconds(self, part: Part) -> float:
        """Training seconds of one part up to the last `stop`."""
        return self._seconds[part]

    def state_dict(self) -> dict[str, float]:
        """The seconds by part, for a checkpoint; the clock stands."""
        assert not self._running
        return {part: self._seconds[part] for part in PARTS}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from the seconds of a checkpoint; a part it does not know had none."""
        assert not self._running
        self._seconds = {part: float(state.get(part, 0.0)) for part in PARTS}

    def _record(self, part: Part | None) -> None:
        event = _new_event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._events.append((part, event))


def restart_peak_memory(device: torch.device) -> None:
    """Let `peak_memory_bytes` count from now on: a process may do several runs.

    Where the system cannot forget a peak (outside Linux), the CPU's stays that of the process.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        logger.debug("the peak of memory cannot be restarted: it counts from the process's start")


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory since the last restart: allocated on a GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:", 1)[1].split(maxsplit=1)[0]) * 1024
    except (OSError, IndexError):
        logger.debug(
            "no /proc: the peak of memory is that of the process's start, or of its parent"
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts kibibytes
