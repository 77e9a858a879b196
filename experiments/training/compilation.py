"""The model under `torch.compile`, as `train.compile` asks for it.

The compiled module shares its parameters with the model, which keeps its names and is what a
checkpoint holds and an evaluation calls; only the passes of the training are compiled. Every size
of a pass is compiled for itself (never for a size left open), so that a resumed run executes the
same code, and in front of the first step, outside the training clock. `max-autotune` chooses
kernels by their speed on the spot: its runs agree up to rounding only.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import nn

from experiments.errors import UserError

MODES = ("reduce-overhead", "max-autotune")


def compiled(model: nn.Module, setting: bool | str) -> nn.Module:
    """The module to call in training.

    Args:
        model: on its device.
        setting: `train.compile`: False, True or one of torch's modes in `MODES`.
    """
    if setting is False:
        return model
    mode = None if setting is True else str(setting)
    # typed as a callable, which is a module for a module
    module: nn.Module = torch.compile(model, mode=mode, dynamic=False)  # type: ignore[assignment]
    return module


def check_no_hooks(model: nn.Module, setting: bool | str, *, optimizer: str) -> None:
    """Refuse to compile a model into which the optimizer has put hooks.

    Raises:
        UserError: a layer of the model has a hook.
    """
    if setting is not False and any(m._forward_hooks for m in model.modules()):
        raise UserError(
            f"optimizer={optimizer} listens to the layers of the model, which train.compile="
            f"{str(setting).lower()} would merge: use train.compile=false"
        )


def compile_now(run: Callable[[], None]) -> None:
    """Make passes that compile what they need.

    Args:
        run: makes them.

    Raises:
        UserError: torch.compile found no compiler, or met code that it cannot translate.
    """
    from torch._dynamo.exc import TorchDynamoException  # slow to import, and only needed here
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    try:
        run()
    except (TorchDynamoException, CppCompileError, InvalidCxxCompiler) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"train.compile: torch.compile failed on this machine ({reason}); it needs a C++ "
            f"compiler on a CPU (CXX={os.environ.get('CXX', 'g++')}) and Triton on a GPU: install "
            "it, or use train.compile=false"
        ) from error
