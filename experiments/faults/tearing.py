"""What happens to the files of a run that was killed: torn, damaged, or swapped for a link."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experiments.runs.directory import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    LOCK_FILE,
    META_FILE,
    METRICS_FILE,
    STATUS_FILE,
)

_LINKED = (
    *(LOCK_FILE, METRICS_FILE, CHECKPOINTS_FOLDER, STATUS_FILE, META_FILE, CONFIG_FILE),
    f"{STATUS_FILE}.tmp",
)


@dataclass(frozen=True)
class Damage:
    """What was done to a run directory.

    Attributes:
        what: in words.
        repair: what the user does whom the command refuses, as its message says.
    """

    what: str
    repair: Callable[[], None]


def tear(directory: Path, chance: random.Random) -> Damage:
    """Damage a file of a run: cut off, changed by a bit, with half a line more, or left over.

    Args:
        directory: of the run, in which nobody works.
        chance: decides which, and where.
    """
    checkpoints = sorted((directory / CHECKPOINTS_FOLDER).iterdir())
    ways: list[Callable[[], Damage]] = [
        lambda: _cut(directory / STATUS_FILE, chance),
        lambda: _cut(directory / META_FILE, chance),
        lambda: _cut(directory / CONFIG_FILE, chance),
        lambda: _half_line(directory / METRICS_FILE, chance),
        lambda: _cut(directory / METRICS_FILE, chance, all_of_it=True),
        lambda: _leftover(directory, chance),
    ]
    if checkpoints:
        newest = checkpoints[-1]
        ways += [lambda: _cut(newest, chance), lambda: _flip(newest, chance)] * 2
        ways += [lambda: _cut_all(checkpoints, chance)]
    return chance.choice(ways)()


@dataclass(frozen=True)
class Swap:
    """A link in place of a file, to one that belongs to somebody else.

    Attributes:
        what: in words.
        foreign: the file or folder it leads to.
        digest: of that, as it was.
        restore: puts the run's own file back where the link still is.
    """

    what: str
    foreign: Path
    digest: str
    restore: Callable[[], None]

    def unharmed(self) -> bool:
        """Whether what the link leads to is as it was."""
        return tree_digest(self.foreign) == self.digest


def swap(directory: Path, elsewhere: Path, chance: random.Random) -> Swap:
    """Put a link in place of a file or folder of a run; it leads to a copy with a leftover in it.

    Args:
        directory: of the run, in which nobody works.
        elsewhere: a new folder.
        chance: decides which.
    """
    elsewhere.mkdir()
    path = directory / chance.choice(_LINKED)
    foreign, own = elsewhere / "foreign", elsewhere / "own"
    if path.is_dir():
        shutil.copytree(path, foreign)
        (foreign / "mine.tmp").write_text("not yours")
    elif path.exists():
        shutil.copy2(path, foreign)
    else:
        foreign.write_text("not yours")
    if path.exists():
        path.rename(own)
    path.symlink_to(foreign)

    def restore() -> None:
        if path.is_symlink():
            path.unlink()
            if own.exists():
                own.rename(path)

    return Swap(f"{path.name} is a link", foreign, tree_digest(foreign), restore)


def tree_digest(path: Path) -> str:
    """SHA-256 of a file, or of all names and contents in a folder."""
    digest = hashlib.sha256()
    for file in sorted([path, *path.rglob("*")]):
        digest.update(str(file.relative_to(path)).encode())
        digest.update(file.read_bytes() if file.is_file() else b"/")
    return digest.hexdigest()


def _cut(path: Path, chance: random.Random, *, all_of_it: bool = False) -> Damage:
    content = path.read_bytes()
    os.truncate(path, 0 if all_of_it else chance.randrange(len(content)))

    def repair() -> None:
        # What is refused is to be deleted; but for the config, which is to be restored, and
        # records that a checkpoint needs.
        if path.name in (CONFIG_FILE, METRICS_FILE):
            path.write_bytes(content)
        else:
            path.unlink(missing_ok=True)

    return Damage(f"{_kind(path)} cut off", repair)


def _flip(path: Path, chance: random.Random) -> Damage:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    return Damage("a bit of a checkpoint changed", path.unlink)


def _cut_all(paths: list[Path], chance: random.Random) -> Damage:
    for path in paths:
        _cut(path, chance)
    return Damage("all checkpoints cut off", lambda: None)


def _half_line(path: Path, chance: random.Random) -> Damage:
    with open(path, "ab") as file:
        file.write(b'{"kind": "step", "epo'[: chance.randrange(1, 20)])
    return Damage("half a line more in metrics.jsonl", lambda: None)


def _leftover(directory: Path, chance: random.Random) -> Damage:
    folder = chance.choice([directory, directory / CHECKPOINTS_FOLDER])
    (folder / "step99999999.tmp").write_bytes(b"half a checkpoint")
    return Damage("a leftover", lambda: None)


def _kind(path: Path) -> str:
    return "a checkpoint" if path.parent.name == CHECKPOINTS_FOLDER else path.name
