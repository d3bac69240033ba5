"""`torchzoo search`: papers by words of title, summary, claim, family or unit."""

from __future__ import annotations

import re
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from torchzoo import catalogue
from torchzoo.cli._output import Json, new_table, paper_record, print_json, stderr, stdout, working
from torchzoo.errors import TorchzooError


def search(
    text: Annotated[
        list[str], typer.Argument(metavar="TEXT", help="Words, all of which must occur.")
    ],
    as_json: Json = False,
) -> None:
    """Find papers by the words they hold.

    Looks in title, summary, claim, family and units.

    Example: [bold]torchzoo search mixture of experts[/bold]
    """
    wanted = " ".join(text)
    if not wanted.strip():
        raise TorchzooError("TEXT is empty; give a word to look for")
    found = catalogue.search(wanted)
    if as_json:
        with working("importing what is built"):
            records = [paper_record(paper) for paper in found]
        print_json(records)
    elif found:
        stdout().print(_table(found, wanted.split()))
    if not found:
        words = {word for paper in catalogue.papers() for word in paper.title.split()}
        near = catalogue.suggest(wanted, words)
        stderr().print(f"no paper holds {wanted!r}{near}", soft_wrap=True, markup=False)


def _table(found: list[catalogue.Paper], words: list[str]) -> Table:
    table = new_table()
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("family", no_wrap=True)
    table.add_column("paper")
    pattern = "(?i)" + "|".join(re.escape(word) for word in words)
    for paper in found:
        what = Text(paper.title, "bold").append(f"\n{paper.summary}", "not bold")
        if paper.unit_names:
            what.append("\n" + ", ".join(paper.unit_names), "not bold green")
        what.highlight_regex(pattern, "yellow")
        table.add_row(str(paper.number), paper.family, what)
    return table
