"""EvoNorm: normalisation and activation evolved as one layer, in batch and in sample form.

Liu, Brock, Simonyan and Le, "Evolving Normalization-Activation Layers", 2020. For x of shape
(N, C, *spatial) a layer gives y = f(x) gamma + beta, per channel, with

    B0:  f = x / max(std_b, v x + std_i)          S0:  f = x sigmoid(v x) / std_g
    B1:  f = x / max(std_b, (x + 1) rms_i)        S1:  f = x sigmoid(x) / std_g
    B2:  f = x / max(std_b, rms_i - x)            S2:  f = x sigmoid(x) / rms_g

std = sqrt(var + eps) with the biased variance, rms = sqrt(mean(x²) + eps), taken over the batch and
space of a channel (b), space alone (i), or space and a group of channels of one sample (g). The
variances are centred, x itself is not: no mean is subtracted and none is remembered.

Deviations from the paper: none in the layers. One or three spatial axes are served as two are, and
the batch variance can be that of several processes.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo import peers
from torchzoo.activations.evonorm_functions import (
    affine,
    batch_and_space,
    evonorm_b0,
    evonorm_s0,
    instance_rms,
    instance_term,
    over_groups,
    over_larger,
    variance,
    variances_over_ranks,
    widened,
)
from torchzoo.hub import ZooModel
from torchzoo.registry import Comparison, Example, register

__all__ = [
    "EvoNormB0",
    "EvoNormB1",
    "EvoNormB2",
    "EvoNormS0",
    "EvoNormS1",
    "EvoNormS2",
    "evonorm_b0",
    "evonorm_s0",
]

_FIXED_RANK = {"fixed-rank": "one batch axis, one channel axis, and all others are space"}


class _EvoNorm(ZooModel):
    """What all six share: checks, memory format, and the affine part."""

    has_v = False

    def __init__(
        self,
        num_features: int,
        eps: float,
        nonlinear: bool,
        channels_last: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        if num_features < 1:
            raise ValueError(f"num_features: expected a number of at least 1, got {num_features}")
        if not 0 <= eps < math.inf:
            raise ValueError(f"eps: expected a finite number of at least 0, got {eps}")
        self.num_features = num_features
        self.eps = eps
        self.nonlinear = nonlinear
        self.channels_last = channels_last
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_features, **factory))
        self.bias = nn.Parameter(torch.empty(num_features, **factory))
        has_v = self.has_v and nonlinear
        self.v = nn.Parameter(torch.empty(num_features, **factory)) if has_v else None

    def reset_parameters(self) -> None:
        """Set gamma and v to 1 and beta to 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        if self.v is not None:
            nn.init.ones_(self.v)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and activate.

        Returns:
            The output in the dtype and memory format of `x`; statistics are in float32 at least.

        Raises:
            ValueError: An option out of its range; another number of channels; no spatial axes or
                more than three; a batch variance of a single value in training.
        """
        if not 3 <= x.ndim <= 5:
            raise ValueError(
                f"x: expected 1 to 3 spatial axes beside batch and channels, got {tuple(x.shape)}"
            )
        y = x.movedim(-1, 1) if self.channels_last else x
        if y.shape[1] != self.num_features:
            raise ValueError(f"x: expected {self.num_features} channels, got {tuple(x.shape)}")
        y = self._normalize(y) if self.nonlinear else affine(widened(y), self.weight, self.bias)
        y = y.to(x.dtype)
        return y.movedim(1, -1) if self.channels_last else y

    def _normalize(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        end = ", nonlinear=False" if not self.nonlinear else ""
        return f"{self.num_features}, eps={self.eps:g}{end}"


class _SampleEvoNorm(_EvoNorm):
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
        wide = widened(x)
        y = over_groups(F.silu(wide), wide, self.groups, self.eps, centred=self.centred)
        return affine(y, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}"


class _BatchEvoNorm(_EvoNorm):
    """B series: the variance of the batch, or the running one in evaluation."""

    running_var: Tensor | None

    def __init__(
        self,
        num_features: int,
        *,
        momentum: float = 0.1,
        eps: float = 1e-5,
        nonlinear: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | Literal["world"] | None = None,
        channels_last: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_features, eps, nonlinear, channels_last, device, dtype)
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum: expected a number in [0, 1], got {momentum}")
        if isinstance(process_group, str) and process_group != "world":
            raise ValueError(
                f"process_group: expected a group, 'world' or None, got {process_group!r}"
            )
        self.momentum = momentum
        self.track_running_stats = track_running_stats
        self.process_group = process_group
        running = torch.empty(num_features, device=device, dtype=dtype)
        self.register_buffer("running_var", running if track_running_stats else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set gamma, v and the running variance to 1 and beta to 0."""
        super().reset_parameters()
        if self.running_var is not None:
            nn.init.ones_(self.running_var)

    def _normalize(self, x: Tensor) -> Tensor:
        wide = widened(x)
        var = self._batch_variance(wide)
        return affine(over_larger(wide, var, self._other(wide), self.eps), self.weight, self.bias)

    def _other(self, x: Tensor) -> Tensor:
        """The term that competes with the deviation of the batch."""
        raise NotImplementedError

    def _batch_variance(self, x: Tensor) -> Tensor:
        """`(C,)`, the biased variance of the batch, or the running one where that is due."""
        if self.running_var is not None and not self.training:
            return self.running_var
        if self.process_group is not None and dist.is_initialized():
            var, unbiased = variances_over_ranks(
                x, None if self.process_group == "world" else self.process_group
            )
        elif x.numel() == 0:  # nothing to measure, and nothing that needs it
            return x.new_ones(self.num_features)
        else:
            count = x.numel() // self.num_features
            if count == 1:
                raise ValueError(
                    f"x: a batch variance needs more than one value a channel, got {tuple(x.shape)}"
                )
            var = variance(x, batch_and_space(x))
            unbiased = var.detach() * (count / (count - 1))
        if self.running_var is not None:
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return var

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, momentum={self.momentum:g}"


