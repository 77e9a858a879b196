"""KFAC from its definitions: one example and one pixel at a time, Kronecker products in full.

Float64 throughout. `normal_equations` solves with np.kron of the two factors, so it has neither
eigen-decompositions nor inverses of factors in common with an implementation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

Array = np.ndarray[Any, np.dtype[np.float64]]


def input_vectors(layer: nn.Module, x: Array) -> Array:
    """(|T|, d_in): what multiplies the layer's weights, for one example, with a 1 for a bias."""
    if isinstance(layer, nn.Linear):
        vectors = [row for row in x.reshape(-1, x.shape[-1])]
    else:
        vectors = patches(layer, x)
    if layer.bias is not None:
        vectors = [np.append(vector, 1.0) for vector in vectors]
    return np.stack(vectors)


def patches(layer: nn.Conv2d, image: Array) -> list[Array]:
    """The patch (C kh kw,) at each output pixel of a convolution, row by row, for one image."""
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    if layer.padding == "same":
        reach_h, reach_w = dh * (kh - 1), dw * (kw - 1)
        pads = [(reach_h // 2, reach_h - reach_h // 2), (reach_w // 2, reach_w - reach_w // 2)]
    else:
        pads = [(0, 0) if p == "valid" else (p, p) for p in _pair(layer.padding)]
    mode = {"zeros": "constant", "circular": "wrap"}.get(layer.padding_mode, layer.padding_mode)
    padded = np.pad(image, [(0, 0), *pads], mode=mode)
    found = []
    for top in range(0, padded.shape[1] - dh * (kh - 1), sh):
        for left in range(0, padded.shape[2] - dw * (kw - 1), sw):
            patch = [
                padded[channel, top + i * dh, left + j * dw]
                for channel in range(padded.shape[0])
                for i in range(kh)
                for j in range(kw)
            ]
            found.append(np.array(patch))
    return found


def _pair(padding: Any) -> tuple[Any, Any]:
    return (padding, padding) if isinstance(padding, str) else padding


def output_vectors(layer: nn.Module, output: Array) -> Array:
    """(|T|, d_out) of one example's output, or of a gradient with respect to it."""
    if isinstance(layer, nn.Conv2d):
        output = np.moveaxis(output, 0, -1)
    return output.reshape(-1, output.shape[-1])


def factors(
    net: nn.Sequential, index: int, images: torch.Tensor, labels: torch.Tensor
) -> tuple[Array, Array]:
    """A and G of the layer `net[index]`, from each example's own loss."""
    layer = net[index]
    a_sum: Any = 0.0
    g_sum: Any = 0.0
    for image, label in zip(images, labels, strict=True):
        x = net[:index](image[None])
        output = layer(x.detach())
        # A copy goes on, so that an in-place ReLU changes neither the output nor what is asked for.
        loss = nn.functional.cross_entropy(net[index + 1 :](output.clone()), label[None])
        (gradient,) = torch.autograd.grad(loss, output)
        a = input_vectors(layer, x[0].detach().numpy())
        g = output_vectors(layer, gradient[0].numpy())
        # The vectors are the right ones: times the weights, they are the layer's output.
        matrix = weight_matrix([p.detach().numpy() for p in layer.parameters()])
        np.testing.assert_allclose(
            a @ matrix.T, output_vectors(layer, output[0].detach().numpy()), atol=1e-12
        )
        for t in range(len(a)):
            a_sum = a_sum + np.outer(a[t], a[t]) / len(a)
            g_sum = g_sum + np.outer(g[t], g[t])
    return a_sum / len(images), g_sum / len(images)


def weight_matrix(tensors: list[Array]) -> Array:
    """(d_out, d_in): a weight, and the bias as the last column if there is one."""
    return np.concatenate([t.reshape(len(t), -1) for t in tensors], axis=1)


def normal_equations(
    gradient: Array, A: Array, G: Array, *, damping: float, factored: bool, pi: bool
) -> Array:
    """V with (curvature) vec(V) = vec(gradient); rows are stacked, so curvature is G ⊗ A."""
    if factored:
        root = damping**0.5
        split = ((np.trace(A) / len(A)) / (np.trace(G) / len(G))) ** 0.5 if pi else 1.0
        curvature = np.kron(G + root / split * np.eye(len(G)), A + split * root * np.eye(len(A)))
    else:
        curvature = np.kron(G, A) + damping * np.eye(len(A) * len(G))
    return np.linalg.solve(curvature, gradient.reshape(-1)).reshape(gradient.shape)


def kl_scale(pairs: list[tuple[Array, Array]], lr: float, kappa: float) -> float:
    """ν from the pairs (V, gradient) of all layers."""
    total = sum(float(np.sum(v * g)) for v, g in pairs)
    return float(min(1.0, (kappa / (lr * lr * total)) ** 0.5))
