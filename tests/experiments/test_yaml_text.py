"""A few lines of YAML that stand for billions of values are refused before they are built."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import yaml_text
from experiments.analysis.judging.claims import load_claims
from experiments.analysis.measuring.runs import _read_yaml
from experiments.analysis.showing.deviations import load_ledger
from experiments.errors import UserError
from experiments.runs.spec import RunSpec
from experiments.tuning.chosen import Chosen
from tests.experiments.run_configs import ROOT


def bomb(levels: int = 40, fan: int = 9) -> str:
    lines = ["a0: &a0 [lol, lol]"]
    for i in range(1, levels):
        lines.append(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * fan)}]")
    return "\n".join(lines) + "\n"


MAPPINGS = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{l: *a{i - 1}, r: *a{i - 1}}}\n" for i in range(1, 60)
)
MERGED = "a0: &a0 {x0: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}], x{i}: 1}}\n" for i in range(1, 60)
)
RECURSIVE = "a: &a [1, *a]\n"
BOMBS = {"lists": bomb(), "mappings": MAPPINGS, "merged": MERGED, "recursive": RECURSIVE}
READERS = [RunSpec.load, load_claims, load_ledger, _read_yaml, Chosen.load]


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__qualname__)
@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_bomb_is_one_line_from_every_reader(reader, text: str, tmp_path: Path) -> None:
    file = tmp_path / "bomb.yaml"
    file.write_text(text)
    begin = time.monotonic()
    with pytest.raises(UserError, match=rf"{file} has aliases .* write out what is meant") as told:
        reader(file)
    assert time.monotonic() - begin < 5 and "\n" not in str(told.value)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [1, 2]\nb: *a\nc: *a\n",
        "a: &a {x: 1}\nb: {<<: *a, y: 2}\n",
        "what: R&D *and* more\n",
        "a: &a 1\nb: [*a, *a]\na2: &a 2\nc: *a\n",
        "not: [closed & *\n",
    ],
)
def test_aliases_that_stand_for_little_are_left_to_their_reader(text: str) -> None:
    yaml_text.refuse_bomb(text, "here")


def test_expansion_is_counted_as_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """a0 has 3 nodes with its list, a1 1 + 9 * 3, ...; keys and the outer mapping count too."""
    sizes = [3]
    for _ in range(3):
        sizes.append(1 + 9 * sizes[-1])
    nodes = 1 + sum(1 + size for size in sizes)
    monkeypatch.setattr(yaml_text, "LIMIT_NODES", nodes)
    yaml_text.refuse_bomb(bomb(4), "here")
    monkeypatch.setattr(yaml_text, "LIMIT_NODES", nodes - 1)
    with pytest.raises(UserError, match="more than"):
        yaml_text.refuse_bomb(bomb(4), "here")


@pytest.mark.slow
def test_bomb_in_a_folder_of_configs_ends_the_command_at_once(tmp_path: Path) -> None:
    (tmp_path / "own" / "model").mkdir(parents=True)
    (tmp_path / "own" / "model" / "bomb.yaml").write_text(bomb())
    for option in (["--config-dir", str(tmp_path / "own")], [f"--config-dir={tmp_path / 'own'}"]):
        ended = subprocess.run(
            [sys.executable, "-m", "experiments.train", *option, "model=bomb"],
            cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert ended.returncode == 2, ended.stderr
        assert ended.stderr.startswith("error: ") and "bomb.yaml has aliases" in ended.stderr
