"""KFAC on several ranks and in several passes: the trajectory of one process on the whole batch.

Real processes that talk over gloo. Tolerances: 1e-9 in float64, where sums over ranks differ by
their order and pass through inverses of condition numbers up to 1e4; in float32, stated there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.data import Part
from experiments.errors import UserError
from experiments.optimizers import kfac, kronecker
from experiments.optimizers.kfac import KFAC
from experiments.optimizers.kfac_layers import find_layers
from experiments.optimizers.kfac_parts import owners_of_layers
from experiments.optimizers.kronecker import Factors
from experiments.training.batch_gradient import batch_gradient
from experiments.training.precision import Precision
from experiments.training.ranks import ALONE, JoinedRanks, Ranks
from experiments.training.task import Task
from experiments.training.trainer import Trainer
from tests.experiments.run_configs import (
    assert_same_bits,
    assert_same_run,
    newest_state,
    run_spec,
)
from tests.gloo import run_ranks

FLOAT32 = Precision("float32", torch.device("cpu"))
# The last batch has five images: parts of 4 and 3, then of 3 and 2. Three inversions.
BATCHES = [7, 7, 7, 7, 7, 7, 7, 7, 7, 5]
INTERVALS: dict[str, Any] = {"factor_update_interval": 2, "inverse_update_interval": 4}
CASES: dict[str, tuple[torch.dtype, int | None, dict[str, Any]]] = {
    "mlp": (torch.float64, None, {}),
    "mlp in micro batches": (torch.float64, 2, {"normalization": "pauloski"}),
    "conv": (torch.float64, None, {"normalization": "pauloski", "damping": 0.01}),
    "conv in micro batches": (torch.float64, 2, {"method": "cholesky", "pi_correction": True}),
    "mlp in float32": (torch.float32, None, {}),
}


def network(case: str) -> nn.Sequential:
    torch.manual_seed(3)
    layers: list[nn.Module]
    if case.startswith("mlp"):
        layers = [nn.Flatten(), nn.Linear(50, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh()]
        layers.append(nn.Linear(6, 3))
    else:
        layers = [nn.Conv2d(2, 4, 3, stride=2), nn.Tanh(), nn.Conv2d(4, 5, 2), nn.Flatten()]
        layers.append(nn.Linear(5, 3))
    return nn.Sequential(*layers).to(CASES[case][0])


def optimizer_of(model: nn.Module, case: str) -> KFAC:
    settings = {"lr": 0.1, "weight_decay": 1e-3, **INTERVALS, **CASES[case][2]}
    return KFAC(model, **settings)


def batches(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for size in BATCHES:
        images = torch.randn(size, 2, 5, 5, generator=generator, dtype=torch.float64)
        yield images.to(dtype), torch.randint(3, (size,), generator=generator)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def alone(case: str) -> tuple[Tensor, dict[str, Any]]:
    """Weights after each step, and the state, of one process that sees whole batches."""
    model = network(case)
    optimizer = optimizer_of(model, case)
    trajectory = []
    for images, labels in batches(CASES[case][0]):
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        trajectory.append(weights(model))
    return torch.stack(trajectory), optimizer.state_dict()


def joined() -> JoinedRanks:
    return JoinedRanks(dist.HashStore(), timeout_s=30.0, local_rank=dist.get_rank())


def in_parts(case: str, ranks: Ranks) -> tuple[Tensor, dict[str, Any], list[tuple[int, int]]]:
    """The same through the trainer's gradient; and the sizes of the layers inverted here."""
    dtype, micro_batch, _ = CASES[case]
    inverted: list[tuple[int, int]] = []
    originals: dict[str, Any] = {
        "eigenbases": kronecker.eigenbases,
        "damped_inverses": kronecker.damped_inverses,
    }

    def counting(name: str) -> Any:
        def call(factors: Factors, *arguments: Any, **more: Any) -> dict[str, Tensor]:
            inverted.append((len(factors.inputs), len(factors.outputs)))
            result: dict[str, Tensor] = originals[name](factors, *arguments, **more)
            return result

        return call

    model = network(case)
    task = cast(Task, SimpleNamespace(parallel=ranks.parallel(model), precision=FLOAT32))
    optimizer = optimizer_of(model, case)
    optimizer.share_batches(ranks)
    trajectory = []
    with pytest.MonkeyPatch.context() as patch:
        for name in originals:
            patch.setattr(kfac, name, counting(name))
        for images, labels in batches(dtype):
            part = ranks.part.of(0, len(labels))
            optimizer.zero_grad()
            batch_gradient(
                task,
                images[part],
                labels[part],
                whole_batch=len(labels),
                micro_batch=micro_batch,
                ranks=ranks,
            )
            optimizer.step()
            trajectory.append(weights(model))
    return torch.stack(trajectory), optimizer.state_dict(), inverted


