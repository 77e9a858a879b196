"""Shows how far a campaign is: which run of how many, which epoch, how much time is left.

On a terminal one line is rewritten; elsewhere each ended run is a line, and a run that takes long
reports now and then. The time left comes from the epochs that this campaign has trained so far, and
runs down while one is under way.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from experiments.analysis.measuring.quantities import duration
from experiments.errors import UserError
from experiments.runs.directory import read_status
from experiments.runs.outcome import Outcome
from experiments.runs.spec import RunSpec

_CLEAR_LINE = "\r\x1b[K"


class Progress:
    """The display of one campaign.

    Args:
        specs: the runs that are to be trained.
        finished_before: runs of the campaign that need no training.
        stream: where to show it.
        plain_interval_s: least seconds between two reports of a run in progress where the stream
            is no terminal.
        clock: seconds from any moment on.
    """

    def __init__(
        self,
        specs: Sequence[RunSpec],
        *,
        finished_before: int = 0,
        stream: TextIO | None = None,
        plain_interval_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._specs = {spec.directory: spec for spec in specs}
        self._epochs_at_start = {path: _epoch(path) for path in self._specs}
        self._epochs = dict(self._epochs_at_start)
        self._several = len({spec.experiment for spec in specs}) > 1
        self._ended: dict[Path, Outcome] = {}
        self._finished_before = finished_before
        self._stream = sys.stdout if stream is None else stream
        self._rewrites = self._stream.isatty()
        self._plain_interval_s = plain_interval_s
        self._clock = clock
        self._started_s = self._last_plain_s = self._last_epoch_s = clock()
        if finished_before:
            self._line(f"{finished_before} of {self._total} runs were finished before")

    @property
    def _total(self) -> int:
        return self._finished_before + len(self._specs)

    def show(self, active: Sequence[Path]) -> None:
        """Show the runs in progress.

        Args:
            active: their directories.
        """
        now = self._clock()
        for path in active:
            self._look_at(path)
        due = now - self._last_plain_s >= self._plain_interval_s
        if not active or not (self._rewrites or due):
            return
        self._last_plain_s = now
        runs = ", ".join(self._position(path) for path in active)
        text = f"[{self._ended_count}/{self._total}] {runs}{self._time_left()}"
        if self._rewrites:
            self._stream.write(f"{_CLEAR_LINE}{text}")
            self._stream.flush()
        else:
            self._line(text)

    def ended(self, outcome: Outcome) -> None:
        """Show that a run has ended."""
        self._ended[outcome.directory] = outcome
        self._look_at(outcome.directory)
        self._last_plain_s = self._clock()
        if self._rewrites:
            self._stream.write(_CLEAR_LINE)
        note = f": {outcome.message}" if outcome.message else ""
        self._line(
            f"[{self._ended_count}/{self._total}] {self._name(self._specs[outcome.directory])} "
            f"{outcome.status}{note}{self._time_left()}"
        )

    @property
    def _ended_count(self) -> int:
        return self._finished_before + len(self._ended)

    def _position(self, path: Path) -> str:
        spec = self._specs[path]
        return f"{self._name(spec)} epoch {self._epochs[path]}/{spec.config.train.epochs}"

    def _name(self, spec: RunSpec) -> str:
        experiment = f"{spec.experiment} " if self._several else ""
        return f"{experiment}{spec.contestant} seed {spec.seed}"

    def _line(self, text: str) -> None:
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def _look_at(self, path: Path) -> None:
        """Note the finished epochs of a run, and when one more was seen."""
        epoch = _epoch(path)
        if epoch != self._epochs[path]:
            self._epochs[path] = epoch
            self._last_epoch_s = self._clock()

    def _time_left(self) -> str:
        """Time left, from the mean time of an epoch of this campaign; empty before the first."""
        trained = sum(self._epochs.values()) - sum(self._epochs_at_start.values())
        # A run that ended early has no epochs left, however many it has not trained.
        left = sum(
            int(spec.config.train.epochs) - self._epochs[path]
            for path, spec in self._specs.items()
            if path not in self._ended
        )
        if trained <= 0 or left <= 0:
            return ""
        # Not up to now: the epoch that is under way would count as time, but not as an epoch.
        epoch_s = (self._last_epoch_s - self._started_s) / trained
        under_way_s = self._clock() - self._last_epoch_s
        return f", {duration(epoch_s * left - min(under_way_s, epoch_s))} left"


def _epoch(path: Path) -> int:
    """Finished epochs of a run, 0 where it has not started."""
    try:
        status = read_status(path)
    except UserError:
        # A display does not end a campaign; the run itself will say that its status is corrupt.
        return 0
    return 0 if status is None else status.epoch
