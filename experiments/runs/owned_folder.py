"""A folder that commands write results into, which knows what they wrote.

    folder/.written      the names, one a line

A file that stands in the list may be replaced and removed. One that does not is somebody else's:
whoever would have to replace it is refused, before anything is written.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from experiments.errors import UserError
from experiments.given import read_text
from experiments.runs.atomic import make_folder, write_atomically
from experiments.runs.locks import HeldLock

LIST_FILE = ".written"
_HEADER = "# Written here by commands of this project, which replace and remove no other file.\n"
_PATIENCE_S = 10.0


class OwnedFolder:
    """A folder with the list of what was written into it.

    Args:
        path: the folder; made where it does not exist.
        below: see `make_folder`.
        alone: refuse a folder that holds anything, unless it has a list.

    Raises:
        UserError: the folder cannot be made, is reached through a link, or is somebody else's.
    """

    def __init__(self, path: Path, *, below: Path | None = None, alone: bool = False):
        self.path = make_folder(path, below=below)
        found = sorted(entry.name for entry in path.iterdir())
        if alone and found and LIST_FILE not in found:
            raise UserError(
                f"{path} is not empty and was not written by this command (it holds {found[0]}): "
                "name another folder; if all of it is an old output, delete it"
            )

    def replace(
        self,
        files: Mapping[str, str | bytes],
        *,
        outdated: Callable[[str], bool] = lambda name: False,
    ) -> tuple[Path, ...]:
        """Write files, and remove those that an earlier call left and this one has not.

        Args:
            files: content by name; `folder/name` in a folder of the folder.
            outdated: whether a file of that name is to go; asked for those in the list alone.

        Returns:
            The files, in the order of `files`.

        Raises:
            UserError: one of them would replace a file of somebody else, or the disk is full.
        """
        self.claim(files)
        for name, content in files.items():
            path = self.path / name
            make_folder(path.parent, below=self.path)
            write_atomically(path, content)
        with self._locked():
            listed = self._listed()
            gone = {name for name in listed if name not in files and outdated(name)}
            for name in gone:
                with suppress(OSError):
                    (self.path / name).unlink()
            if gone:
                self._list(listed - gone)
        return tuple(self.path / name for name in files)

    def refuse_foreign(self, names: Iterable[str]) -> None:
        """Refuse what `replace` would refuse, long before there is something to write.

        Nothing enters the list: a command that ends without writing has no right to the names.

        Args:
            names: of the files; some of them may be there, if the list has them.

        Raises:
            UserError: one of them is there, and not in the list.
        """
        with self._locked():
            self._refuse_unlisted(set(names) - self._listed())

    def claim(self, names: Iterable[str]) -> None:
        """Put files into the list, right before they are written.

        Args:
            names: as in `refuse_foreign`.

        Raises:
            UserError: as in `refuse_foreign`.
        """
        wanted = set(names)
        with self._locked():
            listed = self._listed()
            self._refuse_unlisted(wanted - listed)
            if wanted - listed:
                self._list(listed | wanted)

    def _refuse_unlisted(self, names: set[str]) -> None:
        for name in sorted(names):
            if not self._inside(name):
                raise UserError(f"{name!r} cannot be the name of a file in {self.path}")
            if os.path.lexists(self.path / name):
                raise UserError(
                    f"{self.path / name} was not written by this command "
                    f"({self.path / LIST_FILE} does not name it): move it away, or name "
                    "another folder"
                )

    def _listed(self) -> set[str]:
        """The names in the list; one that leads out of the folder is none."""
        try:
            lines = read_text(self.path / LIST_FILE).splitlines()
        except (FileNotFoundError, UserError):
            return set()
        return {line for line in lines if not line.startswith("#") and self._inside(line)}

    def _inside(self, name: str) -> bool:
        path = PurePosixPath(name)
        if not name or not name.isprintable() or path.is_absolute():
            return False
        if {"..", LIST_FILE} & set(path.parts):
            return False
        folders = [self.path / folder for folder in path.parents if folder.name]
        return not any(folder.is_symlink() for folder in folders)

    def _list(self, names: set[str]) -> None:
        lines = "".join(f"{name}\n" for name in sorted(names))
        write_atomically(self.path / LIST_FILE, _HEADER + lines)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep others from the list; where the file system has no locks, nobody is kept."""
        lock = HeldLock(os.open(self.path, os.O_RDONLY))
        try:
            deadline = time.monotonic() + _PATIENCE_S
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(lock.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    time.sleep(0.02)
                    continue
                except OSError:
                    pass
                break
            yield
        finally:
            lock.release()
