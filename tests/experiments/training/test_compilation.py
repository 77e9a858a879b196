"""torch.compile of the model: the same numbers up to rounding, in front of the clock, resumable."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from experiments.errors import UserError
from experiments.training.clock import TrainingClock
from experiments.training.trainer import Trainer
from tests.experiments.optimizers.kfac_nets import CONFIG as KFAC
from tests.experiments.run_configs import assert_same_run, newest_state, run_spec, stop_at

# 192 images: three batches, all of them in passes of 32.
RUN = {
    "dataset.train_limit": 192,
    "train.micro_batch": 33,
    "train.checkpoint_interval": 1,
    "model": {"name": "mlp", "hidden": [8]},
}


@pytest.fixture(autouse=True)
def _keep_thread_count():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_compiled_run_is_the_plain_one_up_to_rounding_and_resumes_bit_by_bit(
    tmp_path, monkeypatch
):
    plain = run_spec(tmp_path / "plain", **RUN)
    spec = run_spec(tmp_path / "compiled", **RUN, **{"train.compile": True})
    assert spec.key != plain.key
    assert Trainer(plain).run() == "done"
    counters.clear()
    compiled_before: list[int] = []
    start = TrainingClock.start

    def count_and_start(clock):
        compiled_before.append(counters["stats"]["unique_graphs"])
        start(clock)

    monkeypatch.setattr(TrainingClock, "start", count_and_start)
    assert Trainer(spec).run() == "done"
    # Compiled once, before the clock ran for the first time.
    assert compiled_before[0] == 1 and counters["stats"]["unique_graphs"] == 1
    states = newest_state(spec)["model"], newest_state(plain)["model"]
    assert list(states[0]) == list(states[1])
    for name, value in states[0].items():
        # float32, six steps
        torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-6)
    cut = run_spec(tmp_path / "cut", **RUN, **{"train.compile": True})
    stop_at(2, Trainer(cut))
    assert Trainer(cut).run() == "done"
    assert_same_run(cut, spec)


def test_an_optimizer_with_hooks_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.training.task.compile_now", lambda run: None)
    spec = run_spec(tmp_path, optimizer=KFAC, **{"train.compile": True})
    with pytest.raises(UserError, match=r"optimizer=kfac listens to the layers.*compile=false"):
        Trainer(spec).run()


def test_a_machine_without_a_compiler_is_told_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (str(tmp_path / "no-such-compiler"),))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    spec = run_spec(tmp_path, **{"train.compile": True, "model": {"name": "mlp", "hidden": [9]}})
    torch._dynamo.reset()
    with pytest.raises(UserError, match=r"train\.compile: .* use train.compile=false"):
        Trainer(spec).run()
