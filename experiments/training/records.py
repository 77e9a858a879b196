"""What a rank writes down about its run: the leader everything, all others nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.runs.directory import RunDirectory, RunStatus
from experiments.runs.metrics import MetricsFile
from experiments.runs.mirror import build_mirror
from experiments.runs.spec import RunSpec


class Records:
    """Nothing: for the ranks that do not lead."""

    found_status: RunStatus | None = None

    def open(self, offset: int) -> None:
        """Open the records, cut back to `offset` bytes."""

    @property
    def offset(self) -> int:
        """Bytes on record."""
        return 0

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record."""

    def sync(self) -> None:
        """Return once the records are on the disk."""

    def write_status(self, status: RunStatus) -> None:
        """Say how far the run is."""

    def write_meta(self, **meta: Any) -> None:
        """Say what the run is made with, see `RunDirectory.write_meta`."""

    def close(self, ending: str) -> None:
        """End the records of this process."""


class LeaderRecords(Records):
    """The files of a run directory, and their mirror.

    Args:
        spec: the run.
        directory: its locked directory.
    """

    def __init__(self, spec: RunSpec, directory: RunDirectory):
        self._directory = directory
        self._mirror = build_mirror(spec, directory.path)
        self._metrics: MetricsFile | None = None
        self.found_status = directory.status

    def open(self, offset: int) -> None:
        """Open `metrics.jsonl`, cut back to `offset` bytes.

        Raises:
            UserError: the file does not reach so far.
        """
        self._metrics = MetricsFile(self._directory.metrics_path, offset=offset)

    @property
    def offset(self) -> int:
        """Length of `metrics.jsonl`, bytes."""
        return self._opened.offset

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record, and mirror it."""
        self._opened.append(record)
        self._mirror.log(record)

    def sync(self) -> None:
        """Return once the records are on the disk."""
        self._opened.sync()

    def write_status(self, status: RunStatus) -> None:
        """Replace `status.json`."""
        self._directory.write_status(status)

    def write_meta(self, **meta: Any) -> None:
        """Write `meta.json`."""
        self._directory.write_meta(**meta)

    def close(self, ending: str) -> None:
        """Close the file and finish the mirror."""
        self._opened.close()
        self._mirror.finish(ending)

    @property
    def _opened(self) -> MetricsFile:
        assert self._metrics is not None, "open() comes first"
        return self._metrics
