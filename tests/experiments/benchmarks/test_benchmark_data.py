"""The data benchmark on tiny data: every number is there, and the page is made of them."""

import json
import multiprocessing
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.benchmarks import data as benchmark
from experiments.data import ImageSet, RawData, synthetic


@pytest.fixture
def tiny(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 3, 32, 32), dtype=np.uint8)
    images = ImageSet(pixels, np.arange(64) % 10)
    raw = RawData(train=images, test=images, num_classes=10, pixel_max=255)
    monkeypatch.setattr(benchmark, "cifar", SimpleNamespace(load=lambda settings: raw))
    monkeypatch.setattr(benchmark, "CIFAR_BATCH", 16)
    monkeypatch.setattr(benchmark, "CIFAR_IMAGES", 64)
    monkeypatch.setattr(benchmark, "IMAGENET_BATCH", 8)
    monkeypatch.setattr(benchmark, "resnet18_step_s", lambda data, rounds: 0.5)


@pytest.mark.slow
def test_the_page_and_the_file_hold_what_was_measured(tiny, tmp_path, capsys):
    synthetic.make(tmp_path / "tree", 3, {"train": 6, "val": 6})
    arguments = ["--images", str(tmp_path / "tree" / "train"), "--out", str(tmp_path / "out")]
    assert benchmark.main([*arguments, "--rounds", "1", "--workers", "0"]) == 0
    result = json.loads((tmp_path / "out" / "data.json").read_text())
    imagenet, cifar = result["imagenet"], result["cifar10"]
    assert imagenet["sample_images"] == 6 and imagenet["images_an_epoch"] == 24
    assert set(imagenet["over_torchvision"]) == {"originals", "jpeg", "raw"}
    for name, ratio in imagenet["over_torchvision"].items():
        rates = imagenet["images_per_second"]
        assert ratio == rates[name] / rates["torchvision"] > 0
        assert imagenet["images_per_cpu_second"][name] > 0
    raw, jpeg = imagenet["prepared"]["raw"], imagenet["prepared"]["jpeg"]
    assert raw["bytes_an_image"] == 256 * 256 * 3 > jpeg["bytes_an_image"] > 0
    assert raw["gigabytes_of_imagenet"] == pytest.approx(261.7, abs=0.1)
    assert (raw["mean_levels_apart"], raw["p99_levels_apart"]) == (0, 0)
    assert 0 < jpeg["mean_levels_apart"] < jpeg["p99_levels_apart"]
    assert cifar["share_of_resnet18_step"] == cifar["batch_s"] / 0.5
    page = (tmp_path / "out" / "data.md").read_text()
    assert capsys.readouterr().out.strip() == page.strip()
    assert re.search(rf"held in memory .* {cifar['over_torchvision']['memory']:.1f} \|", page)
    assert "262 GB" in page


def test_a_contender_that_loses_an_image_is_no_contender():
    with pytest.raises(AssertionError, match="short: 3 images instead of 4"):
        benchmark.measure_rates({"short": lambda epoch: [(None, [0, 1, 2])]}, images=4, rounds=1)


def test_absent_images_are_one_line(tmp_path, capsys):
    assert benchmark.main(["--data", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "no images in" in capsys.readouterr().err


def test_the_cpu_seconds_of_workers_are_counted():
    """A worker that spins for half a second, while this process sleeps."""
    ready = multiprocessing.Event()
    done = multiprocessing.Event()

    def spin() -> None:
        end = time.process_time() + 0.5
        while time.process_time() < end:
            pass
        ready.set()
        done.wait(60)

    before = benchmark.cpu_seconds()
    worker = multiprocessing.get_context("fork").Process(target=spin)
    worker.start()
    assert ready.wait(60)
    assert 0.4 < benchmark.cpu_seconds() - before < 5
    done.set()
    worker.join(60)
