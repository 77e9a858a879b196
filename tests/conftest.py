"""What must be set before torch computes anything, here and in the processes that tests start."""

import os

import torch

# On processors with AVX2 and without AVX-512, oneDNN's convolutions of torch 2.14.1 write beyond
# their buffers in the backward pass of fewer than 8 channels, channels last ("free(): invalid next
# size"). The tests' networks are that narrow; those of the scales reduced and full are not. oneDNN
# reads it at its first convolution.
if torch.backends.cpu.get_cpu_capability() == "AVX2":
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX")
