"""Batches of images that are read, decoded and augmented while the network trains.

A batch is described by a plan: which images, and which places they have in the epoch's order. A
plan is all that a worker needs, and its result depends on nothing else, so neither a resume nor
the number of workers changes a batch. The workers are processes of torch's DataLoader and live as
long as the data; they give uint8 pixels, which are normalised on the training device.

An image that cannot be read is named in a warning and counted. In training the next image of the
canonical order takes its place, with that image's label; in a test it is left out. More than
`dataset.max_unreadable` of them end the run, which can be resumed.

Shapes: b images of a batch, c the side of the crop; the workers' images are (b, c, c, 3).
"""

from __future__ import annotations

import atexit
import logging
import shutil
import signal
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from experiments.data.augment import Normalise
from experiments.data.batches import Batch, balanced, check_fit, check_limit, check_parts
from experiments.data.holdout import hold_out_places
from experiments.data.imagenet.crops import augment, centre, sample_stream
from experiments.data.imagenet.pixels import Pixels
from experiments.data.imagenet.settings import ImageNetSettings
from experiments.data.imagenet.source import Labels, Split, UnreadableError, canonical_order
from experiments.data.part import WHOLE, Part
from experiments.data.randomness import stream
from experiments.errors import UserError, one_line
from experiments.supervision import end_with_parent

logger = logging.getLogger(__name__)

CHANNELS = 3
PIXEL_MAX = 255
#: Where Linux keeps the memory that processes share.
_SHARED = Path("/dev/shm")
#: Batches that each worker prepares ahead.
PREFETCHED = 2


class Plan(NamedTuple):
    """What a worker must do for one batch.

    Attributes:
        split: `train` or `test`.
        members: (b,) int64, numbers of the images among the members of the split.
        first: place of the first of them in the epoch's order.
        seed: of the run.
        epoch: or the number of a draw, from 0.
        purpose: of the draw, for the augmentation's stream; None for the middle of each image.
    """

    split: str
    members: Labels
    first: int
    seed: int
    epoch: int
    purpose: str | None


class Loaded(NamedTuple):
    """What a worker made of a plan.

    Attributes:
        images: (b, c, c, 3) uint8.
        labels: (b,) int64.
        unreadable: name and reason of the images that could not be used.
        failure: why the worker cannot hand the batch over; empty where it can.
    """

    images: Tensor
    labels: Tensor
    unreadable: list[tuple[str, str]]
    failure: str = ""


@dataclass(frozen=True)
class Members:
    """The images of a split that a run uses, in canonical order.

    Attributes:
        split: where they are read from.
        numbers: (n,) int64, their numbers in the split.
        labels: (n,) int64.
    """

    split: Split
    numbers: Labels
    labels: Labels = field(init=False)

    def __post_init__(self) -> None:
        """Look the labels up."""
        object.__setattr__(self, "labels", self.split.labels[self.numbers])

    def __len__(self) -> int:
        return len(self.numbers)

    def pixels(self, member: int) -> Pixels:
        """The resized image of a member; see `Split.pixels`."""
        return self.split.pixels(int(self.numbers[member]))


def choose_members(splits: dict[str, Split], settings: ImageNetSettings) -> dict[str, Members]:
    """The images that a run trains and tests on, in canonical order: all, or as many as it wants.

    Raises:
        UserError: a limit, or the images to hold out, are more than there are.
    """
    train = canonical_order(splits["train"])
    if settings.holdout is None:
        test = Members(splits["test"], canonical_order(splits["test"]))
        test = _limited(test, settings.test_limit, "test")
    else:
        kept, held = hold_out_places(splits["train"].labels[train], settings.holdout)
        train, test = train[kept], Members(splits["train"], train[held])
    chosen = _limited(Members(splits["train"], train), settings.train_limit, "train")
    return {"train": chosen, "test": test}


def _limited(members: Members, limit: int | None, name: str) -> Members:
    """At most `limit` images, balanced over the classes."""
    if limit is None:
        return members
    check_limit(limit, len(members), name)
    return Members(members.split, members.numbers[balanced(members.labels, limit)])


