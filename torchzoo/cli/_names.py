"""What NAME on the command line stands for, found without importing torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

from torchzoo import catalogue
from torchzoo.catalogue import Paper, families, find, suggest
from torchzoo.errors import UnknownNameError


@dataclass(frozen=True)
class Subject:
    """A paper with its units, or one unit with the paper it belongs to (None: an engine piece).

    Attributes:
        paper: The paper.
        units: Import paths `package.module:Name`.
        single: Whether a unit was named rather than the paper.
    """

    paper: Paper | None
    units: tuple[str, ...]
    single: bool


def resolve(name: str) -> Subject:
    """What a paper's number, slug or title, a unit's `Name`, or `family.Name` stands for.

    Raises:
        UnknownNameError: Nothing, or units of several families; the message says what is near.
    """
    exports = _exports()
    keys = [key for key in exports if name in (key, key.partition(".")[2])]
    if len(keys) > 1:
        raise UnknownNameError(f"{name!r} is in several families: {', '.join(sorted(keys))}")
    if keys:
        return Subject(_owner(keys[0]), (exports[keys[0]],), single=True)
    try:
        paper = find(name)
        return Subject(paper, paper.units, single=False)
    except UnknownNameError as error:
        if name.strip().isdecimal():
            raise
        if name in families():
            hint = f"torchzoo list --family {name}"
            raise UnknownNameError(f"{name!r} is a family; see {hint}") from error
        units = exports if "." in name else (key.partition(".")[2] for key in exports)
        known = [*units, *(paper.slug for paper in catalogue.papers())]
        raise UnknownNameError(f"no paper or unit {name!r}{suggest(name, known)}") from error


def check_family(family: str) -> None:
    """Raise UnknownNameError, with the nearest names, unless the catalogue has the family."""
    if family not in families():
        raise UnknownNameError(f"no family {family!r}{suggest(family, families())}")


def _exports() -> dict[str, str]:
    """For each `family.Name` that a family package exports, its import path."""
    return {
        f"{family}.{name}": f"torchzoo.{family}:{name}"
        for family in families()
        if find_spec(f"torchzoo.{family}")
        for name in import_module(f"torchzoo.{family}").__all__
    }


def _owner(key: str) -> Paper | None:
    family, _, name = key.partition(".")
    mine = [p for p in catalogue.papers() if p.family == family and name in p.unit_names]
    return mine[0] if mine else None
