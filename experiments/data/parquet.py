"""Image data sets as Hugging Face stores them: parquet files with encoded images and labels.

The image column is `image` or `img`, a struct {bytes, path}; the label column is an integer. Rows
are counted from 0 in messages.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from experiments.data.encoded import DecodeError, opened
from experiments.errors import UserError, one_line
from experiments.given import visible

IMAGE_COLUMNS = ("image", "img")
IMAGE_SHAPE = (3, 32, 32)
SUBFOLDERS = ("", "data", "plain_text")
ROWS_PER_CHUNK = 512
_BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
SHARD = re.compile(r".*-(\d{5})-of-(\d{5})\.parquet")


def find_splits(
    root: Path, name: str, test_names: Sequence[str] = ("test",)
) -> dict[str, list[Path]] | None:
    """Find the files of both splits.

    Args:
        root: the data set's folder.
        name: the data set's name, which may be a subfolder's.
        test_names: what the test images may be called; the first present one counts.

    Returns:
        Files of `train` and `test` in the order of their names, or None where there are none.

    Raises:
        UserError: one split or one shard is absent.
    """
    for subfolder in (*SUBFOLDERS, name):
        folder = root / subfolder
        tests = (_split_files(folder, name) for name in test_names)
        found = {
            "train": _split_files(folder, "train"),
            "test": next((files for files in tests if files), []),
        }
        if not any(found.values()):
            continue
        for split, files in found.items():
            if not files:
                wanted = "train" if split == "train" else test_names[0]
                raise UserError(
                    f"{str(folder)!r} has no {wanted}.parquet (nor shards {wanted}-*.parquet), "
                    "only the other split: half a download? Fetch the missing files"
                )
            _check_shards(files)
        return found
    return None


def _split_files(folder: Path, split: str) -> list[Path]:
    """The files of a split in one folder, in the first of three ways of naming them."""
    for pattern in (f"{split}.parquet", f"{split}-*.parquet", f"{split}/*.parquet"):
        files = visible(folder, pattern)
        if files:
            return files
    return []


def _check_shards(files: Sequence[Path]) -> None:
    """Check that all shards that the names announce are there."""
    matches = [match for file in files if (match := SHARD.fullmatch(file.name))]
    if not matches:
        return
    total = int(matches[0][2])
    missing = sorted(set(range(total)) - {int(match[1]) for match in matches})
    if missing:
        raise UserError(
            f"{str(files[0].parent)!r} has {len(matches)} of {total} shards like "
            f"{files[0].name}; number {missing[0]:05d} is missing: half a download? Fetch the "
            "missing files"
        )


def read_labels(files: Sequence[Path], columns: Sequence[str]) -> npt.NDArray[np.int64]:
    """Read the labels of all rows.

    Args:
        files: the files of a split.
        columns: names of the label column; the first present one counts.

    Returns:
        (n,) int64.

    Raises:
        UserError: a file is incomplete, or a column absent or not of integers.
    """
    labels = []
    for file in files:
        parquet = open_file(file)
        column = _column(parquet, columns, file)
        values = _read(parquet, column, file)
        if not pa.types.is_integer(values.type):
            raise UserError(f"column {column!r} of {str(file)!r} holds {values.type}, not integers")
        if values.null_count:
            row = values.is_null().to_pylist().index(True)
            raise UserError(f"row {row} of {str(file)!r} has no label; fetch the file again")
        with _explained(f"the labels of {str(file)!r} are no labels"):
            labels.append(values.to_numpy().astype(np.int64))
    return np.concatenate(labels)


def read_images(files: Sequence[Path], count: int) -> npt.NDArray[np.uint8]:
    """Decode the images of all rows, on as many threads as there are processors.

    Args:
        files: the files of a split.
        count: rows of all files together.

    Returns:
        (count, 3, 32, 32) uint8.

    Raises:
        UserError: a file is incomplete, or a record is corrupt or of another size; it is named.
    """
    images = np.empty((count, *IMAGE_SHAPE), dtype=np.uint8)
    # Pillow releases the interpreter's lock while it decodes.
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        futures = []
        first = 0
        for file, row, records in _records(files):
            target = images[first : first + len(records)]
            futures.append(pool.submit(_decode_chunk, records, target, row, file))
            first += len(records)
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return images


def encoded_images(values: pa.ChunkedArray, file: Path) -> pa.ChunkedArray:
    """The image column as bytes, out of structs {bytes, path} where it holds these.

    Raises:
        UserError: the column holds neither.
    """
    if pa.types.is_struct(values.type):
        names = [field.name for field in values.type]
        if names.count("bytes") != 1:
            raise UserError(
                f"the image column of {str(file)!r} holds {values.type}, without 'bytes'"
            )
        values = pc.struct_field(values, names.index("bytes"))
    # pandas, polars and others each write bytes in their own one of three ways
    if not any(is_bytes(values.type) for is_bytes in _BYTES):
        raise UserError(
            f"the image column of {str(file)!r} holds {values.type}, not encoded images"
        )
    return values


def _records(files: Sequence[Path]) -> Iterator[tuple[Path, int, list[bytes | None]]]:
    """Chunks of encoded images, each with its file and the number of its first row."""
    for file in files:
        parquet = open_file(file)
        column = image_column(parquet, file)
        values = encoded_images(_read(parquet, column, file), file)
        if len(values) != parquet.metadata.num_rows:
            raise UserError(
                f"{str(file)!r} has {parquet.metadata.num_rows} rows and {len(values)} images; "
                "fetch the file again"
            )
        for row in range(0, len(values), ROWS_PER_CHUNK):
            yield file, row, values.slice(row, ROWS_PER_CHUNK).to_pylist()


def _decode_chunk(
    records: Sequence[bytes | None], target: npt.NDArray[np.uint8], row: int, file: Path
) -> None:
    """Decode images into `target` (b, 3, 32, 32); `row` is the first one's number in its file."""
    for index, record in enumerate(records):
        place = f"row {row + index} of {str(file)!r}"
        if record is None:
            raise UserError(f"{place} has no image bytes; fetch the file again")
        channels, height, width = IMAGE_SHAPE
        try:
            with opened(record) as image:
                found = (image.height, image.width, len(image.getbands()))
                if found != (height, width, channels):
                    raise UserError(
                        f"{place} is an image of shape {found}, expected {height}x{width} pixels "
                        "in colour; is this another data set?"
                    )
                pixels = np.asarray(image)
        except DecodeError as error:
            raise UserError(
                f"{place} is not an image that can be decoded ({error}); fetch the file again"
            ) from error
        target[index] = pixels.transpose(2, 0, 1)


