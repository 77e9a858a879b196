"""The Markdown page of the benchmark of distribution."""

from __future__ import annotations

from typing import Any

from tabulate import tabulate

MIB = 2**20


def markdown(result: dict[str, Any]) -> str:
    """The page: memory and bytes of each network, then the paper's setting.

    Args:
        result: the content of distributed.json.
    """
    git = result["origin"].get("git") or {}
    state = "with uncommitted changes" if git.get("dirty") else "clean"
    sections = [
        "# What each rank keeps and what ranks tell each other",
        f"float32, M = {result['history_size']}, gloo processes on one machine; commit "
        f"{git.get('commit', 'unknown')} ({state}). MiB; *state* is the history, averages, "
        "snapshots and momentum of the rank that keeps most. Bytes of collectives are those of "
        "their results, see docs/distributed.md.",
    ]
    for name, network in result["networks"].items():
        sections += [f"## {name}, n = {network['n']:,}", _table(HEAD, _rows(network))]
    sections += [_paper(result)]
    return "\n\n".join(sections) + "\n"


HEAD = [
    *("ranks", "distribution", "state", "history", "2Mn/p", "history / (2Mn/p)"),
    *("parameters a step", "sums a step, bytes", "sums of a pair, bytes"),
]


def _rows(network: dict[str, Any]) -> list[list[str]]:
    rows = []
    for count, modes in network["measured"].items():
        even = network["history_bytes_2Mn_over_p"][count]
        for mode, found in modes.items():
            history = max(found["history_bytes"])
            step, pair = found["ordinary_step_bytes"], found["pair_step_bytes"]
            sums = _reduced(step)
            rows.append(
                [
                    *(count, f"{mode}, {found['blocks']} block{'s' * (found['blocks'] > 1)}"),
                    *(f"{max(found['state_bytes']) / MIB:,.1f}", f"{history / MIB:,.1f}"),
                    *(f"{even / MIB:,.1f}", f"{history / even:.3f}"),
                    f"{step.get('all_gather_parameters', 0) / MIB:,.1f}",
                    *(f"{sums:,}", f"{_reduced(pair) - sums:,}"),
                ]
            )
    return rows


def _reduced(counted: dict[str, int]) -> int:
    return sum(nbytes for name, nbytes in counted.items() if name.startswith("all_reduce"))


def _paper(result: dict[str, Any]) -> str:
    paper = result["paper"]
    head = ["network", "the paper's 2Md/p", "replicated", "blocks, fullest rank", "sharded"]
    rows = []
    for name, network in result["networks"].items():
        planned = network["planned_history_bytes_of_fullest_rank"]
        numbers = [network["paper_history_bytes_2Md_over_p"]]
        numbers += [planned[mode] for mode in ("replicated", "blocks", "sharded")]
        rows.append([name, *(f"{number / MIB:,.1f}" for number in numbers)])
    return (
        f"Computed, not run: the history in MiB on {paper['ranks']} ranks at "
        f"M = {paper['history_size']}, as the mL-BFGS paper trained.\n\n" + _table(head, rows)
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    align = ["left", *["right"] * (len(head) - 1)]
    return tabulate(rows, headers=head, tablefmt="github", colalign=align, disable_numparse=True)
