"""The registry: a card for each module of the zoo, and `create` by name.

Families are looked into lazily: a name is found through the family package's `__all__`, and only
the file that defines it is imported.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import nn

from torchzoo.catalogue import families, suggest
from torchzoo.errors import UnknownNameError

M = TypeVar("M", bound=type[nn.Module])

CAPABILITIES = ("stateful", "stochastic", "couples-batch", "data-dependent-shape", "fixed-rank")
"""What a card may declare with a reason; `torchzoo.testing` says which checks each one lifts."""


@dataclass(frozen=True)
class Example:
    """Constructor arguments and inputs, small enough for tests.

    Attributes:
        kwargs: Keyword arguments of the constructor. May hold modules, for layers built of layers.
        inputs: Positional inputs of `forward`; floating-point ones get gradients in the checks.
        batch_dims: How many leading dimensions of each input are batch dimensions.
        bad_options: For some constructor arguments a value that must raise a ValueError which
            names the argument.
    """

    kwargs: Mapping[str, Any]
    inputs: tuple[torch.Tensor, ...]
    batch_dims: int = 1
    bad_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """What a module is measured against, at a size where speed counts.

    Attributes:
        kwargs: Keyword arguments of the constructor.
        inputs: Positional inputs of `forward`.
        peers: By name, what builds a module for the same job from the same keyword arguments; or
            layers of the zoo and classes of torch as `torchzoo bench --against` takes them, the
            former with those keyword arguments that they know.
    """

    kwargs: Mapping[str, Any]
    inputs: tuple[torch.Tensor, ...]
    peers: Mapping[str, Callable[..., nn.Module]] | Sequence[str] = ()


@dataclass(frozen=True)
class Card:
    """What the zoo knows about a registered module."""

    cls: type[nn.Module]
    paper: int | None
    example: Callable[[], Example]
    exempt: Mapping[str, str]
    compare: Callable[[], Comparison] | str | None = None

    @property
    def name(self) -> str:
        return self.cls.__name__

    @property
    def family(self) -> str:
        """The family package of a module of the zoo; empty for a user's own module."""
        package, _, rest = self.cls.__module__.partition(".")
        return rest.split(".")[0] if package == "torchzoo" else ""

    @property
    def key(self) -> str:
        """The name that always finds it: `family.Name`, or `Name` for a user's own module."""
        return f"{self.family}.{self.name}" if self.family else self.name


_cards: dict[str, Card] = {}


def register(
    *,
    paper: int | None = None,
    example: Callable[[], Example],
    exempt: Mapping[str, str] | None = None,
    compare: Callable[[], Comparison] | str | None = None,
) -> Callable[[M], M]:
    """Class decorator that gives a module its card.

    Args:
        paper: The paper's number; None for an engine piece that belongs to no single paper.
        example: Makes a fresh `Example`.
        exempt: Capabilities (see `CAPABILITIES`) that lift checks of the contract, each with the
            reason, shown by `torchzoo info`.
        compare: Makes the `Comparison` that `torchzoo bench` runs, or says why the module has no
            peers.

    Raises:
        ValueError: An unknown capability, an empty reason, or a name that the family already has.
    """
    lifted = dict(exempt or {})
    for capability, reason in lifted.items():
        if capability not in CAPABILITIES:
            raise ValueError(f"exempt: unknown capability {capability!r}, expected {CAPABILITIES}")
        if not reason.strip():
            raise ValueError(f"exempt: {capability!r} needs a reason")

    def decorate(cls: M) -> M:
        card = Card(cls, paper, example, lifted, compare)
        old = _cards.get(card.key)
        if old and (old.cls.__module__, old.cls.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"{card.key} is registered twice: {old.cls.__module__}, {cls.__module__}"
            )
        _cards[card.key] = card
        return cls

    return decorate


@cache
def _public_names() -> dict[str, str]:
    """For each `family.Name` that a family package exports, the family; imports no unit."""
    package = import_module("torchzoo")
    here = {module.name for module in pkgutil.iter_modules(package.__path__)}
    return {
        f"{family}.{name}": family
        for family in families()
        if family in here
        for name in import_module(f"torchzoo.{family}").__all__
    }


def card(name: str) -> Card:
    """The card of a module by `Name` or `family.Name`.

    Raises:
        UnknownNameError: No module, or modules of several families, have this name.
    """
    if name in _cards:
        return _cards[name]
    keys = [key for key in _public_names() if name in (key, key.partition(".")[2])]
    if len(keys) > 1:
        raise UnknownNameError(f"{name!r} is in several families: {', '.join(sorted(keys))}")
    if keys:
        family, _, unit = keys[0].partition(".")
        thing = getattr(import_module(f"torchzoo.{family}"), unit)
        key = f"{family}.{getattr(thing, '__name__', unit)}"  # another name than its own, it may be
        if key in _cards:
            return _cards[key]
        raise UnknownNameError(f"{keys[0]} is a function, not a module that can be created")
    known = [key.partition(".")[2] for key in _public_names()] + list(_cards)
    raise UnknownNameError(f"no module {name!r}{suggest(name, known)}")


def registered() -> list[Card]:
    """The cards of what is imported so far; imports nothing."""
    return list(_cards.values())


def create(name: str, **kwargs: Any) -> nn.Module:
    """Build a module of the zoo by name.

    Args:
        name: `Name`, or `family.Name` where several families have the name.
        **kwargs: Arguments of its constructor.

    Raises:
        UnknownNameError: No such module; the message suggests the nearest names.

    Example:
        >>> create("GaussianAdaptiveAttention", dim=64).dim
        64
    """
    return card(name).cls(**kwargs)


def cards(family: str | None = None) -> list[Card]:
    """All cards of the zoo (or of one family), ordered by key; imports the families' units.

    Raises:
        UnknownNameError: `family` is not a family that is built.
    """
    built = sorted(set(_public_names().values()))
    if family is not None and family not in built:
        raise UnknownNameError(f"no family {family!r}{suggest(family, built)}")
    for key, home in _public_names().items():
        if family in (None, home):
            getattr(import_module(f"torchzoo.{home}"), key.partition(".")[2])
    return [c for _, c in sorted(_cards.items()) if family in (None, c.family)]


def names(family: str | None = None) -> list[str]:
    """Names of the registered modules, of one family or all; see `cards`."""
    return [c.name for c in cards(family)]
