"""Several ranks against one process: real gloo processes, see `tests.gloo`."""


import pytest
import torch
import torch.distributed as dist

from mlbfgs import MLBFGS, SLIMQN
from tests.gloo import run_ranks

MODES = ("replicated", "blocks", "sharded")
SETTINGS = {"lr": 0.02, "betas": 0.9, "update_interval": 3, "history_size": 3, "damping": 0.95}
STEPS = 21  # six pairs: the ring of three is full and has turned
#: Blocks of 96, 8, 3 and 25 numbers; the first has gaps in its memory, the second is channels-last.
SHAPES = {"gaps": (4, 3), "conv": (3, 2, 4, 4), "scalar": (), "bias": (7,), "none": (0, 3), "v": 13}
GROUPS = (("conv", "scalar"), ("gaps", "bias", "none", "v"))


def make_parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    values = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in SHAPES.items()
    }
    values["gaps"] = torch.empty(4, 6, dtype=dtype)[:, ::2].copy_(values["gaps"])
    values["conv"] = values["conv"].to(memory_format=torch.channels_last)
    return {name: torch.nn.Parameter(value) for name, value in values.items()}


def make_optimizer(named, cls=MLBFGS, **settings):
    rates = ({"lr": 0.02, "momentum": 0.9}, {"lr": 0.03, "momentum": 0.5, "maximize": True})
    groups = [
        {"params": [(name, named[name]) for name in names], "weight_decay": 0.01, **rate}
        for names, rate in zip(GROUPS, rates, strict=True)
    ]
    return cls(groups, **{**SETTINGS, "blocks": by_name, **settings})


def by_name(names, sizes):
    return [{"conv": 0, "scalar": 0, "bias": 1, "none": 2}.get(name, 3) for name in names]


def set_gradients(named, step):
    """Gradients of a noisy quadratic, the same wherever the parameters are."""
    generator = torch.Generator().manual_seed(step)
    for i, (name, p) in enumerate(named.items()):
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        sign = -1 if name in GROUPS[1] else 1  # the group that ascends
        p.grad = (sign * (0.5 + 0.3 * i) * p.detach() + 0.05 * noise).to(p.dtype)
        if name == "bias" and step in (2, 11, 12):
            p.grad = None


def flat_of(named):
    return torch.cat([p.detach().reshape(-1).double() for p in named.values()])


def walk(named, optimizer, first=1, last=STEPS):
    path = []
    for step in range(first, last + 1):
        set_gradients(named, step)
        optimizer.step()
        path.append(flat_of(named))
    return torch.stack(path)


def assert_equal_on_all_ranks(tensor, group=None):
    everywhere = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everywhere, tensor, group=group)
    assert all(torch.equal(tensor, other) for other in everywhere)


def groups_of(rank, world_size):
    """This rank's group of one, of neighbours two by two, and of all."""
    mine = {world_size: dist.group.WORLD}
    for size in (s for s in (1, 2) if s < world_size):
        for start in range(0, world_size, size):
            group = dist.new_group(list(range(start, start + size)))
            if start <= rank < start + size:
                mine[size] = group
    return mine


CASES = (  # ranks, distribution, class, dtype
    (4, "blocks", MLBFGS, torch.float64),
    (4, "sharded", MLBFGS, torch.float64),
    (4, "sharded", SLIMQN, torch.float32),
    (2, "blocks", SLIMQN, torch.float32),
    (2, "sharded", MLBFGS, torch.float64),
    (1, "blocks", MLBFGS, torch.float32),
    (1, "sharded", SLIMQN, torch.float64),
)


def trajectories(rank):
    found = []
    groups = groups_of(rank, 4)
    for size, mode, cls, dtype in CASES:
        named = make_parameters(dtype)
        optimizer = make_optimizer(named, cls, distribution=mode, process_group=groups[size])
        path = walk(named, optimizer)
        assert_equal_on_all_ranks(path, groups[size])
        found.append((path, optimizer.curvature_records()))
    return found


@pytest.mark.slow
def test_every_mode_and_world_size_follows_one_process_bit_equal_on_all_ranks():
    # four ranks, four blocks of 97, 7, 0 and 25 numbers: uneven, and an empty rank
    (found, *_) = run_ranks(trajectories, 4)
    for (size, mode, cls, dtype), (path, records) in zip(CASES, found, strict=True):
        named = make_parameters(dtype)
        optimizer = make_optimizer(named, cls)
        expected = walk(named, optimizer)
        if size == 1 or mode == "blocks":  # the sums are the same sums
            assert torch.equal(path, expected)
            tolerance = 0.0
        else:  # their order differs
            tolerance = 1e-10 if dtype == torch.float64 else 2e-4
            torch.testing.assert_close(path, expected, rtol=tolerance, atol=tolerance)
        for ours, theirs in zip(records, optimizer.curvature_records(), strict=True):
            assert ours == pytest.approx(theirs, rel=10 * tolerance, nan_ok=True)
        assert path.isfinite().all() and not torch.equal(path[-1], path[0])
