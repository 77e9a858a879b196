"""Loss and accuracy of a classifier on a set of images, each counted once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from experiments.training.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Evaluation:
    """Test results: `loss` is the mean over the images, `top1` and `top5` are percent."""

    loss: float
    top1: float
    top5: float


def evaluate(
    model: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Measure loss and accuracy; sums stay on the device until the end.

    Args:
        model: in evaluation mode; from images to logits.
        batches: pairs of images (b, C, H, W) and labels (b,), of this rank's part alone.
        device: where the sums are kept.
        ranks: who shares the images.

    Returns:
        Means over all images; with fewer than five classes, top-5 is top-k over all of them.
    """
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    correct1 = torch.zeros((), dtype=torch.int64, device=device)
    correct5 = torch.zeros((), dtype=torch.int64, device=device)
    count = torch.zeros((), dtype=torch.int64, device=device)
    for images, labels in batches:
        logits = model(images)
        loss_sum += cross_entropy(logits, labels, reduction="sum").double()
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        correct1 += ranked[:, 0].sum()
        correct5 += ranked.sum()
        count += len(labels)
    ranks.sum_(loss_sum, correct1, correct5, count)
    total = count.item()
    return Evaluation(
        loss=loss_sum.item() / total,
        top1=100.0 * correct1.item() / total,
        top5=100.0 * correct5.item() / total,
    )
