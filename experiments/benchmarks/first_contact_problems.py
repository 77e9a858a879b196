"""Five small real problems, each as a new user would write it: data, network, loss.

    digits_mlp      handwritten digits, an MLP
    digits_cnn      the same, a CNN without BatchNorm
    digits_cnn_bn   the same with BatchNorm
    digits_halves   a regression: the lower half of a digit from its upper half
    python_text     a small causal transformer on the characters of Python's own documentation

The digits are scikit-learn's (`experiments.data.digits`), split as everywhere in this suite. The
text is `pydoc_data.topics`, which ships with Python and differs between its versions.
"""

from __future__ import annotations

import hashlib
import pydoc_data.topics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, scaled_dot_product_attention

from experiments.data import digits

#: Characters of the text, and of one sequence; every tenth sequence is a test sequence.
CHARACTERS, LENGTH, TEST_EVERY = 100_000, 32, 10
WIDTH = 32
Split = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """Data, network and loss.

    Attributes:
        name: see the module.
        steps: steps of a run.
        metric: what counts on the test set: "top1", in percent, or "loss".
        model: builds the network; the caller seeds torch.
        loss: (outputs, targets) -> mean loss.
        train: inputs and targets.
        test: the same of the test set.
    """

    name: str
    steps: int
    metric: Literal["top1", "loss"]
    model: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    train: Split
    test: Split


def problems() -> dict[str, Problem]:
    """All five by name."""
    train, test = _digits()
    halves = [(x[:, :, :4].flatten(1), x[:, :, 4:].flatten(1)) for x, _ in (train, test)]
    text, characters = _text()
    found = [
        Problem("digits_mlp", 600, "top1", _mlp, cross_entropy, train, test),
        Problem("digits_cnn", 500, "top1", lambda: _cnn(norm=False), cross_entropy, train, test),
        Problem("digits_cnn_bn", 500, "top1", lambda: _cnn(norm=True), cross_entropy, train, test),
        Problem("digits_halves", 600, "loss", _regressor, mse_loss, *halves),
        Problem("python_text", 400, "loss", lambda: _Transformer(characters), _next, *text),
    ]
    return {problem.name: problem for problem in found}


def text_digest() -> str:
    """SHA-256 of the text, by which to tell whether two machines have the same."""
    return hashlib.sha256(_characters().encode()).hexdigest()


@cache
def _digits() -> tuple[Split, Split]:
    data = digits.load()
    images = [torch.tensor(s.images, dtype=torch.float32) for s in (data.train, data.test)]
    mean, std = images[0].mean(), images[0].std()
    labels = [torch.tensor(s.labels) for s in (data.train, data.test)]
    train, test = (((x - mean) / std, y) for x, y in zip(images, labels, strict=True))
    return train, test


def _characters() -> str:
    topics = pydoc_data.topics.topics
    text = "".join(topics[name] for name in sorted(topics))
    return text.encode("ascii", "ignore").decode()[:CHARACTERS]


@cache
def _text() -> tuple[tuple[Split, Split], int]:
    """Training and test sequences with the characters that follow, and how many kinds there are."""
    text = _characters()
    kinds = {c: i for i, c in enumerate(sorted(set(text)))}
    count = len(text) // (LENGTH + 1)
    rows = torch.tensor([kinds[c] for c in text[: count * (LENGTH + 1)]]).view(count, LENGTH + 1)
    tested = torch.arange(count) % TEST_EVERY == TEST_EVERY - 1
    train, test = ((part[:, :-1], part[:, 1:]) for part in (rows[~tested], rows[tested]))
    return (train, test), len(kinds)


def _next(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs.flatten(0, 1), targets.flatten())


def _mlp() -> nn.Module:
    hidden = (nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(64, 10))


def _regressor() -> nn.Module:
    hidden = (nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
    return nn.Sequential(*hidden, nn.Linear(32, 32))


def _cnn(*, norm: bool) -> nn.Module:
    layers: list[nn.Module] = []
    for inside, outside, stride in ((1, 8, 1), (8, 16, 2), (16, 32, 2)):
        layers.append(nn.Conv2d(inside, outside, 3, stride=stride, padding=1))
        layers += [nn.BatchNorm2d(outside)] if norm else []
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10))


class _Transformer(nn.Module):
    """One block of causal attention and one MLP, pre-norm."""

    def __init__(self, kinds: int):
        super().__init__()
        self.characters = nn.Embedding(kinds, WIDTH)
        self.places = nn.Embedding(LENGTH, WIDTH)
        for embedding in (self.characters, self.places):
            nn.init.normal_(embedding.weight, std=0.02)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.attention = nn.Linear(WIDTH, 3 * WIDTH)
        self.mixed = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.head = nn.Linear(WIDTH, kinds)

    def forward(self, x: Tensor) -> Tensor:
        """(b, L) characters -> (b, L, kinds) logits of the next one."""
        h = self.characters(x) + self.places.weight
        q, k, v = self.attention(self.norms[0](h)).view(*x.shape, 3, 2, WIDTH // 2).unbind(2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (b, heads, L, width)
        seen = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        h = h + self.mixed(seen)
        logits: Tensor = self.head(self.norms[2](h + self.mlp(self.norms[1](h))))
        return logits
