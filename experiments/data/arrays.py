"""Files of arrays (.npz) that are looked at before they are read."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

# Each entry has a header of its own.
_HEADERS_BYTES = 1 << 20


def read_arrays(path: Path) -> dict[str, Any]:
    """Read all arrays of a file that `np.savez` wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no such file, is damaged, or would unpack to more than it is.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise ValueError("no plain file")
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > size + _HEADERS_BYTES:
            raise ValueError(f"{size} bytes that unpack to {unpacked}")
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except FileNotFoundError:
        raise
    except Exception as error:  # of zip, of its entries, of numpy's headers in them
        raise ValueError(str(error) or type(error).__name__) from error
