"""What the commands share: consoles, JSON, the words and colours of a verdict, exit codes."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from torchzoo.catalogue import Paper, recorded_result

BAD_REQUEST = 1
"""Exit code of a request that can't be served, and of a defect."""
BAD_INPUT = 2
"""Exit code of a wrong name or option."""
INTERRUPTED = 130
"""Exit code after Ctrl-C."""
BROKEN_PIPE = 141
"""Exit code when the reader of stdout went away."""

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]

Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="A paper's number, slug or title, a unit's name, or family.Unit.",
        show_default=False,
    ),
]

_VERDICTS = {"reproduced": "green", "partly": "yellow", "not reproduced": "red"}
_OUTCOMES = {
    "holds": ("✓", "green"),
    "fails": ("✗", "red"),
    "refuted": ("✗", "red"),
    "void": ("○", "yellow"),
    "untested": ("○", "yellow"),
}


def stdout() -> Console:
    """The console of a command's result."""
    return Console(highlight=False)


def stderr() -> Console:
    """The console of progress, notices and errors."""
    return Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """Print a value as indented ASCII JSON, which every locale can carry."""
    print(json.dumps(value, indent=2, allow_nan=False))


def fail(message: object, code: int) -> int:
    """Print one line to stderr and return the exit code."""
    line = Text("error: ", style="bold red").append(" ".join(str(message).split()), style="default")
    stderr().print(line, soft_wrap=True)
    return code


def working(text: str) -> AbstractContextManager[Any]:
    """A spinner on stderr while something takes over a second; nothing where no terminal is."""
    return stderr().status(f"{text} …")


def new_table() -> Table:
    """A table without lines, its header in bold."""
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")


def new_grid(style: str) -> Table:
    """A narrow column of labels in a style, and text."""
    rows = Table.grid(padding=(0, 2, 0, 0))
    rows.add_column(style=style, no_wrap=True)
    rows.add_column(overflow="fold")
    return rows


def verdict_text(verdict: str | None) -> Text:
    """A verdict in its colour; a dash where nothing was measured."""
    return Text(verdict, f"bold {_VERDICTS[verdict]}") if verdict else Text("–", "dim")


def outcome_text(outcome: str) -> Text:
    """A criterion's or a claim's outcome with its mark, in its colour."""
    mark, style = _OUTCOMES[outcome]
    return Text(f"{mark} {outcome}", style)


def paper_record(paper: Paper) -> dict[str, Any]:
    """A paper as the JSON object of `list` and `search`; imports what the paper names."""
    result = recorded_result(paper)
    return {
        "number": paper.number,
        "title": paper.title,
        "family": paper.family,
        "summary": paper.summary,
        "claim": paper.claim,
        "units": list(paper.units),
        "experiment": paper.experiment,
        "built": paper.built,
        "verdict": result["verdict"] if result else None,
    }
