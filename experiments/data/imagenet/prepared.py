"""The prepared form: every image decoded, checked and resized once.

    folder/plan.json          what is prepared, from what, how; written first
    folder/train/00000.bin    records one after the other: small JPEGs, or raw pixels
    folder/train/00000.npz    their places, shapes, labels and names; written when the .bin is
                              complete, so that its presence means a finished shard
    folder/unreadable.tsv     the images that cannot be used: split, name, reason
    folder/complete.json      the counts; written last

An unreadable image keeps its place as an empty record with its reason, so that all forms of a data
set number their images alike.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from experiments.data.arrays import read_arrays
from experiments.data.encoded import DecodeError
from experiments.data.imagenet.pixels import Pixels, decode_jpeg, encode_jpeg
from experiments.data.imagenet.settings import ImageNetSettings, Resize
from experiments.data.imagenet.source import Keys, Labels, UnreadableError
from experiments.errors import UserError, one_line
from experiments.given import MALFORMED, parse_json, read_text
from experiments.runs.atomic import replace_file

Form = Literal["jpeg", "raw"]

#: Raised when the files change their meaning.
FORMAT = 1
SHARD_NAMES = r"\d{5,}\.(bin|npz)"
PLAN_FILE, COMPLETE_FILE, UNREADABLE_FILE = "plan.json", "complete.json", "unreadable.tsv"
SPLITS = ("train", "test")
MOST_SHARDS = 1_000_000
AGAIN = "run make prepare-imagenet again, it goes on where it stopped"


@dataclass(frozen=True)
class Plan:
    """What decides the content of the prepared form.

    Attributes:
        resize: see `pixels.resized_shape`.
        resized: pixels of the side.
        form: `jpeg`, or `raw` (h, w, 3) uint8.
        quality: of the JPEGs, 1 to 100; None for raw pixels.
        shard_size: images of a shard.
        num_classes: classes.
        images: images of each split, unreadable ones included.
        source: digest of the names and labels of all images.
        format: of the files.
    """

    resize: Resize
    resized: int
    form: Form
    quality: int | None
    shard_size: int
    num_classes: int
    images: dict[str, int]
    source: str
    format: int = FORMAT

    def shards(self, split: str) -> list[range]:
        """The images of each shard of a split."""
        count, size = self.images[split], self.shard_size
        return [range(first, min(first + size, count)) for first in range(0, count, size)]


@dataclass(frozen=True)
class Shard:
    """What the .npz of a shard holds, for b records.

    Attributes:
        starts: (b + 1,) int64, where the records begin and the last one ends, in bytes.
        shapes: (b, 2) int32, height and width; 0 for an unreadable image.
        labels: (b,) int64.
        keys: (b,) names without folder and ending.
        names: (b,) str, files (and rows) of the unreadable images, empty for the others.
        reasons: (b,) str, why they are unreadable.
        checksum: CRC-32 of the .bin.
    """

    starts: Labels
    shapes: Any
    labels: Labels
    keys: Keys
    names: Any
    reasons: Any
    checksum: int

    @property
    def unreadable(self) -> list[UnreadableError]:
        """The images that cannot be used."""
        places = np.flatnonzero(self.shapes[:, 0] == 0)
        return [UnreadableError(str(self.names[i]), str(self.reasons[i])) for i in places]


def shard_path(folder: Path, split: str, number: int, ending: str) -> Path:
    """The file of a shard: ending `bin` or `npz`."""
    return folder / split / f"{number:05d}.{ending}"


def write_shard(
    folder: Path,
    split: str,
    number: int,
    plan: Plan,
    images: Iterable[Pixels | UnreadableError],
    *,
    labels: Labels,
    keys: Keys,
) -> Shard:
    """Write a shard, its records first and its index once they are on the disk.

    Args:
        folder: of the prepared form; the split's folder in it exists.
        split: `train` or `test`.
        number: of the shard.
        plan: how the records are encoded.
        images: the resized images, or why there is none.
        labels: (b,) of these images.
        keys: (b,) of these images.

    Raises:
        OSError: no space, or no right to write; no file with a final name is left behind.
    """
    starts, shapes, names, reasons = [0], [], [], []
    checksum = 0

    def write(file: Any) -> None:
        nonlocal checksum
        for image in images:
            if isinstance(image, UnreadableError):
                record, shape, name, reason = b"", [0, 0], image.name, image.reason
            else:
                record, shape, name, reason = _encode(image, plan), [*image.shape[:2]], "", ""
            file.write(record)
            checksum = zlib.crc32(record, checksum)
            starts.append(starts[-1] + len(record))
            shapes.append(shape)
            names.append(name)
            reasons.append(reason)

    replace_file(shard_path(folder, split, number, "bin"), write)
    shard = Shard(
        np.array(starts, dtype=np.int64),
        np.array(shapes, dtype=np.int32).reshape(-1, 2),
        labels,
        keys,
        np.array(names, dtype=np.str_),
        np.array(reasons, dtype=np.str_),
        checksum,
    )
    index = shard_path(folder, split, number, "npz")
    replace_file(index, lambda file: np.savez(file, **vars(shard)))
    return shard


def _encode(image: Pixels, plan: Plan) -> bytes:
    if plan.form == "raw":
        return image.tobytes()
    assert plan.quality is not None
    return encode_jpeg(image, plan.quality)


def read_shard(folder: Path, split: str, number: int) -> Shard | None:
    """The index of a finished shard; None where it is absent, incomplete or damaged."""
    try:
        values = read_arrays(shard_path(folder, split, number, "npz"))
        shard = Shard(**{**values, "checksum": int(values["checksum"])})
        size = shard_path(folder, split, number, "bin").stat().st_size
        return shard if _fits(shard, size) else None
    except (OSError, *MALFORMED):
        return None


def _fits(shard: Shard, size: int) -> bool:
    """Whether the index describes a .bin of so many bytes."""
    count = len(shard.labels)
    kinds = [(shard.starts, "i", (count + 1,)), (shard.shapes, "i", (count, 2))]
    kinds += [(shard.labels, "i", (count,)), (shard.keys, "S", (count,))]
    kinds += [(texts, "U", (count,)) for texts in (shard.names, shard.reasons)]
    if any(array.dtype.kind != kind or array.shape != shape for array, kind, shape in kinds):
        return False
    ends = shard.starts[0] == 0 and shard.starts[-1] == size
    return bool(ends and (np.diff(shard.starts) >= 0).all() and (shard.shapes >= 0).all())


def intact(folder: Path, split: str, number: int, shard: Shard) -> bool:
    """Whether the bytes of a shard are those that were written."""
    return zlib.crc32(shard_path(folder, split, number, "bin").read_bytes()) == shard.checksum


def read_plan(folder: Path) -> Plan | None:
    """The plan of a prepared form, finished or not; None where the folder holds none.

    Raises:
        UserError: the file cannot be read, or belongs to another version of this project.
    """
    path = folder / PLAN_FILE
    try:
        values = parse_json(read_text(path))
        if values["format"] != FORMAT:
            raise UserError(
                f"{str(path)!r} has format {values['format']}, this version reads {FORMAT}: "
                "prepare the data set again, into another folder"
            )
        plan = Plan(**values)
        _check_plan(plan)
        return plan
    except FileNotFoundError:
        return None
    except MALFORMED as error:
        raise UserError(
            f"{str(path)!r} cannot be read ({one_line(error)}): delete the folder and prepare again"
        ) from error


def _check_plan(plan: Plan) -> None:
    """Refuse values that no preparation wrote.

    Raises:
        ValueError: there is one.
    """
    if plan.resize not in get_args(Resize) or plan.form not in get_args(Form):
        raise ValueError(f"resize {plan.resize!r}, form {plan.form!r}")
    if sorted(plan.images) != sorted(SPLITS):
        raise ValueError(f"images of {sorted(plan.images)}")
    counts = {
        "resized": plan.resized,
        "shard_size": plan.shard_size,
        "num_classes": plan.num_classes,
        **plan.images,
    }
    for name, count in counts.items():
        if not isinstance(count, int) or not 1 <= count < 2**31:
            raise ValueError(f"{name} = {count!r}")
    if sum(plan.images.values()) > MOST_SHARDS * plan.shard_size:
        raise ValueError(f"more than {MOST_SHARDS} shards")


def plan_text(plan: Plan) -> str:
    """The content of plan.json."""
    return json.dumps(asdict(plan), indent=2) + "\n"


def counts_text(plan: Plan, unreadable: int) -> str:
    """The content of complete.json."""
    return json.dumps({"images": plan.images, "unreadable": unreadable}, indent=2) + "\n"


class PreparedSplit:
    """`Split` over the shards of a prepared form.

    Attributes:
        labels: (n,) int64.
        keys: (n,) names without folder and ending.
        unreadable: the images that cannot be used.
    """

    def __init__(self, folder: Path, split: str, plan: Plan) -> None:
        """Read the indices of all shards.

        Raises:
            UserError: a shard is missing or damaged.
        """
        self._form = plan.form
        self._shard_size = plan.shard_size
        self._paths: list[Path] = []
        shards: list[Shard] = []
        for number, images in enumerate(plan.shards(split)):
            shard = read_shard(folder, split, number)
            path = shard_path(folder, split, number, "bin")
            if shard is None or len(shard.labels) != len(images):
                raise UserError(f"{str(path)!r} or its index is missing or incomplete: {AGAIN}")
            shards.append(shard)
            self._paths.append(path)
        self.labels: Labels = np.concatenate([shard.labels for shard in shards])
        self.keys: Keys = np.concatenate([shard.keys for shard in shards])
        self._begins = np.concatenate([shard.starts[:-1] for shard in shards])
        self._ends = np.concatenate([shard.starts[1:] for shard in shards])
        self._shapes = np.concatenate([shard.shapes for shard in shards])
        self.unreadable = [lost for shard in shards for lost in shard.unreadable]
        self._lost = dict(
            zip(np.flatnonzero(self._shapes[:, 0] == 0), self.unreadable, strict=True)
        )
        # File descriptors by shard. Reads name their position, so forked processes may share them.
        self._opened: dict[int, int] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": {}}

    def pixels(self, index: int) -> Pixels:
        """See `Split.pixels`."""
        if index in self._lost:
            lost = self._lost[index]
            raise UnreadableError(lost.name, lost.reason)
        number = index // self._shard_size
        place = f"record {index % self._shard_size} of {self._paths[number]}"
        begin, end = int(self._begins[index]), int(self._ends[index])
        record = np.empty(end - begin, dtype=np.uint8)
        height, width = (int(side) for side in self._shapes[index])
        try:
            # not a memory map, which would answer a read error with the end of the process
            count = os.preadv(self._file(number), [record.data], begin)
            if count != end - begin:
                raise UnreadableError(
                    place, f"{count} of {end - begin} bytes: the file was cut off"
                )
            if self._form == "raw":
                return record.reshape(height, width, 3)
            pixels = decode_jpeg(record.tobytes())
            if pixels.shape != (height, width, 3):
                raise ValueError(f"{pixels.shape[:2]} pixels, the index says {(height, width)}")
            return pixels
        except (OSError, ValueError, DecodeError) as error:
            raise UnreadableError(place, " ".join(str(error).split())) from error

    def _file(self, number: int) -> int:
        if number not in self._opened:
            self._opened[number] = os.open(self._paths[number], os.O_RDONLY)
        return self._opened[number]


def find(settings: ImageNetSettings, root: Path) -> dict[str, PreparedSplit] | None:
    """Both splits, where the folder holds a prepared form.

    Returns:
        `train` and `test`, or None where there is no prepared form.

    Raises:
        UserError: it is unfinished, damaged, or was prepared otherwise than the settings ask for.
    """
    plan = read_plan(root)
    if plan is None:
        return None
    if not (root / COMPLETE_FILE).is_file():
        shards: Sequence[tuple[str, int]] = [
            (split, number) for split in SPLITS for number in range(len(plan.shards(split)))
        ]
        done = sum(shard_path(root, *shard, "npz").is_file() for shard in shards)
        raise UserError(
            f"the preparation in {str(root)!r} is unfinished, {done} of {len(shards)} shards: "
            f"{AGAIN}"
        )
    for key in ("resize", "resized", "num_classes"):
        wanted, found = getattr(settings, key), getattr(plan, key)
        if wanted != found:
            raise UserError(
                f"{str(root)!r} was prepared with {key} = {found}, dataset.{key} = {wanted}: set "
                "it to that, or prepare the data set again into another folder"
            )
    if settings.val_labels is not None:
        raise UserError(
            f"dataset.val_labels = {settings.val_labels!r} has no effect: the prepared form in "
            f"{str(root)!r} holds the labels; leave it null"
        )
    splits = {split: PreparedSplit(root, split, plan) for split in SPLITS}
    count = sum(len(split.unreadable) for split in splits.values())
    if count > settings.max_unreadable:
        raise UserError(
            f"{count} images cannot be read, more than dataset.max_unreadable = "
            f"{settings.max_unreadable}; {str(root / UNREADABLE_FILE)!r} names them; raise the "
            "limit, or repair the originals and prepare them into another folder"
        )
    return splits
