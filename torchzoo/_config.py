"""Constructor arguments as JSON: what `config.json` holds, and how a module is built from it.

Finite numbers, strings, booleans, None and lists are themselves. Every JSON object is one of
`{"class", "config"}` for a module, `{"tuple"}`, `{"dict"}`, `{"namedtuple", "fields"}`, and
`{"float"}` for infinities and NaN. A dtype is its name, under arguments called `dtype` or
`..._dtype` only; `device` is left out, as it is the loader's choice.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import nn

from torchzoo import registry
from torchzoo.errors import WeightsError

_PATH = re.compile(r"(torchzoo(?:\.\w+)+):(\w+)")


class Unsaveable(NamedTuple):
    """Stands for a value that JSON can't hold, so that only saving the module is an error."""

    what: str


def class_path(cls: type) -> str:
    """The import path `package.module:Name` of a class."""
    return f"{cls.__module__}:{cls.__qualname__}"


@lru_cache(maxsize=256)
def _signature(cls: Any) -> inspect.Signature:
    """The signature of the constructor, without `self`."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())
    return inspect.Signature(parameters[1:])


def capture(cls: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The encoded arguments of the call `cls(*args, **kwargs)`, defaults included.

    The result shares nothing with the arguments. Arguments that don't fit the signature give an
    empty dict: the constructor is about to raise the better error. A default that JSON can't
    hold, such as a function, is left out: the constructor has it.
    """
    signature = _signature(cls)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:
        return {}
    bound.apply_defaults()
    encoded = {name: encode(value, name) for name, value in bound.arguments.items()}
    return {
        name: value
        for name, value in encoded.items()
        if name != "device"
        and not (
            bound.arguments[name] is signature.parameters[name].default and any(unsaveable(value))
        )
    }


def encode(value: Any, name: str = "") -> Any:
    """Encode the value of argument `name`; what JSON can't hold becomes `Unsaveable`."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, torch.dtype) and name.endswith("dtype"):
        return str(value).removeprefix("torch.")
    if isinstance(value, nn.Module) and "_zoo_config" in value.__dict__:
        return spec(value)
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, tuple):
        return _encode_tuple(value)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: encode(item) for key, item in value.items()}}
    if isinstance(value, torch.Tensor):
        return Unsaveable(f"a tensor of shape {tuple(value.shape)}")
    label = getattr(value, "__qualname__", None)
    return Unsaveable(f"{type(value).__qualname__} {label}" if label else type(value).__qualname__)


def _encode_tuple(value: tuple[Any, ...]) -> Any:
    items = [encode(item) for item in value]
    if not hasattr(value, "_fields"):
        return {"tuple": items}
    path = class_path(type(value))
    if not _PATH.fullmatch(path):
        return Unsaveable(f"named tuple {path}, which is not torchzoo's")
    return {"namedtuple": path, "fields": items}


def spec(module: nn.Module) -> dict[str, Any]:
    """The encoded form of a `ZooModel`: its class and the arguments it was built with."""
    return {"class": class_path(type(module)), "config": copy.deepcopy(module._zoo_config)}


def unsaveable(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Where in an encoded value something can't be saved, and what it is."""
    if isinstance(value, Unsaveable):
        yield path, value.what
    elif isinstance(value, dict):
        for key, item in value.items():
            step = "" if key in ("config", "tuple", "dict", "fields") else f".{key}"
            yield from unsaveable(item, path + step)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from unsaveable(item, f"{path}[{index}]")


def decode(value: Any, name: str = "", known: type | None = None) -> Any:
    """The value that `encode` made `value` from; `known` is a class allowed beside the zoo's.

    Raises:
        WeightsError: The value is none of the forms, or names a class that is not allowed.
    """
    match value:
        case list():
            return [decode(item, known=known) for item in value]
        case {"class": str(path), "config": dict(config)}:
            return build(path, config, known=known)
        case {"tuple": list(items)}:
            return tuple(decode(item, known=known) for item in items)
        case {"dict": dict(items)}:
            return {key: decode(item, known=known) for key, item in items.items()}
        case {"namedtuple": str(path), "fields": list(items)}:
            return _find(path, tuple)(*(decode(item, known=known) for item in items))
        case {"float": "inf" | "-inf" | "nan" as text}:
            return float(text)
        case dict():
            raise WeightsError(f"unknown object with keys {sorted(value)} for {name!r}")
        case str() if name.endswith("dtype"):
            dtype = getattr(torch, value, None)
            if not isinstance(dtype, torch.dtype):
                raise WeightsError(f"{name}: no dtype {value!r}")
            return dtype
    return value


def build(
    path: str,
    config: Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    known: type | None = None,
) -> nn.Module:
    """Build the module of a spec.

    Args:
        path: The class, as `class_path` gives it.
        config: Its encoded arguments.
        overrides: Arguments, not encoded, that replace those of the config.
        known: A class that is allowed although neither the zoo's nor registered.

    Raises:
        WeightsError: The class is not allowed, or can't be built from these arguments.
    """
    cls: Any = find_class(path, known)
    signature = _signature(cls)
    if unknown := sorted(set(config) - set(signature.parameters)):
        raise WeightsError(f"{path} has no argument {unknown[0]!r}")
    bound = inspect.BoundArguments(signature, OrderedDict())
    bound.arguments.update({key: decode(value, key, known) for key, value in config.items()})
    more = dict(overrides or {})
    bound.arguments.update(
        {key: more.pop(key) for key in list(more) if key in signature.parameters}
    )
    try:
        return cls(*bound.args, **bound.kwargs, **more)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{path} can't be built from this config: {error}") from error


def find_class(path: str, known: type | None = None) -> type[nn.Module]:
    """The module class at `path`, if it is `known`, registered, or a `ZooModel` of the zoo.

    Raises:
        WeightsError: It is none of those; nothing outside torchzoo is ever imported.
    """
    if known is not None and class_path(known) == path:
        return known
    for card in registry.registered():
        if class_path(card.cls) == path:
            return card.cls
    return _find(path, import_module("torchzoo.hub").ZooModel)


def _find(path: str, base: type) -> type[Any]:
    match = _PATH.fullmatch(path)
    if not match:
        raise WeightsError(
            f"class {path!r} is neither torchzoo's nor registered; import what registers it"
        )
    try:
        found = getattr(import_module(match[1]), match[2], None)
    except ImportError as error:
        raise WeightsError(f"class {path!r} can't be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, base) and class_path(found) == path):
        raise WeightsError(f"{path!r} is not a {base.__name__} class")
    return found