def all_in_parts(_rank: int) -> dict[str, tuple[Tensor, dict[str, Any], list[tuple[int, int]]]]:
    return {case: in_parts(case, joined()) for case in CASES}


def assert_close(case: str, mine: tuple[Any, ...], one: tuple[Any, ...]) -> None:
    """Weights of every step and averages of the factors."""
    tolerance: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
    if CASES[case][0] == torch.float32:
        tolerance = {"rtol": 0.0, "atol": 3e-4}  # ten steps of about 0.05, through inverses
    torch.testing.assert_close(mine[0], one[0], **tolerance, msg=lambda m: f"{case}: {m}")
    for i, state in one[1]["state"].items():
        for key, value in state.items():
            if key.endswith("_factor") or not isinstance(value, Tensor):
                torch.testing.assert_close(
                    mine[1]["state"][i][key], value, **tolerance, msg=lambda m: f"{case}: {m}"
                )


def layer_sizes(case: str) -> list[tuple[int, int]]:
    weights_ = [p for p in network(case).parameters() if p.dim() > 1]
    return [(p[0].numel() + 1, len(p)) for p in weights_]


def test_two_ranks_take_the_steps_of_one_process() -> None:
    ranks = run_ranks(all_in_parts, 2)
    for case in CASES:
        one, (first, second) = alone(case), (rank[case] for rank in ranks)
        assert_close(case, first, one)
        # All that decides the next step is the same, bit for bit.
        assert_same_bits(first[:2], second[:2], case)
        # Every layer is inverted three times, on one rank, and no rank is idle.
        assert first[2] and second[2]
        assert not set(first[2]) & set(second[2])
        assert sorted(first[2] + second[2]) == sorted(3 * layer_sizes(case)), case
    # The steps are far longer than the tolerance, and the factors matter.
    trajectory = alone("mlp")[0]
    assert (trajectory[1:] - trajectory[:-1]).abs().amax(dim=1).min() > 1e-4


@pytest.mark.parametrize("case", [case for case in CASES if "micro" in case])
def test_micro_batches_of_one_process_are_one_batch(case: str) -> None:
    mine = in_parts(case, ALONE)
    assert_close(case, mine, alone(case))
    assert sorted(mine[2]) == sorted(3 * layer_sizes(case))


def test_whole_batches_have_the_same_numbers_either_way() -> None:
    """One pass on one rank goes through the sums, and loses no more than a rounding."""
    assert_close("conv", in_parts("conv", ALONE), alone("conv"))


def test_layers_go_to_ranks_by_their_cubes() -> None:
    model = nn.Sequential(nn.Linear(9, 2), nn.Linear(2, 7), nn.Linear(7, 8, bias=False))
    layers = list(find_layers(model, ()).values())
    # 10³ + 2³ = 1008, 3³ + 7³ = 370, 7³ + 8³ = 855
    assert list(owners_of_layers(layers, 2).values()) == [0, 1, 1]
    assert list(owners_of_layers(layers, 1).values()) == [0, 0, 0]
    assert list(owners_of_layers(layers, 5).values()) == [0, 2, 1]