def _batch_card(x: tuple[int, ...]) -> Example:
    bad = {"num_features": 0, "momentum": 2.0, "eps": -1.0, "process_group": "all"}
    return Example({"num_features": x[1]}, (torch.randn(x),), bad_options=bad)


def _sample_card(x: tuple[int, ...]) -> Example:
    bad = {"num_features": 0, "groups": 3, "group_size": 3, "eps": -1.0}
    return Example({"num_features": x[1], "groups": 2}, (torch.randn(x),), bad_options=bad)


@register(
    paper=40,
    example=lambda: _batch_card((3, 4, 2, 3)),
    exempt=_FIXED_RANK,
    compare=lambda: Comparison(
        {"num_features": 64}, (torch.randn(32, 64, 32, 32),), peers.NORM_ACTIVATIONS
    ),
)
class EvoNormB0(_BatchEvoNorm):
    """Batch and instance deviation in place of BatchNorm and ReLU, for large batches.

    The layer divides by the larger of the batch's deviation and `v x` + the instance's, so that
    large positive values level off and no activation is needed after it.

    Args:
        num_features: Channels C.
        momentum: Weight of the batch's unbiased variance in the running one.
        eps: Added to the variances; some published weights were trained with 1e-3.
        nonlinear: False leaves the affine part alone: no normalisation either.
        track_running_stats: Whether evaluation uses a running variance; else the batch's.
        process_group: Processes whose batches are measured as one, or `"world"` for all where
            `torch.distributed` is initialised; None measures this process's.
        channels_last: Whether channels are the last axis of the shape.
        device: Where the tensors are.
        dtype: Their dtype.

    Shape:
        - x, output: `(N, C, *spatial)` with one to three spatial axes, in any memory format;
          `(N, *spatial, C)` with `channels_last=True`

    Source:
        Liu, Brock, Simonyan and Le, "Evolving Normalization-Activation Layers", 2020.

    Example:
        >>> layer = EvoNormB0(8)
        >>> layer(torch.randn(4, 8, 5, 5)).shape, list(layer.state_dict())
        (torch.Size([4, 8, 5, 5]), ['weight', 'bias', 'v', 'running_var'])
    """

    has_v = True

    def _other(self, x: Tensor) -> Tensor:
        assert self.v is not None
        return instance_term(x, self.v, self.eps)


