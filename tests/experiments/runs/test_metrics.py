"""The records: what is written can be read, and a resume cuts it back."""

from __future__ import annotations

import json
import math

import pytest

from experiments.errors import UserError
from experiments.runs.metrics import EpochRecord, MetricsFile, StepRecord, read_metrics


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def _step(step):
    return StepRecord(epoch=0, step=step, loss=2.0, lr=0.1, train_time_s=1.0).as_record()


def test_records_come_back_as_written(path):
    metrics = MetricsFile(path)
    metrics.append(_step(10))
    metrics.append({"kind": "curvature", "step": 10, "block": 0, "damped": False})
    metrics.close()
    assert read_metrics(path) == [
        {"kind": "step", "epoch": 0, "step": 10, "loss": 2.0, "lr": 0.1, "train_time_s": 1.0},
        {"kind": "curvature", "step": 10, "block": 0, "damped": False},
    ]


def test_record_is_on_file_before_close(path):
    metrics = MetricsFile(path)
    metrics.append(_step(10))
    assert len(read_metrics(path)) == 1
    assert metrics.offset == path.stat().st_size
    metrics.close()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_written_as_null(path, value):
    metrics = MetricsFile(path)
    metrics.append({"kind": "step", "loss": value, "deep": {"list": [1.0, value]}})
    metrics.close()
    (record,) = read_metrics(path)
    assert record == {"kind": "step", "loss": None, "deep": {"list": [1.0, None]}}


def test_epoch_record_has_the_documented_fields():
    record = EpochRecord(1, 2, 0.5, None, None, None, 3.0, 1.0, 1.0, 1.0, 10.0, 100).as_record()
    assert record["kind"] == "epoch"
    assert record["test_top1"] is None


def test_resume_cuts_back_and_goes_on(path):
    metrics = MetricsFile(path)
    metrics.append(_step(10))
    offset = metrics.offset
    metrics.append(_step(20))
    metrics.close()
    with open(path, "ab") as handle:
        handle.write(b'{"kind": "st')
    metrics = MetricsFile(path, offset=offset)
    metrics.append(_step(21))
    metrics.close()
    assert [record["step"] for record in read_metrics(path)] == [10, 21]


def test_new_run_starts_with_an_empty_file(path):
    path.write_text("what a run killed before its first checkpoint left")
    MetricsFile(path).close()
    assert path.read_bytes() == b""


def test_reading_leaves_out_a_torn_last_line(path):
    path.write_text(json.dumps(_step(10)) + "\n" + json.dumps(_step(20))[:-5])
    assert [record["step"] for record in read_metrics(path)] == [10]


@pytest.mark.parametrize("line", ['{"kind": "step"', "[1, 2]", "3", "", '{"step": 3}', "\0\0\0"])
def test_reading_names_a_corrupt_line(path, line):
    path.write_text(json.dumps(_step(10)) + "\n" + line + "\n" + json.dumps(_step(20)) + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl is corrupt in line 2"):
        read_metrics(path)


def test_reading_names_a_missing_file(path):
    with pytest.raises(UserError, match="no records at"):
        read_metrics(path)


@pytest.mark.parametrize(
    ("content", "offset", "message"),
    [
        ('{"kind": "step"}\n', 40, "17 bytes but the checkpoint was written at 40"),
        ('{"kind": "step"}\n{"kind": "step"}\n', 20, "middle of a record"),
        ('{"kind"= "step"}\n', 17, "corrupt in line 1"),
    ],
)
def test_resume_refuses_a_changed_file_and_leaves_it(path, content, offset, message):
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        MetricsFile(path, offset=offset)
    assert path.read_text() == content
