"""Measured twins of the complexity tables: what the real optimizers keep and compute.

A small network of linear layers without bias (so that d = Σ d_i, as the formulas have it) is
trained for two update intervals; over the second, every operation of the optimizer is counted by
torch's dispatcher, not estimated: multiply-adds of matrix and dot products as `products`, one for
every number written by an elementwise operation as `elementwise`, n³ for a factorisation of an
n x n matrix (the formulas' unit) as `factorisations`. Counts are means per step. The state is what
`optimizer.state` holds, storages counted once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.data import Batch
from experiments.optimizers.kfac import KFAC
from experiments.optimizers.slbfgs import SLBFGS
from experiments.theory.cost_formulas import Workload
from experiments.theory.networks import kronecker_layers
from experiments.training.passes import Passes
from mlbfgs import MLBFGS

WIDTHS = (48, 64, 32, 10)
BATCH, CURVATURE_BATCH, TRAIN_SIZE = 8, 32, 64


class OperationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the work of every operation between entering and leaving.

    Attributes:
        work: by kind: products, elementwise, factorisations.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operation and count it."""
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in _PRODUCTS:
            a, b = (t for t in _tensors(args)[-2:])
            self.work["products"] += a.numel() * (b.shape[-1] if b.dim() > 1 else 1)
        elif name in _FACTORISATIONS:
            (matrix,) = _tensors(args)[:1]
            self.work["factorisations"] += matrix.shape[-1] ** 3
        elif name in _ELEMENTWISE:
            written = _tensors((result,)) or _tensors(args[:1])  # foreach in place returns nothing
            self.work["elementwise"] += sum(t.numel() for t in written)
        return result


_PRODUCTS = frozenset({"mm", "addmm", "addmm_", "bmm", "mv", "addmv", "addmv_", "dot", "vdot"})
_FACTORISATIONS = frozenset({"_linalg_eigh", "linalg_cholesky_ex", "cholesky_inverse"})
_ARITHMETIC = ("add", "sub", "mul", "div", "lerp", "addcmul", "addcdiv", "neg")
_ELEMENTWISE = frozenset(
    f"{prefix}{op}{suffix}" for prefix in ("", "_foreach_") for op in _ARITHMETIC
    for suffix in ("", "_")
)  # fmt: skip


class _Images:
    """Random images and labels, the same at every pass."""

    num_classes, input_shape = WIDTHS[-1], (1, 1, WIDTHS[0])
    train_size, test_size, batches_per_epoch = TRAIN_SIZE, 0, TRAIN_SIZE // BATCH

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._images = torch.randn(TRAIN_SIZE, 1, 1, WIDTHS[0], generator=generator)
        self._labels = torch.randint(WIDTHS[-1], (TRAIN_SIZE,), generator=generator)

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for i in range(start * BATCH, TRAIN_SIZE, BATCH):
            yield Batch(self._images[i : i + BATCH], self._labels[i : i + BATCH])

    def random_batches(self, number: int, count: int) -> Iterator[Batch]:
        yield Batch(self._images[:count], self._labels[:count])

    def test_batches(self) -> Iterator[Batch]:
        yield from ()


@dataclass(frozen=True)
class Twin:
    """What one optimizer was measured to keep and compute, per step.

    Attributes:
        state_numbers: numbers in its state, in units of float32.
        products: multiply-adds of matrix and dot products in `step`.
        elementwise: numbers written by elementwise operations in `step`.
        factorisations: Σ n³ of factorised matrices in `step`.
        passes: multiply-adds of further passes over the data.
    """

    state_numbers: float
    products: float
    elementwise: float
    factorisations: float
    passes: float


def network() -> nn.Sequential:
    """The network of linear layers."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(WIDTHS):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def workload(M: int, T: int) -> Workload:
    """The formulas' workload of the same network, on one node."""
    model = network()
    layers = kronecker_layers(model)
    first, d = layers[0], sum(i * o for i, o in layers)
    c_fb = 3 * d - first[0] * first[1]  # no gradient with respect to the images
    return Workload(layers, d, c_fb, b=BATCH, b_h=CURVATURE_BATCH, T=T, M=M, gamma=1.0, p=1)


def build(name: str, model: nn.Module, M: int, T: int) -> torch.optim.Optimizer:
    """An optimizer as the formulas mean it: no momentum, no weight decay."""
    params = list(model.named_parameters())
    if name == "sgd":
        return torch.optim.SGD(params, lr=0.01)
    if name == "kfac":
        return KFAC(
            model, lr=0.01, momentum=0.0, kl_clip=None,
            factor_update_interval=T, inverse_update_interval=T,
        )  # fmt: skip
    if name == "slbfgs":
        return SLBFGS(
            params, lr=0.01, history_size=M, update_interval=T, curvature_batch_size=CURVATURE_BATCH
        )
    return MLBFGS(params, lr=0.01, momentum=0.0, history_size=M, update_interval=T, variant="paper")


def measure(name: str, M: int, T: int) -> Twin:
    """Train until the history is full, then count over one update interval.

    Args:
        name: sgd, kfac, slbfgs or mlbfgs.
        M: history size.
        T: update interval; a multiple of the 8 batches of an epoch keeps the epochs whole.
    """
    model, data = network(), _Images()
    optimizer = build(name, model, M, T)
    if isinstance(optimizer, SLBFGS):
        optimizer.bind(Passes(model, data, memory_format=torch.contiguous_format))
    in_step, in_passes = OperationCounter(), OperationCounter()
    warm = (M + 3) * T
    for step in range(warm + T):
        batch = list(data.train_batches(0))[step % data.batches_per_epoch]
        optimizer.zero_grad()
        loss = cross_entropy(model(batch.images), batch.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        counted = step >= warm
        if isinstance(optimizer, SLBFGS):
            _run(in_passes if counted else None, lambda b=batch: optimizer.before_step(b, 0))
        _run(in_step if counted else None, optimizer.step)
    work = in_step.work
    return Twin(
        state_numbers=state_bytes(optimizer) / 4,
        products=work["products"] / T,
        elementwise=work["elementwise"] / T,
        factorisations=work["factorisations"] / T,
        passes=in_passes.work["products"] / T,
    )


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all storages that the optimizer's state refers to, each counted once."""
    storages: dict[int, int] = {}
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def _run(counter: OperationCounter | None, call: Any) -> None:
    if counter is None:
        call()
        return
    with counter:
        call()


def _tensors(values: Any) -> list[Tensor]:
    """The tensors in nested lists and tuples, in order."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, list | tuple):
        return [tensor for value in values for tensor in _tensors(value)]
    return []
