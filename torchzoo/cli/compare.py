"""`torchzoo compare`: a model with and without a swap, on the same budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from torchzoo.cli._models import (
    Balance,
    Batch,
    Data,
    Epochs,
    Model,
    Rate,
    Size,
    Swaps,
    Weights,
    cost_rows,
    training_progress,
)
from torchzoo.cli._output import Json, new_table, print_json, stderr, stdout, working
from torchzoo.cli._where import Device, check_folder, resolve_device


def compare(
    model: Model,
    swaps: Swaps = None,
    data: Data = "digits",
    weights: Weights = None,
    size: Size = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    epochs: Epochs = 3,
    batch_size: Batch = 64,
    lr: Rate = 1e-3,
    balance: Balance = 0.01,
    device: Annotated[Device, typer.Option(help="Where to train; auto takes CUDA.")] = Device.auto,
    out: Annotated[Path, typer.Option(help="Folder for the figures and the picture.")] = Path(
        "torchzoo-compare"
    ),
    as_json: Json = False,
) -> None:
    """Fine-tune a model with and without a swap, from the same weights, over several seeds.

    Example: [bold]torchzoo compare --model timm:resnet18 --swap relu=CRReLU --data digits[/bold]
    """
    if not swaps:
        raise typer.BadParameter("expected --swap, for example --swap relu=CRReLU")
    check_folder(out)
    with working("importing torch"):
        target = resolve_device(device)
        from torchzoo.experiments.finetune.compare import compare as run
        from torchzoo.experiments.finetune.compare import save_plot
        from torchzoo.experiments.finetune.jobs import Job
        from torchzoo.files import write_json
        from torchzoo.finetuning import Recipe
    recipe = Recipe(epochs=epochs, batch_size=batch_size, lr=lr)
    job = Job(model, data, tuple(swaps), weights, size, seed)
    with training_progress(model) as tick:
        result = run(job, recipe, seeds=seeds, balance=balance, device=target, progress=tick)
    write_json(out / "compare.json", result)
    save_plot(result, out / "compare.png")
    if as_json:
        print_json(result)
        return
    for note in result["notes"]:
        stderr().print(note, style="yellow", soft_wrap=True, markup=False)
    stdout().print(_table(result))
    mean, error = result["difference"]
    count = len(result["seeds"])
    stdout().print(
        f"\nthe swap changes the accuracy by {mean:+.4f} ± {error:.4f} (s.e. over {count} seeds)"
    )
    stdout().print(f"saved {out / 'compare.json'}, {out / 'compare.png'}")


def _table(result: dict[str, Any]) -> Table:
    table = new_table()
    for column in ("", "without", "with"):
        table.add_column(column, justify="right" if column else "left")
    from torchzoo.experiments.finetune.compare import mean_and_error

    for key, label in (
        ("accuracy", "accuracy"),
        ("test_loss", "test loss"),
        ("seconds", "training, seconds"),
    ):
        pairs = [mean_and_error(run[key]) for run in result["runs"].values()]
        table.add_row(label, *(f"{mean:.4g} ± {error:.2g}" for mean, error in pairs))
    for label, values in cost_rows(list(result["cost"].values())):
        table.add_row(label, *values)
    return table
