"""The Markdown page of the data benchmark."""

from __future__ import annotations

from typing import Any

from tabulate import tabulate

CIFAR_NAMES = {
    "torchvision": "torchvision CIFAR10 + transforms + DataLoader",
    "memory": "ours, held in memory",
}
IMAGENET_NAMES = {
    "torchvision": "torchvision ImageFolder + Pillow",
    "originals": "ours, original JPEGs",
    "jpeg": "ours, prepared as JPEGs",
    "raw": "ours, prepared as raw pixels",
}


def markdown(result: dict[str, Any]) -> str:
    """The page: CIFAR-10, ImageNet, the prepared forms.

    Args:
        result: the content of data.json.
    """
    cifar, imagenet = result["cifar10"], result["imagenet"]
    git = result["origin"].get("git") or {}
    state = "with uncommitted changes" if git.get("dirty") else "clean"
    return (
        "\n\n".join(
            [
                "# Images per second",
                f"Normalised float32 batches on the CPU, {result['workers']} worker processes each "
                f"(CIFAR-10 of ours needs none), {result['threads']} threads, medians of "
                f"{result['rounds']} interleaved rounds; commit {git.get('commit', 'unknown')} "
                f"({state}); {result['origin'].get('hardware', {}).get('cpu', 'unknown CPU')}.",
                f"## CIFAR-10, batch {cifar['batch_size']}, crop and flip",
                _cifar(cifar),
                f"## ImageNet, batch {imagenet['batch_size']}, 256x256, random 224x224 crop, flip",
                _rates(imagenet, IMAGENET_NAMES),
                f"{imagenet['sample_images']} photographs of ImageNet, each several times, "
                "from the page cache: what a disk adds is not in these numbers.",
                "The prepared forms (distance of the pixels that the network sees from those of "
                "the originals, in levels of 255; disk for all 1,331,167 images):",
                _forms(imagenet["prepared"]),
            ]
        )
        + "\n"
    )


def _cifar(cifar: dict[str, Any]) -> str:
    return (
        f"{_rates(cifar, CIFAR_NAMES)}\n\nA batch takes {1e3 * cifar['batch_s']:.1f} ms, "
        f"{cifar['share_of_resnet18_step']:.2%} of a step of ResNet-18 "
        f"({cifar['resnet18_step_s']:.2f} s)."
    )


def _rates(result: dict[str, Any], names: dict[str, str]) -> str:
    wall, cpu = result["images_per_second"], result["images_per_cpu_second"]
    ratio, cpu_ratio = result["over_torchvision"], result["over_torchvision_in_cpu_time"]
    rows = [
        [
            label,
            f"{wall[name]:,.0f}",
            f"{ratio.get(name, 1.0):.1f}",
            f"{cpu[name]:,.0f}",
            f"{cpu_ratio.get(name, 1.0):.1f}",
        ]
        for name, label in names.items()
    ]
    return _table(["", "images/s", "ratio", "images per CPU second", "ratio"], rows)


def _forms(prepared: dict[str, dict[str, float]]) -> str:
    rows = [
        [
            form,
            f"{one['bytes_an_image']:,.0f}",
            f"{one['gigabytes_of_imagenet']:.0f} GB",
            f"{one['mean_levels_apart']:.2f}",
            f"{one['p99_levels_apart']:.1f}",
        ]
        for form, one in prepared.items()
    ]
    return _table(["form", "bytes an image", "disk", "mean", "99th percentile"], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    align = ["left", *["right"] * (len(head) - 1)]
    return tabulate(rows, headers=head, tablefmt="github", colalign=align, disable_numparse=True)
