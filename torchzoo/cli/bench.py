"""`torchzoo bench`: an operator and its peers side by side."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from torchzoo.catalogue import suggest
from torchzoo.cli._output import print_json, stderr, stdout, working
from torchzoo.errors import UnknownNameError
from torchzoo.files import write_json


def bench(
    op: Annotated[str, typer.Option(help="The operator.", show_default=False)],
    device: Annotated[str, typer.Option(help="Where to run: cpu or cuda.")] = "cpu",
    rounds: Annotated[int, typer.Option(min=3, help="Calls of each contender a case.")] = 15,
    case: Annotated[
        list[str] | None, typer.Option(help="Only cases whose name holds this; may be repeated.")
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Save the figures here; - prints them.", show_default=False),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Save a log-log plot here (PNG).", show_default=False)
    ] = None,
) -> None:
    """Time an operator against its peers, interleaved in one process.

    What counts is the ratio of medians in one run, so run it on a machine that does nothing else.

    Example: [bold]torchzoo bench --op grouped_mm --rounds 5[/bold]
    """
    with working("importing torch"):
        import torch

        from torchzoo import benchmark

        definition = import_module(f"torchzoo.experiments.ops.{_known(op)}").BENCH
        if device != "cpu" and not torch.cuda.is_available():
            raise typer.BadParameter(f"--device {device}: this torch sees no CUDA device")
    console = stderr()
    with console.status("") as status:

        def tick(done: int, total: int, text: str) -> None:
            status.update(f"{done}/{total} {text}")

        result = benchmark.run(
            definition, device=device, rounds=rounds, only=case or (), progress=tick
        )
    printed = str(json_file) == "-"
    if json_file and not printed:
        write_json(json_file, result)
    if plot:
        benchmark.save_plot(result, plot)
    if printed:
        print_json(result)
    else:
        stdout().print(benchmark.table(result))


def _known(op: str) -> str:
    folder = Path(__file__).parent.parent / "experiments" / "ops"
    known = sorted(path.stem for path in folder.glob("[a-z]*.py"))
    if op not in known:
        raise UnknownNameError(f"no benchmark of {op!r}, expected {known}{suggest(op, known)}")
    return op
