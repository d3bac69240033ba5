"""Which filters of a convolution fire for an image: the targets that mask heads learn.

S. Elkerdawy, M. Elhoushi, H. Zhang and N. Ray, "Fire Together Wire Together: A Dynamic Pruning
Approach with Self-Supervised Mask Prediction", 2022. For activations out,

    e_c = max over space of |out_c|,   p_c = e_c / sum e               how strongly a filter fires
    target_c = 1 while p, summed from the largest down to p_c, is at most tau

Deviations from the authors' code: the strongest filter is kept where it alone has more than tau of
the mass (`min_keep=1`), and an image without any activity keeps that one only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def heatmap_mass_mask(out: Tensor, tau: float, *, delta: float = 1e-5, min_keep: int = 1) -> Tensor:
    """Which filters hold the first tau of the mass of an image's activations.

    Args:
        out: Activations of a layer.
        tau: Share of the mass, at most 1. At 1 all but dead filters are kept, those with at most
            `delta` of the mass; below 0 all are.
        delta: Mass by which tau may be exceeded.
        min_keep: Filters that are kept in any case, the strongest.

    Shape:
        - out: `(B, C, H, W)`
        - output: `(B, C)`, bool

    Raises:
        ValueError: tau above 1, or an input that is no image.

    Source:
        Elkerdawy et al., "Fire Together Wire Together", 2022, the mass criterion.

    Example:
        >>> out = torch.tensor([5.0, 3.0, 1.0, 1.0]).reshape(1, 4, 1, 1)
        >>> heatmap_mass_mask(out, 0.8), heatmap_mass_mask(out, 0.79)
        (tensor([[ True,  True, False, False]]), tensor([[ True, False, False, False]]))
    """
    check_threshold("tau", "mass", tau)
    heat = _heat(out)
    if tau < 0:
        return torch.ones_like(heat, dtype=torch.bool)
    largest, order = heat.sort(stable=True, dim=-1, descending=True)
    share = largest / heat.sum(-1, keepdim=True).clamp_min(torch.finfo(heat.dtype).tiny)
    keep = share > delta if tau == 1 else (share.cumsum(-1) - tau <= delta) & (share > 0)
    keep = keep | (torch.arange(heat.shape[-1], device=heat.device) < min_keep)
    return torch.zeros_like(keep).scatter(-1, order, keep)


def uniform_mask(out: Tensor, ratio: float, *, delta: float = 1e-5) -> Tensor:
    """All but an image's weakest filters, the same number for each image, and the dead ones.

    Args:
        out: Activations of a layer.
        ratio: Share of the filters that are dropped, rounded down to a whole number of them.
        delta: A filter is dead where its largest activation is at most this.

    Shape:
        - out: `(B, C, H, W)`
        - output: `(B, C)`, bool

    Raises:
        ValueError: ratio not in [0, 1), or an input that is no image.

    Source:
        Elkerdawy et al., "Fire Together Wire Together", 2022, the uniform criterion.

    Example:
        >>> out = torch.tensor([5.0, 3.0, 0.0, 1.0]).reshape(1, 4, 1, 1)
        >>> uniform_mask(out, 0.5)
        tensor([[ True,  True, False, False]])
    """
    check_threshold("ratio", "uniform", ratio)
    heat = _heat(out)
    dropped = math.floor(ratio * heat.shape[-1] + 1e-9)  # so that 0.29 of 100 is 29
    weakest = heat.argsort(stable=True, dim=-1)[..., :dropped]
    return (heat > delta).scatter(-1, weakest, False)


def _heat(out: Tensor) -> Tensor:
    if out.ndim != 4:
        raise ValueError(f"out: expected (B, C, H, W), got {tuple(out.shape)}")
    return out.detach().abs().amax((-2, -1)).to(torch.promote_types(out.dtype, torch.float32))


def check_threshold(name: str, criterion: str, value: float) -> None:
    """Raise a ValueError unless the threshold is one of the criterion's."""
    if criterion == "mass" and not value <= 1:
        raise ValueError(f"{name}: expected at most 1, got {value}")
    if criterion == "uniform" and not 0 <= value < 1:
        raise ValueError(f"{name}: expected a number in [0, 1), got {value}")
