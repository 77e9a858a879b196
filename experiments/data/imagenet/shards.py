"""ImageNet as Hugging Face stores it: parquet shards with encoded images and labels.

    root/data/train-00000-of-00294.parquet, root/data/validation-00000-of-00014.parquet

A row can only be read together with its row group, usually 100 images, so that training directly
from shards in random order reads a hundred times as much as it uses. The preparation reads them in
their own order.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from experiments.data import parquet
from experiments.data.encoded import DecodeError
from experiments.data.imagenet.settings import ImageNetSettings
from experiments.data.imagenet.source import Keys, Labels, as_key
from experiments.errors import UserError, one_line

TEST_NAMES = ("validation", "val", "test")
LABEL_COLUMNS = ("label", "labels")
#: Row groups that a process keeps, decompressed: about 11 MB each.
GROUPS_KEPT = 4


class ParquetSplit:
    """Encoded images in the rows of parquet files.

    Attributes:
        labels: (n,) int64.
        keys: (n,) names without folder and ending; the row's number where a file gives no names.
    """

    def __init__(self, files: list[Path]) -> None:
        """Read labels and names, but no image.

        Raises:
            UserError: a file is incomplete or has not the columns it must have.
        """
        self._files = files
        self.labels: Labels = parquet.read_labels(files, LABEL_COLUMNS)
        self._columns: list[str] = []
        starts, group_files, group_numbers, names = [0], [], [], []
        for number, file in enumerate(files):
            opened = parquet.open_file(file)
            self._columns.append(parquet.image_column(opened, file))
            names.extend(parquet.image_names(opened, self._columns[-1], file))
            for group in range(opened.num_row_groups):
                starts.append(starts[-1] + opened.metadata.row_group(group).num_rows)
                group_files.append(number)
                group_numbers.append(group)
        if None in names:
            names = [f"{row:012d}" for row in range(len(names))]
        self.keys: Keys = np.array([as_key(str(name)) for name in names], dtype=np.bytes_)
        self._starts = np.array(starts)
        self._group_files = np.array(group_files)
        self._group_numbers = np.array(group_numbers)
        # Opened in the process that reads: a file's position is shared with forked processes.
        self._opened: dict[int, pq.ParquetFile] = {}
        self._groups: OrderedDict[int, pa.ChunkedArray] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": {}, "_groups": OrderedDict()}

    def name(self, index: int) -> str:
        """File and row of an image."""
        group = self._group_of(index)
        file = int(self._group_files[group])
        first = self._starts[np.flatnonzero(self._group_files == file)[0]]
        return f"row {index - int(first)} of {self._files[file]}"

    def read(self, index: int) -> bytes:
        """The encoded image of a row."""
        group = self._group_of(index)
        if group not in self._groups:
            self._groups[group] = self._read_group(group)
            while len(self._groups) > GROUPS_KEPT:
                self._groups.popitem(last=False)
        self._groups.move_to_end(group)
        content = self._groups[group][index - int(self._starts[group])].as_py()
        if content is None:
            raise DecodeError("the row has no image bytes")
        return bytes(content)

    def _group_of(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def _read_group(self, group: int) -> pa.ChunkedArray:
        number = int(self._group_files[group])
        file = self._files[number]
        try:
            if number not in self._opened:
                self._opened[number] = pq.ParquetFile(file)
            column = self._columns[number]
            table = self._opened[number].read_row_group(
                int(self._group_numbers[group]), columns=[column], use_threads=False
            )
        except Exception as error:  # pyarrow promises nothing about what it raises
            raise DecodeError(one_line(error) or type(error).__name__) from error
        values = parquet.encoded_images(table.column(0), file)
        if len(values) != self._starts[group + 1] - self._starts[group]:
            raise DecodeError(f"{len(values)} images in a row group of another length")
        return values


def find(settings: ImageNetSettings, root: Path) -> dict[str, ParquetSplit] | None:
    """Both splits, where the layout is one of parquet files.

    Returns:
        `train` and `test`, or None where there are no such files.

    Raises:
        UserError: one split is missing, or a file is incomplete.
    """
    files = parquet.find_splits(root, "imagenet", TEST_NAMES)
    if files is None:
        return None
    if settings.val_labels is not None:
        raise UserError(
            f"dataset.val_labels = {settings.val_labels!r} has no effect: the parquet files in "
            f"{str(root)!r} hold the labels; leave it null"
        )
    return {split: ParquetSplit(files[split]) for split in ("train", "test")}
