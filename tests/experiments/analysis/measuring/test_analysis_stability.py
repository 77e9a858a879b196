"""Failing, failing at the drop, shaking: runs whose answer is known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from experiments.analysis.measuring.measures import measure_named
from experiments.analysis.measuring.runs import load_run
from experiments.analysis.measuring.stability import CLASSES, drop_epoch, loss_of_guessing
from experiments.contestants import CONFIG_DIR
from experiments.data.shapes import data_shape
from tests.experiments.analysis.run_factory import FakeRun

DROP_AT_3 = {"name": "steps", "milestones": [3], "gamma": 0.1}
NODES = {"dataset": {"name": "cifar10"}, "schedule": DROP_AT_3, "train": {"epochs": 5}}
FALLING = (2.0, 1.5, 1.2, 0.9, 0.8)


def loaded(tmp_path, loss=FALLING, top1=None, status="done", **nodes):
    top1 = [50.0] * len(loss) if top1 is None else top1
    fake = FakeRun(loss=loss, top1=top1, status=status, extra_config=NODES | nodes)
    return load_run(fake.write(tmp_path))


def flags(run):
    names = ("diverged", "failed", "failed_before_drop", "failed_at_drop")
    return tuple(measure_named(name)(run) for name in names)


# ln 10 = 2.302585 is the loss of guessing.
@pytest.mark.parametrize(
    ("loss", "status", "expected"),
    [
        (FALLING, "done", (0, 0, 0, 0)),
        ((2.0, 1.5), "diverged", (1, 1, 1, None)),  # in its third epoch
        ((), "diverged", (1, 1, 1, None)),  # in its first
        ((2.0, 2.3026, 1.5, 0.9, 0.8), "done", (0, 1, 1, None)),  # back to guessing, for a while
        ((2.0, 2.3025, 1.5, 0.9, 0.8), "done", (0, 0, 0, 0)),  # just not
        ((2.0, 1.5, 2.4, 0.9, 0.8), "done", (0, 1, 1, None)),  # the last epoch before the drop
        ((2.0, 1.5, 1.2), "diverged", (1, 1, 0, 1)),  # in the first epoch after the drop
        ((2.0, 1.5, 1.2, 2.4, 0.8), "done", (0, 1, 0, 1)),
        ((2.0, 1.5, 1.2, 1.0, 1.3), "done", (0, 0, 0, 1)),  # above where it was at the drop
        ((2.0, 1.5, 1.2, 1.3, 1.1), "done", (0, 0, 0, 0)),  # recovered
        ((2.0, 1.5, 1.2), "crashed", (None, None, None, None)),
        ((2.0, 1.5, 1.2), "running", (None, None, None, None)),
        ((2.0, None, 1.2, 1.0, 0.9), "done", (0, 1, 1, None)),  # a loss that is not finite
    ],
)
def test_failing_by_place_and_by_loss(tmp_path, loss, status, expected):
    assert flags(loaded(tmp_path, loss, status=status)) == expected


@pytest.mark.parametrize(
    "schedule",
    [
        {"name": "cosine"},
        {"name": "steps", "milestones": [], "gamma": 0.1},
        {"name": "steps", "milestones": [5], "gamma": 0.1},  # after the end
    ],
)
def test_without_a_drop_nothing_is_said_about_it(tmp_path, schedule):
    run = loaded(tmp_path, schedule=schedule)
    assert drop_epoch(run) is None
    assert flags(run) == (0, 0, None, None)


def test_loss_of_guessing_knows_the_data_sets(tmp_path):
    for name, classes in CLASSES.items():
        config = OmegaConf.load(CONFIG_DIR / f"dataset/{name}.yaml")
        config.root = "nowhere" if "root" in config else None
        if name == "digits":
            del config.root
        assert data_shape(config).num_classes == classes
    run = loaded(tmp_path, dataset={"name": "imagenet", "num_classes": 1000})
    assert loss_of_guessing(run) == math.log(1000)
    unknown = loaded(tmp_path / "b", dataset={"name": "other"})
    assert flags(unknown) == (0, None, None, None)
    gone = loaded(tmp_path / "c", loss=(2.0,), status="diverged", dataset={"name": "other"})
    assert flags(gone) == (1, 1, 1, None)  # what diverged failed, whatever guessing would give


def test_accuracy_shakes_by_what_neither_its_rise_nor_its_bend_explains(tmp_path):
    fluctuation = measure_named("top1_fluctuation")

    def long(name, *top1):
        loss, schedule = (2.0,) * len(top1), {"name": "cosine"}
        return loaded(tmp_path / name, loss=loss, top1=top1, schedule=schedule)

    # second differences -20, 20, ... eight times: squares 8 * 400 over 7, over √6
    shaking = long("a", *(50.0, 60.0) * 5)
    assert fluctuation(shaking) == pytest.approx(math.sqrt(3200 / 7 / 6))
    bending = long("b", *(100.0 - (10 - epoch) ** 2 for epoch in range(10)))
    assert fluctuation(bending) == pytest.approx(0.0, abs=1e-12)
    assert fluctuation(long("c", *(50.0, 60.0) * 4, 50.0)) is None  # seven are too few
    assert fluctuation(long("d", *(50.0, 60.0) * 5, None)) == fluctuation(shaking)
    assert fluctuation(loaded(tmp_path / "e", top1=(50.0, 60.0, 40.0, 90.0, 10.0))) is None
    early = loaded(tmp_path / "f", loss=(2.0, 1.5), status="diverged")
    late = loaded(tmp_path / "g", loss=FALLING[:4], status="diverged")
    assert (fluctuation(early), fluctuation(late)) == (math.inf, None)


def test_the_loss_before_the_drop_leaves_out_what_came_after(tmp_path):
    measure = measure_named("mean_log_train_loss_before_drop")
    early = math.log(2.0 * 1.5 * 1.2) / 3
    assert measure(loaded(tmp_path / "a")) == pytest.approx(early)
    whole = loaded(tmp_path / "b", schedule={"name": "cosine"})
    assert measure(whole) == measure_named("mean_log_train_loss")(whole) != pytest.approx(early)
    assert measure(loaded(tmp_path / "c", status="diverged")) == math.inf


def test_loss_shakes_by_the_deviation_of_its_logarithms_changes(tmp_path):
    fluctuation = measure_named("loss_fluctuation")
    run = loaded(tmp_path)

    def recorded(*points, epoch=0):
        return tuple({"epoch": epoch, "step": step, "loss": loss} for step, loss in points)

    halving = recorded((10, 2.0), (20, 1.0), (30, 0.5), (40, 0.25))
    assert fluctuation(replace(run, steps=halving)) == pytest.approx(0.0, abs=1e-12)
    # ln 2 and -ln 2: mean 0, sqrt(2 ln² 2).
    shaking = recorded((10, 1.0), (20, 2.0), (30, 1.0))
    expected = pytest.approx(math.sqrt(2) * math.log(2))
    assert fluctuation(replace(run, steps=shaking)) == expected
    # Neither a loss after the drop, nor one at another distance, nor one that is not finite counts.
    more = (*shaking, *recorded((33, 9.0), (40, None)), *recorded((600, 7.0), (610, 1.0), epoch=3))
    assert fluctuation(replace(run, steps=more)) == expected
    assert fluctuation(replace(run, steps=recorded((10, 1.0), (20, 2.0)))) is None
    gone = loaded(tmp_path / "gone", loss=(2.0,), status="diverged")
    assert fluctuation(gone) == math.inf
