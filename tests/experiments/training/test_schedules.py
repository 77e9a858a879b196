"""The learning rate against torch's own schedulers, and every setting that makes no sense."""

import itertools
import logging
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    SequentialLR,
)

from experiments.errors import UserError
from experiments.training.schedules import check_schedule, learning_rate, read_schedule

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "schedule"
COSINE = {"name": "cosine", "min_lr": 1e-4, "interval": "epoch"}
STEPS = {"name": "steps", "milestones": [3, 5], "gamma": 0.1}
CONSTANT = {"name": "constant"}
BASE, STEPS_PER_EPOCH, EPOCHS = 0.1, 4, 8


def ours(cfg, steps):
    return [
        learning_rate(cfg, base_lr=BASE, step=step, steps_per_epoch=STEPS_PER_EPOCH, epochs=EPOCHS)
        for step in range(steps)
    ]


def torch_rates(make, steps, every=1) -> list[float]:
    """Learning rates of a torch scheduler that is advanced once in `every` steps."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=BASE)
    scheduler: LRScheduler = make(optimizer)
    rates = []
    for step in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        if (step + 1) % every == 0:
            scheduler.step()
    return rates


def same(a, b):
    # torch multiplies its way from rate to rate; the closed form differs by rounding only.
    assert a == pytest.approx(b, rel=1e-12, abs=1e-15)


def test_cosine_by_epoch_equals_torch():
    steps = EPOCHS * STEPS_PER_EPOCH
    same(
        ours(COSINE, steps),
        torch_rates(lambda o: CosineAnnealingLR(o, EPOCHS, 1e-4), steps, STEPS_PER_EPOCH),
    )


def test_cosine_by_step_equals_torch():
    steps = EPOCHS * STEPS_PER_EPOCH
    same(
        ours(COSINE | {"interval": "step"}, steps),
        torch_rates(lambda o: CosineAnnealingLR(o, steps, 1e-4), steps),
    )


def test_steps_equal_torch():
    steps = EPOCHS * STEPS_PER_EPOCH
    same(
        ours(STEPS, steps),
        torch_rates(lambda o: MultiStepLR(o, [3, 5], 0.1), steps, STEPS_PER_EPOCH),
    )


def test_warmup_equals_torch_linear():
    warmup_steps = 2 * STEPS_PER_EPOCH
    cfg = CONSTANT | {"warmup_epochs": 2, "warmup_start_factor": 0.25}
    same(ours(cfg, 20), torch_rates(lambda o: LinearLR(o, 0.25, total_iters=warmup_steps), 20))


def test_cosine_after_warmup_equals_torch_sequential():
    steps, warmup_steps = EPOCHS * STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH
    cfg = COSINE | {"interval": "step", "warmup_epochs": 2, "warmup_start_factor": 0.25}

    def make(optimizer):
        parts = [
            LinearLR(optimizer, 0.25, total_iters=warmup_steps),
            CosineAnnealingLR(optimizer, steps - warmup_steps, 1e-4),
        ]
        return SequentialLR(optimizer, parts, milestones=[warmup_steps])

    same(ours(cfg, steps), torch_rates(make, steps))


def test_cosine_by_epoch_after_warmup_is_the_shorter_cosine():
    cfg = COSINE | {"warmup_epochs": 2}
    shifted = ours(cfg, EPOCHS * STEPS_PER_EPOCH)[2 * STEPS_PER_EPOCH :]
    plain = [
        learning_rate(
            COSINE, base_lr=BASE, step=step, steps_per_epoch=STEPS_PER_EPOCH, epochs=EPOCHS - 2
        )
        for step in range(len(shifted))
    ]
    assert shifted == plain


def test_milestones_count_from_the_start_of_training():
    rates = ours(STEPS | {"warmup_epochs": 2}, EPOCHS * STEPS_PER_EPOCH)
    assert rates[3 * STEPS_PER_EPOCH - 1] == BASE
    assert rates[3 * STEPS_PER_EPOCH] == pytest.approx(0.1 * BASE)


def test_paper_cosine_ends_near_its_minimum():
    # M Table 6: 0.1 to 1e-4 over 150 epochs; the last epoch's rate is one step short of the end.
    rate = learning_rate(COSINE, base_lr=0.1, step=149 * 195, steps_per_epoch=195, epochs=150)
    assert 1e-4 < rate < 1.2e-4
    end = learning_rate(COSINE, base_lr=0.1, step=150 * 195, steps_per_epoch=195, epochs=150)
    assert end == pytest.approx(1e-4)
    beyond = learning_rate(COSINE, base_lr=0.1, step=170 * 195, steps_per_epoch=195, epochs=150)
    assert beyond == pytest.approx(1e-4)


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_warmup_that_ends_inside_an_epoch_never_exceeds_the_base(interval):
    rates = ours(COSINE | {"warmup_epochs": 1.4, "interval": interval}, EPOCHS * STEPS_PER_EPOCH)
    top = rates.index(max(rates))
    assert max(rates) == BASE and top == round(1.4 * STEPS_PER_EPOCH)
    assert all(a < b for a, b in itertools.pairwise(rates[: top + 1]))
    assert all(a >= b for a, b in itertools.pairwise(rates[top:]))


def test_a_schedule_already_read_gives_the_same_rates():
    node = OmegaConf.create(COSINE)
    assert ours(read_schedule(node), 32) == ours(node, 32)


@pytest.mark.parametrize("bad", [{"step": -1}, {"steps_per_epoch": 0}, {"epochs": 0}])
def test_counts_out_of_range_are_refused(bad):
    counts = {"step": 0, "steps_per_epoch": 4, "epochs": 8} | bad
    with pytest.raises(ValueError, match=next(iter(bad))):
        learning_rate(CONSTANT, base_lr=0.1, **counts)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"name": "cosin"}, "unknown schedule.name = 'cosin'; did you mean 'cosine'"),
        (COSINE | {"minlr": 0.0}, "unknown key schedule.minlr; did you mean 'min_lr'"),
        (CONSTANT | {"gamma": 0.1}, "unknown key schedule.gamma"),
        ({"name": "cosine"}, "schedule.min_lr is missing"),
        ({"name": "steps", "gamma": 0.1}, "schedule.milestones is missing"),
        (COSINE | {"min_lr": 0.2}, "schedule.min_lr = 0.2 must be smaller"),
        (COSINE | {"min_lr": 0.1}, "schedule.min_lr = 0.1 must be smaller"),
        (COSINE | {"min_lr": -1e-4}, "schedule.min_lr = -0.0001 must be 0 or more"),
        (COSINE | {"min_lr": float("nan")}, "schedule.min_lr = nan must be 0 or more"),
        (COSINE | {"interval": "epochs"}, "schedule.interval = 'epochs'; did you mean 'epoch'"),
        (STEPS | {"milestones": []}, "schedule.milestones is empty"),
        (STEPS | {"milestones": [5, 3]}, r"schedule.milestones = \[5, 3\] must be"),
        (STEPS | {"milestones": [3, 3]}, r"schedule.milestones = \[3, 3\] must be"),
        (STEPS | {"milestones": [0, 3]}, r"schedule.milestones = \[0, 3\] must be"),
        (STEPS | {"gamma": 1.0}, "schedule.gamma = 1 must lie"),
        (STEPS | {"gamma": 0.0}, "schedule.gamma = 0 must lie"),
        (STEPS | {"warmup_epochs": 4}, "inside the warm-up"),
        (CONSTANT | {"warmup_epochs": -1}, "schedule.warmup_epochs = -1 must be 0"),
        (CONSTANT | {"warmup_epochs": float("nan")}, "schedule.warmup_epochs = nan must be 0"),
        (CONSTANT | {"warmup_epochs": 8}, "leaves nothing of the run's 8 epochs"),
        (CONSTANT | {"warmup_start_factor": 0.0}, "schedule.warmup_start_factor = 0 must"),
        (CONSTANT | {"warmup_start_factor": 1.0}, "schedule.warmup_start_factor = 1 must"),
    ],
)
def test_check_schedule_refuses(cfg, message):
    with pytest.raises(UserError, match=message) as caught:
        check_schedule(OmegaConf.create(cfg), base_lr=BASE, epochs=EPOCHS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("base_lr", "epochs"), [(0.0, 8), (float("inf"), 8), (0.1, 0)])
def test_check_schedule_refuses_what_the_run_cannot_have(base_lr, epochs):
    with pytest.raises(UserError, match=r"(optimizer\.lr|epochs) ="):
        check_schedule(CONSTANT, base_lr=base_lr, epochs=epochs)


def test_milestone_beyond_the_end_is_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        check_schedule(STEPS | {"milestones": [3, 8]}, base_lr=BASE, epochs=EPOCHS)
    assert "[8] never reached, the run has 8 epochs" in caplog.text
    caplog.clear()
    check_schedule(STEPS | {"milestones": [3, 7]}, base_lr=BASE, epochs=EPOCHS)
    assert not caplog.records


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_file_is_valid_at_the_papers_size(path):
    config = OmegaConf.load(path)
    if path.stem == "replay":  # has nothing to replay until a run is named
        with pytest.raises(UserError, match=r"schedule\.multipliers"):
            check_schedule(config, base_lr=0.1, epochs=151)
        config.multipliers = [[0, 1.0], [101, 2.5]]
    check_schedule(config, base_lr=0.1, epochs=151)
