"""Images per second of the batches, beside torchvision's.

    python -m experiments.benchmarks.data [--data DIR] [--rounds 5] [--workers 2] [--out DIR]

DIR (by default the one that MLBFGS_DATA names) holds `cifar10` and `imagenet-sample/val/<class>/`,
original-size images of ImageNet. All contenders have the same transforms, the same number of worker
processes and end with normalised float32 batches on the CPU. They take turns in every round of one
process and medians over the rounds are compared. CPU time, of the workers too, stands beside wall
time: on a busy machine several processes get more of it than one, and wall time favours workers.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import CIFAR10, ImageFolder

from experiments.benchmarks.data_report import markdown
from experiments.benchmarks.measure import folder_for, write_measured
from experiments.composition import compose_config
from experiments.data import InMemoryData, cifar
from experiments.data.batches import RawData
from experiments.data.imagenet import ImageNetSettings, StreamedData, build
from experiments.data.prepare import prepare
from experiments.data.settings import CifarSettings, read_dataset
from experiments.entry import entry
from experiments.errors import UserError
from experiments.given import user_path
from experiments.models import build_model
from experiments.runs.provenance import describe_origin

CIFAR_BATCH = 256  # M Appendix A.4.1
CIFAR_IMAGES = 80 * CIFAR_BATCH
IMAGENET_BATCH = 32  # of one of 8 GPUs: S Appendix B has 256
#: Each image of the sample is read so often in an epoch, under names of its own.
COPIES = 4
#: Images of ImageNet-1k, for the disk that the prepared forms take.
IMAGENET_IMAGES = 1_281_167 + 50_000
FORMS = ("jpeg", "raw")
CPU = torch.device("cpu")

Contender = Callable[[int], Iterable[Any]]


def measure_rates(contenders: dict[str, Contender], images: int, rounds: int) -> dict[str, Any]:
    """Median images per second, and per second of CPU time of this process and its workers.

    All contenders take turns in every round, the first round is discarded.

    Args:
        contenders: each gives the batches of an epoch.
        images: of an epoch.
        rounds: that count.

    Returns:
        `images_per_second`, `images_per_cpu_second` and, for every contender but torchvision's,
        `over_torchvision` and `over_torchvision_in_cpu_time`.
    """
    wall: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    for epoch in range(rounds + 1):
        for name, batches in contenders.items():
            start, cpu_start = time.perf_counter(), cpu_seconds()
            seen = sum(len(labels) for _, labels in batches(epoch))
            assert seen == images, f"{name}: {seen} images instead of {images}"
            if epoch:
                wall[name].append(images / (time.perf_counter() - start))
                cpu[name].append(images / (cpu_seconds() - cpu_start))
    rates = {name: statistics.median(values) for name, values in wall.items()}
    cpu_rates = {name: statistics.median(values) for name, values in cpu.items()}
    ours = [name for name in contenders if name != "torchvision"]
    theirs, cpu_theirs = rates.get("torchvision", 1.0), cpu_rates.get("torchvision", 1.0)
    return {
        "images_per_second": rates,
        "images_per_cpu_second": cpu_rates,
        "over_torchvision": {name: rates[name] / theirs for name in ours},
        "over_torchvision_in_cpu_time": {name: cpu_rates[name] / cpu_theirs for name in ours},
    }


def cpu_seconds() -> float:
    """CPU time of this process and of its living workers, so far."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])  # utime and stime, proc(5)
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def torchvision_loader(dataset: Dataset[Any], batch_size: int, workers: int) -> Contender:
    """Torchvision's way: a DataLoader over transformed images, its workers kept."""
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        generator=torch.Generator(),
    )
    return lambda epoch: loader


def measure_cifar(root: Path, rounds: int, workers: int) -> dict[str, Any]:
    """CIFAR-10: batches held in memory beside torchvision's CIFAR10 and the same transforms."""
    settings = read_dataset(
        CifarSettings,
        compose_config(["dataset=cifar10", f"dataset.root={root}"]).dataset,
    )
    raw = cifar.load(settings)
    raw = RawData(raw.train.first(CIFAR_IMAGES), raw.test, raw.num_classes, raw.pixel_max)
    ours = InMemoryData(raw, settings, batch_size=CIFAR_BATCH, seed=0, device=CPU)
    # Torchvision's class on the same pixels: its own constructor wants its own files.
    theirs = CIFAR10.__new__(CIFAR10)
    theirs.data = np.ascontiguousarray(raw.train.images.transpose(0, 2, 3, 1))
    theirs.targets = raw.train.labels.tolist()
    theirs.target_transform = None
    theirs.transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=settings.crop_padding),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(settings.mean, settings.std),
        ]
    )
    contenders: dict[str, Contender] = {
        "torchvision": torchvision_loader(theirs, CIFAR_BATCH, workers),
        "memory": ours.train_batches,
    }
    rates = measure_rates(contenders, CIFAR_IMAGES, rounds)
    step_s = resnet18_step_s(ours, min(rounds, 3))
    batch_s = CIFAR_BATCH / rates["images_per_second"]["memory"]
    return {
        "batch_size": CIFAR_BATCH,
        **rates,
        "batch_s": batch_s,
        "resnet18_step_s": step_s,
        "share_of_resnet18_step": batch_s / step_s,
    }


