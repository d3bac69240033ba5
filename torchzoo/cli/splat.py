"""`torchzoo splat`: scenes of Gaussians, their files and what is in them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from torchzoo.cli._output import Json, new_grid, print_json, stdout, working
from torchzoo.cli.splat_render import render
from torchzoo.cli.splat_train import train
from torchzoo.errors import TorchzooError

if TYPE_CHECKING:
    from torchzoo.splatting import Capture, GaussianScene

T = TypeVar("T")

_SIDES = {
    f"{sign}{axis}": tuple(float(f"{sign}1") if name == axis else 0.0 for name in "xyz")
    for sign in ("", "-")
    for axis in "xyz"
}

splat = typer.Typer(
    name="splat",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Scene = Annotated[
    Path,
    typer.Argument(
        metavar="SCENE",
        help="A .ply, .splat or .spz file, or a folder that a scene was saved to.",
        show_default=False,
    ),
]


@splat.callback()
def _splat() -> None:
    """Scenes of 3-D Gaussians: train, render and view them, convert and look into their files.

    Example: [bold]torchzoo splat convert scene.ply scene.spz[/bold]
    """


splat.command()(train)
splat.command()(render)


@splat.command()
def convert(
    scene: Annotated[Path, typer.Argument(metavar="IN", help="The scene.", show_default=False)],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="What to write: a .ply, .splat or .spz file, else a folder.",
            show_default=False,
        ),
    ],
    as_json: Json = False,
) -> None:
    """Convert a scene from one format to another.

    PLY keeps everything. SPZ is several times smaller and keeps positions to 0.1 mm of a metre,
    rotations to 0.25 degrees and colours to about a hundredth. .splat is for simple viewers: a
    colour is the same from all sides. A folder has the zoo's own format.

    Example: [bold]torchzoo splat convert scene.ply scene.spz[/bold]
    """
    with working("converting"):
        from torchzoo.splatting import load, save

        loaded = _read(load, scene)
        try:
            save(loaded, out)
        except ValueError as error:
            raise TorchzooError(str(error)) from None
    report = {
        "in": str(scene),
        "out": str(out),
        "gaussians": loaded.num_gaussians,
        "sh_degree": 0 if out.suffix.lower() == ".splat" else loaded.sh_degree,
        "in_bytes": _size(scene),
        "out_bytes": _size(out),
    }
    _print(report, as_json)


@splat.command()
def info(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="A scene; or a transforms.json, or a folder with that or a COLMAP model.",
            show_default=False,
        ),
    ],
    as_json: Json = False,
) -> None:
    """Say what is in a scene's file, or in the cameras of a data set.

    The box is where 98 % of the Gaussians are along each axis.

    Example: [bold]torchzoo splat info scene.ply[/bold]
    """
    with working("reading"):
        from torchzoo.splatting import load, load_capture

        of_photographs = path.suffix.lower() == ".json" or (
            path.is_dir() and not (path / "config.json").is_file()
        )
        report = (
            _about_capture(_read(load_capture, path))
            if of_photographs
            else _about_scene(_read(load, path))
        )
    _print({"path": str(path), "bytes": _size(path), **report}, as_json)


@splat.command()
def view(
    scene: Scene,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="The page to write; by default SCENE.html.", show_default=False
        ),
    ] = None,
    up: Annotated[
        str, typer.Option(help=f"The side that is up: one of {', '.join(_SIDES)}.")
    ] = "z",
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve the page on this machine until Ctrl-C.")
    ] = False,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Where to serve; 0 takes a free port.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Make a web page that shows a scene and can be turned with mouse, touch or keys.

    The page is one file that works without a network. COLMAP's scenes mostly have --up -y. With
    --serve nothing is written.

    Example: [bold]torchzoo splat view scene.ply -o scene.html[/bold]
    """
    if up not in _SIDES:
        raise typer.BadParameter(f"--up: expected one of {', '.join(_SIDES)}, got {up!r}")
    if serve and out:
        raise typer.BadParameter("--serve writes nothing: leave out --out")
    with working("making the page"):
        from torchzoo.files import write_text
        from torchzoo.splatting import load, viewer

        loaded = _read(load, scene)
        text = viewer.page(loaded, title=scene.stem, up=_SIDES[up])
    if serve:
        _serve(text, port, as_json)
        return
    path = write_text(out or scene.with_suffix(".html"), text)
    _print({"scene": str(scene), "out": str(path), "bytes": _size(path)}, as_json)


def _serve(text: str, port: int, as_json: bool) -> None:
    from torchzoo.splatting import viewer

    try:
        server = viewer.server(text, port)
    except OSError as error:
        raise TorchzooError(f"can't serve at port {port}: {error.strerror or error}") from None
    with server:
        url = f"http://127.0.0.1:{server.server_port}/"
        if as_json:
            print_json({"url": url})
        else:
            stdout().print(f"{url} (Ctrl-C ends)")
        sys.stdout.flush()
        server.serve_forever()


def _about_scene(scene: GaussianScene) -> dict[str, Any]:
    import torch

    rows = scene.state_dict().values()
    finite = torch.cat([value[..., None].flatten(1) for value in rows], 1).isfinite().all(1)
    shown = scene.means.detach()[finite]
    box = shown.quantile(torch.tensor([0.01, 0.99]), 0) if len(shown) else shown.new_zeros(2, 3)
    scales = scene.scales.detach()[finite]
    opacities = scene.opacities.detach()[finite]
    return {
        "gaussians": scene.num_gaussians,
        "not_finite": int((~finite).sum()),
        "sh_degree": scene.sh_degree,
        "box_low": _rounded(box[0].tolist()),
        "box_high": _rounded(box[1].tolist()),
        "median_scale": _rounded([scales.median().item()])[0] if len(shown) else None,
        "mean_opacity": _rounded([opacities.mean().item()])[0] if len(shown) else None,
    }


def _about_capture(capture: Capture) -> dict[str, Any]:
    cameras = capture.cameras
    return {
        "images": len(cameras),
        "width": cameras.width,
        "height": cameras.height,
        "camera_model": cameras.camera_model,
        "focal_lengths": _rounded(cameras.Ks[:, 0, 0].unique().tolist()[:4]),
        "scene_scale": _rounded([cameras.scene_scale])[0],
        "points": len(capture.points),
        "first_image": capture.names[0],
    }


def _rounded(values: list[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def _read(read: Callable[[Path], T], path: Path) -> T:
    """Read a file; what is wrong with it is the request's fault, not the program's."""
    try:
        return read(path)
    except OSError as error:
        raise TorchzooError(f"can't read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise TorchzooError(str(error)) from None


def _size(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _print(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(report)
        return
    table = new_grid("dim")
    for name, value in report.items():
        if isinstance(value, list):
            value = ", ".join(f"{item:g}" for item in value)
        elif isinstance(value, int):
            value = f"{value:,}"
        table.add_row(name.replace("_", " "), "–" if value is None else str(value))
    stdout().print(table)
