"""From the config of an optimizer to the optimizer: one builder for every optimizer of the suite.

A config is `name`, `_target_` and the keyword arguments of the callable that `_target_` names. The
callable gets `model.named_parameters()` (or, with `takes_model: true`, the model itself) and then
those arguments. A new optimizer is therefore one config file and, where its class wants anything
else, one builder function in this package that the config names.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from experiments.errors import UserError, nearest
from experiments.runs.deciding import LATER_KEYS

_NOT_ARGUMENTS = ("name", "_target_", "takes_model")


def build_optimizer(cfg: Mapping[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer that a config describes.

    Args:
        cfg: the config's `optimizer`: `name`, `_target_` (dotted path of a callable), optionally
            `takes_model`, and keyword arguments; lists arrive at the callable as tuples.
        model: the network to train.

    Raises:
        UserError: the callable does not exist, an argument is no argument of it, or it refuses a
            value; the message names the key and what would do.
    """
    values: Any = OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig) else cfg
    name = values.get("name", "(unnamed)")
    target = values.get("_target_")
    if not isinstance(target, str):
        raise UserError(
            f"optimizer {name!r} has _target_={target!r}: it must be the dotted path of a callable,"
            " such as torch.optim.SGD"
        )
    build = _import_callable(target, optimizer=name)
    arguments = {
        str(key): _tuples_for_lists(value)
        for key, value in values.items()
        if key not in _NOT_ARGUMENTS
    }
    if target.startswith("mlbfgs."):  # what the key's absence stands for, not the class's default
        arguments.setdefault("variant", LATER_KEYS["optimizer.variant"])
    _check_arguments(build, arguments, optimizer=name, target=target)
    subject: nn.Module | Iterator[tuple[str, nn.Parameter]]
    subject = model if values.get("takes_model", False) else model.named_parameters()
    try:
        optimizer = build(subject, **arguments)
    except (TypeError, ValueError) as error:
        # Torch compares before it checks types, so lr='big' is a TypeError and lr=-1 a ValueError.
        shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        reason = " ".join(str(error).split())
        raise UserError(f"optimizer {name!r} ({target}) refuses {shown}: {reason}") from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(
            f"optimizer {name!r}: _target_={target} made a {type(optimizer).__name__}, not a"
            " torch.optim.Optimizer"
        )
    return optimizer


def _import_callable(path: str, *, optimizer: str) -> Callable[..., Any]:
    """Import `package.module.attribute`."""
    module_path, _, attribute = path.rpartition(".")
    try:
        module = importlib.import_module(module_path)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"optimizer {optimizer!r}: _target_={path} cannot be imported ({error}); it must be the"
            " dotted path of a callable, such as torch.optim.SGD"
        ) from error
    found: Callable[..., Any] | None = getattr(module, attribute, None)
    if found is None or not callable(found):
        callables = _public_callables(module)
        raise UserError(
            f"optimizer {optimizer!r}: {module_path} has no callable {attribute!r}; "
            f"{nearest(attribute, callables)}"
        )
    return found


def _public_callables(module: ModuleType) -> list[str]:
    return [
        name for name, value in vars(module).items() if callable(value) and not name.startswith("_")
    ]


def _check_arguments(
    build: Callable[..., Any], arguments: Mapping[str, Any], *, optimizer: str, target: str
) -> None:
    """Refuse a keyword that the callable does not have, before it is called."""
    parameters = list(inspect.signature(build).parameters.values())
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    # The first parameter is the one that takes the parameters or the model.
    valid = [parameter.name for parameter in parameters[1:] if parameter.kind in by_keyword]
    for key in arguments:
        if key not in valid:
            raise UserError(
                f"optimizer.{key} is no argument of optimizer {optimizer!r} ({target}); "
                f"{nearest(key, valid)}"
            )


def _tuples_for_lists(value: Any) -> Any:
    """Turn YAML's lists into the tuples that optimizers expect, at every depth."""
    if isinstance(value, list | tuple):
        return tuple(_tuples_for_lists(item) for item in value)
    return value