def resnet18_step_s(data: InMemoryData, rounds: int) -> float:
    """Median seconds of forward, backward and SGD of a full ResNet-18 on one batch."""
    config = compose_config(["experiment=cifar10_resnet18"]).model
    model = build_model(config, num_classes=data.num_classes, input_shape=data.input_shape)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images, labels = next(data.train_batches(0))
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def measure_imagenet(sample: Path, rounds: int, workers: int) -> dict[str, Any]:
    """ImageNet: from the originals and from both prepared forms, beside torchvision and Pillow."""
    with tempfile.TemporaryDirectory() as temporary:
        tree = Path(temporary) / "tree"
        classes, images = copy_tree(sample, tree)
        settings = imagenet_settings(tree, classes, images, workers)
        prepared = {form: prepare_form(settings, Path(temporary) / form, form) for form in FORMS}
        used = images * COPIES // IMAGENET_BATCH * IMAGENET_BATCH
        data = {"originals": stream(settings)}
        for form in FORMS:
            data[form] = stream(imagenet_settings(Path(temporary) / form, classes, images, workers))
        folder = image_folder(tree / "train", settings)
        contenders: dict[str, Contender] = {
            "torchvision": torchvision_loader(folder, IMAGENET_BATCH, workers),
            **{name: one.train_batches for name, one in data.items()},
        }
        rates = measure_rates(contenders, used, rounds)
        for form in FORMS:
            prepared[form].update(tolerance(data["originals"], data[form], settings.std))
    return {
        "sample_images": images,
        "images_an_epoch": used,
        "batch_size": IMAGENET_BATCH,
        "workers": workers,
        **rates,
        "prepared": prepared,
    }


def copy_tree(sample: Path, tree: Path) -> tuple[int, int]:
    """A tree of links, for training each under several names; classes and images of the sample."""
    if not sample.is_dir():
        raise UserError(
            f"no images in {str(sample)!r}: put a few hundred original-size images of ImageNet "
            "there, in class folders, or name another folder with --images"
        )
    folders = sorted(path for path in sample.iterdir() if path.is_dir())
    images = 0
    for folder in folders:
        for path in sorted(folder.iterdir()):
            images += 1
            for split, copies in (("train", COPIES), ("val", 1)):
                target = tree / split / folder.name
                target.mkdir(parents=True, exist_ok=True)
                for copy in range(copies):
                    (target / f"{path.stem}_{copy}{path.suffix}").symlink_to(path.resolve())
    return len(folders), images


def imagenet_settings(root: Path, classes: int, images: int, workers: int) -> ImageNetSettings:
    """ImageNet's config with the size of the sample."""
    values = {
        "root": root,
        "num_classes": classes,
        "train_images": images * COPIES,
        "test_images": images,
        "workers": workers,
    }
    overrides = [f"dataset.{key}={value}" for key, value in values.items()]
    return read_dataset(ImageNetSettings, compose_config(["dataset=imagenet", *overrides]).dataset)


def stream(settings: ImageNetSettings) -> StreamedData:
    """The batches that training reads."""
    return build(settings, batch_size=IMAGENET_BATCH, seed=0, device=CPU)


def image_folder(folder: Path, settings: ImageNetSettings) -> Dataset[Any]:
    """Torchvision's ImageFolder and Pillow with the same transforms."""
    chain = transforms.Compose(
        [
            transforms.Resize((settings.resized, settings.resized)),
            transforms.RandomCrop(settings.crop),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(settings.mean, settings.std),
        ]
    )
    dataset: Dataset[Any] = ImageFolder(str(folder), chain)
    return dataset


def prepare_form(settings: ImageNetSettings, target: Path, form: Any) -> dict[str, float]:
    """Prepare the sample; the bytes it takes, for an image and for all of ImageNet."""
    start = time.perf_counter()
    summary = prepare(settings, target, form=form, workers=settings.workers)
    seconds = time.perf_counter() - start
    images = sum(summary.images.values())
    size = sum(path.stat().st_size for path in target.rglob("*.bin")) / images
    return {
        "bytes_an_image": size,
        "gigabytes_of_imagenet": size * IMAGENET_IMAGES / 1e9,
        "prepared_images_per_second": images / seconds,
    }


def tolerance(
    originals: StreamedData, other: StreamedData, std: Sequence[float]
) -> dict[str, float]:
    """How far the pixels that the network sees are apart, in levels of 255."""
    scale = 255 * torch.tensor(std).view(1, 3, 1, 1)
    apart = []
    for (a, _), (b, _) in zip(originals.test_batches(), other.test_batches(), strict=True):
        apart.append(((a - b).abs() * scale).flatten())
    levels = torch.cat(apart).numpy()
    return {
        "mean_levels_apart": float(levels.mean()),
        "p99_levels_apart": float(np.percentile(levels, 99)),
    }


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(os.environ.get("MLBFGS_DATA", "data"))
    parser.add_argument("--data", type=user_path, default=default, help="folder of the data sets")
    parser.add_argument("--images", type=user_path, default=None, help="class folders of originals")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=None, help="default: torch's own choice")
    parser.add_argument("--out", type=user_path, default=Path("results/benchmarks"))
    return parser.parse_args(arguments)


@entry
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write data.json and data.md, print the page; returns the exit status."""
    chosen = read_arguments(arguments)
    logging.basicConfig(level=logging.WARNING)
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    sample = chosen.images or chosen.data / "imagenet-sample" / "val"
    folder = folder_for(chosen.out, "data")
    result = {
        "origin": describe_origin(CPU),
        "threads": torch.get_num_threads(),
        "rounds": chosen.rounds,
        "workers": chosen.workers,
        "imagenet": measure_imagenet(sample, chosen.rounds, chosen.workers),
        "cifar10": measure_cifar(chosen.data / "cifar10", chosen.rounds, chosen.workers),
    }
    write_measured(folder, "data", result, markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
