"""What cannot work is told before the first step, with what to change."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from torch import nn

from experiments.errors import UserError
from experiments.runs.directory import read_status
from experiments.runs.metrics import read_metrics
from experiments.training.feasibility import available_bytes, check_memory
from experiments.training.trainer import Trainer
from mlbfgs import MLBFGS
from tests.experiments.run_configs import run_spec

CPU = torch.device("cpu")
QUASI_NEWTON = [
    {"name": "mlbfgs", "_target_": "mlbfgs.MLBFGS", "lr": 0.05},
    {"name": "slbfgs", "_target_": "experiments.optimizers.slbfgs.SLBFGS", "lr": 0.05},
]
IDS = [optimizer["name"] for optimizer in QUASI_NEWTON]


@pytest.mark.parametrize("optimizer", QUASI_NEWTON, ids=IDS)
def test_update_interval_too_long_for_the_run_is_refused_and_the_advice_works(tmp_path, optimizer):
    # 44 steps: with T = 22 the first pair comes with the last step
    settings = {**optimizer, "update_interval": 22, "history_size": 2}
    spec = run_spec(tmp_path, optimizer=settings, scale={"name": "reduced"})
    with pytest.raises(UserError, match=r"update_interval=22 .* 44 steps.* run has 44") as told:
        Trainer(spec).run()
    status = read_status(spec.directory)
    assert (status.status, status.step) == ("refused", 0)

    advice = re.search(r"to (\d+) or less, or train for (\d+) epochs", str(told.value))
    assert advice is not None
    shorter = {**settings, "update_interval": int(advice[1])}
    longer = {"train.epochs": int(advice[2])}
    for changes in ({"optimizer": shorter}, {"optimizer": settings, **longer}):
        spec = run_spec(tmp_path, **changes, scale={"name": "reduced"})
        assert Trainer(spec).run() == "done"
        records = read_metrics(spec.directory / "metrics.jsonl")
        assert any(record["kind"] == "curvature" for record in records)


def test_smoke_goes_on_without_pairs_and_says_so(tmp_path, caplog):
    optimizer = {**QUASI_NEWTON[0], "update_interval": 50, "history_size": 2}
    with caplog.at_level(logging.INFO):
        assert Trainer(run_spec(tmp_path, optimizer=optimizer)).run() == "done"
    assert "update_interval=50" in caplog.text and "scale smoke" in caplog.text


@pytest.mark.parametrize("optimizer", QUASI_NEWTON, ids=IDS)
def test_history_larger_than_memory_is_refused_before_it_is_allocated(tmp_path, optimizer):
    settings = {**optimizer, "history_size": 10**9, "update_interval": 5}
    with pytest.raises(UserError, match=r"history_size=1000000000 .*GiB.* available") as told:
        Trainer(run_spec(tmp_path, optimizer=settings)).run()
    needed, available, most = (
        int(number.replace(",", ""))
        for number in re.search(
            r"needs ([\d,]+) bytes .* but ([\d,]+) .* to (\d+) or less", str(told.value)
        ).groups()
    )
    n = -(-(64 * 32 + 32 + 32 * 10 + 10) // 16) * 16  # padded to 64 bytes
    vectors = 4 + (optimizer["name"] == "mlbfgs" and "momentum" in settings)
    assert needed == 4 * n * (2 * 10**9 + vectors)
    assert 4 * n * (2 * most + vectors) <= available < 4 * n * (2 * (most + 1) + vectors)


@pytest.mark.parametrize(
    "settings",
    [{"momentum": 0.0}, {"momentum": 0.9}, {"momentum": 0.9, "history_dtype": torch.bfloat16}],
)
def test_forecast_is_what_the_optimizer_allocates(settings):
    model = nn.Linear(7, 3)
    allocated = MLBFGS(model.named_parameters(), history_size=4, **settings).plan().state_bytes
    too_large = available_bytes(CPU) // allocated * 16
    with pytest.raises(UserError) as told:
        check_memory({"history_size": too_large, **settings}, model, CPU)
    needed = int(re.search(r"needs ([\d,]+) bytes", str(told.value))[1].replace(",", ""))
    fixed = (4 + (settings["momentum"] != 0)) * 32 * 4  # 24 numbers, padded to 64 bytes
    assert needed == fixed + (allocated - fixed) // 4 * too_large
    check_memory({"history_size": 4, **settings}, model, CPU)


def test_available_memory_is_the_smaller_of_machine_and_container(tmp_path):
    (tmp_path / "proc").mkdir()
    cgroup = tmp_path / "sys/fs/cgroup"
    cgroup.mkdir(parents=True)
    assert available_bytes(CPU, tmp_path) is None
    (tmp_path / "proc/meminfo").write_text("MemTotal: 900 kB\nMemAvailable:   500 kB\n")
    assert available_bytes(CPU, tmp_path) == 500 * 1024
    (cgroup / "memory.max").write_text("300000\n")
    (cgroup / "memory.current").write_text("250000\n")
    (cgroup / "memory.stat").write_text("anon 1\ninactive_file 20000\n")
    assert available_bytes(CPU, tmp_path) == 70_000
    (cgroup / "memory.max").write_text("max\n")
    assert available_bytes(CPU, tmp_path) == 500 * 1024
    assert available_bytes(CPU) > 0
