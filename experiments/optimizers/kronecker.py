"""The Kronecker factors of KFAC, their inverses, and what these do to a gradient.

A layer's Fisher block is taken as a Kronecker product of two small matrices (Martens & Grosse
2015; convolutions: Grosse & Martens 2016), here of the empirical Fisher of a mean loss:

    A = 1 / (N |T|) Σ_n Σ_t a_nt a_ntᵀ         a_nt: (d_in,) what the layer's weights multiply
    G = 1 / N       Σ_n Σ_t g_nt g_ntᵀ         g_nt: (d_out,) gradient of example n's own loss
    (A ⊗ G + damping) vec(V) = vec(∇W)         ∇W, V: (d_out, d_in)

n counts the N examples of the batch (dimension 0) and t the |T| places where the layer's weights
are used: one for a Linear on vectors, the output pixels of a Conv2d, whose a_nt is the patch at
pixel t. A bias is the last column of ∇W, with a 1 at the end of a_nt. The loss is taken to be the
mean over the batch, so g is N times what the backward pass delivers. A ⊗ G is the product of
Grosse & Martens; they have the 1 / |T| in G, which changes nothing but `cholesky` without π.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Normalization = Literal["fisher", "pauloski"]
SupportedLayer = nn.Linear | nn.Conv2d

# Patches are 9 times their image for a 3 x 3 kernel: so many numbers of them exist at a time.
_PATCH_NUMBERS = 1 << 24


@dataclass(frozen=True)
class Factors:
    """The two matrices of a layer.

    Attributes:
        inputs: A, (d_in, d_in).
        outputs: G, (d_out, d_out).
        examples: N of the batch they are of; 0 for averages over batches.
    """

    inputs: Tensor
    outputs: Tensor
    examples: int = 0


def layer_factors(
    module: SupportedLayer, inputs: Tensor, gradient: Tensor, normalization: Normalization
) -> Factors:
    """A and G of one batch.

    `pauloski` are the scales of the authors' code, with ∇ = g / N as the backward pass delivers
    it: A = Σ a aᵀ / (N |T|) and G = Σ ∇ ∇ᵀ / (N |T|) for a Linear, both divided by |T|² for a
    Conv2d. A damping printed for that code belongs to these scales.

    Args:
        module: the layer.
        inputs: (N, *, in_features) or (N, in_channels, H, W).
        gradient: of the mean loss with respect to the layer's output.
        normalization: see the class.

    Returns:
        Factors in float32, or float64 for float64 weights.
    """
    dtype = factor_dtype(module.weight)
    convolution = isinstance(module, nn.Conv2d)
    # torch's layers take a single example without its batch dimension, too.
    batched = inputs.dim() == 4 if convolution else inputs.dim() > 1
    if not batched:
        inputs, gradient = inputs.unsqueeze(0), gradient.unsqueeze(0)
    examples = inputs.shape[0]
    rows = gradient.movedim(1, -1) if convolution else gradient
    rows = rows.reshape(-1, rows.shape[-1]).to(dtype)
    places = rows.shape[0] // examples
    input_sum = _sum_of_squares(module, inputs.to(dtype), places)
    if normalization == "fisher":
        return Factors(input_sum / (examples * places), rows.T @ rows * examples, examples)
    spatial = places**2 if convolution else 1
    scale = 1 / (examples * places * spatial)
    return Factors(input_sum * scale, rows.T @ rows * scale, examples)


def _sum_of_squares(module: SupportedLayer, inputs: Tensor, places: int) -> Tensor:
    """(d_in, d_in) Σ_n Σ_t a_nt a_ntᵀ."""
    d_in = input_size(module)
    total = inputs.new_zeros(d_in, d_in)
    for part in torch.split(inputs, max(1, _PATCH_NUMBERS // (d_in * places))):
        a = _patches(module, part) if isinstance(module, nn.Conv2d) else part
        a = a.reshape(-1, a.shape[-1])
        if module.bias is not None:
            a = torch.cat([a, a.new_ones(a.shape[0], 1)], dim=1)
        total.addmm_(a.T, a)
    return total


def _patches(module: nn.Conv2d, images: Tensor) -> Tensor:
    """(N, |T|, C kh kw): what the kernel sees at each output pixel."""
    pads: list[int] = []
    for axis in (1, 0):  # functional.pad begins with the last dimension
        if isinstance(module.padding, str):  # `same` puts the odd one at the end
            reach = module.dilation[axis] * (module.kernel_size[axis] - 1)
            total = reach if module.padding == "same" else 0
            pads += [total // 2, total - total // 2]
        else:
            pads += [module.padding[axis]] * 2
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    images = functional.pad(images, pads, mode=mode)
    columns = functional.unfold(
        images, module.kernel_size, dilation=module.dilation, stride=module.stride
    )
    return columns.transpose(1, 2)


def eigenbases(factors: Factors) -> dict[str, Tensor]:
    """Eigenvectors (columns) and eigenvalues of both factors; rounding's negatives become zero.

    A factor that is not finite gives NaN, so that a diverged run is seen to have diverged.
    """
    result = {}
    for side, factor in (("inputs", factors.inputs), ("outputs", factors.outputs)):
        if torch.isfinite(factor).all():
            values, vectors = _eigh(factor)
        else:
            vectors = torch.full_like(factor, math.nan)
            values = vectors[0]
        result[f"{side}_eigenvalues"] = values.clamp(min=0)
        result[f"{side}_eigenvectors"] = vectors
    return result


def _eigh(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors; in float64 where LAPACK gives up in float32.

    It does on factors of a rank far below their size, as few images in a wide layer make them.
    """
    try:
        values, vectors = torch.linalg.eigh(factor)
    except RuntimeError:  # torch.linalg.LinAlgError, which torch does not export
        if factor.dtype == torch.float64:
            raise
        values, vectors = torch.linalg.eigh(factor.double())
    return values.to(factor.dtype), vectors.to(factor.dtype)


