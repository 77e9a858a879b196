"""Everything under a results directory that the report shows, read once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.analysis.measuring.groups import Results, group_runs
from experiments.analysis.measuring.runs import Run, load_runs
from experiments.analysis.showing.deviations import Deviation, load_ledger
from experiments.errors import UserError
from experiments.report.judged import CLAIMS_FILE, JudgedClaim, load_judged, refuse_outdated

LEDGER = "deviations.yaml"
_SOURCES = (
    CLAIMS_FILE,
    LEDGER,
    "runs/*/*/*/*.json*",
    "runs/*/*/*/config.yaml",
    "benchmarks/*",
    "tuning/*/*.*",
    "theory/*",
)


@dataclass(frozen=True)
class Material:
    """What a report is made of.

    Attributes:
        results_dir: where it was read from.
        experiments: the runs by experiment, one entry per scale, in alphabetical order.
        claims: the judged claims, in the registry's order.
        deviations: the ledger; empty where the results have none.
    """

    results_dir: Path
    experiments: dict[str, tuple[Results, ...]]
    claims: tuple[JudgedClaim, ...]
    deviations: tuple[Deviation, ...]

    @property
    def runs(self) -> tuple[Run, ...]:
        """Every run, by experiment."""
        return tuple(run for results in self.experiments.values() for run in runs_of(results))

    def claims_about(self, experiment: str) -> tuple[JudgedClaim, ...]:
        """The claims that an experiment tests."""
        return tuple(claim for claim in self.claims if claim.experiment == experiment)

    def training_seconds(self, runs: Sequence[str]) -> float | None:
        """Training seconds of runs together.

        Args:
            runs: directories relative to the results directory; files of findings cost nothing.

        Returns:
            The sum; None where no run is among them.
        """
        known = {self.place(run): run.train_time_s for run in self.runs}
        found = [known[run] for run in runs if run in known]
        return sum(found) if found else None

    def place(self, run: Run) -> str:
        """The run directory, relative to the results directory."""
        return run.path.relative_to(self.results_dir).as_posix()

    def fingerprint(self) -> str:
        """Twelve hex digits of everything that the report is made of."""
        return self.digest()[:12]

    def digest(self) -> str:
        """The SHA-256 of everything that the report is made of, in hex."""
        digest = hashlib.sha256()
        for path in _sources(self.results_dir):
            digest.update(path.relative_to(self.results_dir).as_posix().encode() + b"\0")
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()


def load_material(results_dir: Path) -> Material:
    """Read a results directory.

    Raises:
        UserError: it holds no runs, or a file in it cannot be read.
    """
    root = results_dir / "runs"
    if not root.is_dir():
        raise UserError(f"no runs in {results_dir}: the directory {root} does not exist")
    names = sorted(child.name for child in root.iterdir() if child.is_dir())
    experiments = {name: group_runs(load_runs(results_dir, name)) for name in names}
    ledger = results_dir / LEDGER
    claims = load_judged(results_dir)
    refuse_outdated(results_dir)
    return Material(
        results_dir=results_dir,
        experiments={name: results for name, results in experiments.items() if results},
        claims=claims,
        deviations=load_ledger(ledger) if ledger.is_file() else (),
    )


def runs_of(results: Sequence[Results]) -> tuple[Run, ...]:
    """The runs of an experiment, in the order of its groups."""
    return tuple(run for entry in results for group in entry.groups for run in group.runs)


def _sources(results_dir: Path) -> Iterator[Path]:
    for pattern in _SOURCES:
        found = (path for path in results_dir.glob(pattern) if path.is_file())
        yield from sorted(path for path in found if not path.name.startswith("."))
