"""What must be set before torch computes anything, here and in the processes that tests start."""

import os

import torch

# On processors with AVX2 and without AVX-512, MKL adds up a product in an order that depends on
# where in memory its operands begin, unless told not to: a block on its rank and the same block
# within one process's history then differ in the last bit (docs/distributed.md). MKL reads it
# at its first call.
if torch.backends.cpu.get_cpu_capability() == "AVX2":
    os.environ.setdefault("MKL_CBWR", "AUTO")
