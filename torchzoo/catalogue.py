"""The catalogue: one row a paper, read from papers.toml, plus the ledger of tested claims.

What the zoo covers is computed here from the rows and from what imports, never typed by hand.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

from torchzoo.errors import CatalogueError, UnknownNameError

_UNIT = re.compile(r"torchzoo(\.\w+)+:[A-Za-z_]\w*")
_MODULE = re.compile(r"torchzoo(\.\w+)+")


@dataclass(frozen=True)
class Paper:
    """One row of the catalogue.

    Attributes:
        number: The paper's number in the zoo, unique.
        title: The paper's title.
        family: The family package it belongs to, for example `"moe"`.
        summary: What it is, in one line.
        claim: The headline claim, in figures where the paper states some.
        units: Import paths `package.module:Name` of what is built.
        experiment: Module path of the experiment, or an empty string.
    """

    number: int
    title: str
    family: str
    summary: str
    claim: str
    units: tuple[str, ...] = field(default=())
    experiment: str = ""

    @property
    def slug(self) -> str:
        """The unit's file stem where it is built, else the title in lower-case words."""
        if self.experiment:
            return self.experiment.rsplit(".", 1)[1].replace("_", "-")
        return "-".join(re.findall(r"[a-z0-9]+", self.title.lower())[:6])

    @property
    def unit_names(self) -> tuple[str, ...]:
        """The class and function names of the units."""
        return tuple(unit.partition(":")[2] for unit in self.units)

    @property
    def built(self) -> bool:
        """Whether the row names units and an experiment and all of them import."""
        return bool(self.units and self.experiment) and not self.missing()

    def missing(self) -> list[str]:
        """The units and the experiment of this row that can't be imported."""
        return [path for path in (*self.units, self.experiment) if path and not _imports(path)]


@cache
def _imports(path: str) -> bool:
    module, _, name = path.partition(":")
    try:
        return hasattr(import_module(module), name) if name else bool(import_module(module))
    except ImportError:
        return False


def _text(row: Mapping[str, Any], key: str, where: str, *, empty: bool = False) -> str:
    value = row.get(key, "" if empty else None)
    one_line = isinstance(value, str) and "".join(value.splitlines()) == value
    if not one_line or not (empty or value.strip()):
        kind = "one line of text" if empty else "one non-empty line of text"
        raise CatalogueError(f"{where}: {key} must be {kind}, got {value!r}")
    return value


def _paper(row: Any, index: int) -> Paper:
    where = f"papers.toml row {index}"
    if not isinstance(row, dict):
        raise CatalogueError(f"{where}: expected a table, got {type(row).__name__}")
    known = set(Paper.__dataclass_fields__)
    if unknown := sorted(set(row) - known):
        raise CatalogueError(f"{where}: unknown key {unknown[0]!r}, expected {sorted(known)}")
    number = row.get("number")
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise CatalogueError(f"{where}: number must be a positive integer, got {number!r}")
    where = f"{where} (paper {number})"
    family = _text(row, "family", where)
    if not re.fullmatch(r"[a-z]+", family):
        raise CatalogueError(f"{where}: family must be a lower-case word, got {family!r}")
    units = row.get("units", [])
    if not isinstance(units, list) or not all(
        isinstance(unit, str) and _UNIT.fullmatch(unit) for unit in units
    ):
        raise CatalogueError(
            f"{where}: units must be a list of 'torchzoo.module:Name', got {units!r}"
        )
    experiment = _text(row, "experiment", where, empty=True)
    if experiment and not _MODULE.fullmatch(experiment):
        raise CatalogueError(f"{where}: experiment must be 'torchzoo.module', got {experiment!r}")
    return Paper(
        number,
        _text(row, "title", where),
        family,
        _text(row, "summary", where),
        _text(row, "claim", where),
        tuple(units),
        experiment,
    )


def parse(text: str) -> tuple[Paper, ...]:
    """Parse the text of a papers.toml into papers ordered by number.

    Raises:
        CatalogueError: The text is no TOML, or a row is malformed or repeats a number; the
            message names the row, counted from 1.
    """
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # huge integers and deep nesting raise these
        raise CatalogueError(f"papers.toml is no valid TOML: {error}") from error
    rows = table.get("papers")
    if not isinstance(rows, list):
        raise CatalogueError("papers.toml: expected an array of tables [[papers]]")
    found = [_paper(row, index) for index, row in enumerate(rows, 1)]
    for number, count in Counter(paper.number for paper in found).items():
        if count > 1:
            index = max(i for i, paper in enumerate(found, 1) if paper.number == number)
            raise CatalogueError(f"papers.toml row {index} (paper {number}): number appears twice")
    return tuple(sorted(found, key=lambda paper: paper.number))


@cache
def papers() -> tuple[Paper, ...]:
    """All papers of the shipped catalogue, by number."""
    return parse(files("torchzoo").joinpath("papers.toml").read_text(encoding="utf-8"))


def families() -> tuple[str, ...]:
    """The families that the catalogue names, in alphabetical order."""
    return tuple(sorted({paper.family for paper in papers()}))


def find(key: str | int) -> Paper:
    """The paper with this number, slug, unit name or exact title.

    Raises:
        UnknownNameError: Nothing matches; the message holds the nearest names.
    """
    text = str(key).strip()
    if text.isdecimal():
        for paper in papers():
            if paper.number == int(text):
                return paper
        raise UnknownNameError(f"no paper {text}; numbers run from 1 to {papers()[-1].number}")
    wanted = text.lower().replace("_", "-")
    keys: dict[str, Paper] = {}
    for paper in papers():
        for name in (paper.slug, paper.title, *paper.unit_names):
            keys.setdefault(name.lower().replace("_", "-"), paper)
    if wanted in keys:
        return keys[wanted]
    known = [name for paper in papers() for name in (paper.slug, *paper.unit_names)]
    raise UnknownNameError(f"no paper or unit {text!r}{suggest(text, known)}")


def search(text: str) -> list[Paper]:
    """Papers that hold every word of `text` in title, summary, claim, family or unit names."""
    words = text.lower().split()

    def holds(paper: Paper) -> bool:
        parts = (paper.title, paper.summary, paper.claim, paper.family, *paper.unit_names)
        hay = " ".join(parts).lower()
        return all(word in hay for word in words)

    return [paper for paper in papers() if holds(paper)]


def suggest(wrong: str, known: Iterable[str]) -> str:
    """A phrase `; did you mean …?` with the nearest known names, or an empty string."""
    shown = {name.lower(): name for name in known}
    near = difflib.get_close_matches(wrong.lower(), list(shown), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(shown[name] for name in near)}?" if near else ""


def claims(number: int) -> list[dict[str, Any]]:
    """The ledger's entries of one paper: `statement`, `tolerance`, `status` and `test`.

    A status is `holds`, `refuted` or `untested`, as the last recorded test run left it.
    """
    path = files("torchzoo").joinpath("claims.json")
    if not path.is_file():
        return []
    ledger = json.loads(path.read_text(encoding="utf-8"))
    return [entry for entry in ledger["claims"] if entry["paper"] == number]


def recorded_result(paper: Paper) -> dict[str, Any] | None:
    """The committed full-budget result of the paper's experiment, or None."""
    if not paper.experiment:
        return None
    *_, family, unit = paper.experiment.split(".")
    path = Path(str(files("torchzoo"))) / "experiments" / family / "results" / f"{unit}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