@register(
    paper=40,
    example=lambda: _batch_card((3, 4, 2, 3)),
    exempt=_FIXED_RANK,
    compare=lambda: Comparison(
        {"num_features": 64}, (torch.randn(32, 64, 32, 32),), peers.NORM_ACTIVATIONS
    ),
)
class EvoNormB1(_BatchEvoNorm):
    """`EvoNormB0` with (x + 1) times the instance's root mean square, and no `v`.

    Args:
        num_features: Channels C.
        momentum: Weight of the batch's unbiased variance in the running one.
        eps: Added to variance and mean square.
        nonlinear: False leaves the affine part alone: no normalisation either.
        track_running_stats: Whether evaluation uses a running variance; else the batch's.
        process_group: See `EvoNormB0`.
        channels_last: Whether channels are the last axis of the shape.
        device: Where the tensors are.
        dtype: Their dtype.

    Shape:
        - x, output: `(N, C, *spatial)` with one to three spatial axes, in any memory format;
          `(N, *spatial, C)` with `channels_last=True`

    Source:
        Liu, Brock, Simonyan and Le, "Evolving Normalization-Activation Layers", 2020.

    Example:
        >>> EvoNormB1(8)(torch.randn(4, 8, 5)).shape
        torch.Size([4, 8, 5])
    """

    def _other(self, x: Tensor) -> Tensor:
        return (x + 1) * instance_rms(x, self.eps)


@register(
    paper=40,
    example=lambda: _batch_card((3, 4, 2, 3)),
    exempt=_FIXED_RANK,
    compare=lambda: Comparison(
        {"num_features": 64}, (torch.randn(32, 64, 32, 32),), peers.NORM_ACTIVATIONS
    ),
)
class EvoNormB2(_BatchEvoNorm):
    """`EvoNormB0` with the instance's root mean square minus x, and no `v`.

    Args:
        num_features: Channels C.
        momentum: Weight of the batch's unbiased variance in the running one.
        eps: Added to variance and mean square.
        nonlinear: False leaves the affine part alone: no normalisation either.
        track_running_stats: Whether evaluation uses a running variance; else the batch's.
        process_group: See `EvoNormB0`.
        channels_last: Whether channels are the last axis of the shape.
        device: Where the tensors are.
        dtype: Their dtype.

    Shape:
        - x, output: `(N, C, *spatial)` with one to three spatial axes, in any memory format;
          `(N, *spatial, C)` with `channels_last=True`

    Source:
        Liu, Brock, Simonyan and Le, "Evolving Normalization-Activation Layers", 2020.

    Example:
        >>> EvoNormB2(8)(torch.randn(4, 8, 5)).shape
        torch.Size([4, 8, 5])
    """

    def _other(self, x: Tensor) -> Tensor:
        return instance_rms(x, self.eps) - x


@register(
    paper=40,
    example=lambda: _sample_card((3, 4, 2, 3)),
    exempt=_FIXED_RANK,
    compare=lambda: Comparison(
        {"num_features": 64}, (torch.randn(32, 64, 32, 32),), peers.NORM_ACTIVATIONS
    ),
)
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

    def _normalize(self, x: Tensor) -> Tensor:
        assert self.v is not None
        return evonorm_s0(x, self.weight, self.bias, self.v, groups=self.groups, eps=self.eps)


@register(
    paper=40,
    example=lambda: _sample_card((3, 4, 2, 3)),
    exempt=_FIXED_RANK,
    compare=lambda: Comparison(
        {"num_features": 64}, (torch.randn(32, 64, 32, 32),), peers.NORM_ACTIVATIONS
    ),
)
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


@register(
    paper=40,
    example=lambda: _sample_card((3, 4, 2, 3)),
    exempt=_FIXED_RANK,
    compare=lambda: Comparison(
        {"num_features": 64}, (torch.randn(32, 64, 32, 32),), peers.NORM_ACTIVATIONS
    ),
)
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
