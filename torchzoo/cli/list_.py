"""`torchzoo list`: what the zoo covers, by family or paper by paper."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from torchzoo import catalogue
from torchzoo.cli._names import check_family
from torchzoo.cli._output import (
    Json,
    new_table,
    paper_record,
    print_json,
    stdout,
    verdict_text,
    working,
)


def list_(
    family: Annotated[
        str | None, typer.Option(help="List the papers of one family.", show_default=False)
    ] = None,
    built: Annotated[bool, typer.Option("--built", help="List only what is built.")] = False,
    as_json: Json = False,
) -> None:
    """List families and how far each is built, or papers.

    Example: [bold]torchzoo list --family moe[/bold]
    """
    if family is not None:
        check_family(family)
    chosen = [paper for paper in catalogue.papers() if family in (None, paper.family)]
    with working("importing what is built"):
        records = [paper_record(paper) for paper in chosen]
    shown = [record for record in records if record["built"] or not built]
    if as_json:
        print_json(shown)
        return
    console = stdout()
    by_family = family is None and not built
    console.print(_by_family(records) if by_family else _by_paper(shown, family is None))
    covered = sum(record["built"] for record in records)
    more = "torchzoo list --family NAME" if by_family else "torchzoo info NUMBER"
    console.print(f"\n{covered} of {len(records)} papers built. More: {more}", style="dim")


def _by_family(records: list[dict[str, Any]]) -> Table:
    table = new_table()
    table.add_column("family", no_wrap=True)
    table.add_column("covered", justify="right", no_wrap=True)
    table.add_column("papers built")
    for family in sorted({record["family"] for record in records}):
        mine = [record for record in records if record["family"] == family]
        done = [record for record in mine if record["built"]]
        style = "" if done else "dim"
        names = ", ".join(f"{record['number']} {_stem(record)}" for record in done)
        table.add_row(family, f"{len(done)}/{len(mine)}", names or "–", style=style)
    return table


def _by_paper(records: list[dict[str, Any]], with_family: bool) -> Table:
    table = new_table()
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("paper")
    if with_family:
        table.add_column("family", no_wrap=True)
    table.add_column("built", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for record in records:
        mark = Text("✓ ", "green").append(_stem(record)) if record["built"] else Text("–", "dim")
        family = [record["family"]] if with_family else []
        verdict = verdict_text(record["verdict"])
        table.add_row(str(record["number"]), Text(record["title"]), *family, mark, verdict)
    return table


def _stem(record: dict[str, Any]) -> str:
    """The unit's name, which every command takes."""
    return record["experiment"].rpartition(".")[2].replace("_", "-")
