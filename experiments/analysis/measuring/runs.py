"""Read run directories: `<results_dir>/runs/<experiment>/<contestant>/<scale>-seed<seed>-<key>/`.

A contestant is an arm of the experiment, or an optimizer where the run belongs to no arm.

Nothing is dropped in silence. A run that is not finished is loaded with its status; a directory
that lacks a file becomes a line in `RunSet.problems`; a record that cannot be read is an error that
names file and line. Only the last line may be torn, because a process can die while it writes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.errors import UserError, nearest, one_line
from experiments.given import is_number, open_plain, parse_json, read_json, visible
from experiments.yaml_text import read_yaml

logger = logging.getLogger(__name__)

STATUSES = ("done", "diverged", "timeout", "crashed", "refused", "running")
SCALES = ("full", "reduced", "smoke")
REQUIRED_FILES = ("config.yaml", "meta.json", "status.json")
KNOWN_FILES = frozenset(
    {*REQUIRED_FILES, "metrics.jsonl", "checkpoints", "lock", "traceback.txt", "wandb"}
)
# What a record of each kind cannot do without; every other field may be absent or null.
REQUIRED_FIELDS = {
    "step": ("epoch", "step", "train_time_s"),
    "epoch": ("epoch", "step", "train_time_s"),
    "curvature": ("step", "block"),
    "passes": ("epoch", "step"),
    "ema": ("epoch", "step"),
    "overflow": ("epoch", "step"),
    "gradient": ("epoch", "step"),
}
DIRECTORY_NAME = re.compile(r"(?P<scale>[a-z]+)-seed(?P<seed>[0-9]+)-(?P<key>[0-9a-f]{10})")
# Of experiments and contestants: it stands in commands that people copy.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")

Record = dict[str, Any]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False)  # hashed by identity: a run holds mutable records
class Run:
    """One run directory in memory.

    Attributes:
        path: the run directory.
        key: ten hex digits that stand for what decides the numbers.
        experiment: name of the experiment.
        contestant: name of the arm, or of the optimizer where there is no arm.
        optimizer: name of the optimizer's config.
        seed: the seed.
        scale: full, reduced or smoke.
        status: one of `STATUSES`.
        message: what the run says about its end.
        config: the resolved config.
        meta: versions, hardware, git state, parameter count.
        steps: records of kind "step", in order.
        epochs: records of kind "epoch", in order.
        curvature: records of kind "curvature", in order.
        gradients: records of kind "gradient", in order.
        torn: whether the last line of `metrics.jsonl` was cut off.
    """

    path: Path
    key: str
    experiment: str
    contestant: str
    optimizer: str
    seed: int
    scale: str
    status: str
    message: str
    config: Record = field(repr=False)
    meta: Record = field(repr=False)
    steps: tuple[Record, ...] = field(repr=False)
    epochs: tuple[Record, ...] = field(repr=False)
    curvature: tuple[Record, ...] = field(repr=False)
    gradients: tuple[Record, ...] = field(repr=False)
    torn: bool = False

    @cached_property
    def name(self) -> str:
        """`<contestant>/<directory name>`, short enough for a message."""
        return f"{self.contestant}/{self.path.name}"

    @property
    def train_time_s(self) -> float:
        """Training seconds at the last record; 0 where there is none."""
        records = (*self.epochs[-1:], *self.steps[-1:])
        return max((float(record["train_time_s"]) for record in records), default=0.0)

    @property
    def state(self) -> str:
        """The status for people: whether a run that says running still does, no file can tell."""
        return "unfinished" if self.status == "running" else self.status

    @property
    def progress(self) -> str:
        """How far it has come, in words: "epoch 3 of 10"."""
        epoch = self.epochs[-1]["epoch"] if self.epochs else 0
        return f"epoch {epoch} of {self.config.get('train', {}).get('epochs', 'unknown')}"

    @cached_property
    def machine(self) -> str:
        """What it ran on, in words: GPUs or threads of a processor; all, if a resume changed it."""
        return ", then ".join(dict.fromkeys(map(_machine, self._origins)))

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """How many processes trained it, in ascending order; several, if a resume changed it."""
        return tuple(sorted({int(origin.get("ranks") or 1) for origin in self._origins}))

    @property
    def numerics(self) -> int:
        """The meaning of its numbers: 1 where it was not recorded yet."""
        return int(self.meta.get("numerics_version", 1))

    @cached_property
    def roundings(self) -> tuple[int, ...]:
        """How its numbers were rounded, in ascending order; several, if a resume changed it."""
        return tuple(sorted({int(origin.get("numerics_rounding", 1)) for origin in self._origins}))

    @property
    def _origins(self) -> tuple[Record, ...]:
        """Hardware and ranks of its first process, then of those that resumed it."""
        return (self.meta, *self.meta.get("resumes", ()))

    def epoch_series(self, name: str) -> FloatArray:
        """Values of one field of the epoch records, float64, NaN where absent or null."""
        return series(self.epochs, name)


def _machine(origin: Record) -> str:
    found, ranks = origin.get("hardware") or {}, int(origin.get("ranks") or 1)
    if found.get("gpu"):
        return f"{ranks} x {found['gpu']}" if ranks > 1 else str(found["gpu"])
    threads = found.get("threads")
    count = f"{threads} thread{'s' if threads != 1 else ''} of " if threads else ""
    several = f"{ranks} ranks with " if ranks > 1 else ""
    return f"{several}{count}{found.get('cpu', 'an unknown machine')}"


@dataclass(frozen=True)
class RunSet:
    """The runs found, and one line for everything that could not be counted."""

    runs: tuple[Run, ...]
    problems: tuple[str, ...]


def series(records: Iterable[Record], name: str) -> FloatArray:
    """One field of many records, float64; absent and null (JSON has no infinities) become NaN."""
    values = (record.get(name) for record in records)
    return np.array([np.nan if value is None else float(value) for value in values])


def load_runs(
    results_dir: Path,
    experiment: str,
    *,
    scale: str | None = None,
    keys: Collection[str] | None = None,
) -> RunSet:
    """Load every run of an experiment.

    Args:
        results_dir: the directory that holds `runs/`.
        experiment: name of the experiment.
        scale: keep the runs of this scale only.
        keys: keep the runs with these keys only (a comparison that knows which runs it needs).

    Returns:
        The runs, ordered by contestant, scale, seed and key.

    Raises:
        UserError: unknown experiment or scale, or a file that cannot be read.
    """
    if scale is not None and scale not in SCALES:
        raise UserError(f"unknown scale {scale!r}: {nearest(scale, SCALES)}")
    root = results_dir / "runs"
    if NAME.fullmatch(experiment) is None:
        raise UserError(f"{experiment!r} is no experiment: its name is letters, digits and . _ + -")
    if not root.is_dir():
        raise UserError(f"no runs in {results_dir}: the directory {root} does not exist")
    if not (root / experiment).is_dir():
        known = [child.name for child in visible(root, "*") if child.is_dir()]
        hint = nearest(experiment, known) if known else f"{root} is empty"
        raise UserError(f"no runs of experiment {experiment!r} in {root}: {hint}")
    runs: list[Run] = []
    problems: list[str] = []
    for path in _run_directories(root / experiment):
        match = DIRECTORY_NAME.fullmatch(path.name)
        if match is None:
            problems.append(f"{path}: not named <scale>-seed<seed>-<key>; not counted")
            continue
        if scale not in (None, match["scale"]) or (keys is not None and match["key"] not in keys):
            continue
        problems += _unknown_files(path)
        missing = [name for name in REQUIRED_FILES if not (path / name).is_file()]
        if missing:
            problems.append(f"{path}: {', '.join(missing)} missing; not counted")
            continue
        runs.append(load_run(path))
    runs.sort(key=lambda run: (run.contestant, SCALES.index(run.scale), run.seed, run.key))
    return RunSet(tuple(runs), tuple(problems))


def load_run(path: Path) -> Run:
    """Load one run directory.

    Raises:
        UserError: a file is missing or unreadable, or contradicts the directory's name.
    """
    meta = _read_json(path / "meta.json")
    status = _read_json(path / "status.json")
    if status.get("status") not in STATUSES:
        value = str(status.get("status"))
        raise UserError(f"{path / 'status.json'}: status {value!r}: {nearest(value, STATUSES)}")
    identity = _identity(path, meta)
    records, torn = read_metrics(path / "metrics.jsonl")
    return Run(
        path=path,
        **identity,
        status=status["status"],
        message=one_line(status.get("message") or ""),
        config=_read_yaml(path / "config.yaml"),
        meta=meta,
        steps=tuple(records["step"]),
        epochs=tuple(records["epoch"]),
        curvature=tuple(records["curvature"]),
        gradients=tuple(records["gradient"]),
        torn=torn,
    )


def read_metrics(path: Path) -> tuple[dict[str, list[Record]], bool]:
    """Read `metrics.jsonl`.

    Returns:
        The records by kind, and whether the last line was torn (it is then left out).

    Raises:
        UserError: a record before the last is not valid JSON, or any record breaks its contract.
    """
    records: dict[str, list[Record]] = {kind: [] for kind in REQUIRED_FIELDS}
    try:
        with open_plain(path) as file:
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return records, False
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            # Only a line without its newline can be torn: every complete record ends with one.
            if number == len(lines):
                logger.warning("%s: line %d is torn and left out", path, number)
                return records, True
            raise UserError(f"{path}, line {number}: corrupt record ({error})") from error
        _check_record(record, records, f"{path}, line {number}")
        records[record["kind"]].append(record)
    return records, False


def _check_record(record: Any, before: dict[str, list[Record]], where: str) -> None:
    """Raise `UserError` unless the record has its kind, its fields, numbers, and its order."""
    if not isinstance(record, dict) or "kind" not in record:
        raise UserError(f"{where}: corrupt record (an object with the field 'kind' is needed)")
    kind = record["kind"]
    if not isinstance(kind, str) or kind not in REQUIRED_FIELDS:
        raise UserError(f"{where}: unknown kind {kind!r}: {nearest(str(kind), REQUIRED_FIELDS)}")
    for name in REQUIRED_FIELDS[kind]:
        if not is_number(record.get(name)):
            raise UserError(f"{where}: record of kind {kind!r} has no number in {name!r}")
    for name, value in record.items():
        if name != "kind" and not (value is None or isinstance(value, bool) or is_number(value)):
            raise UserError(f"{where}: {name!r} is {value!r}, a number or null is needed")
    earlier = before[kind]
    if kind == "epoch" and earlier and record["epoch"] <= earlier[-1]["epoch"]:
        raise UserError(
            f"{where}: epoch {record['epoch']} follows epoch {earlier[-1]['epoch']}; "
            "each epoch may stand in the file once"
        )


def _identity(path: Path, meta: Record) -> dict[str, Any]:
    """Key, experiment, contestant, seed and scale; the path and `meta.json` must agree."""
    match = DIRECTORY_NAME.fullmatch(path.name)
    if match is None or match["scale"] not in SCALES:
        raise UserError(f"{path}: a run directory is named <scale>-seed<seed>-<key>")
    for folder in (path.parent.parent, path.parent):
        if NAME.fullmatch(folder.name) is None:
            raise UserError(f"{folder}: the folder's name must be letters, digits and . _ + -")
    named: dict[str, Any] = {
        "key": match["key"],
        "experiment": path.parent.parent.name,
        "contestant": path.parent.name,
        "seed": int(match["seed"]),
        "scale": match["scale"],
    }
    for name, value in named.items():
        field_name = name
        if name == "contestant":
            field_name = "arm" if "arm" in meta else "optimizer"
        if meta.get(field_name) != value:
            raise UserError(
                f"{path / 'meta.json'}: {field_name} is {meta.get(field_name)!r}, "
                f"but the directory's name says {value!r}"
            )
    return {**named, "optimizer": str(meta.get("optimizer", ""))}


def _run_directories(root: Path) -> Iterator[Path]:
    for contestant in visible(root, "*"):
        if contestant.is_dir():
            yield from (child for child in visible(contestant, "*") if child.is_dir())


def _unknown_files(path: Path) -> list[str]:
    # A leading dot or a suffix .tmp is a file on its way to its name (atomic writing).
    names = sorted(
        child.name
        for child in path.iterdir()
        if child.name not in KNOWN_FILES
        and not child.name.startswith(".")
        and child.suffix not in (".tmp", ".log")
    )
    return [f"{path}: unknown file {', '.join(names)} (ignored)"] if names else []


def _read_json(path: Path) -> Record:
    try:
        content = read_json(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, an object is needed")
    return content


def _read_yaml(path: Path) -> Record:
    try:
        content = read_yaml(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, a mapping is needed")
    return content
