"""`torchzoo info`: all that the zoo knows of a paper or a unit."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from typing import Any

from rich.console import Console
from rich.syntax import Syntax
from rich.text import Text

from torchzoo import catalogue
from torchzoo._docstring import sections
from torchzoo.catalogue import Paper
from torchzoo.cli import _docstrings
from torchzoo.cli._names import Subject, resolve
from torchzoo.cli._output import (
    Json,
    Name,
    new_grid,
    outcome_text,
    print_json,
    stdout,
    verdict_text,
    working,
)


def info(
    name: Name,
    as_json: Json = False,
) -> None:
    """Show a paper or unit: what it is, its proof, its verdict, an example.

    Example: [bold]torchzoo info moe.TopKGate[/bold]
    """
    subject = resolve(name)
    with working("importing the units") if subject.units else working("reading the catalogue"):
        about = describe(subject)
    if as_json:
        print_json(about)
    else:
        _show(about, stdout())


def describe(subject: Subject) -> dict[str, Any]:
    """What `info` says of a paper or unit, as its JSON object."""
    paper = subject.paper
    missing = paper.missing() if paper else []
    units = [_unit(path) for path in subject.units if path not in missing]
    if paper is None and units[0]["paper"]:
        paper = catalogue.find(units[0]["paper"])
    return {"paper": _paper(paper) if paper else None, "units": units}


def _paper(paper: Paper) -> dict[str, Any]:
    result = catalogue.recorded_result(paper)
    kept = ("verdict", "rule", "criteria", "measurements", "baseline", "setup", "budget")
    return {
        "number": paper.number,
        "title": paper.title,
        "family": paper.family,
        "slug": paper.slug,
        "summary": paper.summary,
        "claim": paper.claim,
        "built": paper.built,
        "missing": paper.missing(),
        "experiment": paper.experiment,
        "verdict": result["verdict"] if result else None,
        "result": {key: result[key] for key in (*kept, "seeds", "seconds")} if result else None,
        "claims": [
            {key: entry[key] for key in ("statement", "tolerance", "status", "test")}
            for entry in catalogue.claims(paper.number)
        ],
    }


def _unit(path: str) -> dict[str, Any]:
    """A class or function of the zoo; importing it gives it its card."""
    from torchzoo.registry import _cards

    module, _, name = path.partition(":")
    thing = getattr(import_module(module), name)
    family = thing.__module__.split(".")[1]
    key = f"{family}.{name}"
    card = _cards.get(key)
    return {
        "name": name,
        "key": key,
        "path": f"{thing.__module__}:{name}",
        "kind": "class" if inspect.isclass(thing) else "function",
        "paper": card.paper if card else None,
        "signature": _docstrings.signature(thing),
        "summary": _docstrings.summary(thing),
        "shape": sections(thing).get("Shape", ""),
        "exempt": dict(card.exempt) if card else {},
        "example": _docstrings.example_code(thing),
    }


def _show(about: dict[str, Any], console: Console) -> None:
    paper, units = about["paper"], about["units"]
    if paper:
        _show_paper(paper, console)
    else:
        console.print("An engine piece, which belongs to no single paper.", style="dim")
    for unit in units[:1]:
        _show_unit(unit, console)
    if units[1:]:
        _heading(console, "More units")
        rows = new_grid("green")
        for unit in units[1:]:
            rows.add_row(unit["name"], Text(unit["summary"]))
        console.print(rows)
        console.print(f"\ntorchzoo info {units[1]['key']} shows one.", style="dim")


def _show_paper(paper: dict[str, Any], console: Console) -> None:
    console.print(Text(f"{paper['number']}  {paper['title']}", "bold"))
    rows = new_grid("dim")
    rows.add_row("family", f"{paper['family']}, {paper['slug']}")
    rows.add_row("summary", Text(paper["summary"]))
    rows.add_row("claim", Text(paper["claim"]))
    if paper["missing"]:
        rows.add_row("status", Text(f"does not import: {', '.join(paper['missing'])}", "yellow"))
    elif not paper["built"]:
        rows.add_row("status", Text("not built yet", "yellow"))
    elif not paper["result"]:
        rows.add_row("verdict", Text("no result recorded yet", "dim"))
    else:
        result = paper["result"]
        run = f"  {len(result['seeds'])} seeds, {result['seconds']:.0f} s"
        rows.add_row("verdict", verdict_text(result["verdict"]).append(run, "not bold default"))
        for criterion in result["criteria"]:
            outcome = {True: "holds", False: "fails", None: "void"}[criterion["holds"]]
            line = outcome_text(outcome).append(f"  {criterion['text']}", "default")
            rows.add_row("", line.append(f"  {criterion['measured']}", "dim"))
    console.print(rows)
    if paper["claims"]:
        _heading(console, "Proof")
        proof = new_grid("")
        proof.add_column(justify="right", style="dim", no_wrap=True)
        for claim in paper["claims"]:
            within = "" if claim["tolerance"] is None else f"within {claim['tolerance']:g}"
            proof.add_row(outcome_text(claim["status"]), Text(claim["statement"]), within)
        console.print(proof)


def _show_unit(unit: dict[str, Any], console: Console) -> None:
    _heading(console, unit["key"])
    console.print(Text(unit["summary"]))
    console.print("", _code(unit["signature"]), sep="\n", soft_wrap=True)
    if unit["shape"]:
        _heading(console, "Shape")
        rows = new_grid("dim")
        for item in re.split(r"^- ", unit["shape"], flags=re.MULTILINE):
            if item.strip():
                rows.add_row("-", Text(" ".join(item.split())))
        console.print(rows)
    if unit["exempt"]:
        _heading(console, "Exempt from checks of the contract")
        rows = new_grid("yellow")
        for capability, reason in unit["exempt"].items():
            rows.add_row(capability, Text(reason))
        console.print(rows)
    if unit["example"]:
        _heading(console, "Example")
        console.print(_code(unit["example"].rstrip()), soft_wrap=True)


def _heading(console: Console, text: str) -> None:
    console.print(f"\n[bold cyan]{text}[/]")


def _code(code: str) -> Text:
    """Python in colour, at the left edge and without a frame, so that it can be pasted."""
    text = Syntax(code, "python", theme="ansi_dark", background_color="default").highlight(code)
    text.rstrip()
    return text
