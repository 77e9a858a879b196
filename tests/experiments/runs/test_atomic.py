"""Files and folders that are written: whole, with a full disk too, and through no link."""

from __future__ import annotations

import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.errors import UserError
from experiments.runs.atomic import (
    UnwritableError,
    make_folder,
    open_own,
    remove,
    remove_leftovers,
    replace_file,
    write_atomically,
    write_durably,
)
from experiments.runs.metrics import MetricsFile
from tests.file_systems import ROOT, disk, fill


@pytest.fixture
def small_disk(tmp_path):
    with disk(tmp_path / "disk", "400k") as folder:
        yield folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("leave", [0, 4096, 12288])
def test_a_full_disk_leaves_the_old_content_and_no_temporary_file(small_disk, leave):
    write_atomically(small_disk / "claims.json", "old")
    fill(small_disk, leave)
    with pytest.raises(UnwritableError, match="No space left on device; make room") as caught:
        write_atomically(small_disk / "claims.json", "new" * 20_000)
    assert not caught.value.forbidden and "\n" not in str(caught.value)
    assert (small_disk / "claims.json").read_text() == "old"
    assert names(small_disk) == {"claims.json", "filler"}


def savers():
    tensor = torch.zeros(500_000)
    array = np.zeros(500_000)
    return {
        "bytes": lambda handle: handle.write(bytes(2_000_000)),
        "torch.save": lambda handle: torch.save({"state": tensor}, handle),
        "torch.save, small": lambda handle: torch.save([torch.zeros(3000)] * 1, handle),
        "numpy.savez": lambda handle: np.savez(handle, array=array),
        "many writes": lambda handle: [handle.write(b"x" * 100) for _ in range(20_000)],
    }


@pytest.mark.parametrize("name", sorted(savers()))
@pytest.mark.parametrize("leave", [0, 8192])
def test_every_library_ends_in_the_systems_own_word(small_disk, name, leave):
    """torch raises a RuntimeError of its own for a disk that is full."""
    fill(small_disk, leave)
    for write_it in (write_durably, replace_file):
        with pytest.raises(OSError, match="No space left on device"):
            write_it(small_disk / "x", savers()[name])
        assert names(small_disk) == {"filler"}


def test_a_disk_without_room_for_another_file_is_told(tmp_path):
    with disk(tmp_path / "disk", "400k", "nr_inodes=3") as folder:
        (folder / "a").touch()
        (folder / "b").touch()
        with pytest.raises(UnwritableError, match="No space left"):
            write_atomically(folder / "c", "text")
        with pytest.raises(UserError, match="No space left"):
            make_folder(folder / "d")


def test_an_error_of_the_writer_itself_is_not_hidden(tmp_path):
    def fail(handle):
        handle.write(b"half")
        raise ZeroDivisionError

    for write_it in (write_durably, replace_file):
        with pytest.raises(ZeroDivisionError):
            write_it(tmp_path / "x", fail)
    assert names(tmp_path) == set()


def test_records_end_with_the_last_whole_one_where_the_disk_is_full(small_disk):
    file = MetricsFile(small_disk / "metrics.jsonl")
    file.append({"kind": "step", "loss": 1.0})
    fill(small_disk)
    with pytest.raises(UnwritableError, match="No space left"):
        for _ in range(10_000):
            file.append({"kind": "step", "loss": 1.0})
    file.close()
    content = (small_disk / "metrics.jsonl").read_bytes()
    assert content.endswith(b"}\n") and len(content) == file.offset
    (small_disk / "filler").unlink()
    again = MetricsFile(small_disk / "metrics.jsonl", offset=file.offset)
    again.append({"kind": "step", "loss": 2.0})
    again.close()


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_modes_are_those_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        make_folder(tmp_path / "folder" / "inner")
        write_atomically(tmp_path / "folder" / "text", "x")
        write_durably(tmp_path / "folder" / "bytes", lambda handle: handle.write(b"x"))
        os.close(open_own(tmp_path / "folder" / "lock", os.O_RDWR | os.O_CREAT))
        MetricsFile(tmp_path / "folder" / "metrics.jsonl").close()
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        full = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == full & ~umask, path


WRITER = """
import sys
from pathlib import Path
from experiments.runs.atomic import replace_file
def write(handle):
    handle.write(b"half")
    handle.flush()
    print("half", flush=True)
    sys.stdin.read()
replace_file(Path(sys.argv[1]), write)
"""


def start_writer(path: Path) -> subprocess.Popen[bytes]:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert writer.stdout is not None and writer.stdout.readline() == b"half\n"
    return writer


def test_what_a_killed_writer_left_is_removed_and_a_living_ones_is_not(tmp_path):
    path = tmp_path / "page.md"
    foreign = tmp_path / "page.md.of-mine.tmp"
    foreign.write_text("mine")
    living, killed = start_writer(path), start_writer(path)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert len(list(tmp_path.glob("*.tmp"))) == 3
    write_atomically(path, "whole")
    assert path.read_text() == "whole" and len(list(tmp_path.glob("*.tmp"))) == 2
    assert living.stdin is not None
    living.stdin.close()
    assert living.wait() == 0
    assert path.read_text() == "half" and list(tmp_path.glob("*.tmp")) == [foreign]
    for process in (living, killed):
        process.stdout.close()
    killed.stdin.close()


