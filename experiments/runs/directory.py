"""The files of one run: its lock, frozen config, meta, records, checkpoints and status.

One process at a time works in a run directory. It holds a lock of the operating system, which
disappears with the process however that ends. A directory whose status says `running` while its
lock is free was left by a killed process, and is resumed; a run that is done or has diverged is
finished, and never repeated, locked or written to again.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from experiments.errors import UserError, one_line
from experiments.given import parse_json, read_text
from experiments.runs.atomic import (
    UnwritableError,
    make_folder,
    open_own,
    remove_leftovers,
    write_atomically,
)
from experiments.runs.locks import HeldLock, holder
from experiments.runs.spec import NUMERICS_MEANING, NUMERICS_ROUNDING, RunSpec

Status = Literal["running", "done", "diverged", "timeout", "crashed", "refused"]
STATUSES: tuple[Status, ...] = get_args(Status)
FINISHED: tuple[Status, ...] = ("done", "diverged")

CONFIG_FILE = "config.yaml"
META_FILE = "meta.json"
METRICS_FILE = "metrics.jsonl"
STATUS_FILE = "status.json"
TRACEBACK_FILE = "traceback.txt"
CHECKPOINTS_FOLDER = "checkpoints"
LOCK_FILE = "lock"
# Files of a run that are replaced as a whole, and everything that a run's directory may hold
# before its config is frozen.
_REPLACED = r"config\.yaml|meta\.json|status\.json|traceback(-rank\d+)?\.txt"
_OWN = re.compile(
    rf"({_REPLACED})(\.[0-9a-f]{{8}}\.tmp)?|lock|metrics\.jsonl|checkpoints|slurm|wandb"
)
_TRACEBACK = re.compile(r"traceback(-rank\d+)?\.txt")
_CHECKPOINT = r"step\d+(-[0-9a-f]{16}(\.pt)?)?"
# Longer than `is_locked` holds a free lock.
_LOOK_S = 0.1


@dataclass(frozen=True)
class RunStatus:
    """How far a run is.

    Attributes:
        status: running, done, diverged, timeout, crashed, or refused (a mistake of the user, told
            once the directory was there); all but done and diverged resume.
        epoch: finished epochs.
        step: finished steps.
        message: one line for people; may be empty.
    """

    status: Status
    epoch: int = 0
    step: int = 0
    message: str = ""


class InUseError(UserError):
    """Another live process has the run."""


class RunDirectory:
    """The directory of one run, locked for this process; use `open`, and as a context manager.

    Attributes:
        path: the directory.
        spec: the run, as this process was asked for it.
        status: the status found when it was opened, or written last; None in a new directory.
    """

    def __init__(self, path: Path, spec: RunSpec, lock: HeldLock | None):
        self.path = path
        self.spec = spec
        self.status: RunStatus | None = None
        self._lock = lock

    @classmethod
    def open(cls, spec: RunSpec, path: Path | None = None) -> RunDirectory:
        """Make or find the directory of a run, lock it, and freeze the config in it.

        A finished run is opened as it is, without a lock, and left untouched: whoever may read it
        may open it.

        Args:
            spec: the run.
            path: its directory, if the results were moved; `spec.directory` by default.

        Raises:
            InUseError: another process has it.
            UserError: the directory cannot be written, is reached through a link, holds what no run
                wrote, a run whose config decides other numbers, or an unfinished one and
                `resume=never`.
        """
        path = spec.directory if path is None else path
        directory = cls(path, spec, None)
        directory.status = read_status(path)
        if directory.finished:
            directory._check_config()
            return directory
        results = Path(spec.config.results_dir)
        _make(path, results if path == spec.directory else path.parent)
        directory._lock = _lock(path)
        try:
            directory._check_config()
            directory.status = read_status(path)
            if not directory.finished:
                directory._check_resume()
                directory._prepare()
        except BaseException:
            directory.close()
            raise
        return directory

    @property
    def finished(self) -> bool:
        """Whether the run is already finished: done or diverged."""
        return self.status is not None and self.status.status in FINISHED

    @property
    def metrics_path(self) -> Path:
        """The records."""
        return self.path / METRICS_FILE

    @property
    def checkpoints_path(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / CHECKPOINTS_FOLDER

    def write_status(self, status: RunStatus) -> None:
        """Replace the status, atomically."""
        write_atomically(self.path / STATUS_FILE, json.dumps(asdict(status)) + "\n")
        self.status = status

    def write_meta(self, *, origin: dict[str, Any], parameters: int, resumed_at: int) -> None:
        """Record what the run is made with; a resume adds to it and replaces nothing.

        Args:
            origin: versions, hardware and git state of this process.
            parameters: trainable numbers of the model.
            resumed_at: finished steps when this process took over; 0 for the first.
        """
        path = self.path / META_FILE
        if resumed_at > 0 and path.exists():
            meta = _read_json(path)
            resumed = {"step": resumed_at, "numerics_rounding": NUMERICS_ROUNDING, **origin}
            meta.setdefault("resumes", []).append(resumed)
        else:
            spec = self.spec
            meta = {
                "key": spec.key,
                "experiment": spec.experiment,
                **({} if spec.arm is None else {"arm": spec.arm}),
                "optimizer": spec.optimizer,
                "seed": spec.seed,
                "scale": spec.scale,
                "numerics_version": NUMERICS_MEANING,
                "numerics_rounding": NUMERICS_ROUNDING,
                "parameters": parameters,
                **origin,
            }
        write_atomically(path, json.dumps(meta, indent=2) + "\n")

    def record_crash(self, error: BaseException, account: str | None = None) -> None:
        """Write the traceback of an unexpected error, if there is room, and the status `crashed`.

        Args:
            error: what this process met.
            account: what lies behind it, in one line, where the error does not say so itself.
        """
        with suppress(UnwritableError):
            write_traceback(self.path, error)
        self._write_ending("crashed", account or f"{type(error).__name__}: {error}")

    def record_refusal(self, error: UserError) -> None:
        """Write the status `refused`: nothing broke, the run cannot go on as it is configured."""
        self._write_ending("refused", str(error))

    def _write_ending(self, status: Status, message: str) -> None:
        """Write a status at the last epoch and step known.

        What ended the run is told by whoever calls this, and must not be hidden by a disk that has
        not even room for a status beside the old one: then the old one is overwritten in place.
        """
        epoch, step = (self.status.epoch, self.status.step) if self.status else (0, 0)
        ending = RunStatus(status, epoch, step, " ".join(message.split()))
        try:
            self.write_status(ending)
        except UnwritableError:
            with suppress(OSError):
                _overwrite(self.path / STATUS_FILE, json.dumps(asdict(ending)) + "\n")
                self.status = ending

    def close(self) -> None:
        """Release the lock; more than once does no harm."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_config(self) -> None:
        """Refuse a directory whose frozen config decides other numbers than the one asked for."""
        frozen_path = self.path / CONFIG_FILE
        if not frozen_path.exists():
            return
        difference = RunSpec.load(frozen_path).first_difference(self.spec)
        if difference is not None:
            key, frozen, asked = difference
            raise UserError(
                f"resuming under a changed config: {key} is {frozen} in {frozen_path} "
                f"but {asked} was asked for; restore the file, or delete the directory"
            )

    def _check_resume(self) -> None:
        if self.status is not None and self.spec.config.resume == "never":
            raise UserError(
                f"resume=never, but {self.path} holds an unfinished run ({self.status.status}, "
                f"step {self.status.step}): use resume=auto, or delete the directory"
            )

    def _prepare(self) -> None:
        """Clear what a killed process left and freeze the config as it is asked for now."""
        make_folder(self.checkpoints_path, below=self.path)
        try:
            remove_leftovers(self.path, _REPLACED)
            remove_leftovers(self.checkpoints_path, _CHECKPOINT)
            for old in list(self.path.iterdir()):
                if _TRACEBACK.fullmatch(old.name):
                    old.unlink()
        except OSError as error:
            raise UnwritableError(self.path, error) from error
        self.spec.save(self.path / CONFIG_FILE)


