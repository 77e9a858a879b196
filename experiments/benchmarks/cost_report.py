"""The Markdown page of the cost table."""

from __future__ import annotations

from typing import Any

from experiments.benchmarks.report import origin_line, table

_NETWORKS = {"resnet18": "ResNet-18", "resnet50": "ResNet-50"}
_HEAD = [
    *("optimizer", "ordinary step, s", "more, every so many steps", "optimizer, s"),
    *("further passes, s", "iteration / SGD's", "state, bytes a parameter"),
]


def markdown(result: dict[str, Any]) -> str:
    """The page: one row for each optimizer, the cheapest iteration first.

    Args:
        result: the content of optimizer_cost.json.
    """
    optimizers: dict[str, dict[str, Any]] = result["optimizers"]
    ordered = sorted(optimizers, key=lambda name: optimizers[name]["iteration_over_sgd"])
    network, apart = result["network"], result.get("apart", False)
    sections = [
        "# Cost of one step of every optimizer",
        f"{_NETWORKS.get(network['name'], network['name'])} of width {network['width']}, "
        f"{network['input_shape'][1]} x {network['input_shape'][2]} pixels, "
        f"batch {result['batch']}, float32, "
        f"{result['threads']} threads; forward and backward pass "
        f"{result['forward_backward_s']:.3f} s. Medians of {result['rounds']} "
        f"{'rounds, each optimizer in a process of its own' if apart else 'interleaved rounds'}; "
        "optimizers that need passes over a batch themselves took part in "
        f"{result['heavy_rounds']}. {origin_line(result['origin'])}",
        table(
            [*_HEAD, "peak memory, GiB"] if apart else _HEAD,
            [_row(name, optimizers[name]) for name in ordered],
        ),
        "Seconds of the optimizer are those of an ordinary step, and of what it does every so many "
        "steps, spread over them; so are those of the further passes, which for b_H images are "
        "measured on one batch and taken in proportion. An iteration is forward and backward "
        "pass, further passes and optimizer. Settings: the recipes of "
        f"`{result.get('experiment', 'cifar10_resnet18')}`, or else the optimizer's defaults.",
    ]
    if apart:
        sections.append(
            "Peak memory is that of a process in real steps (forward and backward pass, optimizer, "
            "everything that it does every so many steps once), with libraries and one batch."
        )
    printed: dict[str, float] = result.get("printed_over_sgd", {})
    if printed:
        ratios = ", ".join(f"{name} {value:.3f}" for name, value in printed.items())
        sections.append(f"Epoch over SGD's in the mL-BFGS paper's Table 4: {ratios}.")
    sections += [f"Not measured: {name} ({why})." for name, why in result["left_out"].items()]
    return "\n\n".join(sections) + "\n"


def _row(name: str, numbers: dict[str, Any]) -> list[str]:
    events = [
        f"{event} {values['extra_s']:.3f} s every {values['every_steps']}"
        for event, values in numbers["events"].items()
    ]
    peak = numbers.get("peak_memory_bytes")
    return [
        name,
        f"{numbers['ordinary_step_s']:.4f}",
        "; ".join(events) or "-",
        f"{numbers['optimizer_s']:.4f}",
        f"{numbers['passes_s']:.3f}" if numbers["passes_s"] else "-",
        f"{numbers['iteration_over_sgd']:.3f}",
        f"{numbers['state_bytes_per_parameter']:.1f}",
        *([] if peak is None else [f"{peak / 2**30:.2f}"]),
    ]
