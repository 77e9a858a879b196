"""The clock counts training only, by part, and goes on across a resume."""

from __future__ import annotations

import sys
import time

import pytest
import torch

from experiments.training.clock import PARTS, TrainingClock, peak_memory_bytes, restart_peak_memory

CPU = torch.device("cpu")
# What `sleep` may overrun by on a loaded machine; it never underruns.
OVERRUN_S = 0.5


def test_time_goes_to_the_part_that_the_lap_names():
    clock = TrainingClock(CPU)
    clock.start()
    for seconds, part in ((0.02, "data"), (0.04, "forward_backward"), (0.06, "optimizer")):
        time.sleep(seconds)
        clock.lap(part)
    clock.stop()
    for seconds, part in ((0.02, "data"), (0.04, "forward_backward"), (0.06, "optimizer")):
        assert seconds <= clock.seconds(part) < seconds + OVERRUN_S
    assert clock.train_time_s == sum(clock.seconds(part) for part in PARTS)


def test_standing_clock_and_dropped_laps_count_nothing():
    clock = TrainingClock(CPU)
    clock.start()
    time.sleep(0.05)
    clock.lap(None)
    clock.lap("data")
    time.sleep(0.05)
    clock.stop()
    time.sleep(0.05)
    clock.start()
    clock.lap("data")
    clock.stop()
    assert clock.train_time_s < 0.05


def test_clock_goes_on_across_a_resume():
    clock = TrainingClock(CPU)
    clock.load_state_dict({"data": 1.0, "forward_backward": 2.0, "optimizer": 4.0})
    clock.start()
    time.sleep(0.01)
    clock.lap("optimizer")
    clock.stop()
    assert clock.seconds("data") == 1.0
    assert 7.01 <= clock.train_time_s < 7.01 + OVERRUN_S
    other = TrainingClock(CPU)
    other.load_state_dict(clock.state_dict())
    assert other.train_time_s == clock.train_time_s


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_clock_counts_device_time_in_its_part_without_waiting():
    device = torch.device("cuda")
    matrix = torch.randn(4096, 4096, device=device)
    (matrix @ matrix).sum().item()
    clock = TrainingClock(device)
    clock.start()
    clock.lap("data")
    began = time.perf_counter()
    for _ in range(50):
        product = matrix @ matrix
    clock.lap("forward_backward")
    clock.lap("optimizer")
    queued_s = time.perf_counter() - began
    clock.stop()
    waited_s = time.perf_counter() - began
    assert product.isfinite().all()
    assert queued_s < 0.5 * waited_s
    # Events and the host's clock agree up to the launch of the first kernel.
    assert clock.train_time_s == pytest.approx(waited_s, rel=0.1)
    assert clock.seconds("forward_backward") > 0.95 * clock.train_time_s


def test_peak_memory_of_the_process_grows_with_it():
    before = peak_memory_bytes(CPU)
    block = torch.ones(before // 4 + 50_000_000, dtype=torch.float32)
    after = peak_memory_bytes(CPU)
    assert after - before > 0.5 * 4 * 50_000_000
    assert block.numel() > 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can forget a peak")
def test_peak_memory_restarts_with_a_run():
    block = torch.ones(100_000_000, dtype=torch.float32)
    peak = peak_memory_bytes(CPU)
    del block
    assert peak_memory_bytes(CPU) == peak  # a peak stays
    restart_peak_memory(CPU)
    assert peak_memory_bytes(CPU) < peak - 200_000_000
