"""What each rank keeps and what ranks tell each other, measured over gloo beside the formulas.

    python -m experiments.benchmarks.distributed [--networks resnet18,resnet50] [--ranks 1,2,4]

At the parameter shapes of ResNet-18 and ResNet-50, in the papers' blocks where ranks own blocks, in
one block over the whole model where the state is sharded. Real processes, started by torchrun;
every number of bytes is one that this machine's processes allocated or handed to a collective. A
small history (M = 2) keeps four whole states in memory; all formulas are linear in M.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from experiments.benchmarks.distributed_report import markdown
from experiments.entry import entry
from experiments.errors import UserError, nearest
from experiments.given import user_path
from experiments.runs.atomic import write_atomically
from experiments.runs.provenance import describe_origin
from experiments.training.ranks import Ranks, join_ranks
from mlbfgs import MLBFGS, plan
from mlbfgs.checkpoint import StateShard
from mlbfgs.collectives import Distribution

HISTORY_SIZE = 2
#: Small, so that six steps pass through warm-up, an ordinary step and one with a pair.
UPDATE_INTERVAL = 2
ORDINARY_STEP, PAIR_STEP = 5, 6
TIMEOUT_S = 600.0

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": torchvision.models.resnet18,
    "resnet50": torchvision.models.resnet50,
}
#: M Section 5: two ResBlocks a block, which are 4 blocks of ResNet-18 and 8 of ResNet-50.
BLOCKS: dict[Distribution, str | None] = {
    "replicated": "resblocks:2",
    "blocks": "resblocks:2",
    "sharded": None,
}
#: The paper's own setting, which is computed and not run: 8 GPUs, M = 10 (M Section 4.2, Table 5).
PAPER_RANKS, PAPER_HISTORY_SIZE = 8, 10


def kept_bytes(optimizer: MLBFGS, keys: tuple[str, ...] = ()) -> int:
    """Bytes of the state's tensors on this rank, of all of them or of those with certain keys."""
    total = 0
    for values in optimizer.state.values():
        for key, value in values.items():
            if isinstance(value, Tensor) and (not keys or key in keys):
                total += (value.local if isinstance(value, StateShard) else value).nbytes
    return total


def measure_rank(network: str, distribution: Distribution) -> dict[str, Any]:
    """Take six steps; return what this rank kept and counted."""
    torch.manual_seed(0)
    model = NETWORKS[network]()
    optimizer = MLBFGS(
        model.named_parameters(),
        lr=1e-4,
        betas=0.9,
        history_size=HISTORY_SIZE,
        update_interval=UPDATE_INTERVAL,
        blocks=BLOCKS[distribution],
        distribution=distribution,
    )
    generator = torch.Generator().manual_seed(1)
    told: dict[int, dict[str, int]] = {}
    for step in range(1, PAIR_STEP + 1):
        for p in model.parameters():  # the same on every rank, as DDP leaves gradients
            noise = torch.randn(p.shape, generator=generator)
            p.grad = p.detach() + 0.01 * noise
        optimizer.step()
        told[step] = optimizer.communication()["last_step"]
    accepted = sum(record["accepted"] for record in optimizer.curvature_records())
    checksum = sum(float(p.detach().double().sum()) for p in model.parameters())
    return {
        "state_bytes": kept_bytes(optimizer),
        "history_bytes": kept_bytes(optimizer, ("s_history", "y_history")),
        "ordinary_step_bytes": told[ORDINARY_STEP],
        "pair_step_bytes": told[PAIR_STEP],
        "blocks": len(optimizer.plan().block_sizes),
        "pairs_accepted": accepted,
        "checksum": checksum,
    }


def measure_network(network: str, ranks: Ranks) -> dict[str, Any]:
    """All distributions on the ranks that are there."""
    found: dict[str, Any] = {}
    for distribution in BLOCKS:
        every = ranks.objects(measure_rank(network, distribution))
        first = every[0]
        if len({rank["checksum"] for rank in every}) > 1:
            raise RuntimeError(f"{network}, {distribution}: the ranks' parameters differ")
        if first["pairs_accepted"] != first["blocks"]:
            raise RuntimeError(f"{network}, {distribution}: a pair was refused")
        shared = ("ordinary_step_bytes", "pair_step_bytes", "blocks")
        found[distribution] = {
            "state_bytes": [rank["state_bytes"] for rank in every],
            "history_bytes": [rank["history_bytes"] for rank in every],
            **{key: first[key] for key in shared},
        }
    return found


def start_ranks(network: str, count: int) -> dict[str, Any]:
    """Run this module in `count` processes of torchrun; return what their leader wrote."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(count), "-m", "experiments.benchmarks.distributed"]
        subprocess.run([*command, "--networks", network, "--as-rank", str(out)], check=True)
        found: dict[str, Any] = json.loads(out.read_text())
    return found


def formulas(network: str, counts: list[int]) -> dict[str, Any]:
    """What should come out, from sizes alone."""
    with torch.device("meta"):
        model = NETWORKS[network]()
    n = sum(p.numel() for p in model.parameters())
    # what one rank of the paper's setting keeps of the history, in float32
    paper = {
        distribution: plan(
            model,
            blocks,
            history_size=PAPER_HISTORY_SIZE,
            distribution=distribution,
            world_size=PAPER_RANKS,
        ).history_bytes
        for distribution, blocks in BLOCKS.items()
    }
    return {
        "n": n,
        "history_bytes_2Mn_over_p": {str(p): 2 * HISTORY_SIZE * n * 4 / p for p in counts},
        "paper_history_bytes_2Md_over_p": 2 * PAPER_HISTORY_SIZE * n * 4 / PAPER_RANKS,
        "planned_history_bytes_of_fullest_rank": paper,
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: a network is unknown, or a number of ranks is none.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--out", type=user_path, default=Path("results/benchmarks"))
    parser.add_argument("--as-rank", type=user_path, default=None, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    chosen.networks = chosen.networks.split(",")
    for name in chosen.networks:
        if name not in NETWORKS:
            raise UserError(f"--networks {name}: {nearest(name, NETWORKS)}")
    if not all(count.isdigit() and int(count) for count in chosen.ranks.split(",")):
        raise UserError(f"--ranks {chosen.ranks} must be numbers of ranks, such as 1,2,4")
    chosen.ranks = [int(count) for count in chosen.ranks.split(",")]
    return chosen


@entry
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write distributed.json and distributed.md, print the tables."""
    chosen = parse(arguments)
    if chosen.as_rank is not None:
        with join_ranks(use_gpu=False, timeout_s=TIMEOUT_S) as ranks:
            measured = measure_network(chosen.networks[0], ranks)
            if ranks.leads:
                chosen.as_rank.write_text(json.dumps(measured))
        return 0
    result = {
        "origin": describe_origin(torch.device("cpu")),
        "history_size": HISTORY_SIZE,
        "paper": {"ranks": PAPER_RANKS, "history_size": PAPER_HISTORY_SIZE},
        "networks": {
            name: {
                **formulas(name, chosen.ranks),
                "measured": {str(count): start_ranks(name, count) for count in chosen.ranks},
            }
            for name in chosen.networks
        },
    }
    chosen.out.mkdir(parents=True, exist_ok=True)
    write_atomically(chosen.out / "distributed.json", json.dumps(result, indent=2) + "\n")
    table = markdown(result)
    write_atomically(chosen.out / "distributed.md", table)
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
