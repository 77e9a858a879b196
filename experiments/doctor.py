"""What this machine has, what a run needs, and what to do about the difference.

    python -m experiments.doctor [key=value ...]

The overrides are those of `experiments.train`; they say which run is meant. Nothing is kept but
what a run would keep too: decoded images, or generated ones. Exit status 1 where something must be
repaired before the run can go well; the line that says so begins with `!`.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch.nn.functional import cross_entropy

from experiments.composition import compose_config
from experiments.data import Data, build_data
from experiments.entry import entry
from experiments.errors import UserError
from experiments.models import build_model
from experiments.runs.provenance import describe_hardware, describe_versions
from experiments.runs.spec import RunSpec
from experiments.training.ranks import backends
from experiments.training.task import choose_device

DATASETS = ("digits", "cifar10", "cifar100", "imagenet")
TEST_FILE_BYTES = 128 << 20
#: Seconds of each measurement, about.
MEASURED_S = 3.0
#: The loader should be so much faster than the training, because both vary.
MARGIN = 1.2
#: Images of a training step that is timed on a CPU.
CPU_STEP_IMAGES = 8
SHARED_MEMORY = Path("/dev/shm")
#: Free space below which a run's results and checkpoints are at risk.
LOW_SPACE_BYTES = 5 << 30


@dataclass(frozen=True)
class Rates:
    """Images per second.

    Attributes:
        loader: of the loader alone, one worker.
        workers: how many there will be; 0 where the images are held in memory.
        training: that one device trains.
        devices: how many train.
        prepared: whether the images are in the prepared form; None where that has no meaning.
    """

    loader: float
    workers: int
    training: float
    devices: int
    prepared: bool | None

    @property
    def available(self) -> float:
        """What all workers give together."""
        return self.loader * max(1, self.workers)

    @property
    def needed(self) -> float:
        """What all devices take together."""
        return self.training * self.devices


def advise(rates: Rates) -> str:
    """What the rates mean, in words."""
    ratio = rates.available / rates.needed
    said = (
        f"the loader gives about {rates.available:,.0f} images/s"
        f"{f' with {rates.workers} workers' if rates.workers else ''}, the training takes about "
        f"{rates.needed:,.0f} on {rates.devices} device{'s' if rates.devices > 1 else ''}: "
    )
    if ratio >= MARGIN:
        return f"{said}enough, {ratio:.1f} times what is needed"
    if not rates.workers:
        return f"{said}the training would wait; the images are in memory, so use the GPU for both"
    workers = int(MARGIN * rates.needed / rates.loader) + 1
    advice = f"{said}the training would wait; it needs about {workers} workers, each a processor"
    if rates.prepared is False:
        return f"{advice}, or images that are prepared once: make prepare-imagenet SRC=... DST=..."
    return f"{advice}, or raw pixels: make prepare-imagenet SRC=... DST=... ARGS='--form raw'"


def describe_machine(device: torch.device) -> Iterator[str]:
    """Versions, processors, memory, GPUs and what ranks can talk through."""
    versions, hardware = describe_versions(), describe_hardware(device)
    yield f"Python {platform.python_version()}, torch {versions['torch']}, torchvision " + str(
        versions["torchvision"]
    )
    yield (
        f"{hardware['cpu']}, {hardware['cores']} processors for this process, "
        f"{hardware['memory_bytes'] / 2**30:.0f} GiB of memory"
    )
    if device.type == "cuda":
        yield (
            f"{torch.cuda.device_count()} x {hardware['gpu']}, "
            f"{hardware['gpu_memory_bytes'] / 2**30:.0f} GiB, CUDA {hardware['cuda']}"
        )
    else:
        yield "no GPU that torch sees: training on the CPU"
    found = backends()
    missing = [name for name, there in found.items() if not there]
    yield "ranks talk through " + " and ".join(name for name, there in found.items() if there)
    if missing and device.type == "cuda":
        yield f"! torch was built without {', '.join(missing)}: several GPUs need nccl"


def describe_disk(folder: Path) -> Iterator[str]:
    """Free space and speed of the disk that takes the results."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    try:
        write, read = disk_speed(existing, TEST_FILE_BYTES)
    except OSError as error:
        yield f"! {existing} cannot be written ({error}): set results_dir to another folder"
        return
    yield (
        f"results_dir {folder}: {free / 1e9:.0f} GB free, writes {write / 1e6:,.0f} MB/s, reads "
        f"{read / 1e6:,.0f} MB/s (just written, so perhaps from memory)"
    )
    if free < LOW_SPACE_BYTES:
        yield f"! only {free / 1e9:.1f} GB are free for results and checkpoints: make space"


def disk_speed(folder: Path, size: int) -> tuple[float, float]:
    """Bytes per second of writing (until they are on the disk) and of reading.

    Raises:
        OSError: the folder cannot be written.
    """
    content = os.urandom(1 << 20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="doctor-") as file:
        start = time.perf_counter()
        for _ in range(size >> 20):
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter()
        # so that the system reads it again, where it obeys
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        while file.read(1 << 20):
            pass
        return size / (written - start), size / (time.perf_counter() - written)


