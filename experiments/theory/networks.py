"""What a network costs, counted on its real layers without computing anything (meta tensors)."""

from __future__ import annotations

import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from experiments.theory.cost_formulas import Workload


def kronecker_layers(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """(inputs, outputs) of the weight matrix of every convolution and linear layer.

    A convolution's weight is the matrix (out, in · height · width), as KFAC treats it.
    """
    return tuple(
        (module.weight[0].numel(), module.weight.shape[0])
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    )


def forward_backward_macs(model: nn.Module, input_shape: tuple[int, ...]) -> tuple[float, float]:
    """MACs of one sample, counted: forward alone, and forward with backward.

    Args:
        model: on the meta device.
        input_shape: (C, H, W).
    """
    images = torch.empty(1, *input_shape, device="meta")
    with FlopCounterMode(display=False) as forward:
        model(images)
    with FlopCounterMode(display=False) as both:
        model(images).sum().backward()
    return forward.get_total_flops() / 2, both.get_total_flops() / 2


def saved_numbers(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Numbers that autograd keeps between forward and backward, one sample, parameters excluded.

    Tensors that share their storage are counted once.
    """
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    parameters |= {b.untyped_storage()._cdata for b in model.buffers()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in parameters:
            kept[key] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.empty(1, *input_shape, device="meta"))
    return sum(tensor.numel() for tensor in kept.values())


def resnet50_workload() -> Workload:
    """ResNet-50 on 224 x 224 images, at the settings of M Table 2's caption."""
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    shape = (3, 224, 224)
    _, c_fb = forward_backward_macs(model, shape)
    return Workload(
        layers=kronecker_layers(model),
        d=sum(p.numel() for p in model.parameters()),
        c_fb=c_fb,
        m_fb=saved_numbers(model, shape),
        b=64,
        b_h=1024,
        T=20,
        M=10,
        gamma=1.0,
        p=8,
    )
