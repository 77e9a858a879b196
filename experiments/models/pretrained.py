"""Weights to start from: a file, or the hub that publishes them.

Weights of another image or patch size are resampled as timm does it (positions bicubically, patches
by FlexiViT's pseudo-inverse); the classifier is left out where the classes are others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.errors import UserError
from experiments.given import user_path

_CLASSIFIER = "head."


def load_pretrained(model: nn.Module, *, hub_name: str, path: str | None) -> None:
    """Replace a vision transformer's weights by pretrained ones.

    Args:
        model: timm's; its classifier keeps its own weights where the shapes differ.
        hub_name: timm's name of the network, downloaded where there is no file.
        path: a file of a state dict (`.safetensors`, or what torch.save wrote); None for the hub.

    Raises:
        UserError: the file is missing or no state dict, its weights do not fit, or the hub gives
            none.
    """
    source = f"{hub_name} of the hub" if path is None else f"model.weights={path}"
    state = _from_hub(hub_name) if path is None else _from_file(user_path(path, "model.weights"))
    if "patch_embed.proj.weight" not in state:
        raise UserError(f"{source} holds no vision transformer: no patch_embed.proj.weight")
    state = _resampled(state, model, source)
    wanted = model.state_dict()
    state = {
        key: value
        for key, value in state.items()
        if not (key.startswith(_CLASSIFIER) and value.shape != wanted[key].shape)
    }
    for key in sorted(wanted.keys() | state.keys()):
        if key not in state and not key.startswith(_CLASSIFIER):
            raise UserError(f"{source} has no {key}, which the network has")
        if key in state and key not in wanted:
            raise UserError(f"{source} has {key}, which the network has not")
        if key in state and state[key].shape != wanted[key].shape:
            raise UserError(
                f"{source} has {key} of shape {tuple(state[key].shape)}, the network of shape "
                f"{tuple(wanted[key].shape)}: set the keys of model to what was trained"
            )
    model.load_state_dict(state, strict=False)


def _from_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"model.weights={path} does not exist: expected a file of weights")
    state: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # every reader has errors of its own
        raise UserError(f"model.weights={path} cannot be read: {_first_line(error)}") from error
    state = state.get("model", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"model.weights={path} holds no state dict of tensors")
    return dict(state)


def _from_hub(name: str) -> dict[str, Tensor]:
    import timm

    try:
        state: dict[str, Tensor] = timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # of the network, of the hub and of its cache
        raise UserError(
            f"the weights of {name} cannot be downloaded ({_first_line(error)}): fetch the file "
            "elsewhere and set model.weights to it, or set model.pretrained=false"
        ) from error
    return state


def _resampled(state: dict[str, Tensor], model: nn.Module, source: str) -> dict[str, Tensor]:
    from timm.models.vision_transformer import checkpoint_filter_fn

    try:
        # typed for one class of timm's
        resample: Any = checkpoint_filter_fn
        resampled: dict[str, Tensor] = resample(
            state, model, interpolation="bicubic", antialias=True
        )
    except (RuntimeError, ValueError, KeyError, AssertionError) as error:
        raise UserError(f"{source} does not fit the network: {_first_line(error)}") from error
    return resampled


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
