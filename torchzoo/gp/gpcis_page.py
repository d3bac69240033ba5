"""A photograph to be segmented by clicks, as one web page: no network, and nothing to install.

The page holds what the head sees of each pixel and solves the clicks' system itself; features are
kept in 16 bits.
"""

from __future__ import annotations

import base64
import html
import json
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchzoo.files import write_text
from torchzoo.gp.gpcis import GPCISHead
from torchzoo.ops.calling import no_autocast

__all__ = ["export_html", "page"]


@torch.no_grad()
def page(
    head: GPCISHead, features: Tensor, image: Tensor, photo: Tensor, *, title: str = "Segmentation"
) -> str:
    """The page's HTML; see `export_html`."""
    if image.ndim != 3 or features.ndim != 3:
        shapes = f"{tuple(features.shape)} and {tuple(image.shape)}"
        raise ValueError(f"image: expected features (C, h, w) and image (3, H, W), got {shapes}")
    if photo.shape != (3, *image.shape[1:]):
        raise ValueError(f"photo: expected (3, H, W) of the image, got {tuple(photo.shape)}")
    with no_autocast(features):
        x = head.embed(features[None], image[None])[0]
        prior = head.basis(x) @ head.omega_mean
        means = F.softplus(head.click_mlp(x)[:, 0])
    split = head.feature_dim
    near, near_unit = _sixteen_bits(x[:, :split])
    colour, colour_unit = _sixteen_bits(x[:, split:])
    light = (photo.clamp(0, 1) * 255).round().byte().flatten(1).mT
    settings = {
        "height": image.shape[1],
        "width": image.shape[2],
        "units": [near_unit, colour_unit],
        "precision": head.log_precision.exp().tolist(),
        "colours": head.extra_dim,
        "weight": head.weight.item(),
        "jitter": head.jitter_eval,
    }
    parts = [prior.float(), means.float(), near, colour, light]
    data = b"".join(_bytes(part) for part in parts)
    template = files("torchzoo.gp").joinpath("gpcis.html").read_text(encoding="utf-8")
    for name, value in (
        ("$title", html.escape(title)),
        ("$heading", html.escape(title)),
        ("$settings", json.dumps(settings)),
        ("$data", base64.b64encode(data).decode("ascii")),
    ):
        template = template.replace(name, value, 1)
    return template


def export_html(
    head: GPCISHead,
    features: Tensor,
    image: Tensor,
    photo: Tensor,
    path: str | Path,
    *,
    title: str = "Segmentation",
) -> Path:
    """Write a page on which clicks segment a photograph, as this head does in evaluation.

    The features must not depend on the clicks.

    Args:
        head: The head; channels come first here, whatever it takes.
        features: The photograph's features.
        image: The photograph as the head takes it.
        photo: The photograph as it is shown, in [0, 1].
        path: The file.
        title: The page's title.

    Shape:
        - features: `(C, h, w)`
        - image: `(3, H, W)`
        - photo: `(3, H, W)`

    Returns:
        The path.

    Raises:
        ValueError: Shapes that don't fit.
        TorchzooError: The file can't be written.

    Example:
        >>> import tempfile
        >>> head, photo = GPCISHead(8), torch.rand(3, 12, 16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = export_html(head, torch.randn(8, 12, 16), photo, photo, f"{folder}/a.html")
        ...     path.read_text()[:15]
        '<!DOCTYPE html>'
    """
    return write_text(path, page(head, features, image, photo, title=title))


def _sixteen_bits(values: Tensor) -> tuple[Tensor, float]:
    """Whole numbers, and what 1 stands for."""
    unit = max(values.abs().max().item() if values.numel() else 0.0, 1e-12) / 32767
    return (values / unit).round().to(torch.int16), unit


def _bytes(values: Tensor) -> bytes:
    array: Any = values.contiguous().cpu().numpy()
    return (array if sys.byteorder == "little" else array.byteswap()).tobytes()
