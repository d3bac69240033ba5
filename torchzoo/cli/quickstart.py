"""`torchzoo quickstart`: the main job, from a composition of parts to a report."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from torchzoo.cli._output import Json, print_json, stderr, stdout, working
from torchzoo.cli._where import Device, check_folder, resolve_device
from torchzoo.errors import TorchzooError

if TYPE_CHECKING:
    from torchzoo.experiments.quickstart.composition import Part
    from torchzoo.experiments.quickstart.outcome import Outcome


def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for the report and the model.")] = Path(
        "torchzoo-quickstart"
    ),
    device: Annotated[
        Device, typer.Option(help="Where to train and stream; auto takes CUDA where it is.")
    ] = Device.auto,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="The first seed.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="A look in seconds, on less data.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compose, fine-tune, stream and time a small model on real digits, and write a report.

    A shipped circuit tells digits from other pictures, too.

    About a minute on two cores. Everything is there without a network.

    Example: [bold]torchzoo quickstart --out my-first-run[/bold]
    """
    _check_packages()
    # Torch warns about a missing GPU where a CUDA toolkit is installed; nobody asked.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with working("importing torch"):
        target = resolve_device(device)
        check_folder(out)
        from torchzoo.experiments.quickstart import report
        from torchzoo.experiments.quickstart.composition import composition
        from torchzoo.experiments.quickstart.model import ZooVisionModel
        from torchzoo.experiments.quickstart.run import FULL, QUICK, run
    if not as_json:
        stdout().print(tree(composition(ZooVisionModel(5))), "")
    with _progress() as tick:
        outcome = run(QUICK if quick else FULL, seed=seed, device=target, progress=tick)
    with working("writing the report"):
        report.save(outcome, out)
    if as_json:
        print_json(outcome.to_json())
        return
    stdout().print(_table(outcome))
    _epilogue(out, report.NEXT)


def tree(part: Part) -> Tree:
    """A model's parts with their parameters."""
    line = Text(part.name, "bold").append(f"  {part.parameters:,}", "not bold cyan")
    branch = Tree(line.append(f"  {part.text}", "not bold dim") if part.text else line)
    for child in part.parts:
        branch.children.append(tree(child))
    return branch


def _check_packages() -> None:
    if find_spec("matplotlib") is None:
        raise TorchzooError("the report needs matplotlib: pip install torchzoo[plot]")
    if find_spec("sklearn") is None:
        raise TorchzooError("the digits need scikit-learn: pip install torchzoo[train]")


@contextmanager
def _progress() -> Iterator[Any]:
    """Yield the run's progress call: on stderr a bar a stage, or a line where no terminal is."""
    console = stderr()
    bar = Progress(
        TextColumn("[bold]{task.description:<22}"),
        BarColumn(30),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    tasks: dict[str, TaskID] = {}

    def tick(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bar.add_task(stage, total=total)
            if not console.is_terminal:
                console.print(f"{stage} …", soft_wrap=True)
        bar.update(tasks[stage], completed=done)

    with bar:
        yield tick


def _table(outcome: Outcome) -> Table:
    """All figures of a run, group by group."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("measured")
    table.add_column("torchzoo", no_wrap=True, justify="right")
    table.add_column("against", no_wrap=True, justify="right")
    table.add_column("difference", no_wrap=True, justify="right")
    marks = {True: ("▲", "green"), False: ("▼", "red"), None: ("=", "dim")}
    for group, rows in groupby(outcome.rows, key=lambda row: row.group):
        table.add_row()
        table.add_row(Text(group, "bold"))
        for row in rows:
            mark, style = marks[row.better]
            table.add_row(
                Text(f"{row.what}\n").append(f"  {row.against}", "dim"),
                row.ours.text,
                row.theirs.text,
                Text(f"{mark} {row.result.text}", style),
            )
    return table


def _epilogue(out: Path, commands: tuple[tuple[str, str], ...]) -> None:
    """Where the results are, and what to try next."""
    lines = Table.grid(padding=(0, 2, 0, 0))
    lines.add_row("", "")
    lines.add_row(Text("report", "dim"), f"{out / 'report.html'}, {out / 'report.json'}")
    lines.add_row(Text("model", "dim"), f'torchzoo.from_pretrained("{out / "model"}")')
    for index, (command, why) in enumerate(commands):
        line = Text(command, "bold").append(f"  {why}", "not bold dim")
        lines.add_row(Text("next" if index == 0 else "", "dim"), line)
    stdout().print(lines, soft_wrap=True)
