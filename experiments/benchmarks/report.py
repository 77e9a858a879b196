"""The Markdown page of the optimizer benchmark."""

from __future__ import annotations

from typing import Any

from tabulate import tabulate

ROWS = (
    ("numbers in the flat vector", "n", "{:,.0f}"),
    ("read bandwidth, GB/s", "read_bandwidth_GBps", "{:.1f}"),
    ("copy bandwidth, GB/s (read + write)", "copy_bandwidth_GBps", "{:.1f}"),
    ("floor of one step, s", "floor_s", "{:.4f}"),
    ("**MLBFGS step, s**", "mlbfgs_step_s", "{:.4f}"),
    ("**step / floor**", "step_over_floor", "{:.2f}"),
    ("**two-loop recursion as printed, separate vectors / step**", "two_loop_over_step", "{:.2f}"),
    ("the same recursion, every line in place / step", "two_loop_in_place_over_step", "{:.2f}"),
    ("**torch.optim.LBFGS (max_iter 1) / step**", "torch_lbfgs_over_step", "{:.2f}"),
    ("MLBFGS step with bfloat16 history, s", "mlbfgs_bfloat16_history_step_s", "{:.4f}"),
    ("two-loop step as printed, s", "two_loop_step_s", "{:.4f}"),
    ("two-loop step in place, s", "two_loop_in_place_step_s", "{:.4f}"),
    ("torch.optim.LBFGS step, s", "torch_lbfgs_step_s", "{:.4f}"),
    ("SGD step, s (foreach)", "sgd_step_s", "{:.4f}"),
    ("AdamW step, s (foreach)", "adamw_step_s", "{:.4f}"),
    ("pair update, s", "pair_update_s", "{:.4f}"),
    ("pair update over T = 50 steps, s", "pair_update_amortised_s", "{:.4f}"),
)


def markdown(result: dict[str, Any]) -> str:
    """The page: one column for each network, then memory, floor, profile and the whole iteration.

    Args:
        result: the content of optimizer_step.json.
    """
    sizes: dict[str, dict[str, Any]] = result["sizes"]
    names = list(sizes)
    rows = [
        [label, *(shape.format(sizes[name][key]) for name in names)] for label, key, shape in ROWS
    ]
    sections = [
        "# Time of one optimizer step",
        f"M = 10, full history, float32, {result['threads']} threads, medians of "
        f"{result['rounds']} interleaved rounds. {origin_line(result['origin'])}",
        table(["", *names], rows),
        "State, bytes a parameter:",
        table(
            ["optimizer", *names],
            [
                [key, *(f"{sizes[name]['state_bytes_per_parameter'][key]:.1f}" for name in names)]
                for key in sizes[names[0]]["state_bytes_per_parameter"]
            ],
        ),
        "The floor, numbers a parameter (over the read bandwidth):",
        table(["traffic", "numbers"], [[k, str(v)] for k, v in result["floor_items"].items()]),
        "Where a step's time goes (share of each torch operation, profiled, ResNet-50's shapes):",
        table(
            ["operation", "share"],
            [[key, f"{share:.1%}"] for key, share in sizes[names[0]]["profile"].items()],
        ),
        _end_to_end(result["end_to_end"]),
    ]
    return "\n\n".join(sections) + "\n"


def _end_to_end(result: dict[str, Any]) -> str:
    return (
        f"A whole iteration ({result['network']}): forward + backward "
        f"{result['forward_backward_s']:.2f} s, MLBFGS {result['mlbfgs_step_s']:.3f} s "
        f"({result['mlbfgs_share_of_forward_backward']:.1%} of it), SGD "
        f"{result['sgd_step_s']:.3f} s ({result['sgd_share_of_forward_backward']:.1%}). With "
        f"MLBFGS an iteration takes {result['iteration_over_sgd']:.3f} times as long as with SGD; "
        f"the mL-BFGS paper's Table 4 prints {result['paper_iteration_over_sgd']:.3f} for an "
        "epoch at batch 512 on 8 GPUs."
    )


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its first column to the left, all others to the right."""
    align = ["left", *["right"] * (len(head) - 1)]
    return tabulate(rows, headers=head, tablefmt="github", colalign=align, disable_numparse=True)


def origin_line(origin: dict[str, Any]) -> str:
    """The commit and the CPU of a measurement, as a sentence.

    Args:
        origin: what `experiments.runs.provenance.describe_origin` wrote down.
    """
    git = origin.get("git") or {}
    state = "with uncommitted changes" if git.get("dirty") else "clean"
    hardware = origin.get("hardware", {})
    device = hardware.get("gpu") or hardware.get("cpu", "unknown CPU")
    return f"Commit {git.get('commit', 'unknown')} ({state}); {device}."
