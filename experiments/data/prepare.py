"""Prepare ImageNet: decode, check and resize every image once; training then decodes small ones.

    python -m experiments.data.prepare SRC DST [--form jpeg|raw] [--workers N] [dataset.key=value]

SRC holds the originals in any layout of `imagenet/find.py`. DST becomes the prepared form
(`imagenet/prepared.py`), to be named by `dataset.root`. The work is divided into shards; a shard is
finished or not there, so that the command can be stopped at any time and typed again. An image that
cannot be read is listed in DST/unreadable.tsv and counted; it keeps its number, and training passes
over it.

Forms, measured by `python -m experiments.benchmarks.data`: `jpeg` (quality 95, chroma at half
resolution) takes about 40 GB for all of ImageNet at 256x256 and changes the pixels a little; `raw`
takes 262 GB and changes none.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import logging
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from experiments.composition import compose_config, override
from experiments.data.imagenet import ImageNetSettings, find, prepared
from experiments.data.imagenet.pixels import Pixels
from experiments.data.imagenet.prepared import SPLITS, Plan, Shard
from experiments.data.imagenet.source import EncodedSplit, ResizedSplit, UnreadableError
from experiments.data.settings import read_dataset
from experiments.entry import entry
from experiments.errors import UserError, one_line
from experiments.given import user_path
from experiments.runs.atomic import (
    NO_SPACE,
    UnwritableError,
    make_folder,
    open_own,
    remove_leftovers,
    write_atomically,
)
from experiments.runs.locks import HeldLock
from experiments.supervision import end_with_parent

logger = logging.getLogger(__name__)

JPEG_QUALITY = 95
SHARD_SIZE = 8192
#: Bytes of a pixel in the JPEG form, measured on originals of ImageNet and rounded up.
JPEG_BYTES_PER_PIXEL = 0.5
LOCK_FILE = "lock"
REPORT_EVERY_S = 30.0


@dataclass(frozen=True)
class Job:
    """One shard to be made.

    Attributes:
        split: `train` or `test`.
        number: of the shard.
        images: numbers of its images in the split.
    """

    split: str
    number: int
    images: range


@dataclass(frozen=True)
class Summary:
    """What a preparation did.

    Attributes:
        images: of each split, unreadable ones included.
        unreadable: in every split and shard: split and error.
        made: shards made by this call.
        found: shards that were there.
    """

    images: dict[str, int]
    unreadable: list[tuple[str, UnreadableError]]
    made: int
    found: int


def prepare(
    settings: ImageNetSettings,
    target: Path,
    *,
    form: prepared.Form = "jpeg",
    workers: int | None = None,
    shard_size: int = SHARD_SIZE,
    verify: bool = False,
) -> Summary:
    """Prepare a data set, or finish what an earlier call began.

    Args:
        settings: where the originals are, what must be there, how to resize.
        target: the folder of the prepared form.
        form: of the records.
        workers: processes; None for one for each processor.
        shard_size: images of a shard.
        verify: read the shards that are there and make damaged ones again.

    Raises:
        UserError: the originals are incomplete, the folder is in use, holds something else, is
            that of the originals or within it or around it, has no space, or too many images are
            unreadable.
    """
    refuse_nested(find.root_folder(settings), target)
    sources = find.find_encoded(settings)
    for name, source in sources.items():
        find.check(settings, name, source.labels, find.root_folder(settings))
    plan = Plan(
        resize=settings.resize,
        resized=settings.resized,
        form=form,
        quality=JPEG_QUALITY if form == "jpeg" else None,
        shard_size=shard_size,
        num_classes=settings.num_classes,
        images={split: len(sources[split].labels) for split in SPLITS},
        source=_digest(sources),
    )
    with locked(target):
        try:
            _freeze(plan, target)
            shards = _existing(plan, target, verify=verify)
            found = len(shards)
            _make_missing(shards, sources, plan, target, settings, workers)
            return _finish(plan, target, shards, found)
        except UnwritableError as error:
            raise UserError(f"{error}; {prepared.AGAIN}") from error
        except OSError as error:
            raise _cannot_write(error, target) from error


def refuse_nested(source: Path, target: Path) -> None:
    """Refuse to write where the originals are.

    Raises:
        UserError: one of the two folders is the other, or lies in it, under whatever name.
    """
    for inner, outer in ((target, source), (source, target)):
        for folder in (inner.resolve(), *inner.resolve().parents):
            if folder.exists() and outer.exists() and folder.samefile(outer):
                raise UserError(
                    f"the prepared form cannot go to {str(target)!r}: it and the originals in "
                    f"{str(source)!r} need folders of their own, neither within the other"
                )


def refuse_foreign(target: Path) -> None:
    """Refuse a folder that holds something, but no preparation.

    Raises:
        UserError: it does.
    """
    own = {LOCK_FILE, prepared.PLAN_FILE}
    try:
        found = {path.name for path in target.iterdir()} if target.exists() else set()
        for split in SPLITS:  # an empty one was left by a process that was killed early
            if (target / split).is_dir() and not any((target / split).iterdir()):
                own.add(split)
    except OSError as error:
        raise UserError(f"{str(target)!r} cannot be written ({error})") from error
    foreign = sorted(n for n in found - own if not n.startswith(f"{prepared.PLAN_FILE}."))
    if foreign and prepared.PLAN_FILE not in found:
        raise UserError(
            f"{str(target)!r} holds no preparation, but {foreign[0]!r}: name a folder that is "
            "empty or absent"
        )


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the folder for this process; the lock disappears with it however it ends.

    Raises:
        UserError: another preparation holds it, or the folder is somebody else's or cannot be
            written.
    """
    refuse_foreign(target)
    try:
        for split in SPLITS:
            make_folder(target / split, below=target)
        lock = HeldLock(open_own(target / LOCK_FILE, os.O_RDWR | os.O_CREAT))
    except (OSError, UnwritableError) as error:
        raise UserError(f"{str(target)!r} cannot be written ({error})") from error
    try:
        fcntl.flock(lock.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UserError(
            f"another preparation is writing {str(target)!r}: wait for it, or name another folder"
        ) from error
    finally:
        lock.release()


def _digest(sources: dict[str, EncodedSplit]) -> str:
    """What decides which images are prepared and how they are numbered."""
    digest = hashlib.sha256()
    for split in SPLITS:
        digest.update(sources[split].labels.tobytes())
        digest.update(b"\n".join(sources[split].keys.tolist()))
    return digest.hexdigest()


def _freeze(plan: Plan, target: Path) -> None:
    """Write the plan, or check that the one that is there is the same."""
    old = prepared.read_plan(target)
    if old is None:
        write_atomically(target / prepared.PLAN_FILE, prepared.plan_text(plan))
        return
    differing = [key for key in vars(plan) if getattr(plan, key) != getattr(old, key)]
    if differing:
        key = differing[0]
        raise UserError(
            f"{str(target)!r} holds a preparation with {key} = {getattr(old, key)}, this one has "
            f"{getattr(plan, key)}: name another folder, or delete that one"
        )


def _existing(plan: Plan, target: Path, *, verify: bool) -> dict[tuple[str, int], Shard]:
    """The finished shards; what a killed process left half done is deleted."""
    shards = {}
    for split in SPLITS:
        remove_leftovers(target / split, prepared.SHARD_NAMES)
        for number, images in enumerate(plan.shards(split)):
            shard = prepared.read_shard(target, split, number)
            if shard is None or len(shard.labels) != len(images):
                continue
            if verify and not prepared.intact(target, split, number, shard):
                logger.warning("shard %s/%05d is damaged, making it again", split, number)
                continue
            shards[split, number] = shard
    return shards


def _make_missing(
    shards: dict[tuple[str, int], Shard],
    sources: dict[str, EncodedSplit],
    plan: Plan,
    target: Path,
    settings: ImageNetSettings,
    workers: int | None,
) -> None:
    """Make the shards that are not there and add them to `shards`."""
    jobs = [
        Job(split, number, images)
        for split in SPLITS
        for number, images in enumerate(plan.shards(split))
        if (split, number) not in shards
    ]
    _check_space(plan, jobs, target)
    count = len(os.sched_getaffinity(0)) if workers is None else workers
    for job, shard in _run(jobs, sources, plan, target, settings, count):
        shards[job.split, job.number] = shard


def _check_space(plan: Plan, jobs: Sequence[Job], target: Path) -> None:
    """Refuse to begin what cannot end."""
    pixels = sum(len(job.images) for job in jobs) * plan.resized**2
    if plan.resize == "shorter":
        pixels = pixels * 4 // 3  # the usual aspect
    needed = int(pixels * (3 if plan.form == "raw" else JPEG_BYTES_PER_PIXEL))
    free = shutil.disk_usage(target).free
    if needed > free:
        raise UserError(
            f"{str(target)!r} has {free / 1e9:.1f} GB of free space, form {plan.form} needs about "
            f"{needed / 1e9:.1f} GB more: make space, name another folder"
            + (", or use --form jpeg, which takes a sixth" if plan.form == "raw" else "")
        )


def _run(
    jobs: Sequence[Job],
    sources: dict[str, EncodedSplit],
    plan: Plan,
    target: Path,
    settings: ImageNetSettings,
    workers: int,
) -> Iterator[tuple[Job, Shard]]:
    """Make shards in several processes, in any order.

    Raises:
        OSError: no space; finished shards stay.
        UserError: too many images are unreadable, or a process was killed; finished shards stay.
    """
    total = sum(len(job.images) for job in jobs)
    begin = reported = time.monotonic()
    done = unreadable = 0
    with ProcessPoolExecutor(
        max(1, min(workers, len(jobs))),
        mp_context=multiprocessing.get_context("fork"),
        initializer=_begin_worker,
        initargs=(sources, plan, target),
    ) as pool:
        futures: dict[Future[Shard], Job] = {pool.submit(_make_shard, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                job, shard = futures[future], future.result()
                done += len(job.images)
                unreadable += len(shard.unreadable)
                for error in shard.unreadable:
                    logger.warning("unreadable: %s", one_line(error))
                yield job, shard
                if unreadable > settings.max_unreadable:
                    last = one_line(shard.unreadable[-1])
                    raise UserError(
                        f"{unreadable} images cannot be read, more than dataset.max_unreadable = "
                        f"{settings.max_unreadable}; the last is {last}; repair the copy, or raise "
                        "the limit"
                    )
                now = time.monotonic()
                if now - reported >= REPORT_EVERY_S or done == total:
                    reported = now
                    rate = done / (now - begin)
                    logger.info(
                        "%d of %d images, %.0f images/s, %.0f minutes left",
                        done, total, rate, (total - done) / rate / 60,
                    )  # fmt: skip
        except BrokenProcessPool as error:
            raise UserError(
                "a process of the preparation was killed, perhaps for want of memory: use fewer "
                f"--workers (now {workers}); {prepared.AGAIN}"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _cannot_write(error: OSError, target: Path) -> UserError:
    if error.errno in NO_SPACE:
        return UserError(
            f"no space for {error.filename or str(target)!r} ({error.strerror}): make space and "
            f"{prepared.AGAIN}"
        )
    return UserError(f"{str(target)!r} cannot be written ({error}); {prepared.AGAIN}")


#: What a worker makes shards of; set once in each worker process.
_worker: tuple[dict[str, ResizedSplit], Plan, Path] | None = None


def _begin_worker(sources: dict[str, EncodedSplit], plan: Plan, target: Path) -> None:
    global _worker
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent obeys it and cancels what is left
    torch.set_num_threads(1)
    splits = {
        name: ResizedSplit(encoded, plan.resize, plan.resized) for name, encoded in sources.items()
    }
    _worker = splits, plan, target


def _make_shard(job: Job) -> Shard:
    assert _worker is not None
    splits, plan, target = _worker
    split = splits[job.split]
    labels, keys = split.labels[job.images], split.keys[job.images]
    images = (_image(split, index) for index in job.images)
    return prepared.write_shard(
        target, job.split, job.number, plan, images, labels=labels, keys=keys
    )


def _image(split: ResizedSplit, index: int) -> Pixels | UnreadableError:
    try:
        return split.pixels(index)
    except UnreadableError as error:
        return error


def _finish(plan: Plan, target: Path, shards: dict[tuple[str, int], Shard], found: int) -> Summary:
    unreadable = [
        (split, error) for (split, _), shard in sorted(shards.items()) for error in shard.unreadable
    ]
    # a tab or line end in a name would be taken for one of the table's
    lines = [
        f"{split}\t{one_line(error.name)}\t{one_line(error.reason)}\n"
        for split, error in unreadable
    ]
    write_atomically(target / prepared.UNREADABLE_FILE, "".join(lines))
    summary = Summary(plan.images, unreadable, made=len(shards) - found, found=found)
    write_atomically(target / prepared.COMPLETE_FILE, prepared.counts_text(plan, len(unreadable)))
    return summary


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=user_path, help="the folder with the originals")
    parser.add_argument("target", type=user_path, help="the folder for the prepared form")
    parser.add_argument(
        "overrides", nargs="*", help="config keys, for example dataset.resize=shorter"
    )
    parser.add_argument("--form", choices=["jpeg", "raw"], default="jpeg")
    parser.add_argument("--workers", type=int, default=None, help="default: one for each processor")
    parser.add_argument("--shard-size", type=int, default=SHARD_SIZE, help="images of a shard")
    parser.add_argument(
        "--verify", action="store_true", help="read finished shards, make damaged ones again"
    )
    return parser.parse_intermixed_args(arguments)


@entry
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    chosen = read_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        for name, value in (("workers", chosen.workers), ("shard-size", chosen.shard_size)):
            if value is not None and value < 1:
                raise UserError(f"--{name} = {value} must be 1 or more")
        config = compose_config(["dataset=imagenet", *chosen.overrides]).dataset
        settings = read_dataset(ImageNetSettings, config)
        summary = prepare(
            replace(settings, root=str(chosen.source)),
            chosen.target,
            form=chosen.form,
            workers=chosen.workers,
            shard_size=chosen.shard_size,
            verify=chosen.verify,
        )
    except KeyboardInterrupt:
        print(f"stopped; {prepared.AGAIN}", file=sys.stderr)
        return 130
    print(
        f"{chosen.target}: {summary.images['train']} training and {summary.images['test']} test "
        f"images, {len(summary.unreadable)} unreadable "
        f"({chosen.target / prepared.UNREADABLE_FILE}); {summary.made} shards made, "
        f"{summary.found} were there; use it with "
        + shlex.quote(override("dataset.root", str(chosen.target)))
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
