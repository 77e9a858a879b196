"""BatchNorm whose statistics are those of the whole batch, however many ranks share it.

Per-rank statistics are noisier than those of the whole batch, so a run on several ranks has other
numbers than one on a single process, unless `train.sync_batchnorm` is set. (torch.nn.SyncBatchNorm
does the same on GPUs alone.)

    mean = Σ x / N,   var = Σ (x - mean)² / N,   N = numbers of a channel over all ranks
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from experiments.errors import UserError
from experiments.training.ranks import Ranks


class SynchronisedBatchNorm(_BatchNorm):
    """BatchNorm over all ranks; use `synchronise_batchnorm`.

    Args:
        like: the module to replace; its parameters and buffers are taken over.
        ranks: who shares a batch.
    """

    def __init__(self, like: _BatchNorm, ranks: Ranks):
        super().__init__(
            like.num_features,
            like.eps,
            like.momentum,
            like.affine,
            like.track_running_stats,
        )
        self.weight, self.bias = like.weight, like.bias
        for name, buffer in like.named_buffers(recurse=False):
            setattr(self, name, buffer)
        self._ranks = ranks

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (b, C, ...) by channel, in float32 at least."""
        if not self.training:
            return super().forward(input)
        if input.dtype in (torch.bfloat16, torch.float16):  # their sums would be too coarse
            return self._normalised(input.float()).to(input.dtype)
        return self._normalised(input)

    def _normalised(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        dims = [d for d in range(input.dim()) if d != 1]
        shape = [1, -1, *[1] * (input.dim() - 2)]
        count = input.new_tensor([input.numel() / input.shape[1]])
        self._ranks.sum_(count)
        mean = self._ranks.differentiable_sum(input.sum(dims)) / count
        centred = input - mean.view(shape)
        var = self._ranks.differentiable_sum(centred.square().sum(dims)) / count
        if self.track_running_stats:
            self._update_running(mean.detach(), var.detach() * (count / (count - 1)))
        normalised = centred * torch.rsqrt(var + self.eps).view(shape)
        if not self.affine:
            return normalised
        return normalised * self.weight.view(shape) + self.bias.view(shape)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, unbiased_var: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        weight = self.momentum
        if weight is None:  # a plain average over all batches
            weight = 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(unbiased_var, weight)


def synchronise_batchnorm(model: nn.Module, ranks: Ranks) -> None:
    """Replace every BatchNorm of a model by one over all ranks; names and values stay.

    Raises:
        UserError: the model has none.
    """
    found = False
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, _BatchNorm):
                setattr(module, name, SynchronisedBatchNorm(child, ranks))
                found = True
    if not found:
        raise UserError("train.sync_batchnorm=true, but the model has no BatchNorm: leave it false")