class PlannedImages(Dataset[Loaded]):
    """What the workers have: both splits, and how to make a batch of a plan."""

    def __init__(self, members: dict[str, Members], settings: ImageNetSettings) -> None:
        """Keep what the workers need.

        Args:
            members: of `train` and `test`.
            settings: size of the crop, augmentation, how many images may be unreadable.
        """
        self._members = members
        self._settings = settings

    def __getitem__(self, plan: Plan) -> Loaded:
        """Read, augment and stack the images of a plan; an unreadable one is told, not raised."""
        size = self._settings.crop
        images = np.empty((len(plan.members), size, size, CHANNELS), dtype=np.uint8)
        labels: list[int] = []
        unreadable: list[tuple[str, str]] = []
        for offset, member in enumerate(plan.members):
            out = images[len(labels)]
            used = self._readable(plan, int(member), unreadable)
            if used is None:
                continue
            pixels, label = used
            if plan.purpose is None:
                centre(pixels, out)
            else:
                place = plan.first + offset
                random = sample_stream(plan.seed, plan.epoch, place, plan.purpose)
                augment(pixels, self._settings.augmentation, random, out)
            labels.append(label)
        kept = torch.from_numpy(images[: len(labels)])
        loaded = Loaded(kept, torch.tensor(labels, dtype=torch.int64), unreadable)
        return loaded if get_worker_info() is None else _shared(loaded)

    def _readable(
        self, plan: Plan, member: int, unreadable: list[tuple[str, str]]
    ) -> tuple[Pixels, int] | None:
        """An image and its label; in training, of the next one that can be read."""
        members = self._members[plan.split]
        attempts = 1 if plan.purpose is None else len(members)
        for step in range(attempts):
            if len(unreadable) > self._settings.max_unreadable:
                return None  # the run is about to end
            candidate = (member + step) % len(members)
            try:
                return members.pixels(candidate), int(members.labels[candidate])
            except UnreadableError as error:
                unreadable.append((error.name, error.reason))
        return None


