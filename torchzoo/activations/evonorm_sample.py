"""EvoNorm's S series: statistics of groups of channels of each sample, and nothing that runs.

Liu, Brock, Simonyan and Le, "Evolving Normalization-Activation Layers", 2020. The formulas
are in `evonorm_base`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchzoo import peers
from torchzoo.activations.evonorm_base import FIXED_RANK, EvoNorm
from torchzoo.ops import evonorm_sample
from torchzoo.registry import Comparison, Example, register


class _SampleEvoNorm(EvoNorm):
    """S series: statistics of groups of channels of each sample."""

    centred = True

    def __init__(
        self,
        num_features: int,
        groups: int = 32,
        *,
        group_size: int | None = None,
        nonlinear: bool = True,
        eps: float = 1e-5,
        channels_last: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_features, eps, nonlinear, channels_last, device, dtype)
        name, size = ("groups", groups) if group_size is None else ("group_size", group_size)
        if size < 1 or num_features % size:
            raise ValueError(f"{name}: expected a divisor of {num_features} channels, got {size}")
        self.groups = groups if group_size is None else num_features // group_size
        self.reset_parameters()

    def _normalize(self, x: Tensor) -> Tensor:
        v = torch.ones_like(self.weight) if self.v is None else self.v
        return evonorm_sample(
            x, self.weight, self.bias, v, groups=self.groups, eps=self.eps, centred=self.centred
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}"


def _sample_card(x: tuple[int, ...]) -> Example:
    bad = {"num_features": 0, "groups": 3, "group_size": 3, "eps": -1.0}
    return Example({"num_features": x[1], "groups": 2}, (torch.randn(x),), bad_options=bad)


_sample_layer = register(
    paper=40,
    example=lambda: _sample_card((3, 4, 2, 3)),
    exempt=FIXED_RANK,
    compare=lambda: Comparison(
        {"num_features": 64}, (torch.randn(32, 64, 32, 32),), peers.NORM_ACTIVATIONS
    ),
)


@_sample_layer
class EvoNormS0(_SampleEvoNorm):
    """A gated value over its group's deviation in place of GroupNorm and SiLU.

    It has no running state and is the same in training and evaluation, for any batch size. The
    gate sees the raw values, and the layer does not centre them.

    Args:
        num_features: Channels C.
        groups: Number of groups, a divisor of C.
        group_size: Channels a group, a divisor of C; takes the place of `groups`.
        nonlinear: False leaves the affine part alone: no normalisation either.
        eps: Added to the variance.
        channels_last: Whether channels are the last axis of the shape.
        device: Where the tensors are.
        dtype: Their dtype.

    Shape:
        - x, output: `(N, C, *spatial)` with one to three spatial axes, in any memory format;
          `(N, *spatial, C)` with `channels_last=True`

    Source:
        Liu, Brock, Simonyan and Le, "Evolving Normalization-Activation Layers", 2020.

    Example:
        >>> layer = EvoNormS0(64)
        >>> layer(torch.randn(2, 64, 5, 7)).shape, list(layer.state_dict())
        (torch.Size([2, 64, 5, 7]), ['weight', 'bias', 'v'])
    """

    has_v = True


@_sample_layer
class EvoNormS1(_SampleEvoNorm):
    """`EvoNormS0` with a plain SiLU: no `v`.

    Args:
        num_features: Channels C.
        groups: Number of groups, a divisor of C.
        group_size: Channels a group, a divisor of C; takes the place of `groups`.
        nonlinear: False leaves the affine part alone: no normalisation either.
        eps: Added to the variance.
        channels_last: Whether channels are the last axis of the shape.
        device: Where the tensors are.
        dtype: Their dtype.

    Shape:
        - x, output: `(N, C, *spatial)` with one to three spatial axes, in any memory format;
          `(N, *spatial, C)` with `channels_last=True`

    Source:
        Liu, Brock, Simonyan and Le, "Evolving Normalization-Activation Layers", 2020.

    Example:
        >>> EvoNormS1(8, groups=2)(torch.randn(4, 8, 5)).shape
        torch.Size([4, 8, 5])
    """


@_sample_layer
class EvoNormS2(_SampleEvoNorm):
    """`EvoNormS1` with the group's root mean square in place of its deviation.

    Args:
        num_features: Channels C.
        groups: Number of groups, a divisor of C.
        group_size: Channels a group, a divisor of C; takes the place of `groups`.
        nonlinear: False leaves the affine part alone: no normalisation either.
        eps: Added to the mean square.
        channels_last: Whether channels are the last axis of the shape.
        device: Where the tensors are.
        dtype: Their dtype.

    Shape:
        - x, output: `(N, C, *spatial)` with one to three spatial axes, in any memory format;
          `(N, *spatial, C)` with `channels_last=True`

    Source:
        Liu, Brock, Simonyan and Le, "Evolving Normalization-Activation Layers", 2020.

    Example:
        >>> EvoNormS2(8, groups=2)(torch.randn(4, 8, 5)).shape
        torch.Size([4, 8, 5])
    """

    centred = False
