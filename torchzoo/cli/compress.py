"""`torchzoo compress`: images and other files, with the shipped probabilistic circuits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from torchzoo.cli._output import Json, new_table, print_json, stderr, stdout, working
from torchzoo.errors import TorchzooError
from torchzoo.files import atomic_path

SUFFIX = ".tzc"
"""What compressed files end in where their names are not given."""

_LOSSLESS = {"PNG", "BMP", "PPM", "TIFF"}
_KINDS = ("auto", "image", "bytes")

Files = Annotated[list[Path], typer.Argument(metavar="FILE…", show_default=False)]
Out = Annotated[
    Path,
    typer.Option(
        "--out", "-o", help="The file to write; with several FILEs a folder.", show_default=False
    ),
]


def compress(
    files: Files,
    out: Out,
    kind: Annotated[
        str, typer.Option("--as", help=f"What the files are: {', '.join(_KINDS)}.")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Compress files losslessly with a shipped circuit.

    PNG, BMP, PPM and TIFF images of 8 bits, grey or RGB, are compressed by their pixels: what comes
    back is the same picture, not the same file, and without its metadata. All else, and images with
    --as bytes, comes back byte for byte. Photographs come out smaller than as PNG, about as small
    as lossless WebP. The model of bytes knows English text, but xz makes text smaller still; what
    the model can't make smaller is stored.

    Example: [bold]torchzoo compress photo.png -o photo.tzc[/bold]
    """
    if kind not in _KINDS:
        raise typer.BadParameter(f"expected one of {', '.join(_KINDS)}, got {kind!r}")
    targets = plan(files, out, lambda path: path.name + SUFFIX)
    with working("importing torch"):
        from torchzoo.circuits import archive

    rows = []
    with bar() as progress:
        for path, target in targets:
            pixels = None if kind == "bytes" else read_image(path, required=kind == "image")
            size = path.stat().st_size if pixels is None else pixels.numel()
            tick = ticker(progress, path.name, size)
            if pixels is None:
                data = archive.pack_bytes(read(path), path.name, tick)
            else:
                data = archive.pack_image(pixels, path.name, tick)
            write(target, data)
            rows.append(_record(path, target, "bytes" if pixels is None else "image", size, data))
    report(rows, as_json)


def plan(files: list[Path], out: Path, name: Callable[[Path], str]) -> list[tuple[Path, Path]]:
    """Where each file goes: to `out`, or into that folder.

    Raises:
        TorchzooError: A file is missing, would be overwritten, or two have one target.
    """
    for path in files:
        if not path.is_file():
            raise TorchzooError(f"no file {path}")
    into = len(files) > 1 or out.is_dir()
    targets = [(path, out / name(path) if into else out) for path in files]
    places = [target.resolve() for _, target in targets]
    if len(set(places)) < len(places):
        raise TorchzooError("two files have the same name; compress them one by one")
    for path in files:
        if path.resolve() in places:
            raise TorchzooError(f"{path} would be overwritten; give another --out")
    return targets


def read(path: Path) -> bytes:
    """A file's bytes."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise TorchzooError(f"can't read {path}: {error.strerror or error}") from error


def read_image(path: Path, *, required: bool) -> Any:
    """Pixels `(H, W)` or `(H, W, 3)` of a lossless image that the codec can hold; None of others.

    Raises:
        TorchzooError: It is none of these, and `required`.
    """
    import numpy as np
    import torch
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            what = f"{image.format} of mode {image.mode}"
            plain = image.mode in ("L", "RGB") and getattr(image, "n_frames", 1) == 1
            plain = plain and "transparency" not in image.info
            if plain and (required or image.format in _LOSSLESS):
                return torch.from_numpy(np.array(image))
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        what = f"{type(error).__name__}"
    if required:
        raise TorchzooError(f"{path}: expected an 8-bit grey or RGB image, got {what}")
    return None


def write(target: Path, data: bytes) -> None:
    """Write a file atomically."""
    with atomic_path(target) as part:
        part.write_bytes(data)


def bar() -> Progress:
    """A progress bar on stderr; nothing where no terminal is."""
    console = stderr()
    return Progress(console=console, disable=not console.is_terminal, transient=True)


def ticker(progress: Progress, name: str, size: int) -> Callable[[int], None]:
    """What moves the bar of a file on."""
    task = progress.add_task(name, total=size)
    return lambda count: progress.update(task, advance=count)


def _record(path: Path, target: Path, kind: str, size: int, data: bytes) -> dict[str, Any]:
    return {
        "file": str(path),
        "out": str(target),
        "kind": kind,
        "file_bytes": path.stat().st_size,
        "raw_bytes": size,
        "compressed_bytes": len(data),
        "bits_per_byte": round(8 * len(data) / max(1, size), 4),
    }


def report(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print what became of the files."""
    if as_json:
        print_json(rows)
        return
    table = new_table()
    for column in ("file", "kind", "file bytes", "compressed", "bits a byte", "out"):
        table.add_column(
            column, overflow="fold", justify="left" if column in "file kind out" else "right"
        )
    for row in rows:
        table.add_row(
            row["file"],
            row["kind"],
            f"{row['file_bytes']:,}",
            f"{row['compressed_bytes']:,}",
            f"{row['bits_per_byte']:.2f}",
            row["out"],
        )
    stdout().print(table)
