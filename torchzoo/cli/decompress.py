"""`torchzoo decompress`: what `torchzoo compress` made."""

from __future__ import annotations

import io
from math import prod
from pathlib import Path
from typing import Any

from torchzoo.cli._output import Json, print_json, stdout, working
from torchzoo.cli.compress import SUFFIX, Files, Out, bar, plan, read, ticker, write
from torchzoo.errors import TorchzooError


def decompress(
    files: Files,
    out: Out,
    as_json: Json = False,
) -> None:
    """Restore files that torchzoo compress made.

    Images are written in the lossless format that the name of the output ends in, PNG, BMP, PPM or
    TIFF; into a folder, as PNG. Everything is checked: a damaged or truncated file is an error and
    nothing is written.

    Example: [bold]torchzoo decompress photo.tzc -o photo.png[/bold]
    """
    targets = plan(files, out, lambda path: path.name.removesuffix(SUFFIX))
    with working("importing torch"):
        from torchzoo.circuits import archive

    rows = []
    with bar() as progress:
        for path, target in targets:
            data = read(path)
            try:
                size = prod(archive.description(data)["shape"])
                found = archive.unpack(data, ticker(progress, path.name, size))
            except ValueError as error:
                raise TorchzooError(f"{path}: {error}") from error
            if found.pixels is None:
                kind, content = "bytes", found.data or b""
            else:
                named = target == out and not out.is_dir() and len(files) == 1
                target = target if named else target.with_suffix(".png")
                kind, content = "image", _image_file(found.pixels, target)
            write(target, content)
            rows.append(
                {"file": str(path), "out": str(target), "kind": kind, "bytes": len(content)}
            )
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            stdout().print(f"{row['out']} ({row['kind']}, {row['bytes']:,} bytes)", soft_wrap=True)


def _image_file(pixels: Any, target: Path) -> bytes:
    """An image file of these pixels, in the lossless format that the name ends in."""
    from PIL import Image

    kind = {".png": "PNG", ".bmp": "BMP", ".ppm": "PPM", ".pgm": "PPM", ".tif": "TIFF"}
    kind[".tiff"] = "TIFF"
    suffix = target.suffix.lower()
    if suffix not in kind:
        raise TorchzooError(f"{target}: expected a name that ends in {', '.join(kind)}")
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, kind[suffix])
    return buffer.getvalue()
