"""A scene as one web page: WebGL 2, no network, and orbit controls for mouse, touch and keys.

The page draws what a `.splat` file holds: colours that are the same from all sides.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from torchzoo.files import write_text
from torchzoo.splatting.scene import GaussianScene
from torchzoo.splatting.splat_file import write_splat

__all__ = ["View", "export_html", "first_view", "page", "server"]

FOV = 45.0
PITCH = 0.35


class View(NamedTuple):
    """From where the page shows the scene at first.

    Attributes:
        target: `(3,)`, what is looked at.
        eye: `(3,)`, from where.
        up: `(3,)`, of length one.
        fov: Degrees, along the shorter side of the window.
    """

    target: Tensor
    eye: Tensor
    up: Tensor
    fov: float


def first_view(scene: GaussianScene, up: Sequence[float] = (0.0, 0.0, 1.0)) -> View:
    """A view from which most of the scene is seen.

    Args:
        scene: The scene.
        up: The world's direction that is up.

    Raises:
        ValueError: `up` has no direction.
    """
    upward = torch.tensor(up, dtype=torch.float64)
    if upward.shape != (3,) or not upward.isfinite().all() or not upward.any():
        raise ValueError(f"up: got {tuple(up)}, expected a direction of 3 numbers")
    upward = upward / upward.norm()
    means = scene.means.detach().double().cpu()
    means = means[means.isfinite().all(-1)]
    target, reach = torch.zeros(3, dtype=torch.float64), 1.0
    if len(means):
        target = means.median(0).values
        reach = (means - target).norm(dim=-1).quantile(0.9).item() or 1.0
    _, front = _around(upward)
    away = math.cos(PITCH) * front + math.sin(PITCH) * upward
    distance = 1.3 * reach / math.tan(math.radians(FOV) / 2)
    return View(target, target + distance * away, upward, FOV)


def _around(up: Tensor) -> tuple[Tensor, Tensor]:
    """Two directions at right angles to `up` and each other; the page takes the same."""
    other = up.new_tensor([1, 0, 0] if abs(up[0]) < 0.9 else [0, 1, 0])
    side = torch.linalg.cross(up, other)
    side = side / side.norm()
    return side, torch.linalg.cross(side, up)


def page(
    scene: GaussianScene, *, title: str = "Scene", up: Sequence[float] = (0.0, 0.0, 1.0)
) -> str:
    """The page's HTML; see `export_html`."""
    view = first_view(scene, up)
    settings = {
        "target": view.target.tolist(),
        "distance": (view.eye - view.target).norm().item(),
        "up": view.up.tolist(),
        "yaw": 0.0,
        "pitch": PITCH,
        "fov": view.fov,
    }
    template = files("torchzoo.splatting").joinpath("viewer.html").read_text(encoding="utf-8")
    for name, value in (
        ("title", html.escape(title)),
        ("view", json.dumps(settings)),
        ("splats", base64.b64encode(write_splat(scene)).decode("ascii")),
    ):
        template = template.replace(f"${name}", value, 1)
    return template


def export_html(
    scene: GaussianScene,
    path: str | Path,
    *,
    title: str = "Scene",
    up: Sequence[float] = (0.0, 0.0, 1.0),
) -> Path:
    """Write a scene as one web page that needs nothing else, and no network.

    Args:
        scene: The scene; its splats, 32 bytes each, are in the page.
        path: The file.
        title: The page's title.
        up: The world's direction that is up at first; `(0, -1, 0)` for most of COLMAP's scenes.

    Returns:
        The path.

    Raises:
        ValueError: `up` has no direction.
        TorchzooError: The file can't be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = export_html(GaussianScene(5), f"{folder}/scene.html")
        ...     path.read_text()[:15]
        '<!DOCTYPE html>'
    """
    return write_text(path, page(scene, title=title, up=up))


def server(text: str, port: int = 0) -> ThreadingHTTPServer:
    """A server of one page to this machine alone; with port 0, at any port that is free."""
    content = text.encode("utf-8")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path.partition("?")[0] == "/"
            self.send_response(200 if known else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(content) if known else 0))
            self.end_headers()
            if known:
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)
