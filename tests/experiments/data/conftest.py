"""What the tests of several modules ask for."""

import dataclasses

import pytest

from experiments.data import cifar
from tests.experiments.data.cifar_copies import SIZES


@pytest.fixture
def tiny(monkeypatch) -> None:
    """CIFAR with 40 + 20 images of 10 classes, and CIFAR-100 with as many of 20 classes."""
    for name, classes in (("cifar10", 10), ("cifar100", 20)):
        version = dataclasses.replace(cifar.VERSIONS[name], sizes=SIZES, num_classes=classes)
        monkeypatch.setitem(cifar.VERSIONS, name, version)
