"""Parameters that do not move: frozen ones, groups without parameters, ranks without any."""

import io

import pytest
import torch
from torch.distributed.optim import ZeroRedundancyOptimizer

from mlbfgs import MLBFGS
from tests.gloo import run_ranks

SETTINGS = {"lr": 0.02, "betas": 0.9, "update_interval": 3, "history_size": 3}


def make_model():
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(*[torch.nn.Linear(40, 40) for _ in range(4)])
    return torch.nn.Sequential(backbone.requires_grad_(False), torch.nn.Linear(40, 3)).double()


def walk(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 40, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def kept(optimizer):
    return sum(
        v.numel()
        for entry in optimizer.state.values()
        for v in entry.values()
        if torch.is_tensor(v)
    )


def saved_bytes(optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    return len(buffer.getvalue())


@pytest.mark.parametrize(
    "settings", [{}, {"blocks": 1}, {"momentum": 0.0}, {"variant": "released"}]
)
def test_a_frozen_backbone_costs_what_it_costs_if_it_is_not_passed(settings):
    whole, head = make_model(), make_model()
    passed = MLBFGS(whole.named_parameters(), **SETTINGS, **settings)
    trainable = [(n, p) for n, p in head.named_parameters() if p.requires_grad]
    alone = MLBFGS(trainable, **SETTINGS, **settings)
    for model, optimizer in ((whole, passed), (head, alone)):
        walk(model, optimizer, range(20))
    assert all(
        torch.equal(p, q) for p, q in zip(whole.parameters(), head.parameters(), strict=True)
    )
    assert kept(passed) == kept(alone)
    assert saved_bytes(passed) < saved_bytes(alone) + 4096
    assert list(passed.state) == [p for p in whole.parameters() if p.requires_grad]
    products = passed.hessian_vector([torch.ones_like(p) for p in whole.parameters()])
    assert torch.equal(products[0], torch.ones_like(products[0]))


def test_a_thawed_layer_joins_and_a_frozen_one_that_was_trained_keeps_its_state():
    model = make_model()
    optimizer = MLBFGS(model.named_parameters(), **SETTINGS, blocks=2)
    walk(model, optimizer, range(10))
    before = [p.detach().clone() for p in model[0][3].parameters()]
    model[0][3].requires_grad_(True)
    model[1].requires_grad_(False)
    head = [p.detach().clone() for p in model[1].parameters()]
    walk(model, optimizer, range(10, 20))
    moved = zip(model[0][3].parameters(), before, strict=True)
    assert all(not torch.equal(p, old) for p, old in moved)
    assert all(torch.equal(p, old) for p, old in zip(model[1].parameters(), head, strict=True))
    assert all(
        optimizer.state[p]["seeded"] for p in (*model[0][3].parameters(), *model[1].parameters())
    )
    resumed = MLBFGS(model.named_parameters(), **SETTINGS, blocks=2)
    resumed.load_state_dict(optimizer.state_dict())
    assert kept(resumed) == kept(optimizer)


def test_a_gradient_given_by_hand_moves_a_tensor_that_asks_for_none():
    p, q = torch.ones(3), torch.ones(3)
    ours, sgd = MLBFGS([p], lr=0.1), torch.optim.SGD([q], lr=0.1, momentum=0.9)
    assert not ours.state
    for _ in range(3):
        for x, optimizer in ((p, ours), (q, sgd)):
            x.grad = torch.full((3,), 0.5)
            optimizer.step()
    assert torch.equal(p, q) and ours.state[p]["step"] == 3


def test_groups_without_parameters_are_as_harmless_as_in_sgd():
    for make in (torch.optim.SGD, MLBFGS):
        optimizer = make([{"params": []}], lr=0.1)
        optimizer.step()
        assert optimizer.state_dict()["state"] == {}
        p = torch.nn.Parameter(torch.ones(3))
        optimizer.add_param_group({"params": [p]})
        p.grad = torch.ones(3)
        optimizer.step()
        torch.testing.assert_close(p.detach(), torch.full((3,), 0.9))
    assert MLBFGS([{"params": []}]).plan().block_sizes == []
    assert MLBFGS([{"params": []}]).hessian_vector([]) == []
    everything_frozen = MLBFGS(torch.nn.Linear(2, 2).requires_grad_(False).parameters())
    everything_frozen.step()
    everything_frozen.load_state_dict(everything_frozen.state_dict())


@pytest.mark.parametrize("policy", [2, "resblocks:1", ["x"]])
def test_a_policy_says_what_it_needs_of_parameters_that_are_not_there(policy):
    with pytest.raises(ValueError, match=r"blocks=|pattern"):
        MLBFGS([{"params": []}], blocks=policy)


def zero_redundancy(rank):
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 4, bias=False)  # one parameter: the second rank has none
    optimizer = ZeroRedundancyOptimizer(layer.parameters(), optimizer_class=MLBFGS, lr=0.1)
    for _ in range(4):
        layer.weight.grad = layer.weight.detach().clone()
        optimizer.step()
    return layer.weight.detach().clone()


def empty_everywhere(rank):
    found = []
    for mode in ("blocks", "sharded"):
        frozen = torch.nn.Linear(8, 4).requires_grad_(False)
        optimizer = MLBFGS(frozen.parameters(), lr=0.1, distribution=mode)
        optimizer.step()
        frozen.requires_grad_(True)
        for p in frozen.parameters():
            p.data.fill_(1.0)
            p.grad = torch.ones_like(p)
        optimizer.step()
        found.append(frozen.weight.detach().clone())
    return found


def test_a_rank_without_parameters_waits_for_nobody():
    first, second = run_ranks(zero_redundancy, 2)
    assert torch.equal(first, second)
    for rank in run_ranks(empty_everywhere, 2):
        for weight in rank:
            torch.testing.assert_close(weight, torch.full((4, 8), 0.9))


FROZEN = {
    "integer": lambda: torch.arange(6),
    "boolean": lambda: torch.tensor([True, False]),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "on another device": lambda: torch.ones(4, device="meta"),
    "of 8 bits": lambda: torch.ones(4).to(torch.float8_e4m3fn),
    "empty": lambda: torch.zeros(0, dtype=torch.int64),
}


@pytest.mark.parametrize("kind", FROZEN)
@pytest.mark.parametrize("late", [False, True], ids=["from the start", "added later"])
def test_a_frozen_parameter_of_any_kind_is_left_alone_as_in_sgd(kind, late):
    def train(make, frozen):
        p = torch.nn.Parameter(torch.linspace(-1, 2, 5))
        named = [("table", frozen), ("weight", p)]
        optimizer = make(named[1:] if late else named)
        for step in range(12):
            if late and step == 7:
                optimizer.add_param_group({"params": named[:1]})
            p.grad = 0.5 * p.detach()
            optimizer.step()
        return p.detach(), optimizer

    frozen = torch.nn.Parameter(FROZEN[kind](), requires_grad=False)
    before = None if frozen.is_meta else frozen.detach().clone()
    moved, optimizer = train(lambda params: MLBFGS(params, **SETTINGS), frozen)
    alone = torch.nn.Parameter(torch.linspace(-1, 2, 5))
    twin = MLBFGS([alone], **SETTINGS)
    for _ in range(12):
        alone.grad = 0.5 * alone.detach()
        twin.step()
    assert torch.equal(moved, alone.detach()) and len(optimizer.state) == 1
    assert before is None or torch.equal(frozen, before)
    sgd = train(lambda params: torch.optim.SGD(params, lr=0.1), frozen)[1]
    assert len(sgd.state_dict()["param_groups"]) == len(optimizer.state_dict()["param_groups"])
    # what it has been given a gradient for cannot be one of ours, and is named
    again = MLBFGS([("table", frozen), ("weight", torch.nn.Parameter(torch.ones(5)))], **SETTINGS)
    again.load_state_dict(again.state_dict())
    if kind in ("complex", "on another device"):
        frozen.requires_grad_(True)
        with pytest.raises(ValueError, match=r"real floating-point|one device"):
            again.step()


@pytest.mark.parametrize("variant", ["paper", "guarded", "released"])
def test_an_infinite_number_that_never_moves_leaves_the_others_their_curvature(variant):
    """As the -inf of a mask among the parameters, whose gradient is 0."""

    def train(values, **settings):
        p, q = (torch.nn.Parameter(torch.tensor(v)) for v in (values, [1.0, -2.0, 0.5]))
        optimizer = MLBFGS([p, q], **SETTINGS, variant=variant, **settings)
        for step in range(30):
            for x, slope in ((p, 0.5), (q, 0.8)):
                x.grad = torch.nan_to_num(slope * x.detach(), posinf=0.0, neginf=0.0)
            if step == 20:  # from then on it is an ordinary number
                with torch.no_grad():
                    p[1].clamp_(-1e-3, 1e-3)
                middle = [x.detach().clone() for x in (p, q)]
            optimizer.step()
        return middle, q.detach(), optimizer.state[q]["pairs"], optimizer.state[q]["skipped"]

    masked, q, pairs, skipped = train([1.0, -float("inf"), 2.0])
    plain, _, expected, _ = train([1.0, 0.0, 2.0])
    assert masked[0][1] == -1e-3 and torch.equal(masked[0][[0, 2]], plain[0][[0, 2]])
    assert torch.equal(masked[1], plain[1])
    assert pairs == expected > 3 and skipped == 0 and q.isfinite().all()