class _Workers(Sampler[Plan]):
    """One set of worker processes, which makes the batches of one list of plans at a time."""

    def __init__(self, images: PlannedImages, count: int, *, pin_memory: bool) -> None:
        self._plans: list[Plan] = []
        self._loader = DataLoader(
            images,
            batch_size=None,
            sampler=self,
            num_workers=count,
            collate_fn=_unchanged,
            worker_init_fn=_leave_signals_to_the_training,
            pin_memory=pin_memory,
            persistent_workers=count > 0,
            prefetch_factor=PREFETCHED if count > 0 else None,
            # of its own, because the loader draws a number from it whenever it starts
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[Plan]:
        return iter(self._plans)

    def __len__(self) -> int:
        return len(self._plans)

    def load(self, plans: list[Plan]) -> Iterator[Loaded]:
        self._plans = plans
        try:
            iterator = iter(self._loader)
        except OSError as error:
            raise UserError(
                f"processes that load images cannot be started ({error.strerror}{_size()}): use "
                "fewer dataset.workers; 0 needs none"
            ) from error
        # Again and again, so that it comes before torch's own: at Python's end that waits five
        # seconds for each worker and sends it SIGTERM, which it ignores.
        atexit.unregister(self.close)
        atexit.register(self.close)
        return iterator

    def close(self) -> None:
        """End the processes, as torch does when it forgets a loader, but now."""
        atexit.unregister(self.close)
        iterator = self._loader._iterator
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            iterator._shutdown_workers()


def _close_all(sets: list[_Workers]) -> None:
    for workers in sets:
        workers.close()


def _shared(loaded: Loaded) -> Loaded:
    """Put a batch where the training finds it.

    Left to the queue, it would be done by a thread that drops what does not fit, and the training
    would wait for ever.
    """
    try:
        for tensor in (loaded.images, loaded.labels):
            tensor.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        nothing = torch.empty(0, dtype=torch.int64)
        return Loaded(nothing, nothing, [], _no_room(loaded.images.nbytes, error))
    return loaded


def _no_room(nbytes: int, error: RuntimeError) -> str:
    reason = str(error).rsplit(": ", 1)[-1]
    return (
        f"no shared memory for a batch of {nbytes / 1e6:.1f} MB ({reason}{_size()}): give it more "
        "(docker run --shm-size=8g), or use fewer dataset.workers; 0 needs none"
    )


def _size() -> str:
    """How much memory processes can share here, for messages."""
    if not _SHARED.is_dir():
        return ""
    return f"; {_SHARED} has {shutil.disk_usage(_SHARED).total / 1e6:.2f} MB"


def _unchanged(loaded: Any) -> Any:
    return loaded


def _leave_signals_to_the_training(_: int) -> None:
    """Ctrl-C reaches all processes of a terminal; the training obeys it between two steps.

    The workers go on until they are told to end (`_Workers.close`), or have no parent any more.
    """
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class StreamedData:
    """`Data` over images that are read as they are needed.

    Attributes:
        unreadable: reason of each image that could not be used so far, by its name.
    """

    def __init__(
        self,
        splits: dict[str, Split],
        settings: ImageNetSettings,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        part: Part = WHOLE,
        workers: int,
    ) -> None:
        """Choose the images and check that the settings fit them; no image is read yet.

        Args:
            splits: `train` and `test`.
            settings: limits, normalisation, augmentation.
            batch_size: images of a training batch, over all ranks.
            seed: the run's seed; decides order and augmentation.
            device: where the batches shall be.
            part: what of every batch, and of the test images, is asked for.
            workers: processes that load; 0 to load in this one.

        Raises:
            UserError: a limit, the batch size or the normalisation does not fit the data.
        """
        members = choose_members(splits, settings)
        self.num_classes = settings.num_classes
        self.input_shape = (CHANNELS, settings.crop, settings.crop)
        self.train_size, self.test_size = len(members["train"]), len(members["test"])
        check_fit(settings, CHANNELS, batch_size, self.train_size)
        full, rest = divmod(self.train_size, batch_size)
        self.batches_per_epoch = full + (1 if rest and not settings.drop_last else 0)

        check_parts(part.count, self.train_size, self.batches_per_epoch, batch_size)

        self.unreadable: dict[str, str] = {}
        self._settings, self._seed, self._device = settings, seed, device
        self._batch_size, self._part = batch_size, part
        self._images = PlannedImages(members, settings)
        self._worker_count = workers
        # More than one set where a stream begins while another is still being read.
        self._sets: list[_Workers] = []
        self._idle: list[_Workers] = []
        # when the data are forgotten
        weakref.finalize(self, _close_all, self._sets)
        self._normalise = Normalise(settings.mean, settings.std, pixel_max=PIXEL_MAX, device=device)

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch; see `InMemoryData.train_batches`."""
        if epoch < 0 or not 0 <= start <= self.batches_per_epoch:
            raise ValueError(
                f"epoch = {epoch}, start = {start}: need epoch >= 0 and 0 <= start <= "
                f"{self.batches_per_epoch} batches"
            )
        order = self._order(epoch, "order")
        firsts = range(0, self.batches_per_epoch * self._batch_size, self._batch_size)[start:]
        return self._batches(self._train_plan(order, f, epoch, "augmentation") for f in firsts)

    def random_batches(self, number: int, count: int) -> Iterator[Batch]:
        """Training images drawn without replacement; see `InMemoryData.random_batches`."""
        if not 1 <= count <= self.train_size:
            raise ValueError(f"count = {count}: need 1 to {self.train_size} training images")
        chosen = self._order(number, "random batches")[:count]
        firsts = range(0, count, self._batch_size)
        plans = [self._train_plan(chosen, f, number, "random batches") for f in firsts]
        # of a few images some ranks have none
        return self._batches(plan for plan in plans if len(plan.members))

    def test_batches(self) -> Iterator[Batch]:
        """Every test image once, in order, its middle; the last batch may be smaller."""
        size = self._settings.test_batch_size
        mine = self._part.of(0, self.test_size)
        return self._batches(
            Plan("test", np.arange(first, min(first + size, mine.stop)), first, self._seed, 0, None)
            for first in range(mine.start, mine.stop, size)
        )

    def _order(self, number: int, purpose: str) -> Labels:
        generator = stream(self._seed, number, purpose)
        return torch.randperm(self.train_size, generator=generator).numpy()

    def _train_plan(self, order: Labels, first: int, epoch: int, purpose: str) -> Plan:
        places = self._part.of(first, min(first + self._batch_size, len(order)))
        return Plan("train", order[places], places.start, self._seed, epoch, purpose)

    def _batches(self, plans: Iterable[Plan]) -> Iterator[Batch]:
        workers = self._idle.pop() if self._idle else self._new_workers()
        try:
            for loaded in workers.load(list(plans)):
                if loaded.failure:
                    raise UserError(loaded.failure)
                self._count(loaded)
                yield self._on_device(loaded)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(
                f"a process that loads images has died ({' '.join(str(error).split())}): killed, "
                "or out of memory; use fewer dataset.workers, and the same command goes on"
            ) from error
        finally:
            self._idle.append(workers)

    def _new_workers(self) -> _Workers:
        pin_memory = self._device.type == "cuda"
        workers = _Workers(self._images, self._worker_count, pin_memory=pin_memory)
        self._sets.append(workers)
        return workers

    def _on_device(self, loaded: Loaded) -> Batch:
        images = loaded.images.to(self._device, non_blocking=True)
        labels = loaded.labels.to(self._device, non_blocking=True)
        return Batch(self._normalise.channels_last(images), labels)

    def _count(self, loaded: Loaded) -> None:
        """Name what is newly unreadable, and end the run where it is too much."""
        for name, reason in loaded.unreadable:
            if name not in self.unreadable:
                self.unreadable[name] = reason
                logger.warning(
                    "unreadable image %d of at most %d: %s: %s",
                    len(self.unreadable),
                    self._settings.max_unreadable,
                    one_line(name),
                    reason,
                )
        if len(self.unreadable) > self._settings.max_unreadable or not len(loaded.labels):
            name, reason = next(iter(self.unreadable.items()))
            raise UserError(
                f"{len(self.unreadable)} images cannot be read (dataset.max_unreadable = "
                f"{self._settings.max_unreadable}), {len(loaded.labels)} of the last batch could; "
                f"the first is {name}: {reason}; repair the copy or raise the limit, and start the "
                "run again: it resumes"
            )
