"""A small part of the campaign; `python -m tests.fuzzing` is the whole."""

import os
from pathlib import Path

import pytest

from tests.fuzzing import campaign
from tests.fuzzing.campaign import Subject, run
from tests.fuzzing.subjects import SUBJECTS

EXAMPLES = int(os.environ.get("MLBFGS_FUZZ_EXAMPLES", "100"))
SEED = int(os.environ.get("MLBFGS_FUZZ_SEED", "1"))


@pytest.mark.slow
@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_no_generated_input_gives_a_traceback_a_hang_or_a_stray_file(
    tmp_path: Path, subject: Subject
) -> None:
    (tmp_path / "scratch").mkdir()
    tally = run(subject, tmp_path / "scratch", examples=EXAMPLES // len(SUBJECTS), number=SEED)
    assert tally.inputs and not tally.failures, "\n\n".join(tally.failures[:5])


def fail(scratch: Path, kind: str) -> int:
    if kind == "exception":
        raise KeyError("x")
    if kind == "traceback":
        print("Traceback (most recent call last):")
    if kind == "file":
        Path("left").touch()
    while kind == "hang":
        pass
    (scratch / "results" / kind).touch()
    return 2


@pytest.mark.parametrize("kind", ["exception", "traceback", "file", "hang", "fine"])
def test_the_campaign_sees_each_kind_of_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(campaign, "LIMIT_S", 1)
    (tmp_path / "scratch").mkdir()
    subject = Subject("x", campaign.st.just(kind), fail)
    tally = run(subject, tmp_path / "scratch", examples=1, number=0)
    assert (tally.inputs, len(tally.failures)) == (1, 0 if kind == "fine" else 1)
