"""The committed benchmark of distribution: its page, and its numbers against the formulas."""

import json
from pathlib import Path

import pytest

from experiments.benchmarks.distributed import parse
from experiments.benchmarks.distributed_report import markdown
from experiments.errors import UserError

RESULTS = Path(__file__).resolve().parents[3] / "results/benchmarks"


@pytest.fixture(scope="module")
def committed():
    return json.loads((RESULTS / "distributed.json").read_text(encoding="utf-8"))


def test_the_committed_page_is_the_committed_numbers(committed):
    assert (RESULTS / "distributed.md").read_text(encoding="utf-8") == markdown(committed)


@pytest.mark.parametrize("network", ["resnet18", "resnet50"])
def test_memory_and_bytes_were_what_the_documents_promise(committed, network):
    m = committed["history_size"]
    n = committed["networks"][network]["n"]
    for count, modes in committed["networks"][network]["measured"].items():
        p = int(count)
        for mode, found in modes.items():
            blocks, step = found["blocks"], found["ordinary_step_bytes"]
            copies = p if mode == "replicated" else 1
            assert len(found["history_bytes"]) == p
            assert sum(found["history_bytes"]) == copies * 2 * m * n * 4
            assert sum(found["state_bytes"]) == copies * (2 * m + 5) * n * 4
            if mode == "sharded":
                assert max(found["history_bytes"]) == 2 * m * -(-n // p) * 4
            expected = {}
            if p > 1 and mode != "replicated":
                expected["all_gather_parameters"] = 4 * n + 8 * p
                if mode == "sharded":
                    expected["all_reduce_step"] = 8 * blocks * (2 * m + 1)
            assert step == expected
            pairs = {k: v for k, v in found["pair_step_bytes"].items() if k not in expected}
            assert (
                sum(pairs.values())
                == (p > 1)
                * {
                    "replicated": 0,
                    "blocks": 64 * blocks,
                    "sharded": (64 + 32 * m) * blocks,
                }[mode]
            )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--networks", "resnet5"], "resnet50"), (["--ranks", "1,two"], "numbers of ranks")],
)
def test_mistakes_on_the_command_line_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        parse(arguments)
