"""The files of one run: its lock, frozen config, meta, records, checkpoints and status.

One process at a time works in a run directory. It holds a lock of the operating system, which
disappears with the process however that ends. A directory whose status says `running` while its
lock is free was left by a killed process, and is resumed; a run that is done or has diverged is
finished, and never repeated.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from experiments.errors import UserError
from experiments.runs.atomic import remove_leftovers, write_atomically
from experiments.runs.locks import HeldLock, holder
from experiments.runs.spec import NUMERICS_VERSION, RunSpec

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


class RunDirectory:
    """The directory of one run, locked for this process; use `open`, and as a context manager.

    Attributes:
        path: the directory.
        spec: the run, as this process was asked for it.
        status: the status found when it was opened, or written last; None in a new directory.
    """

    def __init__(self, path: Path, spec: RunSpec, lock: HeldLock):
        self.path = path
        self.spec = spec
        self.status: RunStatus | None = None
        self._lock = lock

    @classmethod
    def open(cls, spec: RunSpec, path: Path | None = None) -> RunDirectory:
        """Make or find the directory of a run, lock it, and freeze the config in it.

        A finished run is opened as it is and left untouched.

        Args:
            spec: the run.
            path: its directory, if the results were moved; `spec.directory` by default.

        Raises:
            UserError: the directory cannot be written, is in use by another process, holds a
                run whose config decides other numbers, or an unfinished one and `resume=never`.
        """
        path = spec.directory if path is None else path
        lock = _lock(_make(path))
        directory = cls(path, spec, lock)
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
            meta.setdefault("resumes", []).append({"step": resumed_at, **origin})
        else:
            spec = self.spec
            meta = {
                "key": spec.key,
                "experiment": spec.experiment,
                **({} if spec.arm is None else {"arm": spec.arm}),
                "optimizer": spec.optimizer,
                "seed": spec.seed,
                "scale": spec.scale,
                "numerics_version": NUMERICS_VERSION,
                "parameters": parameters,
                **origin,
            }
        write_atomically(path, json.dumps(meta, indent=2) + "\n")

    def record_crash(self, error: BaseException, account: str | None = None) -> None:
        """Write the traceback of an unexpected error and the status `crashed`.

        Args:
            error: what this process met.
            account: what lies behind it, in one line, where the error does not say so itself.
        """
        write_traceback(self.path, error)
        self._write_ending("crashed", account or f"{type(error).__name__}: {error}")

    def record_refusal(self, error: UserError) -> None:
        """Write the status `refused`: nothing broke, the run cannot go on as it is configured."""
        self._write_ending("refused", str(error))

    def _write_ending(self, status: Status, message: str) -> None:
        """Write a status at the last epoch and step known."""
        epoch, step = (self.status.epoch, self.status.step) if self.status else (0, 0)
        self.write_status(RunStatus(status, epoch, step, " ".join(message.split())))

    def close(self) -> None:
        """Release the lock; more than once does no harm."""
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
        remove_leftovers(self.path)
        for old in self.path.glob("traceback*.txt"):
            old.unlink()
        self.checkpoints_path.mkdir(exist_ok=True)
        remove_leftovers(self.checkpoints_path)
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
    if not file.exists():
        return None
    content = _read_json(file)
    try:
        status = RunStatus(**content)
    except TypeError as error:
        raise UserError(f"{file} is corrupt: {error}; delete it to resume the run") from error
    if status.status not in STATUSES:
        known = ", ".join(STATUSES)
        raise UserError(f"{file} is corrupt: status {status.status!r} is none of {known}")
    return status


def is_locked(path: Path) -> bool:
    """Whether a live process works in a run directory.

    Args:
        path: a run directory; it may not exist.
    """
    try:
        lock = HeldLock(os.open(path / LOCK_FILE, os.O_RDONLY))
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
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is corrupt: {error}; delete it to resume the run") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is corrupt: expected a JSON object; delete it to resume the run")
    return content


def _make(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def _lock(path: Path) -> HeldLock:
    """Take the lock of a run directory, which holds the process id of its owner."""
    file = path / LOCK_FILE
    try:
        lock = HeldLock(os.open(file, os.O_RDWR | os.O_CREAT, 0o644))
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        _take(lock.descriptor)
    except BlockingIOError as error:
        owner = holder(lock.descriptor)
        lock.release()
        raise UserError(
            f"run directory in use by {owner}: {path}; wait for it, or end that process"
        ) from error
    except OSError as error:
        lock.release()
        raise UserError(
            f"{file} cannot be locked ({error.strerror}): set results_dir to a file system "
            "that has locks"
        ) from error
    os.ftruncate(lock.descriptor, 0)
    os.pwrite(lock.descriptor, f"{os.getpid()}\n".encode(), 0)
    return lock


def _take(descriptor: int) -> None:
    """Take the lock; a second time where somebody has only looked whether it is held."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(_LOOK_S)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"results directory cannot be written: {path} ({error.strerror}); "
        "set results_dir to a folder that you may write"
    )
