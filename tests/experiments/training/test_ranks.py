"""Several ranks train as one process does: real processes that talk over gloo."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from experiments.runs.directory import read_status
from experiments.runs.spec import RunSpec
from experiments.training.evaluation import evaluate
from experiments.training.ranks import ALONE, JoinedRanks, Ranks
from experiments.training.task import build_task
from experiments.training.trainer import Trainer
from tests.experiments.run_configs import (
    MLBFGS,
    newest_state,
    numbers,
    run_spec,
)
from tests.gloo import run_ranks

CPU = torch.device("cpu")
SLBFGS = {
    "name": "slbfgs",
    "_target_": "experiments.optimizers.slbfgs.SLBFGS",
    "lr": 0.05,
    "update_interval": 4,
    "history_size": 3,
    "curvature_batch_size": 130,
}
# 1,442 images: 22 whole batches and one of 34, which two and three ranks share unevenly.
RUN = {"train.epochs": 1, "dataset.drop_last": False, "train.batch_size": 65}
RESNET = {"model": {"name": "cifar_resnet", "depth": 8, "width": 2}, "dataset.train_limit": 260}


def joined() -> JoinedRanks:
    return JoinedRanks(dist.HashStore(), timeout_s=30.0, local_rank=dist.get_rank())


def train(_rank: int, specs: list[RunSpec]) -> None:
    for spec in specs:
        Trainer(spec, ranks=joined()).run()


def runs(folder: Path) -> dict[str, RunSpec]:
    """One run of each kind that has to be the same on any number of ranks."""
    changes: dict[str, dict[str, Any]] = {
        "sgd": {},
        "micro batches": {"train.micro_batch": 7},
        "mlbfgs": {"optimizer": MLBFGS},
        "slbfgs": {"optimizer": SLBFGS},
        "synchronised batchnorm": {**RESNET, "train.sync_batchnorm": True},
    }
    return {name: run_spec(folder, **{**RUN, **more}) for name, more in changes.items()}


def weights(spec: RunSpec) -> torch.Tensor:
    state = newest_state(spec)
    return torch.cat([value.double().flatten() for value in state["model"].values()])


def figures(spec: RunSpec) -> list[dict[str, float]]:
    """The numbers of the records, without those on curvature, where pairs magnify rounding."""
    records = [record for record in numbers(spec.directory) if record["kind"] != "curvature"]
    return [{k: v for k, v in record.items() if k != "kind"} for record in records]


@pytest.mark.slow
def test_any_number_of_ranks_trains_as_one(tmp_path: Path) -> None:
    alone = runs(tmp_path / "1")
    for spec in alone.values():
        Trainer(spec).run()
    for world_size in (2, 3):
        shared = runs(tmp_path / str(world_size))
        run_ranks(train, world_size, list(shared.values()))
        for name, spec in shared.items():
            one = alone[name]
            assert read_status(spec.directory) == read_status(one.directory), name
            # Rounding alone differs: float32 sums in another order, over 23 steps.
            torch.testing.assert_close(weights(spec), weights(one), rtol=1e-4, atol=1e-5, msg=name)
            for mine, others in zip(figures(spec), figures(one), strict=True):
                assert mine == pytest.approx(others, rel=1e-3), name
    # The comparison can fail: per-rank statistics are another computation.
    per_rank = run_spec(tmp_path / "per rank", **RUN, **RESNET)
    run_ranks(train, 2, [per_rank])
    assert (weights(per_rank) - weights(alone["synchronised batchnorm"])).abs().max() > 1e-2


@pytest.mark.slow
def test_what_two_ranks_began_one_and_three_go_on_with(tmp_path: Path) -> None:
    optimizer = {**MLBFGS, "blocks": 2, "distribution": "blocks"}
    changes = {**RUN, "optimizer": optimizer, "train.log_interval": 15}
    begun = run_spec(tmp_path / "2", **changes, **{"train.timeout_s": 1e-9})
    run_ranks(train, 2, [begun])
    status = read_status(begun.directory)
    # full history, in the middle of the epoch
    assert status is not None and (status.status, status.step) == ("timeout", 15)
    (folder,) = (begun.directory / "checkpoints").iterdir()
    assert len(list(folder.glob("*.distcp"))) == 2
    whole = run_spec(tmp_path / "whole", **changes)
    assert Trainer(whole).run() == "done"
    sharded = {**changes, "optimizer": {**optimizer, "distribution": "sharded"}}
    for world_size, changed in ((1, changes), (3, changes), (3, sharded)):
        distribution = changed["optimizer"]["distribution"]
        spec = run_spec(tmp_path / f"{world_size}-{distribution}", **changed)
        shutil.copytree(begun.directory, spec.directory)
        if world_size == 1:
            assert Trainer(spec).run() == "done"
        else:
            run_ranks(train, world_size, [spec])
        resumes = json.loads((spec.directory / "meta.json").read_text())["resumes"]
        assert [(r["step"], r["ranks"]) for r in resumes] == [(15, world_size)]
        assert OmegaConf.load(spec.directory / "config.yaml").optimizer.distribution == distribution
        torch.testing.assert_close(weights(spec), weights(whole), rtol=1e-4, atol=1e-5)
        ends = zip(figures(spec)[-1:], figures(whole)[-1:], strict=True)
        for mine, theirs in ends:
            assert mine == pytest.approx(theirs, rel=1e-3)


def evaluated(ranks: Ranks, spec: RunSpec) -> tuple[Any, int]:
    task = build_task(spec, CPU, ranks)
    batches = [(batch.images, batch.labels) for batch in task.data.test_batches()]
    result = evaluate(task.model.eval(), batches, device=CPU, ranks=ranks)
    return result, sum(len(labels) for _, labels in batches)


def evaluated_by_rank(_rank: int, spec: RunSpec) -> tuple[Any, int]:
    return evaluated(joined(), spec)


def test_evaluation_counts_every_image_once(tmp_path: Path) -> None:
    spec = run_spec(tmp_path, **{"dataset.test_batch_size": 50})
    one, images = evaluated(ALONE, spec)
    assert images == 355
    for world_size in (2, 3):
        results = run_ranks(evaluated_by_rank, world_size, spec)
        assert sum(count for _, count in results) == 355
        for result, _ in results:
            assert (result.top1, result.top5) == (one.top1, one.top5)
            # float32 logits of other batches
            assert result.loss == pytest.approx(one.loss, rel=1e-6)
