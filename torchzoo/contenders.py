"""A layer of the zoo and its peers, built for a benchmark from text."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchzoo import registry
from torchzoo.catalogue import suggest
from torchzoo.errors import TorchzooError, UnknownNameError
from torchzoo.options import parse_options

_LAYER = re.compile(r"\s*([\w.]+)\s*(?:\((.*)\))?\s*", re.DOTALL)


class Contest(NamedTuple):
    """Modules that do the same job on the same inputs."""

    name: str
    modules: dict[str, nn.Module]
    inputs: list[Tensor]


def contests(
    text: str,
    *,
    against: Sequence[str] = (),
    shapes: Sequence[str] = (),
    device: torch.device | str = "cpu",
) -> list[Contest]:
    """Build a layer and its peers, once for each size of the inputs.

    Args:
        text: `Layer` or `Layer(option=value, …)`; options that are not given are those of the
            comparison on the layer's card, or else of its example.
        against: Names of peers on the card, other layers of the zoo, or dotted names of classes,
            the latter two with options if need be. None: all peers on the card.
        shapes: `8x1024x256`, of several inputs `8x16,8x64x16`. None: those of the card.
        device: Where the modules and the inputs are.

    Raises:
        UnknownNameError: No such layer or peer.
        TorchzooError: Shapes of another form, options that a constructor refuses, or inputs that
            a module refuses.

    Example:
        >>> contest, = contests("CRReLU", against=["torch.nn.ReLU"], shapes=["4x8"])
        >>> list(contest.modules), contest.inputs[0].shape
        (['CRReLU', 'torch.nn.ReLU'], torch.Size([4, 8]))
    """
    name, options = _parse(text)
    card = registry.card(name)
    given = card.compare() if callable(card.compare) else registry.Comparison(*_example(card))
    kwargs = {**given.kwargs, **options}
    rivals = list(against) or list(given.peers)
    makers = {text: lambda: card.cls(**kwargs)}
    makers |= {rival: maker(rival, given.peers, kwargs) for rival in rivals}
    modules = {label: _built(label, make).to(device) for label, make in makers.items()}
    found = []
    for shape in shapes or [_name_of(given.inputs)]:
        inputs = [_like(x, size, device) for x, size in _sizes(shape, given.inputs)]
        for label, module in modules.items():
            _try(label, module, inputs, shape)
        found.append(Contest(shape, modules, inputs))
    return found


def why_no_peers(text: str) -> str | None:
    """The reason on a layer's card, if it has no peers."""
    compare = registry.card(_parse(text)[0]).compare
    return compare if isinstance(compare, str) else None


def _example(card: registry.Card) -> tuple[Any, Any]:
    example = card.example()
    return example.kwargs, example.inputs


def _parse(text: str) -> tuple[str, dict[str, Any]]:
    match = _LAYER.fullmatch(text)
    if match is None:
        raise TorchzooError(f"{text!r}: expected Layer or Layer(option=value)")
    return match[1], parse_options(match[2] or "", repr(text))


def maker(
    rival: str,
    peers: Mapping[str, Callable[..., nn.Module]] | Sequence[str],
    kwargs: dict[str, Any],
) -> Callable[[], nn.Module]:
    """What builds a peer: of the card, of the zoo, or by a dotted name."""
    if isinstance(peers, Mapping) and rival in peers:
        return lambda: peers[rival](**kwargs)
    name, options = _parse(rival)
    try:
        cls: Any = registry.card(name).cls
        known = inspect.signature(cls).parameters
        shared = {key: value for key, value in kwargs.items() if key in known}
        return lambda: cls(**{**shared, **options})
    except UnknownNameError:
        module, _, last = name.rpartition(".")
        try:
            cls = getattr(import_module(module), last)
        except (ImportError, AttributeError, ValueError):
            cls = None
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise UnknownNameError(
                f"no peer {name!r}: expected one of {sorted(peers)}, a layer of the zoo, or a "
                f"module such as torch.nn.GELU{suggest(name, list(peers))}"
            ) from None
        return lambda: cls(**options)


def _built(label: str, make: Callable[[], nn.Module]) -> nn.Module:
    try:
        return make()
    except (TypeError, ValueError) as error:
        raise TorchzooError(f"{label}: {error}") from error


def _name_of(inputs: Sequence[Tensor]) -> str:
    return ",".join("x".join(map(str, x.shape)) for x in inputs)


def _sizes(text: str, inputs: Sequence[Tensor]) -> list[tuple[Tensor, list[int]]]:
    parts = text.split(",")
    if not re.fullmatch(r"\d+(x\d+)*(,\d+(x\d+)*)*", text) or len(parts) != len(inputs):
        raise TorchzooError(
            f"shapes {text!r}: expected {len(inputs)} as in {_name_of(inputs)!r}, comma between"
        )
    return [(x, [int(n) for n in part.split("x")]) for x, part in zip(inputs, parts, strict=True)]


def _like(x: Tensor, size: list[int], device: torch.device | str) -> Tensor:
    """The card's input, or random numbers of another size; integers up to the largest in `x`."""
    if list(x.shape) == size:
        found = x.detach().to(device, copy=True)
    elif x.is_floating_point() or x.is_complex():
        found = torch.randn(size, dtype=x.dtype, device=device)
    else:
        found = torch.randint(0, int(x.max()) + 1, size, device=device).to(x.dtype)
    return found.requires_grad_(x.is_floating_point() or x.is_complex())


def _try(label: str, module: nn.Module, inputs: Sequence[Tensor], shape: str) -> None:
    """Run once, so that what doesn't fit is said before anything is timed."""
    try:
        with torch.no_grad():
            module(*inputs)
    except (RuntimeError, ValueError, TypeError) as error:
        raise TorchzooError(f"{label} on inputs of shapes {shape}: {error}") from error
