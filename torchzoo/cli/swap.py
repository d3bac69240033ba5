"""`torchzoo swap`: what a swap would change in a model."""

from __future__ import annotations

from typing import Annotated

import typer

from torchzoo.cli._models import Model, Swaps, Weights, swap_tree
from torchzoo.cli._output import Json, print_json, stderr, stdout, working


def swap(
    model: Model,
    swaps: Swaps = None,
    weights: Weights = None,
    size: Annotated[int, typer.Option(min=1, help="Height and width of an image.")] = 224,
    classes: Annotated[int, typer.Option(min=1, help="Classes that the model tells.")] = 1000,
    as_json: Json = False,
) -> None:
    """Show what a swap changes in a model: a tree, parameters and operations before and after.

    Words for layers: relu, gelu, silu, activation, mlp, attention, linear, conv, norm.

    Example: [bold]torchzoo swap --model timm:resnet18 --swap relu=CRReLU --size 64[/bold]
    """
    if not swaps:
        raise typer.BadParameter("expected --swap, for example --swap relu=CRReLU")
    with working(f"building {model}"):
        import torch

        from torchzoo.experiments.finetune.models import load_model
        from torchzoo.swaps import apply

        made, notes = load_model(model, classes=classes, size=size, weights=weights)
        reports = [apply(made, text, inputs=torch.zeros(1, 3, size, size)) for text in swaps]
    for note in notes:
        stderr().print(note, style="yellow", soft_wrap=True, markup=False)
    if as_json:
        print_json([{"swap": text, **r.to_json()} for text, r in zip(swaps, reports, strict=True)])
        return
    for text, report in zip(swaps, reports, strict=True):
        stdout().print(swap_tree(f"{model}  {text}", report))