def write_often(path: str, letter: str) -> None:
    for _ in range(150):
        write_atomically(Path(path), letter * 10_000)


def test_processes_that_write_one_file_at_once_leave_a_whole_one(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_often, args=(tmp_path / "x", a)) for a in "abcd"]
    for writer in writers:
        writer.start()
    deadline = time.monotonic() + 120
    while any(writer.is_alive() for writer in writers) and time.monotonic() < deadline:
        if (tmp_path / "x").exists():
            found = (tmp_path / "x").read_text()
            assert len(found) == 10_000 and len(set(found)) == 1
    assert [writer.exitcode for writer in writers] == [0] * 4
    for writer in writers:
        writer.join()
    assert names(tmp_path) == {"x"}


@pytest.mark.parametrize("kind", ["file", "dangling", "folder", "itself"])
def test_a_link_in_the_place_of_a_file_is_replaced_and_its_target_untouched(tmp_path, kind):
    target = tmp_path / "target"
    if kind == "file":
        target.write_text("precious")
    elif kind == "folder":
        target.mkdir()
    elif kind == "itself":
        target = tmp_path / "x"
    for write_it in (
        write_atomically,
        lambda p, t: write_durably(p, lambda h: h.write(t.encode())),
    ):
        (tmp_path / "x").unlink(missing_ok=True)
        (tmp_path / "x").symlink_to(target)
        write_it(tmp_path / "x", "new")
        assert not (tmp_path / "x").is_symlink() and (tmp_path / "x").read_text() == "new"
        if kind == "file":
            assert target.read_text() == "precious"
        elif kind == "dangling":
            assert not target.exists()


def test_files_written_in_place_are_plain_and_have_one_name(tmp_path):
    target = tmp_path / "target"
    target.write_text("precious")
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "hard").hardlink_to(target)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "device").symlink_to("/dev/full")
    for name in ("link", "dangling", "hard", "pipe", "folder", "device"):
        with pytest.raises(OSError):
            open_own(tmp_path / name, os.O_RDWR | os.O_CREAT)
        if name != "hard":
            with pytest.raises(UserError):
                MetricsFile(tmp_path / name)
    assert target.read_text() == "precious" and not (tmp_path / "nothing").exists()


def test_records_with_another_name_become_a_copy_of_their_own(tmp_path):
    """`cp -al` copies results by giving their files a second name: the copy must not change."""
    line = b'{"kind": "step"}\n'
    (tmp_path / "metrics.jsonl").write_bytes(line * 2)
    (tmp_path / "copy").hardlink_to(tmp_path / "metrics.jsonl")
    file = MetricsFile(tmp_path / "metrics.jsonl", offset=len(line))
    file.append({"kind": "epoch"})
    file.close()
    assert (tmp_path / "copy").read_bytes() == line * 2
    assert (tmp_path / "metrics.jsonl").read_bytes() == line + b'{"kind": "epoch"}\n'


def test_folders_below_are_made_through_no_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "results").symlink_to(tmp_path / "elsewhere")  # the user's own
    make_folder(tmp_path / "results" / "runs" / "a", below=tmp_path / "results")
    (tmp_path / "victim").mkdir()
    (tmp_path / "elsewhere" / "runs" / "b").symlink_to(tmp_path / "victim")
    (tmp_path / "elsewhere" / "dangling").symlink_to(tmp_path / "nothing")
    for path in ("runs/b", "runs/b/c/d", "dangling", "dangling/a"):
        with pytest.raises(UserError, match="is a link"):
            make_folder(tmp_path / "results" / path, below=tmp_path / "results")
    assert names(tmp_path / "victim") == set() and not (tmp_path / "nothing").exists()


def test_removing_ends_at_links_and_leaves_other_names(tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("x")
    folder = tmp_path / "folder"
    (folder / "step1.tmp").mkdir(parents=True)
    (folder / "step1.tmp" / "inner").symlink_to(victim)
    (folder / "step2.tmp").symlink_to(victim)
    (folder / "step3.0123abcd.tmp").write_text("left")
    kept = {"mine.tmp", "step4", "step4.tmp.txt", "step5.zzzzzzzz.tmp"}
    for name in kept:
        (folder / name).write_text("mine")
    remove_leftovers(folder, r"step\d+")
    assert names(folder) == kept and names(victim) == {"precious"}
    (folder / "link").symlink_to(victim)
    remove(folder / "link")
    assert names(victim) == {"precious"}


def test_the_error_survives_the_way_between_processes():
    import pickle

    error = UnwritableError(Path("/x"), OSError(28, "No space left on device"))
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_no_descriptor_stays_open(tmp_path):
    before = os.listdir("/proc/self/fd")
    for _ in range(5):
        write_atomically(tmp_path / "x", "y")
        write_durably(tmp_path / "z", lambda handle: handle.write(b"y"))
        with pytest.raises(UnwritableError):
            write_atomically(tmp_path / "absent" / "x", "y")
    assert len(os.listdir("/proc/self/fd")) == len(before)
