"""What pairs of seeds rest on: one seed gives all optimizers the same start and the same images."""

from __future__ import annotations

from pathlib import Path

import torch

from experiments.composition import compose_config
from experiments.contestants import optimizers_with_recipe
from experiments.runs.spec import RunSpec
from experiments.training.task import build_task

DIGITS = ["experiment=digits_mlp", "scale=smoke", "train.device=cpu"]


def start(tmp_path: Path, *overrides: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The initial weights of a run, and the images of its second epoch's first three batches."""
    config = compose_config([*DIGITS, *overrides])
    config.results_dir = str(tmp_path)
    task = build_task(RunSpec.from_config(config), torch.device("cpu"))
    weights = torch.cat([p.detach().flatten() for p in task.model.parameters()])
    batches = [batch.images for batch, _ in zip(task.data.train_batches(1), range(3), strict=False)]
    return weights, torch.cat(batches)


def test_all_optimizers_of_a_seed_start_alike_and_see_the_same_images(tmp_path: Path) -> None:
    first = start(tmp_path, "optimizer=sgd")
    for optimizer in optimizers_with_recipe("digits_mlp"):
        for mine, theirs in zip(start(tmp_path, f"optimizer={optimizer}"), first, strict=True):
            assert torch.equal(mine, theirs), optimizer
    longer = start(tmp_path, "optimizer=adam", "train.epochs=9", "schedule=steps")
    assert all(map(torch.equal, longer, first))


def test_other_seeds_and_batch_sizes_are_other_runs(tmp_path: Path) -> None:
    weights, images = start(tmp_path, "optimizer=sgd")
    other_weights, other_images = start(tmp_path, "optimizer=sgd", "seed=1")
    assert not torch.equal(weights, other_weights) and not torch.equal(images, other_images)
    same_weights, smaller = start(tmp_path, "optimizer=sgd", "train.batch_size=32")
    assert torch.equal(weights, same_weights)
    assert not torch.equal(images[:32], smaller[32:64])
