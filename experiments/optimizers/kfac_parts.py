"""KFAC where several ranks, or several passes, share a batch (Pauloski et al. 2020, section 4).

The factors are averaged over the ranks; each layer's decompositions are one rank's work, whose
result the others copy. A pass sees k of the batch's N images; its loss is k p / N times their mean
on p ranks (`experiments.training.batch_gradient`), so the gradient of an output is ∇ = (p / N) g
with the gradient g of the image's own loss. What `layer_factors` makes of a pass, A_k and G_k,
gives those of the batch by

    A = Σ k A_k / N,    G = N / p² Σ G_k / k (fisher),    G = 1 / (p² N) Σ k G_k (pauloski)

since G_k is k Σ ∇∇ᵀ for `fisher` and proportional to Σ ∇∇ᵀ / k for `pauloski`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from experiments.optimizers.kfac_layers import Layer
from experiments.optimizers.kronecker import Factors, Normalization, factor_dtype, input_size
from experiments.training.ranks import Ranks
from mlbfgs.sharding import owners_of_blocks


def owners_of_layers(layers: Collection[Layer], world_size: int) -> dict[Layer, int]:
    """The rank that decomposes the factors of each layer: the longest first, by d_in³ + d_out³."""
    costs = [input_size(x.module) ** 3 + x.module.weight.shape[0] ** 3 for x in layers]
    return dict(zip(layers, owners_of_blocks(costs, world_size), strict=True))


def whole_batch(
    parts: Mapping[Layer, Sequence[Factors]], normalization: Normalization, ranks: Ranks
) -> dict[Layer, Factors]:
    """The factors of a batch of which each rank has seen parts.

    All layers are summed over the ranks in one message (one for each dtype, where they differ).

    Args:
        parts: by layer, what `layer_factors` made of each pass on this rank; the same layers on
            all ranks, of which some may have had no pass.
        normalization: of those factors.
        ranks: who shares the batch; each of them calls this.

    Returns:
        For each layer that had a pass on any rank; the same bits on all ranks.
    """
    result: dict[Layer, Factors] = {}
    for dtype in dict.fromkeys(factor_dtype(layer.module.weight) for layer in parts):
        layers = [layer for layer in parts if factor_dtype(layer.module.weight) == dtype]
        # a float32 counts images exactly up to 16.8 million
        counts = [float(sum(part.examples for part in parts[layer])) for layer in layers]
        pieces = [layers[0].module.weight.new_tensor(counts, dtype=dtype)]
        for layer in layers:
            pieces += [side.view(-1) for side in _weighted_sums(layer, parts[layer], normalization)]
        message = torch.cat(pieces)
        sizes = [len(piece) for piece in pieces]
        del pieces
        ranks.sum_(message)
        examples, *sums = torch.split(message, sizes)
        for i, (layer, count) in enumerate(zip(layers, examples.tolist(), strict=True)):
            if count == 0:
                continue
            inputs, outputs = (x.view(math.isqrt(len(x)), -1) for x in sums[2 * i : 2 * i + 2])
            scale = count if normalization == "fisher" else 1 / count
            result[layer] = Factors(
                inputs.div_(count), outputs.mul_(scale / ranks.world_size**2), int(count)
            )
    return result


def _weighted_sums(
    layer: Layer, parts: Sequence[Factors], normalization: Normalization
) -> tuple[Tensor, Tensor]:
    """Σ k A_k and Σ G_k / k or Σ k G_k over the passes of this rank."""
    weight = layer.module.weight
    sizes = input_size(layer.module), weight.shape[0]
    inputs, outputs = (
        torch.zeros(n, n, dtype=factor_dtype(weight), device=weight.device) for n in sizes
    )
    for part in parts:
        k = part.examples
        inputs.add_(part.inputs, alpha=k)
        outputs.add_(part.outputs, alpha=1 / k if normalization == "fisher" else k)
    return inputs, outputs
