"""`torchzoo bench`: an operator and its peers, or a model and its swapped self, side by side."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from torchzoo.catalogue import suggest
from torchzoo.cli._models import Swaps, cost_rows
from torchzoo.cli._output import new_table, print_json, stderr, stdout, working
from torchzoo.errors import UnknownNameError
from torchzoo.files import write_json


def bench(
    op: Annotated[str | None, typer.Option(help="The operator.", show_default=False)] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Instead of --op a model: timm:NAME, torchvision:NAME, transformers:TYPE.",
            show_default=False,
        ),
    ] = None,
    swaps: Swaps = None,
    size: Annotated[int, typer.Option(min=1, help="Of --model: pixels of an image.")] = 224,
    batch_size: Annotated[int, typer.Option(min=1, help="Of --model: images a call.")] = 8,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Of --model: also measure it compiled.")
    ] = False,
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
    """Time an operator against its peers, or a model against itself with layers swapped.

    What counts is the ratio of medians in one run, so run it on a machine that does nothing else.

    Example: [bold]torchzoo bench --op grouped_mm --rounds 5[/bold]
    """
    if (op is None) is (model is None):
        raise typer.BadParameter("expected one of --op and --model")
    if op is None:
        assert model is not None
        result = _models(model, tuple(swaps or ()), size, batch_size, device, rounds, compiled)
        if str(json_file) == "-":
            print_json(result)
            return
        if json_file:
            write_json(json_file, result)
        stdout().print(_cost_table(result))
        return
    with working("importing torch"):
        from torchzoo import benchmark

        definition = import_module(f"torchzoo.experiments.ops.{_known(op)}").BENCH
        check_device(device)
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


def _models(
    name: str,
    swaps: tuple[str, ...],
    size: int,
    batch_size: int,
    device: str,
    rounds: int,
    compiled: bool,
) -> dict[str, Any]:
    """Time, memory and operations of a model, and of the same model with swaps."""
    with working(f"building {name}") as status:
        import copy

        import torch

        from torchzoo.experiments.finetune.models import load_model
        from torchzoo.experiments.finetune.timing import time_models
        from torchzoo.swaps import apply

        check_device(device)
        plain, _ = load_model(name, classes=1000, size=size)
        models = {name: plain}
        if swaps:
            models[", ".join(swaps)] = swapped = copy.deepcopy(plain)
            for swap in swaps:
                apply(swapped, swap)
        models = {label: model.to(device) for label, model in models.items()}
        images = torch.randn(batch_size, 3, size, size, device=device)
        return time_models(models, images, rounds=rounds, compiled=compiled, progress=status.update)


def _cost_table(result: dict[str, Any]) -> Table:
    table = new_table()
    for column in ("", *result):
        table.add_column(column, justify="right" if column else "left")
    for label, values in cost_rows(list(result.values())):
        table.add_row(label, *values)
    return table


def check_device(device: str) -> None:
    """Raise a BadParameter for CUDA where this torch sees none."""
    import torch

    if device != "cpu" and not torch.cuda.is_available():
        raise typer.BadParameter(f"--device {device}: this torch sees no CUDA device")


def _known(op: str) -> str:
    folder = Path(__file__).parent.parent / "experiments" / "ops"
    known = sorted(path.stem for path in folder.glob("[a-z]*.py"))
    if op not in known:
        raise UnknownNameError(f"no benchmark of {op!r}, expected {known}{suggest(op, known)}")
    return op