def late_layer(_rank: int) -> list[tuple[int, int]]:
    """Rank 1 alone uses the second layer, from the third step on."""
    first, second = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
    optimizer = KFAC(
        nn.Sequential(first, second), factor_update_interval=1, inverse_update_interval=4
    )
    ranks = joined()
    optimizer.share_batches(ranks)
    for step in range(4):
        optimizer.zero_grad()
        features = first(torch.ones(2, 3, dtype=torch.float64))
        used = second(features) if step >= 2 and ranks.rank == 1 else features
        used.square().mean().backward()
        optimizer.step()
    states = [optimizer.state[layer.weight] for layer in (first, second)]
    return [(state["factor_updates"], state["inversions"]) for state in states]


def test_layer_that_one_rank_alone_has_passed_does_not_part_them() -> None:
    assert run_ranks(late_layer, 2) == [[(4, 1), (2, 1)]] * 2


def train(_rank: int, specs: list[Any]) -> None:
    for spec in specs:
        Trainer(spec, ranks=joined()).run()


def test_run_of_two_ranks_is_cut_and_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    optimizer = {
        "name": "kfac",
        "_target_": "experiments.optimizers.kfac.KFAC",
        "takes_model": True,
        "lr": 0.05,
        "factor_update_interval": 3,
        "inverse_update_interval": 7,
    }
    changes = {"optimizer": optimizer, "train.epochs": 1, "train.micro_batch": 20}
    # 65 images over two ranks, in passes of at most 20; cut at step 5.
    changes |= {"train.batch_size": 65, "train.checkpoint_interval": 5}
    whole, cut = run_spec(tmp_path / "whole", **changes), run_spec(tmp_path / "cut", **changes)
    short = run_spec(tmp_path / "cut", **changes, **{"train.timeout_s": 1e-9})
    run_ranks(train, 2, [short, cut, whole])
    assert_same_run(cut, whole)
    one = run_spec(tmp_path / "one", **{**changes, "train.micro_batch": None})
    Trainer(one).run()
    mine, theirs = (newest_state(spec)["model"] for spec in (whole, one))
    for key, value in theirs.items():
        # 22 steps of float32, through inverses
        torch.testing.assert_close(mine[key], value, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("world_size", [1, 2])
def test_optimizer_that_would_take_a_part_for_the_whole_is_refused(
    tmp_path: Path, world_size: int
) -> None:
    optimizer = {
        "name": "passes",
        "_target_": "tests.experiments.optimizers.odd_optimizers.SGDWithModel",
        "takes_model": True,
        "lr": 0.1,
    }
    changes = {"train.micro_batch": 20} if world_size == 1 else {}
    spec = run_spec(tmp_path, optimizer=optimizer, **changes)
    ranks = Ranks()
    ranks.world_size = world_size
    assert ranks.part == Part(0, world_size)
    refusal = "train.micro_batch=null" if world_size == 1 else "train on one rank"
    with pytest.raises(UserError, match=rf"optimizer=passes takes .* for the whole: .*{refusal}"):
        Trainer(spec, ranks=ranks).run()


def test_muon_looks_at_gradients_alone(tmp_path: Path) -> None:
    optimizer = {
        "name": "muon",
        "_target_": "experiments.optimizers.muon.Muon",
        "takes_model": True,
        "lr": 0.02,
    }
    model = {"name": "mlp", "hidden": [16, 16]}
    shared = {"optimizer": optimizer, "model": model, "train.epochs": 1}
    whole, parts = (
        run_spec(tmp_path / str(size), **shared, **{"train.micro_batch": size})
        for size in (None, 20)
    )
    assert Trainer(whole).run() == Trainer(parts).run() == "done"
    # Muon's bfloat16 makes steps of its own of roundings; the trainings still are one.
    mine, theirs = (newest_state(spec)["model"] for spec in (parts, whole))
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key], value, rtol=0.05, atol=0.02)
