"""Fixtures of the experiments' tests."""

import os
from pathlib import Path

import pytest

from tests.experiments.data import image_trees

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets: MLBFGS_DATA, or `shared/data` beside the repository."""
    configured = os.environ.get("MLBFGS_DATA")
    folder = Path(configured) if configured else REPOSITORY.parent / "shared" / "data"
    if not (folder / "cifar10" / "train.parquet").is_file():
        pytest.skip(f"no real CIFAR-10 in {folder}/cifar10 (set MLBFGS_DATA to the folder)")
    return folder


@pytest.fixture(scope="session")
def real_images(real_data) -> Path:
    """A folder with original-size ImageNet images, one class folder each."""
    folder = real_data / "imagenet-sample" / "val"
    if not folder.is_dir():
        pytest.skip(f"no sample of ImageNet in {folder} (set MLBFGS_DATA to the folder)")
    return folder


@pytest.fixture(scope="session")
def image_tree(tmp_path_factory) -> Path:
    """A small generated ImageNet; not to be changed."""
    return image_trees.make_tree(tmp_path_factory.mktemp("images") / "tree")
