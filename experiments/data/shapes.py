"""The sizes of a data set, known without reading it."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.data import cifar, digits
from experiments.data.settings import CifarSettings, InputSettings, read_dataset
from experiments.errors import UserError
from experiments.settings import Node, node_name


@dataclass(frozen=True)
class DataShape:
    """What a network and an epoch need to know of a data set.

    Attributes:
        num_classes: classes.
        input_shape: (C, H, W) of one image.
        train_size: training images.
        drop_last: whether an epoch leaves out a smaller last batch.
    """

    num_classes: int
    input_shape: tuple[int, int, int]
    train_size: int
    drop_last: bool = True


def data_shape(cfg: Node) -> DataShape:
    """The shape of the data set that a config node names.

    Args:
        cfg: the node `dataset`.

    Raises:
        UserError: a setting that makes no sense.
    """
    name = node_name(cfg, "dataset", ["digits", "imagenet", *cifar.VERSIONS])
    if name == "imagenet":
        return _imagenet(cfg)
    settings: InputSettings
    if name == "digits":
        settings = read_dataset(InputSettings, cfg)
        raw = digits.load()  # embedded: reading it costs nothing
        classes, shape, size = raw.num_classes, raw.train.images.shape[1:], len(raw.train)
    else:
        settings = read_dataset(CifarSettings, cfg)
        version = cifar.VERSIONS[name]
        classes, shape, size = version.num_classes, (3, 32, 32), version.sizes["train"]
    size = min(size - (settings.holdout or 0), settings.train_limit or size)
    channels, height, width = shape
    return DataShape(classes, (channels, height, width), size, settings.drop_last)


def _imagenet(cfg: Node) -> DataShape:
    from experiments.data.imagenet import ImageNetSettings  # imports torchvision

    settings = read_dataset(ImageNetSettings, cfg)
    if settings.train_images is None:
        raise UserError("dataset.train_images=null: a plan needs the number of training images")
    size = settings.train_images - (settings.holdout or 0)
    return DataShape(
        settings.num_classes,
        (3, settings.crop, settings.crop),
        min(size, settings.train_limit or size),
        settings.drop_last,
    )
