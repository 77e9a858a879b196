"""Whether a data set is there, asked before anything is trained on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from experiments.data import cifar
from experiments.data.settings import CifarSettings, read_dataset
from experiments.errors import UserError
from experiments.settings import Node, node_name


def missing_data(cfg: Node) -> UserError | None:
    """Look for the data set that a config node names, without reading its images.

    Args:
        cfg: the node `dataset`.

    Returns:
        What is missing and where it would be looked for; None where the data set is there, comes
        with the project or is generated.

    Raises:
        UserError: a setting makes no sense.
    """
    name = node_name(cfg, "dataset", ["digits", "imagenet", *cifar.VERSIONS])
    if cfg.get("synthetic"):
        return None
    if name in cifar.VERSIONS:
        return _problem_of(cifar.find, read_dataset(CifarSettings, cfg))
    if name == "imagenet":
        from experiments.data import imagenet  # only here: it imports torchvision

        return _problem_of(imagenet.find_splits, read_dataset(imagenet.ImageNetSettings, cfg))
    return None


def _problem_of(find: Callable[[Any], object], settings: object) -> UserError | None:
    try:
        find(settings)
    except UserError as error:
        return error
    return None
