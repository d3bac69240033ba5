"""LPIPS: how different pictures are by the features of a network, where one is on the machine."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

__all__ = ["find_lpips"]

Measure = Callable[[Tensor, Tensor], Tensor]

LEAST_SIDE = 32
"""Smaller pictures don't fill the networks' strides."""

NETWORKS = {"vgg": "VGG16_Weights", "alex": "AlexNet_Weights"}
"""Networks in the order in which they are wanted, and what torchvision calls their weights."""


def find_lpips(
    height: int, width: int, *, device: torch.device | str | None = None
) -> dict[str, Measure]:
    """The perceptual measure that can be had without a download, under its network's name.

    Takes the package lpips or torchmetrics, whichever can be imported, and weights that torch's
    cache holds. Values of different networks don't compare, hence the names.

    Args:
        height: Of the pictures.
        width: Of the pictures.
        device: Where the pictures are.

    Returns:
        `lpips_vgg` or else `lpips_alex`, called with pictures and their truth `(C, H, W, 3)` in
        [0, 1], gives their mean. Empty where there is neither package or neither network, where a
        package doesn't work, of which a warning tells, and for pictures below 32 pixels.

    Source:
        Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
        2018.

    Example:
        >>> find_lpips(16, 16)
        {}
    """
    if min(height, width) < LEAST_SIDE:
        return {}
    for network in filter(_is_here, NETWORKS):
        for make in (_of_lpips, _of_torchmetrics):
            try:
                module = make(network).to(device).eval().requires_grad_(False)
            except ImportError:
                continue
            except Exception as error:  # whatever a foreign package may raise
                warnings.warn(f"LPIPS is left out: {error}", stacklevel=2)
                continue
            return {f"lpips_{network}": _measure(module)}
    return {}


def _is_here(network: str) -> bool:
    """Whether torch's cache holds the weights, so that nothing would be downloaded."""
    try:
        from torchvision import models
    except ImportError:
        return False
    url: str = getattr(models, NETWORKS[network]).IMAGENET1K_V1.url
    return (Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]).is_file()


def _of_lpips(network: str) -> torch.nn.Module:
    from lpips import LPIPS

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torchvision the old way
        module: torch.nn.Module = LPIPS(net=network, verbose=False)
    return module


def _of_torchmetrics(network: str) -> torch.nn.Module:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    metric: torch.nn.Module = LearnedPerceptualImagePatchSimilarity(net_type=network)
    return metric


def _measure(module: torch.nn.Module) -> Measure:
    """Both packages take channels first and, unless told otherwise, [-1, 1]."""

    def measure(found: Tensor, truth: Tensor) -> Tensor:
        planes = [2 * rearrange(x.float(), "c h w f -> c f h w") - 1 for x in (found, truth)]
        value: Tensor = module(*planes)
        return value.mean()

    return measure
