"""`torchzoo bench`: a layer, an operator or a model beside what it competes with."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from torchzoo.catalogue import suggest
from torchzoo.cli._models import Swaps, cost_rows
from torchzoo.cli._output import new_table, print_json, stderr, stdout, working
from torchzoo.cli._where import Device, resolve_device
from torchzoo.errors import UnknownNameError
from torchzoo.files import write_json


def bench(
    layer: Annotated[
        str | None,
        typer.Argument(help="A layer: S4D, or S4D(d_model=512) for its size.", show_default=False),
    ] = None,
    op: Annotated[str | None, typer.Option(help="An operator instead.", show_default=False)] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A model instead: timm:NAME, torchvision:NAME, transformers:TYPE.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Of a layer: one of its peers, another layer, or a class such as torch.nn.GELU; "
            "all of its peers by default; may be repeated.",
            show_default=False,
        ),
    ] = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            help="Of a layer: shapes of its inputs, 8x1024x512 or 8x16,8x64x16; may be repeated.",
            show_default=False,
        ),
    ] = None,
    backward: Annotated[
        bool, typer.Option(help="Of a layer: also measure a training step.")
    ] = True,
    swaps: Swaps = None,
    size: Annotated[int, typer.Option(min=1, help="Of --model: pixels of an image.")] = 224,
    batch_size: Annotated[int, typer.Option(min=1, help="Of --model: images a call.")] = 8,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Of a layer or --model: also measure it compiled.")
    ] = False,
    device: Annotated[Device, typer.Option(help="Where to run; auto takes CUDA.")] = Device.cpu,
    rounds: Annotated[int, typer.Option(min=3, help="Calls of each contender a case.")] = 15,
    case: Annotated[
        list[str] | None,
        typer.Option(help="Of --op: only cases whose name holds this; may be repeated."),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Save the figures here; - prints them.", show_default=False),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Save a plot here (PNG).", show_default=False)
    ] = None,
) -> None:
    """Time a layer or an operator against its peers, or a model against itself with layers swapped.

    What counts is the ratio of medians in one run, so run it on a machine that does nothing else.

    Example: [bold]torchzoo bench S4D --shapes 8x1024x256[/bold]
    """
    if sum(thing is not None for thing in (layer, op, model)) != 1:
        raise typer.BadParameter("expected one of LAYER, --op and --model")
    with working("importing torch"):
        target = resolve_device(device)
    if op is not None:
        result = _operator(op, target, rounds, case or ())
        shown = [_operator_table(result)]
    elif model is not None:
        result = _models(model, tuple(swaps or ()), size, batch_size, target, rounds, compiled)
        shown = [_cost_table("", result)]
    else:
        assert layer is not None
        asked = (tuple(against or ()), tuple(shapes or ()), target, rounds, backward, compiled)
        result = _layers(layer, *asked)
        shown = [_cost_table(case_name, row) for case_name, row in result.items()]
    if json_file and str(json_file) != "-":
        write_json(json_file, result)
    if plot:
        _plot(result, plot, op is not None, layer is not None)
    if str(json_file) == "-":
        print_json(result)
    else:
        stdout().print(*shown)


def _operator(op: str, device: str, rounds: int, only: Any) -> dict[str, Any]:
    from torchzoo import benchmark

    definition = import_module(f"torchzoo.experiments.ops.{_known(op)}").BENCH
    with stderr().status("") as status:

        def tick(done: int, total: int, text: str) -> None:
            status.update(f"{done}/{total} {text}")

        return benchmark.run(definition, device=device, rounds=rounds, only=only, progress=tick)


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
        from torchzoo.swaps import apply
        from torchzoo.timing import time_modules

        plain, _ = load_model(name, classes=1000, size=size)
        models = {name: plain}
        if swaps:
            models[", ".join(swaps)] = swapped = copy.deepcopy(plain)
            for swap in swaps:
                apply(swapped, swap)
        models = {label: model.to(device) for label, model in models.items()}
        images = torch.randn(batch_size, 3, size, size, device=device)
        return time_modules(
            models, [images], rounds=rounds, compiled=compiled, progress=status.update
        )


def _layers(
    text: str,
    against: tuple[str, ...],
    shapes: tuple[str, ...],
    device: str,
    rounds: int,
    backward: bool,
    compiled: bool,
) -> dict[str, Any]:
    """Time, memory and operations of a layer and its peers, case by case."""
    with working(f"building {text}") as status:
        from torchzoo.contenders import contests, why_no_peers
        from torchzoo.timing import time_modules

        result = {}
        for case in contests(text, against=against, shapes=shapes, device=device):

            def tick(what: str, name: str = case.name) -> None:
                status.update(f"{name}: {what}")

            result[case.name] = time_modules(
                case.modules,
                case.inputs,
                rounds=rounds,
                backward=backward,
                compiled=compiled,
                progress=tick,
            )
    if not against and (reason := why_no_peers(text)):
        stderr().print(f"no peers: {reason}", style="dim")
    return result


def _operator_table(result: dict[str, Any]) -> Table:
    from torchzoo import benchmark

    table: Table = benchmark.table(result)
    return table


def _cost_table(title: str, result: dict[str, Any]) -> Table:
    table = new_table()
    for column in (title, *result):
        table.add_column(column, justify="left" if column == title else "right")
    for label, values in cost_rows(list(result.values())):
        table.add_row(label, *values)
    return table


def _plot(result: dict[str, Any], path: Path, of_operator: bool, of_layer: bool) -> None:
    if of_operator:
        from torchzoo import benchmark

        benchmark.save_plot(result, path)
        return
    from torchzoo.timing import save_plot

    save_plot(next(iter(result.values())) if of_layer else result, path)


def _known(op: str) -> str:
    folder = Path(__file__).parent.parent / "experiments" / "ops"
    known = sorted(path.stem for path in folder.glob("[a-z]*.py"))
    if op not in known:
        raise UnknownNameError(f"no benchmark of {op!r}, expected {known}{suggest(op, known)}")
    return op
