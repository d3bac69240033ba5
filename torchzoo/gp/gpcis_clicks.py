"""What goes with a head that takes clicks: maps of them, the losses, and which are disobeyed.

M. Zhou and others, "Interactive segmentation as Gaussian process classification", 2023, with the
click maps and the focal loss that the field has in common.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Segmentation(NamedTuple):
    """What `GPCISHead` finds.

    Attributes:
        logits: `(..., 1, H, W)`, above 0 in the object.
        kl: `(...)`, divergence of the clicks' values from their prior.
        click_loss: `(...)`, cross entropy of the clicks' values and labels.
    """

    logits: Tensor
    kl: Tensor
    click_loss: Tensor


def click_disks(points: Tensor, size: tuple[int, int], radius: float = 5) -> Tensor:
    """Clicks as two maps of disks, in the object and outside: what a backbone sees of them.

    Args:
        points: Row, column and the click's number; the first half of the M rows are clicks in the
            object, the second half clicks outside. Negative numbers: no click.
        size: Height and width.
        radius: Of the disks, in pixels.

    Shape:
        - points: `(B, M, 3)`, M even
        - output: `(B, 2, H, W)`, 0 or 1

    Raises:
        ValueError: Points of another shape, or a negative radius.

    Example:
        >>> clicks = torch.tensor([[[1.0, 1.0, 0.0], [-1.0, -1.0, -1.0]]])
        >>> click_disks(clicks, (3, 4), radius=1)[0, 0].tolist()
        [[0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0]]
    """
    if points.ndim != 3 or points.shape[2] != 3 or points.shape[1] % 2:
        raise ValueError(f"points: expected (B, M, 3) with M even, got {tuple(points.shape)}")
    if not radius >= 0:
        raise ValueError(f"radius: expected at least 0, got {radius}")
    kind = points.dtype if points.is_floating_point() else torch.get_default_dtype()
    row, column = (torch.arange(side, device=points.device, dtype=kind) for side in size)
    away = (row[:, None] - points[..., 0, None, None]).square()
    away = away + (column - points[..., 1, None, None]).square()
    real = (points[..., :2] >= 0).all(-1)[..., None, None]
    inside = (away <= radius**2) & real
    return inside.unflatten(1, (2, -1)).any(2).to(kind)


def disk_points(points: Tensor, labels: Tensor) -> Tensor:
    """Clicks as the head takes them in the form that `click_disks` takes.

    Shape:
        - points: `(B, M, 2)`
        - labels: `(B, M)`
        - output: `(B, 2 M, 3)`

    Example:
        >>> disk_points(torch.tensor([[[4, 7]]]), torch.tensor([[-1]])).tolist()
        [[[-1, -1, -1], [4, 7, 0]]]
    """
    order = torch.arange(labels.shape[-1], device=points.device).expand(labels.shape)
    rows = torch.cat([points, order.to(points)[..., None]], -1)
    halves = [torch.where((labels == sign)[..., None], rows, -1) for sign in (1, -1)]
    return torch.cat(halves, -2)


def normalized_focal_loss(
    logits: Tensor, mask: Tensor, *, alpha: float = 0.5, gamma: float = 2.0
) -> Tensor:
    """Focal loss whose weights (1 - p)^gamma are scaled to a mean of 1 in each image.

    Args:
        logits: Logits.
        mask: The truth, 0 or 1.
        alpha: Weight of the object's pixels; others have 1 - alpha.
        gamma: Exponent.

    Shape:
        - logits: `(..., H, W)`
        - mask: the same
        - output: a scalar, the mean

    Raises:
        ValueError: Shapes that differ.

    Source:
        K. Sofiiuk, O. Barinova and A. Konushin, "AdaptIS: adaptive instance selection network",
        2019; the scale is held, as the authors' code has it.

    Example:
        >>> loss = normalized_focal_loss(torch.zeros(1, 2, 2), torch.eye(2)[None])
        >>> round(loss.item(), 4)  # log(2) / 2
        0.3466
    """
    if logits.shape != mask.shape:
        raise ValueError(f"mask: expected {tuple(logits.shape)}, got {tuple(mask.shape)}")
    truth = mask > 0.5
    log_p = F.logsigmoid(torch.where(truth, logits, -logits))
    focus = (-log_p.expm1()).clamp_min(0) ** gamma
    scale = focus.detach().mean((-2, -1), keepdim=True).clamp_min(torch.finfo(focus.dtype).tiny)
    weight = torch.where(truth, alpha, 1 - alpha)
    return -(weight * focus / scale * log_p).mean()


def gpcis_loss(found: Segmentation, mask: Tensor, *, kl_weight: float = 1e-3) -> Tensor:
    """The loss of training: focal on the mask, cross entropy and divergence at the clicks.

    Args:
        found: What the head gave.
        mask: The truth, 0 or 1.
        kl_weight: Weight of the terms at the clicks.

    Shape:
        - mask: that of the logits
        - output: a scalar

    Example:
        >>> zeros = torch.zeros(1)
        >>> found = Segmentation(torch.zeros(1, 1, 2, 2), zeros, zeros)
        >>> round(gpcis_loss(found, torch.ones(1, 1, 2, 2)).item(), 4)
        0.3466
    """
    return normalized_focal_loss(found.logits, mask) + kl_weight * (
        found.kl.mean() + found.click_loss.mean()
    )


def click_violations(logits: Tensor, points: Tensor, labels: Tensor) -> Tensor:
    """Which clicks the logits contradict.

    Shape:
        - logits: `(..., 1, H, W)`
        - points: `(..., M, 2)`
        - labels: `(..., M)`, 0 for no click
        - output: `(..., M)`, booleans

    Example:
        >>> logits = torch.tensor([[[1.0, -1.0]]])
        >>> click_violations(logits, torch.tensor([[0, 0], [0, 1]]), torch.tensor([1, 1]))
        tensor([False,  True])
    """
    width = logits.shape[-1]
    row, column = points.long().unbind(-1)
    index = torch.where(labels != 0, row * width + column, 0)
    return (logits.flatten(-3).gather(-1, index) * labels <= 0) & (labels != 0)