def describe_shared_memory(config: DictConfig, workers: int) -> Iterator[str]:
    """Whether the batches that wait in shared memory fit into it."""
    if not workers or not SHARED_MEMORY.is_dir():
        return
    from experiments.data.imagenet.loader import PREFETCHED

    batch = max(int(config.train.batch_size), int(config.dataset.test_batch_size))
    needed = workers * PREFETCHED * batch * 3 * int(config.dataset.crop) ** 2
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        yield (
            f"! {SHARED_MEMORY} has {free / 2**20:.0f} MiB free, the workers' batches take up to "
            f"{needed / 2**20:.0f}: enlarge it (docker run --shm-size), or lower dataset.workers"
        )


def describe_datasets(config: DictConfig) -> Iterator[str]:
    """Which data sets are there, and what is missing of the others."""
    meant = config.dataset
    for name in DATASETS:
        node, batch_size = compose_config([f"dataset={name}"]).dataset, 1
        if name == meant.name:
            node, batch_size = meant, config.train.batch_size
        try:
            data = build_data(node, batch_size=batch_size, seed=0, device="cpu")
        except UserError as error:
            yield f"{'!' if name == meant.name else '-'} {name}: {error}"
        else:
            yield f"{name}: {data.train_size} training and {data.test_size} test images"


def measure(spec: RunSpec, device: torch.device) -> Rates:
    """Time the loader alone and the training alone.

    Raises:
        UserError: the run could not start.
    """
    config = spec.config
    on_gpu = device.type == "cuda"
    batch_size = config.train.batch_size if on_gpu else CPU_STEP_IMAGES
    workers, prepared = loading(config)
    node = OmegaConf.to_container(config.dataset)
    assert isinstance(node, dict)
    if workers:
        node["workers"] = 0  # in this process, so that it is the rate of one worker
    data = build_data(OmegaConf.create(node), batch_size=batch_size, seed=0, device=device)
    return Rates(
        loader=loader_rate(data),
        workers=workers,
        training=training_rate(config, data, device),
        devices=torch.cuda.device_count() if on_gpu else 1,
        prepared=prepared,
    )


def loading(config: DictConfig) -> tuple[int, bool | None]:
    """Worker processes of the configured run, and whether its images are prepared.

    Returns:
        0 and None where the images are held in memory.
    """
    if config.dataset.name != "imagenet":
        return 0, None
    from experiments.data.imagenet import ImageNetSettings, find, prepared, worker_count
    from experiments.data.settings import read_dataset

    settings = read_dataset(ImageNetSettings, config.dataset)
    is_prepared = prepared.read_plan(find.root_folder(settings)) is not None
    return max(1, worker_count(settings, 1)), is_prepared


def loader_rate(data: Data) -> float:
    """Images per second of the training batches, without training."""
    images, epoch = 0, 0
    next(data.train_batches(0))  # what only the first batch costs
    start = time.perf_counter()
    while True:
        for batch in data.train_batches(epoch):
            images += len(batch.labels)
            elapsed = time.perf_counter() - start
            if elapsed > MEASURED_S:
                return images / elapsed
        epoch += 1


def training_rate(config: DictConfig, data: Data, device: torch.device) -> float:
    """Images per second of forward and backward passes over one batch."""
    model = build_model(config.model, num_classes=data.num_classes, input_shape=data.input_shape)
    model = model.to(device).to(memory_format=torch.channels_last)
    images, labels = next(data.train_batches(0))
    seen, start = 0, 0.0
    while True:
        model.zero_grad()
        loss = cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        loss.item()  # waits for the device
        now = time.perf_counter()
        if not start:  # the first step is slower
            start = now
            continue
        seen += len(labels)
        if now - start > MEASURED_S:
            return seen / (now - start)


def examine(overrides: Sequence[str]) -> Iterator[str]:
    """All findings, line by line; what must be repaired begins with `!`.

    Raises:
        UserError: the overrides describe no run.
    """
    spec = RunSpec.from_config(compose_config(overrides))
    device = choose_device(spec.config.train.device)
    yield from describe_machine(device)
    yield from describe_disk(Path(spec.config.results_dir))
    yield from describe_datasets(spec.config)
    try:
        workers, _ = loading(spec.config)
        yield from describe_shared_memory(spec.config, workers)
        rates = measure(spec, device)
    except UserError as error:
        yield f"! {spec.experiment} cannot start: {error}"
        return
    yield (
        f"{spec.experiment}: {rates.loader:,.0f} images/s "
        f"{'for each worker' if rates.workers else 'from memory'}; {rates.training:,.0f} images/s "
        "trained by one device (forward and backward alone)"
    )
    yield advise(rates)


@entry
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="as of experiments.train")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)
    trouble = False
    for line in examine(chosen.overrides):
        print(line, flush=True)
        trouble = trouble or line.startswith("!")
    return 1 if trouble else 0


if __name__ == "__main__":
    sys.exit(main())
