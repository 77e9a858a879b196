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
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        assert forecast.state_bytes == sum(storages.values())
        assert forecast == optimizer.plan()


@pytest.mark.parametrize("policy", [None, 2, ["0", "1|2"], lambda names, sizes: [0, 0, 1, 1, 2, 2]])
def test_plan_leaves_frozen_parameters_out_as_the_optimizer_does(policy):
    layers = torch.nn.Linear(30, 20), torch.nn.Linear(20, 10), torch.nn.Linear(10, 3)
    model = torch.nn.Sequential(*layers)
    model[0].requires_grad_(False)
    made = MLBFGS(model.named_parameters(), blocks=policy).plan()
    assert made == plan(model, policy)
    assert made.names == ("1.weight", "1.bias", "2.weight", "2.bias")
    assert made.block_sizes == ([243] if policy in (None, ["0", "1|2"]) else [210, 33])


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


# --- several parameter groups --------------------------------------------------------------------


def split_by_decay(named):
    """Weights, then biases and norms, as most training scripts split them."""
    weights = [(name, p) for name, p in named if p.dim() >= 2]
    return [weights, [(name, p) for name, p in named if p.dim() < 2]]


def blocks_by_name(model, policy, groups):
    made = MLBFGS([{"params": g} for g in groups], blocks=policy, history_size=1).plan()
    return dict(zip(made.names, made.blocks, strict=True))


@pytest.fixture(scope="module")
def small_resnets():
    basic, bottleneck = (
        torchvision.models.ResNet(block, [2, 2, 2, 2], width_per_group=64, num_classes=10)
        for block in (
            torchvision.models.resnet.BasicBlock,
            torchvision.models.resnet.Bottleneck,
        )
    )
    return {"basic": basic, "bottleneck": bottleneck}


@pytest.mark.parametrize("name", ["basic", "bottleneck"])
@pytest.mark.parametrize("policy", ["resblocks:2", "resblocks:1", 4, 7])
@pytest.mark.parametrize("turned", [False, True])
def test_blocks_do_not_depend_on_how_parameters_are_grouped(small_resnets, name, policy, turned):
    model = small_resnets[name]
    expected = plan(model, policy)
    groups = split_by_decay(list(model.named_parameters()))
    found = blocks_by_name(model, policy, reversed(groups) if turned else groups)
    assert found == dict(zip(expected.names, expected.blocks, strict=True))


def transformer():
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.token = torch.nn.Parameter(torch.zeros(1, 1, 8))
    model.embed = torch.nn.Linear(5, 8)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16)
    model.blocks = torch.nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
    model.norm, model.head = torch.nn.LayerNorm(8), torch.nn.Linear(8, 3)
    return model


@pytest.mark.parametrize("turned", [False, True])
def test_even_blocks_of_two_groups_have_no_layer_in_two_and_follow_the_model(turned):
    model = transformer()
    groups = split_by_decay(list(model.named_parameters()))
    found = blocks_by_name(model, 5, reversed(groups) if turned else groups)
    of_layer = {}
    for name, block in found.items():
        of_layer.setdefault(name.rpartition(".")[0], set()).add(block)
    assert all(len(blocks) == 1 for blocks in of_layer.values())
    numbers = [min(of_layer[f"blocks.layers.{i}.linear1"]) for i in range(12)]
    assert numbers == sorted(numbers) and set(found.values()) == set(range(5))
    assert (found["embed.weight"], found["head.weight"]) == (0, 4)


def test_groups_without_a_common_module_follow_one_another():
    model = torch.nn.ModuleDict({f"layer_{c}": torch.nn.Linear(3, 3) for c in "abcd"})
    named = list(model.named_parameters())
    expected = plan(model, 2)
    found = blocks_by_name(model, 2, [named[:6], named[6:]])
    assert found == dict(zip(expected.names, expected.blocks, strict=True))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("inside", ["", "backbone."])
@pytest.mark.parametrize("policy", ["resblocks:2", "resblocks:1", "resblocks:8"])
def test_classifier_or_stem_that_is_a_group_of_its_own_is_known_by_name(
    small_resnets, policy, inside, turned
):
    model = small_resnets["basic"]
    if inside:
        model = torch.nn.ModuleDict({"backbone": model})
    expected = plan(model, policy)
    named = list(model.named_parameters())
    for own in ("fc", ("conv1", "bn1"), "conv1", "bn1"):
        starts = tuple(f"{inside}{module}" for module in ([own] if isinstance(own, str) else own))
        apart = [(name, p) for name, p in named if name.startswith(starts)]
        rest = [(name, p) for name, p in named if not name.startswith(starts)]
        found = blocks_by_name(model, policy, [apart, rest] if turned else [rest, apart])
        assert found == dict(zip(expected.names, expected.blocks, strict=True))


def test_a_module_of_no_known_place_among_the_resblocks_is_refused(small_resnets):
    named = list(small_resnets["basic"].named_parameters())
    named = [(name.replace("fc.", "neck.conv1."), p) for name, p in named]
    neck = [(name, p) for name, p in named if name.startswith("neck")]
    trunk = [(name, p) for name, p in named if not name.startswith("neck")]
    said = r"where 'neck.conv1' stands .* regular expressions or a callable"
    with pytest.raises(ValueError, match=said):
        blocks_by_name(None, "resblocks:2", [trunk, neck])
    assert set(blocks_by_name(None, "resblocks:8", [trunk, neck]).values()) == {0}
    # the last stage and the module in one group is enough; so is the first for the stem
    late = [(name, p) for name, p in named if name.startswith(("layer4", "neck"))]
    early = [(name, p) for name, p in named if not name.startswith(("layer4", "neck"))]
    found = blocks_by_name(None, "resblocks:2", [late, early])
    assert (found["conv1.weight"], found["neck.conv1.bias"], found["layer4.0.conv1.weight"]) == (
        0,
        3,
        3,
    )
    # two groups that contradict each other
    names = ["fc.weight", "layer1.0.weight", "layer2.0.weight", "layer2.0.bias", "fc.bias"]
    with pytest.raises(ValueError, match="where 'fc' stands"):
        assign_blocks("resblocks:1", names, [1] * 5, [0, 0, 0, 1, 1])
