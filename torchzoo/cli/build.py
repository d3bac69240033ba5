"""`torchzoo build`: compile the kernel libraries into the user's cache."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from torchzoo.cli._output import Json, print_json, stderr, stdout, working


def build(
    cuda: Annotated[bool, typer.Option("--cuda", help="Build the CUDA library too.")] = False,
    clean: Annotated[
        bool, typer.Option("--clean", help="Compile again what is there already.")
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Files compiled at once.", show_default="cores, at most 4"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the libraries, for packaging.", show_default="the cache"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compile the kernels for this machine; without them operators run on PyTorch code.

    A build that was interrupted leaves nothing behind. Nothing else ever compiles.

    Example: [bold]torchzoo build[/bold]
    """
    with working("importing torch"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing is built yet is why this command runs
        from torchzoo.ops import building

    console = stderr()
    made = []
    for name in ("cpu", "cuda") if cuda else ("cpu",):
        target = out / f"libtorchzoo_{name}.so" if out else None
        with Progress(console=console, disable=not console.is_terminal) as bar:
            tick = _ticker(bar, name)
            path = building.build(name, clean=clean, jobs=jobs, target=target, progress=tick)
        made.append({"name": name, "path": str(path)})
        if not as_json:
            stdout().print(f"{name} kernels: {path}", soft_wrap=True)
    if as_json:
        print_json(made)


def _ticker(bar: Progress, name: str) -> Callable[[int, int, str], None]:
    task = bar.add_task(f"{name} kernels")

    def tick(done: int, total: int, text: str) -> None:
        bar.update(task, total=total, completed=done, description=f"{name} {text}".strip())

    return tick