def write_traceback(path: Path, error: BaseException, rank: int = 0) -> None:
    """Write the traceback of an unexpected error into a run directory.

    Args:
        path: the directory.
        error: what was raised.
        rank: who raised it; every rank but the leader has a file of its own.
    """
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    file = f"traceback-rank{rank}.txt" if rank else TRACEBACK_FILE
    write_atomically(path / file, text)


def read_status(path: Path) -> RunStatus | None:
    """Read the status of a run without locking it.

    Args:
        path: a run directory.

    Returns:
        The status; None where no run has started.

    Raises:
        UserError: `status.json` is corrupt.
    """
    file = path / STATUS_FILE
    try:
        content = _read_json(file)
    except FileNotFoundError:
        return None
    try:
        status = RunStatus(**content)
    except TypeError as error:
        raise UserError(f"{file} is corrupt: {error}; delete it to resume the run") from error
    if status.status not in STATUSES:
        known = ", ".join(STATUSES)
        raise UserError(f"{file} is corrupt: status {status.status!r} is none of {known}")
    for name in ("epoch", "step"):
        value = getattr(status, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise UserError(
                f"{file} is corrupt: {name} {value!r} is no count; delete it to resume the run"
            )
    # shown on a terminal, which the file may not command
    return replace(status, message=one_line(status.message))


def is_locked(path: Path) -> bool:
    """Whether a live process works in a run directory.

    Args:
        path: a run directory; it may not exist.
    """
    try:
        lock = HeldLock(open_own(path / LOCK_FILE, os.O_RDONLY))
    except OSError:
        return False
    try:
        fcntl.flock(lock.descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        lock.release()
    return False


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(read_text(path))
    except ValueError as error:
        reason = one_line(error)
        raise UserError(f"{path} is corrupt: {reason}; delete it to resume the run") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is corrupt: expected a JSON object; delete it to resume the run")
    return content


def _make(path: Path, below: Path) -> None:
    """Make a run directory, or see that the one that is there is one.

    Raises:
        UserError: it cannot be made, is reached through a link, or holds what no run wrote.
    """
    try:
        make_folder(path, below=below)
    except UnwritableError as error:
        raise _unwritable(path, error) from error
    try:
        names = [] if (path / CONFIG_FILE).exists() else sorted(p.name for p in path.iterdir())
    except OSError as error:
        raise _unwritable(path, UnwritableError(path, error)) from error
    foreign = [name for name in names if not _OWN.fullmatch(name)]
    if foreign:
        raise UserError(
            f"{path} is no run directory: it has no {CONFIG_FILE}, but holds {foreign[0]}; move "
            "that away, or use another results_dir"
        )


def _lock(path: Path) -> HeldLock:
    """Take the lock of a run directory, which holds the process id of its owner."""
    file = path / LOCK_FILE
    try:
        lock = HeldLock(_open_lock(file))
    except OSError as error:
        refused = UnwritableError(file, error)
        raise (_unwritable(path, refused) if refused.forbidden else refused) from error
    try:
        _take(lock.descriptor)
    except BlockingIOError as error:
        owner = holder(lock.descriptor)
        lock.release()
        raise InUseError(
            f"run directory in use by {owner}: {path}; wait for it, or end that process"
        ) from error
    except OSError as error:
        lock.release()
        raise UserError(
            f"{file} cannot be locked ({error.strerror}): set results_dir to a file system "
            "that has locks"
        ) from error
    with suppress(OSError):  # a full disk, or a file that only its owner may write
        os.ftruncate(lock.descriptor, 0)
        os.pwrite(lock.descriptor, f"{os.getpid()}\n".encode(), 0)
    return lock


def _open_lock(file: Path) -> int:
    """Open the lock; one that another user made under a strict umask can be held unwritten."""
    try:
        return open_own(file, os.O_RDWR | os.O_CREAT)
    except PermissionError:
        return open_own(file, os.O_RDONLY)


def _take(descriptor: int) -> None:
    """Take the lock; a second time where somebody has only looked whether it is held."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(_LOOK_S)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _overwrite(path: Path, text: str) -> None:
    """Put a short text in the place of another one, without asking the disk for more room."""
    descriptor = open_own(path, os.O_WRONLY)
    try:
        written = os.pwrite(descriptor, text.encode(), 0)
        os.ftruncate(descriptor, written)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritable(path: Path, error: UnwritableError) -> UserError:
    return UserError(
        f"results directory cannot be written: {path} ({error.reason}); "
        "set results_dir to a folder that you may write"
    )
