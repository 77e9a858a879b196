"""What the doctor finds, on a machine as it is and on one in trouble."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from experiments import doctor
from experiments.doctor import Rates, advise
from tests.experiments.data.image_trees import VALUES


def overrides(tree: Path, results: Path) -> list[str]:
    values = {**VALUES, "workers": 2, "train_limit": "null", "test_limit": "null"}
    return [
        "experiment=digits_mlp",
        "scale=smoke",
        "dataset=imagenet",
        f"dataset.root={tree}",
        *(f"dataset.{key}={value}" for key, value in values.items()),
        "train.batch_size=8",
        f"results_dir={results}",
    ]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(doctor, "MEASURED_S", 0.05)
    monkeypatch.setattr(doctor, "TEST_FILE_BYTES", 2 << 20)


def rates(**changes) -> Rates:
    values = {"loader": 200.0, "workers": 8, "training": 100.0, "devices": 8, "prepared": False}
    return Rates(**{**values, **changes})


@pytest.mark.parametrize(
    ("measured", "words"),
    [
        (rates(), "1,600 images/s with 8 workers, .* takes about 800 on 8 devices: enough"),
        (rates(training=400.0), "about 20 workers, each a processor, or images that are prepared"),
        (rates(training=400.0, prepared=True), "about 20 workers, .* raw pixels: .*--form raw"),
        (rates(training=190.0), "would wait"),  # 1.05 times what is needed
        (rates(workers=0, loader=9e4, devices=1), r"on 1 device: enough, 900\.0 times"),
        (rates(workers=0, loader=1.0), "would wait; the images are in memory"),
    ],
)
def test_the_advice_follows_from_the_rates(measured, words):
    assert re.search(words, advise(measured))


def test_a_run_that_can_start_is_measured(image_tree, tmp_path, capsys):
    status = doctor.main(overrides(image_tree, tmp_path / "results"))
    out = capsys.readouterr().out
    assert f"torch {torch.__version__.split('+')[0]}" in out and "gloo" in out
    assert "imagenet: 32 training and 13 test images" in out
    assert "digits: 1442 training and 355 test images" in out
    assert "for each worker" in out and "with 2 workers, the training takes" in out
    assert status == 0, out
    assert not (tmp_path / "results").exists() and list(tmp_path.iterdir()) == []


def test_a_run_without_its_images_is_told_what_is_missing_and_where_it_goes(tmp_path, capsys):
    assert doctor.main(overrides(tmp_path / "absent", tmp_path)) == 1
    out = capsys.readouterr().out
    assert f"! imagenet: ImageNet was not found: dataset.root = '{tmp_path / 'absent'}'" in out
    assert "! digits_mlp cannot start" in out


def test_images_in_memory_need_no_workers(tmp_path, capsys):
    assert doctor.main(["experiment=digits_mlp", f"results_dir={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert "images/s from memory" in out and "workers" not in out.splitlines()[-1]


def test_little_space_is_told(image_tree, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage._replace(free=1 << 10))
    assert doctor.main(overrides(image_tree, tmp_path)) == 1
    out = capsys.readouterr().out
    assert "GB are free for results and checkpoints" in out
    assert "/dev/shm has 0 MiB free" in out


def test_a_folder_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    def refuse(folder, size):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor, "disk_speed", refuse)
    (line,) = doctor.describe_disk(tmp_path / "results")
    assert line.startswith("! ") and "set results_dir to another folder" in line


def test_a_batch_larger_than_the_data_is_told(image_tree, tmp_path, capsys):
    arguments = [*overrides(image_tree, tmp_path), "train.batch_size=33"]
    assert doctor.main(arguments) == 1
    assert "batch size 33 is larger than the training set" in capsys.readouterr().out


def test_a_mistake_in_the_overrides_is_one_line(capsys):
    assert doctor.main(["experiment=absent"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
