"""The campaign of faults itself, small: what it finds equal is equal, and it finds what is not."""

from __future__ import annotations

import json
import random
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from experiments.faults import __main__ as campaign
from experiments.faults import setups
from experiments.faults.comparison import differing
from experiments.faults.report import markdown
from experiments.faults.setups import run_directories
from experiments.faults.tearing import swap
from experiments.faults.trial import CYCLE, KINDS, make_reference, run_trial

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """With the undisturbed runs of all tests here."""
    return tmp_path_factory.mktemp("faults")


@pytest.mark.slow
def test_a_handful_of_trials_end_equal_and_are_not_made_twice(work: Path, tmp_path: Path) -> None:
    kinds = ["process", "torn file", "full disk", "torchrun", "campaign"]
    command = ["--kinds", ",".join(kinds), "--work", str(work), "--out", str(tmp_path)]
    assert campaign.main([*command, "--trials", "4"]) == 0
    assert campaign.main([*command, "--trials", "5"]) == 0
    noted = [json.loads(line) for line in (work / campaign.TRIALS_FILE).read_text().splitlines()]
    assert [line["account"]["kind"] for line in noted] == kinds
    result = json.loads((tmp_path / "faults.json").read_text())
    assert result["trials"] == 5 and set(result["kinds"]) == set(kinds)
    for kind, found in result["kinds"].items():
        assert set(found["outcomes"]) <= (
            {"equal", "skipped"} if kind == "full disk" else {"equal"}
        )
    table = (tmp_path / "faults.md").read_text()
    assert table == markdown(result) and "5 trials, seed 0" in table
    assert campaign.main([*command, "--trials", "5", "--seed", "1"]) == 2  # another campaign's


@pytest.mark.slow
def test_run_that_is_not_the_undisturbed_one_is_found(work: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"

    def other(setup: setups.Setup) -> Path:
        shutil.copytree(make_reference(setup, work), changed)
        (directory,) = run_directories(changed)
        lines = (directory / "metrics.jsonl").read_text().splitlines()
        record = json.loads(lines[40])
        record["loss"] = torch.nextafter(torch.tensor(record["loss"]), torch.tensor(9.0)).item()
        lines[40] = json.dumps(record)
        (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        return changed

    account = run_trial(0, seed=0, work=tmp_path, reference=other, kinds=("process",))
    assert account.outcome == "differs" and "records[40]['loss']" in account.detail[-1]
    # what did not end well stays to be looked at
    assert (tmp_path / "trial0000" / "results").is_dir()
    equal = partial(make_reference, work=work)
    account = run_trial(0, seed=0, work=tmp_path, reference=equal, kinds=("process",))
    assert account.outcome == "equal" and not (tmp_path / "trial0000").exists()


def test_differences_are_found_to_the_bit() -> None:
    left = {"a": [torch.zeros(2), {"b": (1, "x")}]}
    assert differing(left, {"a": [torch.zeros(2), {"b": (1, "x")}]}, "s") is None
    assert differing(left, {"a": [torch.tensor([0.0, 1e-45]), {"b": (1, "x")}]}, "s") == "s['a'][0]"
    found = differing(left, {"a": [torch.zeros(2), {"b": (1, "y")}]}, "s")
    assert found == "s['a'][1]['b'][1]: 'x' and 'y'"
    assert differing(left, {"a": [torch.zeros(2)]}, "s") == "s['a']: 2 and 1 entries"
    assert differing(left, {"a": [torch.zeros(2).double(), {"b": (1, "x")}]}, "s") == "s['a'][0]"
    assert differing({}, {"k": 1}, "s") == "s: keys ['k']"


def test_change_of_what_a_link_leads_to_is_found(tmp_path: Path) -> None:
    seen = set()
    for seed in range(40):
        directory = tmp_path / f"run{seed}"
        (directory / "checkpoints").mkdir(parents=True)
        for name in ("lock", "metrics.jsonl", "status.json", "meta.json", "config.yaml"):
            (directory / name).write_text(name)
        swapped = swap(directory, tmp_path / f"elsewhere{seed}", random.Random(seed))
        (link,) = [path for path in directory.iterdir() if path.is_symlink()]
        seen.add(link.name)
        assert swapped.unharmed()
        if link.is_dir():
            (link / "mine.tmp").unlink()
        else:
            link.write_text("overwritten")
        assert not swapped.unharmed()
        swapped.restore()
        assert not any(path.is_symlink() for path in directory.iterdir())
    assert len(seen) == 7


def test_every_kind_has_its_turn() -> None:
    assert set(CYCLE) == set(KINDS)
    assert campaign.main(["--kinds", "proces", "--trials", "1"]) == 2
    assert campaign.main(["--trials", "0"]) == 2
