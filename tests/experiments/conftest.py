"""Fixtures of the experiments' tests."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets: MLBFGS_DATA, or `shared/data` beside the repository."""
    configured = os.environ.get("MLBFGS_DATA")
    folder = Path(configured) if configured else REPOSITORY.parent / "shared" / "data"
    if not (folder / "cifar10" / "train.parquet").is_file():
        pytest.skip(f"no real CIFAR-10 in {folder}/cifar10 (set MLBFGS_DATA to the folder)")
    return folder
