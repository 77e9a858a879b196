"""Shampoo and SOAP, from the package `pytorch-optimizer`, which is the optional extra `shampoo`.

That package takes any keyword in silence; these builders have a signature of their own, so that a
misspelled one is refused, and they say what to install where the package is absent.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from experiments.errors import UserError


def shampoo(
    params: ParamsT,
    lr: float,
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    matrix_eps: float = 1e-6,
    preconditioning_compute_steps: int = 1,
) -> Optimizer:
    """Shampoo (Gupta et al. 2018): a preconditioner for each dimension of each parameter.

    The package's inverse roots are zero until it first computes them, which is in the step whose
    number its interval divides: no weight would move before. Here it counts its steps so that this
    is the first step, and then every `preconditioning_compute_steps`.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        momentum: of the package's own kind: the gradient is averaged with the last direction.
        weight_decay: L2, in the gradient.
        matrix_eps: ε of the statistics' start, ε I.
        preconditioning_compute_steps: steps between inverse roots.

    Raises:
        UserError: the package is not installed.
    """
    built: Optimizer = _of_package("Shampoo")(
        params,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        matrix_eps=matrix_eps,
        preconditioning_compute_steps=preconditioning_compute_steps,
    )
    built.defaults["step"] = preconditioning_compute_steps - 1  # of groups that are added later
    for group in built.param_groups:
        group["step"] = preconditioning_compute_steps - 1
    return built


def soap(
    params: ParamsT,
    lr: float,
    *,
    betas: tuple[float, float] = (0.95, 0.95),
    weight_decay: float = 1e-2,
    precondition_frequency: int = 10,
    max_precondition_dim: int = 10000,
    eps: float = 1e-8,
) -> Optimizer:
    """SOAP (Vyas et al. 2024): Adam in the eigenbasis of Shampoo's preconditioners.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: of Adam; the second also averages the preconditioners' statistics.
        weight_decay: decoupled.
        precondition_frequency: steps between updates of the eigenbases.
        max_precondition_dim: dimensions above it are left as they are.
        eps: of Adam.

    Raises:
        UserError: the package is not installed.
    """
    built: Optimizer = _of_package("SOAP")(
        params,
        lr=lr,
        betas=betas,
        weight_decay=weight_decay,
        precondition_frequency=precondition_frequency,
        max_precondition_dim=max_precondition_dim,
        eps=eps,
    )
    return built


def _of_package(name: str) -> Any:
    try:
        package = importlib.import_module("pytorch_optimizer")
    except ImportError as error:
        raise UserError(
            f"{name} comes from the package pytorch-optimizer, which is not installed: "
            "python -m pip install --constraint constraints.txt --editable '.[shampoo]'"
        ) from error
    return getattr(package, name)