def open_file(file: Path) -> pq.ParquetFile:
    """Open a file.

    Raises:
        UserError: it is incomplete.
    """
    with _explained(f"{str(file)!r} ({_size(file)}) is not a complete parquet file"):
        if not file.is_file():  # a pipe would be waited for
            raise OSError("no plain file")
        opened_file = pq.ParquetFile(file)
        rows = opened_file.metadata.num_rows
        if rows > file.stat().st_size:  # equal values are packed, but no two images are equal
            raise ValueError(f"claims {rows} rows")
        return opened_file


def image_column(parquet: pq.ParquetFile, file: Path) -> str:
    """The name of the column with the images.

    Raises:
        UserError: there is none.
    """
    return _column(parquet, IMAGE_COLUMNS, file)


def _column(parquet: pq.ParquetFile, wanted: Sequence[str], file: Path) -> str:
    """The first of the wanted columns that the file has."""
    names = parquet.schema_arrow.names
    for name in wanted:
        if name in names:
            return name
    raise UserError(
        f"{str(file)!r} has no column {' or '.join(map(repr, wanted))}; its columns: "
        f"{', '.join(names)}; is dataset.name right?"
    )


def _read(parquet: pq.ParquetFile, column: str, file: Path) -> pa.ChunkedArray:
    with _explained(f"column {column!r} of {str(file)!r} cannot be read"):
        return parquet.read(columns=[column]).column(0)


def image_names(parquet: pq.ParquetFile, column: str, file: Path) -> list[str | None]:
    """The names in the image column, None where there are none.

    Raises:
        UserError: they cannot be read.
    """
    kind = parquet.schema_arrow.field(column).type
    rows = parquet.metadata.num_rows
    if not pa.types.is_struct(kind) or "path" not in [field.name for field in kind]:
        return [None] * rows
    with _explained(f"the image names of {str(file)!r} cannot be read"):
        values = parquet.read(columns=[f"{column}.path"]).column(0)
        names: list[str | None] = pc.struct_field(values, "path").to_pylist()
    if len(names) != rows:
        raise UserError(f"{str(file)!r} has {rows} rows and {len(names)} names; fetch it again")
    return names


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Tell what a file did to its reader, which promises nothing about what it raises."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = one_line(error) or type(error).__name__
        raise UserError(f"{what} ({reason}); fetch the file again") from error


def _size(file: Path) -> str:
    try:
        return f"{file.stat().st_size} bytes"
    except OSError:
        return "gone by now"
