"""`torchzoo cite`: BibTeX of a paper and of torchzoo."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torchzoo._docstring import sections
from torchzoo.catalogue import Paper
from torchzoo.cli._names import resolve
from torchzoo.cli._output import Json, Name, print_json, working
from torchzoo.errors import UnknownNameError
from torchzoo.version import __version__

_SPECIAL = re.compile(r"([&%$#_{}])")


@dataclass(frozen=True)
class Source:
    """Who wrote a paper, and when."""

    authors: tuple[str, ...]
    year: int


def cite(
    name: Name,
    as_json: Json = False,
) -> None:
    """Print BibTeX for a paper and for torchzoo.

    Example: [bold]torchzoo cite 48[/bold]
    """
    subject = resolve(name)
    paper = subject.paper
    if paper is None:
        raise UnknownNameError(f"{name} is an engine piece of the zoo, which has no single paper")
    with working("reading the units"):
        source = find_source(paper)
    entry, own = bibtex(paper, source), torchzoo_bibtex()
    if as_json:
        print_json(_record(paper, source, entry, own))
    else:
        print(f"{entry}\n\n{own}")


def _record(paper: Paper, source: Source | None, entry: str, own: str) -> dict[str, Any]:
    return {
        "number": paper.number,
        "title": paper.title,
        "authors": list(source.authors) if source else None,
        "year": source.year if source else None,
        "bibtex": entry,
        "torchzoo": own,
    }


def find_source(paper: Paper) -> Source | None:
    """Authors and year from the Source section of the paper's units; None where none has them."""
    missing = paper.missing()
    for path in paper.units:
        if path in missing:
            continue
        module, _, name = path.partition(":")
        text = sections(getattr(import_module(module), name)).get("Source", "")
        if source := parse_source(text, paper.title):
            return source
    return None


def parse_source(text: str, title: str) -> Source | None:
    """What a Source section says of the paper with this title.

    It names works one after the other as `authors, title, year`; quotes and subtitles are optional,
    and dots or semicolons end a work.
    """
    words = r"\W+".join(re.findall(r"\w+", title.partition(": ")[0]))
    match = re.search(rf"(.*?)\W*{words}\W.*?\b((?:19|20)\d\d)\b", " ".join(text.split()), re.I)
    if not match:
        return None
    # A dot after an initial ends nothing, one after a word does.
    before = re.split(r";\s+|:\s+|(?<=\w\w)[.]\s+", match[1])[-1]
    authors = _authors(before)
    return Source(authors, int(match[2])) if authors else None


def _authors(text: str) -> tuple[str, ...]:
    """`A. Author, B. Author and C. Author` as names; `et al` becomes BibTeX's `others`."""
    text = re.sub(r",?\s+et al\.?$", ", others", text.strip())
    return tuple(part for part in re.split(r",\s+(?:and\s+|&\s+)?|\s+and\s+|\s+&\s+", text) if part)


def bibtex(paper: Paper, source: Source | None) -> str:
    """The paper's entry; without a source its note says what is missing."""
    title = _SPECIAL.sub(r"\\\1", paper.title)
    fields = {"title": f"{{{title}}}"}
    if source:
        fields = {"author": " and ".join(source.authors), **fields, "year": str(source.year)}
    else:
        fields["note"] = "Authors and year are not recorded in torchzoo yet"
    return _entry(paper.slug, fields)


def torchzoo_bibtex() -> str:
    """The entry of torchzoo itself."""
    return _entry(
        "torchzoo",
        {
            "author": "{The torchzoo authors}",
            "title": "{torchzoo: PyTorch layers from papers, each with its proof and its claim}",
            "note": f"Version {__version__}",
        },
    )


def _entry(key: str, fields: dict[str, str]) -> str:
    width = max(map(len, fields))
    rows = [f"  {name:<{width}} = {{{value}}}," for name, value in fields.items()]
    return "\n".join([f"@misc{{{key},", *rows, "}"])
