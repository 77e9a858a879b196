"""One short training in each framework that people hand optimizers to.

Every framework must end with the very numbers of a plain loop. Those that are not installed are
reported as not run.
"""

from __future__ import annotations

import importlib
import logging
import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from mlbfgs.testing.compare import first_difference
from mlbfgs.testing.outcome import NotRunError, expect
from mlbfgs.testing.problems import batch, decay, small_network, train
from mlbfgs.testing.registry import Registry
from mlbfgs.testing.subject import Subject

CHECKS = Registry()


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """The batches of a plain loop, whole, by number."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        """How many batches."""
        return self.count

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs (16, 6) and labels (16,) of one step."""
        return batch(step)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotRunError(f"{name.partition('.')[0]} is not installed") from error


def _plain(subject: Subject) -> list[Tensor]:
    model = small_network()
    optimizer = subject.make(model.parameters(), **decay(subject, {}))
    losses = train(model, optimizer, subject.horizon)
    expect(losses[-1] == losses[-1], "the loss of the plain loop is not a number")
    return list(model.parameters())


def _expect_plain(subject: Subject, model: nn.Module) -> None:
    difference = first_difference(_plain(subject), list(model.parameters()), "parameters")
    expect(difference is None, f"unlike in a plain loop: {difference}")


@CHECKS.check("Frameworks")
def plain_loop(subject: Subject) -> None:
    """A plain loop lowers the loss, and repeats to the last bit."""
    first, second = _plain(subject), _plain(subject)
    difference = first_difference(first, second, "parameters")
    expect(difference is None, f"a second run: {difference}")
    losses = []
    model = small_network()
    optimizer = subject.make(model.parameters(), **decay(subject, {"lr": 0.01}))
    for _ in range(10):
        losses.append(sum(train(model, optimizer, subject.horizon)))
    expect(losses[-1] < losses[0], f"the loss goes from {losses[0]:.3g} to {losses[-1]:.3g}")


@CHECKS.check("Frameworks")
def lightning(subject: Subject) -> None:
    """Lightning's Trainer ends with the numbers of a plain loop."""
    pl: Any = _import("lightning.pytorch")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = small_network()

        def training_step(self, data: tuple[Tensor, Tensor], index: int) -> Tensor:
            inputs, labels = data
            return nn.functional.cross_entropy(self.network(inputs), labels)

        def configure_optimizers(self) -> Optimizer:
            return subject.make(self.parameters(), **decay(subject, {}))

    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = Module()
        trainer.fit(module, DataLoader(Batches(subject.horizon), batch_size=None))
    _expect_plain(subject, module.network)


@CHECKS.check("Frameworks")
def accelerate(subject: Subject) -> None:
    """Accelerate's loop ends with the numbers of a plain loop."""
    library: Any = _import("accelerate")
    accelerator = library.Accelerator(cpu=True)
    model = small_network()
    optimizer = subject.make(model.parameters(), **decay(subject, {}))
    data = DataLoader(Batches(subject.horizon), batch_size=None)
    wrapped, optimizer, data = accelerator.prepare(model, optimizer, data)
    for inputs, labels in data:
        optimizer.zero_grad()
        accelerator.backward(nn.functional.cross_entropy(wrapped(inputs), labels))
        optimizer.step()
    _expect_plain(subject, model)


@CHECKS.check("Frameworks")
def transformers_trainer(subject: Subject) -> None:
    """The Trainer of Hugging Face transformers ends with the numbers of a plain loop."""
    _import("accelerate")
    library: Any = _import("transformers")

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = small_network()

        def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.network(inputs)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    def named(data: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        ((inputs, labels),) = data
        return {"inputs": inputs, "labels": labels}

    class InOrder(library.Trainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            return DataLoader(self.train_dataset, batch_size=1, collate_fn=named)

    model = WithLoss()
    optimizer = subject.make(model.parameters(), **decay(subject, {}))
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = library.TrainingArguments(
            output_dir=folder,
            max_steps=subject.horizon,
            max_grad_norm=0.0,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = InOrder(
            model=model,
            args=arguments,
            train_dataset=Batches(subject.horizon),
            optimizers=(optimizer, constant),
        )
        trainer.train()
    _expect_plain(subject, model.network)


@CHECKS.check("Frameworks")
def timm_registry(subject: Subject) -> None:
    """Made by timm's optimizer registry, with its two groups, it trains as made by hand."""
    factory: Any = _import("timm.optim._optim_factory")
    if not isinstance(subject.factory, type):
        raise NotRunError("timm's registry takes classes, not functions")
    registry = factory.OptimizerRegistry()
    has_momentum = subject.has("momentum")
    registry.register(
        factory.OptimInfo(
            name="subject",
            opt_class=subject.factory,
            has_eps=subject.has("eps"),
            has_momentum=has_momentum,
            has_betas=subject.has("betas"),
        )
    )
    model, by_hand = small_network(), small_network()
    settings = {k: v for k, v in subject.kwargs.items() if k not in ("lr", "momentum")}
    optimizer = registry.create_optimizer(
        model, "subject", lr=0.02, weight_decay=0.01, momentum=0.8, **settings
    )
    plain = subject.make(
        [
            {"params": [p for p in by_hand.parameters() if p.dim() < 2], "weight_decay": 0.0},
            {"params": [p for p in by_hand.parameters() if p.dim() >= 2]},
        ],
        lr=0.02,
        weight_decay=0.01,
        **({"momentum": 0.8} if has_momentum else {}),
    )
    for m, o in ((model, optimizer), (by_hand, plain)):
        train(m, o, subject.horizon)
    values = [[p.detach() for p in m.parameters()] for m in (by_hand, model)]
    difference = first_difference(values[0], values[1], "parameters")
    expect(difference is None, f"unlike made by hand: {difference}")
