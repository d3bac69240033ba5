"""`torchzoo splat render`: a video, or its frames, of a scene of Gaussians."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchzoo.cli._models import training_progress
from torchzoo.cli._output import Json, print_json, stderr, stdout, working
from torchzoo.cli._where import Device, check_folder, resolve_device
from torchzoo.errors import TorchzooError

if TYPE_CHECKING:
    from torch import Tensor

    from torchzoo.splatting.cameras import Cameras
    from torchzoo.splatting.scene import GaussianScene

VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".gif")


def render(
    scene: Annotated[
        Path,
        typer.Argument(
            help="A .ply, .splat or .spz file, or a folder of torchzoo splat train.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help=f"A video ({', '.join(VIDEOS)}), or a folder for PNG files.",
            show_default=False,
        ),
    ],
    path: Annotated[
        str, typer.Option(help="orbit, or a capture whose cameras are the path.")
    ] = "orbit",
    frames: Annotated[int, typer.Option(min=1, help="Frames of an orbit.")] = 90,
    size: Annotated[str, typer.Option(help="Width x height, such as 640x360.")] = "256x256",
    radius: Annotated[
        float | None,
        typer.Option(min=1e-6, help="Of the orbit.", show_default="what shows most of the scene"),
    ] = None,
    elevation: Annotated[float, typer.Option(min=-89, max=89, help="Of it, in degrees.")] = 25.0,
    fov: Annotated[float, typer.Option(min=1, max=170, help="Field of view, in degrees.")] = 45.0,
    up: Annotated[str, typer.Option(help="The axis that points up: x, y, z, -x, -y or -z.")] = "z",
    background: Annotated[str, typer.Option(help="Red,green,blue from 0 to 1.")] = "0,0,0",
    fps: Annotated[int, typer.Option(min=1, help="Frames a second of a video.")] = 30,
    device: Annotated[Device, typer.Option(help="Where to render; auto takes CUDA.")] = Device.auto,
    as_json: Json = False,
) -> None:
    """Render a scene along a path of cameras, as a video or as PNG files.

    Videos need PyAV, the extra "video"; without it the frames go into a folder of the video's name.

    Example: [bold]torchzoo splat render checker/scene.ply --path orbit -o orbit.mp4[/bold]
    """
    width, height = _size(size)
    color = _color(background)
    video = out.suffix.lower() in VIDEOS
    if out.suffix and not video:
        kinds = ", ".join(VIDEOS)
        raise typer.BadParameter(f"--out: expected a folder or a name in {kinds}, got {out.name}")
    if video and find_spec("av") is None:
        video, out = False, out.with_suffix("")
        stderr().print(f"PyAV is not installed: PNG files go to {out}", soft_wrap=True)
    check_folder(out.parent if video else out)
    with working("importing torch"):
        target = resolve_device(device)
        import torch
    with working("reading the scene"):
        splats = _load(scene).to(target)
    if path == "orbit":
        cameras = _orbit(splats, frames, width, height, radius, elevation, fov, up)
    else:
        cameras = _capture(Path(path), width, height)
    cameras = cameras.to(target)
    behind = torch.tensor(color, device=target)

    def pictures() -> Iterator[Tensor]:
        with training_progress("rendering") as tick, torch.no_grad():
            for index, camera in enumerate(cameras):
                image = splats.render(camera, backgrounds=behind).image
                assert image is not None
                yield (image[0].clamp(0, 1) * 255).round().byte().cpu()
                tick(index + 1, len(cameras), "")

    written = _video(pictures(), out, fps, width, height) if video else _stills(pictures(), out)
    if as_json:
        print_json({"out": str(written), "frames": len(cameras), "splats": splats.num_gaussians})
    else:
        stdout().print(f"{len(cameras)} frames in {written}", soft_wrap=True)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if match is None or not (int(match[1]) and int(match[2])):
        raise typer.BadParameter(f"--size: expected width x height such as 640x360, got {text!r}")
    return int(match[1]), int(match[2])


def _color(text: str) -> tuple[float, ...]:
    try:
        color = tuple(float(part) for part in text.split(","))
    except ValueError:
        color = ()
    if len(color) != 3 or not all(0 <= part <= 1 for part in color):
        raise typer.BadParameter(f"--background: expected three of 0 to 1, got {text!r}")
    return color


def _load(path: Path) -> GaussianScene:
    from torchzoo.splatting import formats

    inside = path / "scene.ply"
    path = inside if inside.is_file() else path
    try:
        return formats.load(path)
    except ValueError as error:
        raise TorchzooError(str(error)) from error
    except OSError as error:
        raise TorchzooError(f"can't read {path}: {error.strerror or error}") from error


def _orbit(
    splats: GaussianScene,
    frames: int,
    width: int,
    height: int,
    radius: float | None,
    elevation: float,
    fov: float,
    up: str,
) -> Cameras:
    """A circle around the middle of the scene, whose axis points up."""
    import torch

    from torchzoo.splatting.cameras import Cameras

    if not re.fullmatch(r"-?[xyz]", up):
        raise typer.BadParameter(f"--up: expected x, y, z, -x, -y or -z, got {up!r}")
    if not splats.num_gaussians:
        raise TorchzooError("the scene has no Gaussians")
    axis = torch.zeros(3)
    axis["xyz".index(up[-1])] = -1.0 if up[0] == "-" else 1.0
    means = splats.means.detach().float().cpu()
    middle = means.median(0).values
    if radius is None:
        reach = (means - middle).norm(dim=-1).quantile(0.9).item() or 1.0
        radius = 1.2 * reach / math.sin(math.radians(fov) / 2)
    side = torch.tensor([0.0, 1.0, 0.0]) if up[-1] == "x" else torch.tensor([1.0, 0.0, 0.0])
    other = torch.linalg.cross(axis, side)
    angle = torch.arange(frames) * (2 * math.pi / frames)
    flat = side * angle.cos()[:, None] + other * angle.sin()[:, None]
    rise = math.radians(elevation)
    eyes = middle + radius * (math.cos(rise) * flat + math.sin(rise) * axis)
    return Cameras.look_at(
        eyes, middle.tolist(), width=width, height=height, up=axis.tolist(), fov=fov
    )


def _capture(path: Path, width: int, height: int) -> Cameras:
    """The cameras of a capture, in pictures of another size."""
    from torchzoo.splatting import formats

    try:
        return formats.load_capture(path).cameras.resized(width, height)
    except ValueError as error:
        raise TorchzooError(f"--path: expected orbit or a capture; {error}") from error
    except OSError as error:
        raise TorchzooError(f"--path: can't read {path}: {error.strerror or error}") from error


def _stills(pictures: Iterator[Tensor], folder: Path) -> Path:
    from PIL import Image

    from torchzoo.files import atomic_path

    for index, pixels in enumerate(pictures):
        with atomic_path(folder / f"{index:05d}.png") as part:
            Image.fromarray(pixels.numpy()).save(part, "PNG")
    return folder


def _video(pictures: Iterator[Tensor], path: Path, fps: int, width: int, height: int) -> Path:
    """Write a video, whole or not at all."""
    import av

    from torchzoo.files import atomic_path

    codec, pixel_format = {
        ".gif": ("gif", "rgb8"),
        ".webm": ("libvpx-vp9", "yuv420p"),
    }.get(path.suffix.lower(), ("libx264", "yuv420p"))
    container_format = {".mkv": "matroska"}.get(path.suffix.lower(), path.suffix.lower()[1:])
    with (
        atomic_path(path) as part,
        av.open(str(part), "w", format=container_format) as container,
    ):
        stream: Any = container.add_stream(codec, rate=Fraction(fps))
        # these formats halve the colours' resolution, so sides must be even
        stream.width, stream.height = max(2, width - width % 2), max(2, height - height % 2)
        stream.pix_fmt = pixel_format
        for pixels in pictures:
            frame = av.VideoFrame.from_ndarray(pixels.numpy(), format="rgb24")
            container.mux(stream.encode(frame.reformat(stream.width, stream.height)))
        container.mux(stream.encode(None))
    return path
