"""The wandb mirror: real wandb, offline; and that its failures never reach the run."""

from __future__ import annotations

import logging
import os
import pty
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.errors import UserError
from experiments.runs.mirror import NoMirror, WandbMirror, build_mirror
from experiments.training.trainer import Trainer
from tests.experiments.run_configs import ROOT, numbers, run_spec

OFFLINE = {"name": "wandb", "mode": "offline", "project": "mlbfgs-test"}


@pytest.fixture(autouse=True)
def _wandb_stays_in_the_test(monkeypatch, tmp_path):
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    for name in ("WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)


def test_files_logger_has_no_mirror_and_never_imports_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    spec = run_spec(tmp_path)
    assert isinstance(build_mirror(spec, tmp_path), NoMirror)
    assert Trainer(spec).run() == "done"


def test_unknown_mode_is_told(tmp_path):
    spec = run_spec(tmp_path, logger={**OFFLINE, "mode": "ofline"})
    with pytest.raises(UserError, match=r"logger\.mode.*did you mean 'offline'"):
        build_mirror(spec, tmp_path)


@pytest.mark.parametrize(
    ("variable", "value", "mode"),
    [
        ("WANDB_MODE", "disabled", "disabled"),
        ("WANDB_MODE", "Offline", "offline"),
        ("WANDB_MODE", "dryrun", "offline"),
        ("WANDB_MODE", "online", "online"),
        ("WANDB_MODE", "", "online"),
        ("WANDB_DISABLED", "true", "disabled"),
        ("WANDB_DISABLED", "false", "online"),
    ],
)
def test_environment_comes_before_the_config(variable, value, mode, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "experiments.runs.mirror._start", lambda spec, path, mode: asked.append(mode)
    )
    monkeypatch.setenv(variable, value)
    mirror = build_mirror(run_spec(tmp_path, logger={**OFFLINE, "mode": "online"}), tmp_path)
    assert isinstance(mirror, NoMirror) == (mode == "disabled")
    assert asked == ([] if mode == "disabled" else [mode])


def test_unknown_mode_of_the_environment_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(UserError, match=r"WANDB_MODE='ofline' .*did you mean 'offline'"):
        build_mirror(run_spec(tmp_path, logger=OFFLINE), tmp_path)


NOBODY = """
import logging, sys
from pathlib import Path
from experiments.runs.mirror import build_mirror
from experiments.runs.spec import RunSpec
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
assert sys.stdin.isatty() and sys.stderr.isatty()
build_mirror(RunSpec.load(Path(sys.argv[1])), Path(sys.argv[2]))
assert sys.stdin.isatty()
print("went on")
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["online", "disabled"])
def test_wandb_on_a_terminal_asks_nothing(mode, tmp_path):
    """Nobody is logged in, and a person sits at a real terminal."""
    pytest.importorskip("wandb")
    spec = run_spec(tmp_path, logger={**OFFLINE, "mode": "online"})
    spec.save(tmp_path / "config.yaml")
    free = {k: v for k, v in os.environ.items() if k not in ("WANDB_API_KEY", "WANDB_MODE")}
    own = {"HOME": str(tmp_path), "TERM": "xterm", "PYTHONPATH": str(ROOT)}
    own |= {"WANDB_BASE_URL": "http://localhost:9"} | (
        {"WANDB_MODE": mode} if mode != "online" else {}
    )
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", NOBODY, str(tmp_path / "config.yaml"), str(tmp_path)],
        stdin=theirs, stdout=theirs, stderr=theirs, env={**free, **own}, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    try:
        said = screen(ours, 90)
        assert process.wait(10) == 0 and "went on" in said, said
    finally:
        process.kill()
    assert "choose" not in said.lower() and "paste" not in said.lower(), said
    told = "wandb mirror is off, the run goes on" if mode == "online" else "the environment says so"
    assert told in said, said


def screen(terminal: int, seconds: float) -> str:
    """What is shown on a terminal until its program ends."""
    shown, deadline = b"", time.monotonic() + seconds
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                shown += os.read(terminal, 65536)
            except OSError:  # the other end is closed
                break
    return shown.decode(errors="replace")


def log_entries(content: bytes) -> Iterator[bytes]:
    """Read wandb's transaction log: LevelDB's log format behind a header of 7 bytes.

    Blocks of 32 KiB hold fragments of entries: checksum (4 bytes), length (2), kind (1: whole,
    2: first, 3: middle, 4: last), data. Fewer than 7 bytes at the end of a block are padding.
    """
    assert content.startswith(b":W&B")
    place, entry = 7, b""
    while place < len(content):
        left = 32768 - place % 32768
        if left < 7 or len(content) - place < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        entry += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield entry
            entry = b""


def finished_log(file: Path) -> list[Any]:
    """The entries of a wandb run; its service closes the file a moment after `finish` returns."""
    from wandb.proto.wandb_internal_pb2 import Record

    deadline = time.monotonic() + 60
    while True:
        entries = [Record.FromString(data) for data in log_entries(file.read_bytes())]
        if entries and entries[-1].WhichOneof("record_type") == "exit":
            return entries
        assert time.monotonic() < deadline, f"wandb did not finish {file}"
        time.sleep(0.05)


@pytest.mark.slow
def test_offline_wandb_gets_every_record_and_changes_none(tmp_path):
    pytest.importorskip("wandb")
    mirrored, plain = run_spec(tmp_path / "wandb", logger=OFFLINE), run_spec(tmp_path / "plain")
    assert Trainer(plain).run() == "done"
    assert Trainer(mirrored).run() == "done"
    assert numbers(mirrored.directory) == numbers(plain.directory)

    (file,) = (mirrored.directory / "wandb").glob("offline-run-*/run-*.wandb")
    entries = finished_log(file)
    rows = [
        {(item.key or "/".join(item.nested_key)): item.value_json for item in entry.history.item}
        for entry in entries
        if entry.WhichOneof("record_type") == "history"
    ]
    (run_id,) = {e.run.run_id for e in entries if e.WhichOneof("record_type") == "run"}
    written = numbers(mirrored.directory)
    assert len(rows) == len(written)
    for row, record in zip(rows, written, strict=True):
        assert float(row["step"]) == record["step"]
        name = "loss" if record["kind"] == "step" else "test_top1"
        assert float(row[f"{record['kind']}/{name}"]) == record[name]
    assert mirrored.key in run_id


class Failing:
    """A wandb run whose service went away."""

    def __init__(self):
        self.calls = 0
        self.summary = {}

    def log(self, _values):
        self.calls += 1
        raise ConnectionError("the service\nwent away")

    def finish(self, exit_code):
        raise AssertionError("a mirror that is off is not finished")


def test_missing_wandb_is_logged_once_and_the_run_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    spec = run_spec(tmp_path, logger=OFFLINE)
    with caplog.at_level(logging.WARNING):
        assert Trainer(spec).run() == "done"
    assert caplog.text.count("wandb mirror is off") == 1
    assert len(numbers(spec.directory)) == 6


def test_failure_while_logging_ends_the_mirror_and_is_logged_once(tmp_path, monkeypatch, caplog):
    run = Failing()
    monkeypatch.setattr("experiments.runs.mirror._start", lambda *_: run)
    mirror = WandbMirror(run_spec(tmp_path), tmp_path)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            mirror.log({"kind": "step", "step": step, "loss": 1.0})
        mirror.finish("done")
    assert run.calls == 1
    assert caplog.text.count("wandb mirror is off") == 1
    assert "ConnectionError: the service went away" in caplog.text
