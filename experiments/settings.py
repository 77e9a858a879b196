"""A config node, read into a frozen dataclass whose fields say which keys and types are valid.

A key that the dataclass does not know, a required key that is absent and a value of the wrong type
are the user's mistakes and become one line each; the meaning of the values is checked by the
dataclass's owner.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.errors import UserError, nearest

Settings = TypeVar("Settings")
Node = DictConfig | Mapping[str, Any]


def node_name(node: Node, where: str, valid: typing.Iterable[str]) -> str:
    """Read the key `name`, which says what the node is about.

    Args:
        node: the config node.
        where: the node's place in the config, for messages (`dataset`).
        valid: the names that would do.

    Raises:
        UserError: `name` is absent or not one of `valid`.
    """
    names = list(valid)
    name = node.get("name")
    if name is None:
        raise UserError(f"{where}.name is missing; valid: {', '.join(sorted(names))}")
    if name not in names:
        raise UserError(f"unknown {where}.name = {name!r}; {nearest(str(name), names)}")
    return str(name)


def read_settings(kind: type[Settings], node: Node, where: str) -> Settings:
    """Build `kind` from a config node, with every key and type checked.

    Args:
        kind: a dataclass; a field without a default is a required key. Field types may be bool,
            int, float, str, Literal, tuple[T, ...] and T | None of these.
        node: the config node, or a plain mapping.
        where: the node's place in the config, for messages (`dataset`).

    Returns:
        The settings; a list became a tuple, an int in a float's place a float.

    Raises:
        UserError: unknown key, missing key, wrong type or an interpolation that has no value.
    """
    if not dataclasses.is_dataclass(kind):
        raise TypeError(f"{kind!r} is not a dataclass")
    values = _plain(node, where)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in fields:
            raise UserError(f"unknown key {where}.{key}; {nearest(str(key), fields)}")
    for name, field in fields.items():
        optional = (
            field.default is not dataclasses.MISSING
            or field.default_factory is not dataclasses.MISSING
        )
        if name not in values and not optional:
            raise UserError(f"{where}.{name} is missing; it must be {_describe(hints[name])}")
    converted = {
        key: _convert(value, hints[key], f"{where}.{key}") for key, value in values.items()
    }
    return typing.cast(Settings, kind(**converted))


def _plain(node: Node, where: str) -> dict[str, Any]:
    """The node as a plain dictionary, interpolations resolved."""
    if not isinstance(node, DictConfig):
        return dict(node)
    try:
        plain = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{where} in the config cannot be resolved: {reason}") from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _convert(value: Any, hint: Any, key: str) -> Any:
    """Check `value` against a type and return it as that type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    wrong = UserError(f"{key} = {value!r} must be {_describe(hint)}")
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = [argument for argument in arguments if argument is not type(None)]
        try:
            return _convert(value, inner, key)
        except UserError:
            raise wrong from None
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{key} = {value!r}; {nearest(str(value), map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise wrong
        return tuple(
            _convert(item, arguments[0], f"{key}[{index}]") for index, item in enumerate(value)
        )
    # bool is an int to Python, but `train_limit: true` is a mistake.
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise wrong
    return value


def _describe(hint: Any) -> str:
    """A type in words, for messages."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        inner = [_describe(argument) for argument in arguments if argument is not type(None)]
        return " or ".join([*inner, "null"])
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        return f"a list, each entry {_describe(arguments[0])}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return words[hint]
