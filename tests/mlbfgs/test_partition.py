"""Block policies on the papers' networks, and the plan's forecast against the real state."""

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st

from mlbfgs import MLBFGS, plan
from mlbfgs.partition import assign_blocks


@pytest.fixture(scope="module")
def resnet50():
    return torchvision.models.resnet50()


@pytest.fixture(scope="module")
def resnet18():
    return torchvision.models.resnet18()


def resblocks_in(block_plan, block):
    names = [n for n, b in zip(block_plan.names, block_plan.blocks, strict=True) if b == block]
    return sorted({".".join(n.split(".")[:2]) for n in names if n.startswith("layer")})


def test_resnet50_in_eight_blocks_of_two_resblocks(resnet50):
    p = plan(resnet50, "resblocks:2")
    assert len(p.block_sizes) == 8
    assert all(len(resblocks_in(p, block)) == 2 for block in range(8))
    of = dict(zip(p.names, p.blocks, strict=True))
    assert of["conv1.weight"] == 0 and of["bn1.bias"] == 0
    assert of["fc.weight"] == 7 and of["fc.bias"] == 7
    assert sum(p.block_sizes) == 25_557_032


def test_resnet18_in_four_blocks_and_one_per_resblock(resnet18):
    assert len(plan(resnet18, "resblocks:2").block_sizes) == 4
    assert len(plan(resnet18, "resblocks:1").block_sizes) == 8
    assert len(plan(resnet18, "resblocks:4").block_sizes) == 2
    assert len(plan(resnet18, "resblocks:100").block_sizes) == 1


def test_plan_forecasts_the_bytes_of_the_real_state(resnet18):
    for options in (
        {"history_size": 3},
        {"history_size": 2, "momentum": 0.0},
        {"history_size": 2, "history_dtype": torch.bfloat16},
    ):
        forecast = plan(resnet18, "resblocks:2", **options)
        optimizer = MLBFGS(resnet18.named_parameters(), blocks="resblocks:2", **options)
        tensors = [
            t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)
        ]
        assert forecast.state_bytes == sum(t.numel() * t.element_size() for t in tensors)
        assert forecast == optimizer.plan()


def test_plan_prints_blocks_sizes_and_memory(resnet18):
    text = str(plan(resnet18, "resblocks:2"))
    lines = text.splitlines()
    assert len(lines) == 6
    assert "conv1.weight ... layer1.1.bn2.bias" in lines[1]
    # 4 + 2 * 10 + 1 numbers of 4 bytes
    assert "11,689,512 parameters, M = 10" in lines[-1] and "100 bytes a parameter" in lines[-1]


sizes = st.lists(st.integers(1, 1000), min_size=1, max_size=12)


@given(sizes=sizes, data=st.data())
def test_even_blocks_are_contiguous_and_as_even_as_possible(sizes, data):
    k = data.draw(st.integers(1, len(sizes)))
    names = [f"layer{i}.weight" for i in range(len(sizes))]
    blocks = assign_blocks(k, names, sizes)
    assert blocks == sorted(blocks) and set(blocks) == set(range(k))
    totals = [sum(s for s, b in zip(sizes, blocks, strict=True) if b == j) for j in range(k)]

    def best(start, parts):  # exhaustive search over cuts
        if parts == 1:
            return sum(sizes[start:])
        stops = range(start + 1, len(sizes) - parts + 2)
        return min(max(sum(sizes[start:stop]), best(stop, parts - 1)) for stop in stops)

    if len(sizes) <= 8:
        assert max(totals) == best(0, k)


def test_even_blocks_never_cut_through_a_layer():
    names = ["a.weight", "a.bias", "b.weight", "b.bias"]
    assert assign_blocks(2, names, [10, 1, 10, 1]) == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="1 to 2 blocks"):
        assign_blocks(3, names, [10, 1, 10, 1])


def test_patterns():
    names = ["embed.weight", "blocks.0.attn.weight", "blocks.1.mlp.weight", "head.weight"]
    assert assign_blocks([r"attn|mlp", "."], names, [1] * 4) == [1, 0, 0, 1]
    with pytest.raises(ValueError, match=r"no pattern matches embed.weight, head.weight"):
        assign_blocks(["blocks"], names, [1] * 4)
    with pytest.raises(ValueError, match="first match of no parameter"):
        assign_blocks([".", "head"], names, [1] * 4)


def test_blocks_need_not_be_contiguous_in_the_model():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 5))
    optimizer = MLBFGS(model.named_parameters(), blocks=["weight", "bias"])
    assert optimizer.plan().block_sizes == [32, 9]
    assert optimizer.plan().blocks == (0, 1, 0, 1)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (0, "1 to 4 blocks"),
        (5, "1 to 4 blocks"),
        (2.5, "expected None"),
        (True, "expected None"),
        ("resblocks:2", "named_parameters"),
        (["a"], "named_parameters"),
        (lambda names, sizes: [0, 0, 2, 3], "without gaps"),
        (lambda names, sizes: [0], "without gaps"),
    ],
)
def test_policies_that_do_not_fit_say_what_would(policy, message):
    with pytest.raises(ValueError, match=message):
        assign_blocks(policy, None, [1, 2, 3, 4])


@pytest.mark.parametrize("policy", ["resblocks", "resblocks:0", "resnet50"])
def test_unknown_policies_by_name_are_refused(policy):
    with pytest.raises(ValueError, match="'resblocks:r'"):
        assign_blocks(policy, ["layer1.0.conv1.weight"], [1])


def test_a_model_without_resblocks_is_told():
    with pytest.raises(ValueError, match="no parameter is named like"):
        plan(torch.nn.Linear(2, 2), "resblocks:2")
