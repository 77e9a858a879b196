"""Small generated ImageNets for tests: a tree of JPEGs, and the config that describes it."""

import shutil
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from experiments.data import imagenet, synthetic
from experiments.data.batches import Batch
from experiments.data.part import WHOLE, Part
from experiments.data.settings import read_dataset

CLASSES = 4
IMAGES = {"train": 32, "val": 13}
CONFIG = Path(__file__).resolve().parents[3] / "configs" / "dataset" / "imagenet.yaml"
VALUES = {
    "num_classes": CLASSES,
    "train_images": IMAGES["train"],
    "test_images": IMAGES["val"],
    "resized": 40,
    "crop": 32,
    "test_batch_size": 5,
    "workers": 0,
}


def make_tree(root: Path) -> Path:
    """32 + 13 JPEGs of 4 classes."""
    synthetic.make(root, CLASSES, IMAGES)
    return root


def copy_tree(tree: Path, root: Path) -> Path:
    """The same with files of its own, to be damaged."""
    shutil.copytree(tree, root)
    return root


def config(root: Path, **keys) -> DictConfig:
    """The node `dataset` for such a tree."""
    node = OmegaConf.load(CONFIG)
    assert isinstance(node, DictConfig)
    node.merge_with({**VALUES, "root": str(root), **keys})
    return node


def settings(root: Path, **keys) -> imagenet.ImageNetSettings:
    return read_dataset(imagenet.ImageNetSettings, config(root, **keys))


def build(
    root: Path, *, batch_size: int = 8, seed: int = 0, part: Part = WHOLE, **keys
) -> imagenet.StreamedData:
    cpu = torch.device("cpu")
    chosen = settings(root, **keys)
    return imagenet.build(chosen, batch_size=batch_size, seed=seed, device=cpu, part=part)


def raw(root: Path, **keys) -> imagenet.StreamedData:
    """Data whose batches are the pixels from 0 to 1 themselves."""
    return build(root, mean=[0.0] * 3, std=[1.0] * 3, **keys)


def all_batches(data: imagenet.StreamedData) -> list[Batch]:
    return [*data.train_batches(0), *data.train_batches(1), *data.test_batches()]


def equal(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.images, y.images) and torch.equal(x.labels, y.labels)
        for x, y in zip(a, b, strict=True)
    )
