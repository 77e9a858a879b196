"""What a campaign shows of its progress."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from experiments.campaign.progress import Progress
from experiments.runs.directory import RunStatus
from experiments.runs.outcome import Outcome
from experiments.runs.spec import RunSpec
from tests.experiments.run_configs import run_spec


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _watch(
    specs: list[RunSpec], stream: io.StringIO
) -> tuple[Progress, Callable[[float, int, int], None]]:
    """A display, and a function that shows (seconds since the start, a run, its epochs)."""
    _reset(specs)
    now = [1000.0]
    progress = Progress(
        specs,
        finished_before=3,
        stream=stream,
        plain_interval_s=3600,
        clock=lambda: now[0],
    )

    def show(at: float, number: int, epoch: int) -> None:
        now[0] = 1000.0 + at
        _write(specs[number], RunStatus("running", epoch=epoch))
        progress.show([specs[number].directory])

    return progress, show


def test_runs_are_counted_and_the_time_left_is_estimated(tmp_path: Path) -> None:
    specs = [run_spec(tmp_path, seed=seed, **{"train.epochs": 10}) for seed in (0, 1)]
    plain, terminal = io.StringIO(), Terminal()
    for stream in (plain, terminal):
        progress, show = _watch(specs, stream)
        show(100, 0, 4)
        show(200, 0, 10)
        progress.ended(Outcome(specs[0].directory, "done"))
        progress.ended(Outcome(specs[1].directory, "diverged", "not finite"))
    # 100 s for 4 epochs, 16 to go; then 200 s for 10, 10 to go
    assert "\r\x1b[K[3/5] sgd seed 0 epoch 4/10, 6 min 40 s left" in terminal.getvalue()
    assert plain.getvalue().splitlines() == [
        "3 of 5 runs were finished before",
        "[4/5] sgd seed 0 done, 3 min 20 s left",
        "[5/5] sgd seed 1 diverged: not finite",
    ]


def test_time_left_runs_down_during_an_epoch_and_never_grows_by_waiting(tmp_path: Path) -> None:
    specs = [run_spec(tmp_path, **{"train.epochs": 10})]
    terminal = Terminal()
    _, show = _watch(specs, terminal)
    for at, epoch in ((60, 0), (100, 1), (130, 1), (190, 1), (900, 1), (1000, 2)):
        show(at, 0, epoch)
    shown = [line.strip().partition(", ")[2] for line in terminal.getvalue().split("\x1b[K")[1:]]
    assert shown == [
        "",  # before the first epoch nothing is known
        "15 min 00 s left",
        "14 min 30 s left",
        "13 min 30 s left",
        "13 min 20 s left",  # an epoch that takes longer than the mean
        "1 h 06 min left",
    ]


def _write(spec: RunSpec, status: RunStatus) -> None:
    spec.directory.mkdir(parents=True, exist_ok=True)
    text = f'{{"status": "{status.status}", "epoch": {status.epoch}, "step": 0, "message": ""}}'
    (spec.directory / "status.json").write_text(text)


def _reset(specs: list[RunSpec]) -> None:
    for spec in specs:
        (spec.directory / "status.json").unlink(missing_ok=True)
