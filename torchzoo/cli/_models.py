"""What the commands on whole models share: their options, their report of swaps, progress."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from rich.tree import Tree

from torchzoo.cli._output import stderr

if TYPE_CHECKING:
    from torchzoo.surgery import Swapped

Model = Annotated[
    str,
    typer.Option(
        help="timm:NAME, torchvision:NAME, transformers:TYPE(option=value) or zoo:NAME.",
        show_default=False,
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        help="A .safetensors file, pretrained, or for transformers a folder or hub id.",
        show_default=False,
    ),
]
Swaps = Annotated[
    list[str] | None,
    typer.Option(
        "--swap",
        help="What gives way and what takes its place: relu=CRReLU, mlp=MoELayer(num_experts=4); "
        "may be repeated.",
        show_default=False,
    ),
]
Data = Annotated[
    str,
    typer.Option(
        help="digits, folder:PATH, torchvision:NAME, text or text:PATH.", show_default=True
    ),
]
Size = Annotated[
    int | None,
    typer.Option(min=1, help="Pixels of an image, characters of a text.", show_default=False),
]
Epochs = Annotated[int, typer.Option(min=1, help="Passes over the data.")]
Batch = Annotated[int, typer.Option(min=1, help="Rows a step, of all processes together.")]
Rate = Annotated[float, typer.Option(min=0.0, help="Highest learning rate.")]
Balance = Annotated[
    float, typer.Option(min=0.0, help="Weight of the loss that evens out experts' loads.")
]


def swap_tree(name: str, report: Swapped) -> Tree:
    """A swap's report as a tree of names, with parameters and operations before and after."""
    line = Text(name, "bold").append(f"  {_change('parameters', report.parameters)}", "not bold")
    if report.flops:
        line.append(f"  {_change('FLOPs', report.flops)}", "not bold")
    root = Tree(line)
    branches = {"": root}
    for change in report.changes:
        above, _, last = change.name.rpartition(".")
        parent = _branch(branches, above)
        text = Text(last).append(f"  {change.old} → {change.new}", "green")
        parent.add(text.append(f"  {_change('parameters', change.parameters)}", "dim"))
    for note in report.notes:
        root.add(Text(note, "yellow"))
    return root


def _branch(branches: dict[str, Tree], name: str) -> Tree:
    if name not in branches:
        above, _, last = name.rpartition(".")
        branches[name] = _branch(branches, above).add(Text(last, "dim"))
    return branches[name]


def _change(what: str, pair: tuple[int, int]) -> str:
    old, new = pair
    return f"{new:,} {what}" if old == new else f"{old:,} → {new:,} {what}"


def cost_rows(costs: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """What models cost, a label and a text for each model."""
    rows = [
        ("parameters", [f"{cost['parameters']:,}" for cost in costs]),
        ("MFLOPs, forward", [_millions(cost["flops"]) for cost in costs]),
    ]
    for kind in (key for key in costs[0] if key not in ("parameters", "flops")):
        medians = [cost[kind]["seconds"]["median"] * 1e3 for cost in costs]
        rows.append((f"{kind}, ms", [f"{value:.3g}" for value in medians]))
        peaks = [cost[kind]["peak_bytes"] for cost in costs]
        if None not in peaks:
            rows.append((f"{kind}, peak MiB", [f"{peak / 2**20:.1f}" for peak in peaks]))
    return rows


def _millions(flops: int) -> str:
    """A dash where torch's counter knows none of the operators."""
    return f"{flops / 1e6:,.1f}" if flops else "–"


@contextmanager
def training_progress(title: str) -> Iterator[Any]:
    """Yield a call of steps done, steps in all, and a line: a bar with the time that is left."""
    console = stderr()
    bar = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(24),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[line]}", style="dim", markup=False),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task(title, total=1, line="")

    def tick(done: int, total: int, line: str) -> None:
        bar.update(task, completed=done, total=total, line=line)

    with bar:
        yield tick