def damped_inverses(
    factors: Factors, damping: float, pi_correction: bool, *, name: str = ""
) -> dict[str, Tensor]:
    """(A + π √λ I)⁻¹ and (G + √λ / π I)⁻¹; NaN where a factor is not finite.

    Raises:
        RuntimeError: a damped factor is not positive definite in its precision.
    """
    pi = _pi(factors.inputs.diagonal(), factors.outputs.diagonal(), pi_correction)
    root = math.sqrt(damping)
    result = {}
    for side, factor, added in (
        ("inputs", factors.inputs, pi * root),
        ("outputs", factors.outputs, root / pi),
    ):
        damped = factor + added * torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        lower, info = torch.linalg.cholesky_ex(damped)
        if not torch.isfinite(factor).all():
            lower = torch.full_like(factor, math.nan)
        elif info.item() != 0:
            raise RuntimeError(
                f"layer {name!r}: the damped factor of its {side} is not positive definite; "
                f"damping={damping} is too small for it"
            )
        result[f"{side}_inverse"] = torch.cholesky_inverse(lower)
    return result


def precondition(
    gradient: Tensor, state: Mapping[str, Tensor], damping: float, pi_correction: bool
) -> Tensor:
    """V of one layer.

    Args:
        gradient: ∇W, (d_out, d_in).
        state: what `eigenbases` or `damped_inverses` returned.
        damping: λ; of no effect on inverses, which contain it.
        pi_correction: likewise.

    Returns:
        (d_out, d_in).
    """
    if "inputs_inverse" in state:
        return state["outputs_inverse"] @ gradient @ state["inputs_inverse"]
    q_a, q_g = state["inputs_eigenvectors"], state["outputs_eigenvectors"]
    a, g = state["inputs_eigenvalues"], state["outputs_eigenvalues"]
    if pi_correction:
        pi, root = _pi(a, g, True), math.sqrt(damping)
        eigenvalues = torch.outer(g + root / pi, a + pi * root)
    else:
        eigenvalues = torch.outer(g, a) + damping
    return q_g @ (q_g.T @ gradient @ q_a / eigenvalues) @ q_a.T


def _pi(inputs: Tensor, outputs: Tensor, pi_correction: bool) -> Tensor:
    """π from the diagonals, or the eigenvalues, of A and G; 1 where a trace is zero."""
    if not pi_correction:
        return torch.ones_like(inputs[0])
    ratio = inputs.mean() / outputs.mean()
    return torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, 1.0).sqrt()


def clip_scale(products: Tensor, lr: float, kl_clip: float) -> Tensor:
    """ν = min(1, sqrt(κ / (lr² Σ Vᵀ∇W))), () on the device of `products`, which are Vᵀ∇W."""
    return (kl_clip / (lr**2 * products.sum().abs())).sqrt().clamp(max=1.0)


def input_size(module: SupportedLayer) -> int:
    """d_in: columns of the weight's matrix, and one for the bias."""
    return module.weight[0].numel() + (module.bias is not None)


def factor_dtype(weight: Tensor) -> torch.dtype:
    """Float64 for float64 weights, else float32: bfloat16 is too coarse to invert."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
