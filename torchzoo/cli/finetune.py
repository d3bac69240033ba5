"""`torchzoo finetune`: train a model of another library with layers of the zoo in it."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    swap_tree,
    training_progress,
)
from torchzoo.cli._output import Json, new_table, print_json, stderr, stdout, working
from torchzoo.cli._where import Device, check_folder, resolve_device
from torchzoo.errors import TorchzooError

if TYPE_CHECKING:
    from torchzoo.finetuning import Run


class Method(StrEnum):
    """Recipes that change the model and its loss."""

    prosparse = "prosparse"


def finetune(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for weights, log and checkpoints.")] = Path(
        "torchzoo-finetune"
    ),
    data: Data = "digits",
    swaps: Swaps = None,
    weights: Weights = None,
    size: Size = None,
    epochs: Epochs = 5,
    batch_size: Batch = 64,
    lr: Rate = 1e-3,
    weight_decay: Annotated[float, typer.Option(min=0.0, help="Decoupled weight decay.")] = 0.01,
    warmup: Annotated[float, typer.Option(help="Share of the steps that warm up.")] = 0.1,
    accumulate: Annotated[int, typer.Option(min=1, help="Parts a batch is cut into.")] = 1,
    precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    ema: Annotated[
        float | None, typer.Option(help="Decay of an average of the weights.", show_default=False)
    ] = None,
    freeze: Annotated[
        list[str] | None,
        typer.Option(help="Glob of parameters that stay; may be repeated.", show_default=False),
    ] = None,
    balance: Balance = 0.01,
    method: Annotated[
        Method | None,
        typer.Option(
            "--recipe",
            help="prosparse: feed-forward layers get relu, a penalty on their neurons, and at the "
            "end a threshold.",
            show_default=False,
        ),
    ] = None,
    l1: Annotated[
        float, typer.Option("--l1", min=0.0, help="Of prosparse: last weight of the penalty.")
    ] = 0.2,
    threshold: Annotated[
        float, typer.Option(min=0.0, help="Of prosparse: neurons up to it are dropped at the end.")
    ] = 0.01,
    save_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between checkpoints.", show_default="an epoch")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read data.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all that is random.")] = 0,
    device: Annotated[Device, typer.Option(help="Where to train; auto takes CUDA.")] = Device.auto,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Shard over the processes (FSDP2).")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint, bit for bit.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a model on images or text, with layers of the zoo swapped in.

    On several processes: torchrun --nproc-per-node 2 -m torchzoo finetune …

    Example: [bold]torchzoo finetune --model timm:resnet18 --swap relu=CRReLU --data digits[/bold]
    """
    check_folder(out)
    with working("importing torch"):
        target = resolve_device(device)
        from torchzoo.experiments.finetune.jobs import Job, prepare, task_of
        from torchzoo.experiments.finetune.sparsified import shift
        from torchzoo.files import write_json
        from torchzoo.finetuning import Recipe
        from torchzoo.finetuning import finetune as train
        from torchzoo.swaps import prosparse
    try:
        recipe = Recipe(
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            weight_decay=weight_decay,
            warmup=warmup,
            accumulate=accumulate,
            precision=precision,
            ema=ema,
            freeze=tuple(freeze or ()),
            seed=seed,
            save_every=save_every,
            workers=workers,
        )
    except ValueError as error:  # the options have the names of its arguments
        raise TorchzooError(f"--{error}") from error
    job = Job(model, data, tuple(swaps or ()), weights, size, seed, method and method.value)
    with working(f"building {model}"):
        ready = prepare(job)
    first = os.environ.get("RANK", "0") == "0"
    if first:
        for note in ready.notes:
            stderr().print(note, style="yellow", soft_wrap=True, markup=False)
        if not as_json:
            for text, report in zip(job.swaps, ready.reports, strict=True):
                stdout().print(swap_tree(f"{model}  {text}", report), "")
        write_json(out / "job.json", asdict(job))
    plain = task_of(balance)
    learnt = prosparse(plain, ready.model, weight=l1) if method else nullcontext(plain)
    with training_progress(model) as tick, learnt as task:
        run = train(
            ready.model,
            task,
            ready.data.train,
            ready.data.test,
            recipe,
            out=out,
            resume=resume,
            device="cpu" if target == "cpu" else None,
            fsdp=fsdp,
            progress=tick,
        )
    if not first:
        return
    sparse = []
    if method:
        with working("measuring what is inactive"):
            sparse = shift(ready.model, ready.data.test, plain, threshold=threshold)
        write_json(out / "prosparse.json", {"threshold": threshold, "activations": sparse})
    if run.resumed:
        stderr().print(f"went on after step {run.resumed}")
    if as_json:
        swapped = [report.to_json() for report in ready.reports]
        print_json(
            {"best": run.best, "steps": run.step, "log": run.history, "swaps": swapped}
            | ({"prosparse": sparse} if method else {})
        )
        return
    stdout().print(_table(run))
    if method:
        stdout().print("", _sparse_table(sparse), "")
    stdout().print(f"best accuracy {run.best:.4f}, weights in {out / 'best.safetensors'}")


def _sparse_table(rows: list[dict[str, Any]]) -> Table:
    table = new_table()
    for column in ("activation", "test loss", "accuracy", "inactive neurons"):
        table.add_column(column, justify="left" if column == "activation" else "right")
    for row in rows:
        figures = (row["test_loss"], row["accuracy"])
        table.add_row(
            row["activation"], *(f"{x:.4f}" for x in figures), f"{100 * row['inactive']:.1f} %"
        )
    return table


def _table(run: Run) -> Table:
    table = new_table()
    for column in ("epoch", "loss", "test loss", "accuracy", "seconds"):
        table.add_column(column, justify="right")
    for row in run.history:
        figures = (row["loss"], row["test_loss"], row["accuracy"])
        table.add_row(str(row["epoch"]), *(f"{x:.4f}" for x in figures), f"{row['seconds']:.1f}")
    return table
