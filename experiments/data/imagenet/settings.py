"""The keys of the config node `dataset` for ImageNet, and which values make sense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from experiments.data.settings import BaseSettings
from experiments.errors import UserError

Resize = Literal["square", "shorter"]
Augmentation = Literal["paper", "inception"]


@dataclass(frozen=True, kw_only=True)
class ImageNetSettings(BaseSettings):
    """Keys of ImageNet, and of any other tree of images.

    Attributes:
        root: the folder that holds the images, in one of the layouts of `find.py`; for synthetic
            images the folder they are generated into, null for the user's cache folder.
        num_classes: classes that must be there; labels are 0 to num_classes - 1.
        train_images: training images that must be there; null for any number.
        test_images: the same for the test (ImageNet: validation) images.
        resize: to a square, or the shorter side; see `pixels.resized_shape`.
        resized: pixels of that side.
        crop: pixels of the side of what the network sees.
        augmentation: `paper`, a random crop of the resized image, mirrored with probability 1/2;
            `inception`, a random part of it, resized to the crop's size and mirrored likewise.
        workers: processes that load images; 0 for none beside the training's own, null for as
            many as there are processors.
        max_unreadable: so many images may turn out to be unreadable before the run stops.
        val_labels: the file with the classes of a flat validation folder; null to look for it.
        synthetic: generate the images (`synthetic.py`).
    """

    root: str | None
    num_classes: int
    train_images: int | None
    test_images: int | None
    resize: Resize = "square"
    resized: int = 256
    crop: int = 224
    augmentation: Augmentation = "paper"
    workers: int | None = None
    max_unreadable: int = 100
    val_labels: str | None = None
    synthetic: bool = False

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UserError: a value that makes no sense, alone or beside another.
        """
        for key in ("num_classes", "train_images", "test_images", "resized", "crop"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"dataset.{key} = {value} must be 1 or more")
        for key in ("workers", "max_unreadable"):
            value = getattr(self, key)
            if value is not None and value < 0:
                raise UserError(f"dataset.{key} = {value} must be 0 or more")
        if self.crop > self.resized:
            raise UserError(
                f"dataset.crop = {self.crop} is larger than the resized images: it must be "
                f"dataset.resized = {self.resized} or less"
            )
        if self.synthetic:
            self._check_synthetic()
        elif self.root is None:
            raise UserError("dataset.root = None: set it to the folder that holds the images")

    @property
    def synthetic_images(self) -> dict[str, int]:
        """Images to generate: of `train` and `val`."""
        assert self.train_images is not None and self.test_images is not None
        return {"train": self.train_images, "val": self.test_images}

    def _check_synthetic(self) -> None:
        for key in ("train_images", "test_images"):
            value = getattr(self, key)
            if value is None or value < self.num_classes:
                raise UserError(
                    f"dataset.{key} = {value}: synthetic images need a number, "
                    f"dataset.num_classes = {self.num_classes} or more"
                )
        if self.val_labels is not None:
            raise UserError(
                f"dataset.val_labels = {self.val_labels!r} has no effect on synthetic images: "
                "leave it null"
            )
