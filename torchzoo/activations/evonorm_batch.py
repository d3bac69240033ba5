"""EvoNorm's B series: the variance of the batch, or of a running mean in evaluation.

Liu, Brock, Simonyan and Le, "Evolving Normalization-Activation Layers", 2020. The formulas
are in `evonorm_base`.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchzoo import peers
from torchzoo.activations.evonorm_base import FIXED_RANK, EvoNorm
from torchzoo.activations.evonorm_functions import variances_over_ranks, widened
from torchzoo.ops import evonorm_batch
from torchzoo.registry import Comparison, Example, register


class _BatchEvoNorm(EvoNorm):
    """B series: the variance of the batch, or the running one in evaluation."""

    centred = False
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
        if self.running_var is not None and not self.training:
            # a copy, as an update may come before backward
            return self._over_larger(x, self.running_var.clone())[0]
        if self.process_group is not None and dist.is_initialized():
            group = None if self.process_group == "world" else self.process_group
            var, unbiased = variances_over_ranks(widened(x), group)
            y, _ = self._over_larger(x, var)
        elif x.numel() == 0:  # nothing to measure, and nothing that needs it
            return self._over_larger(x, x.new_ones(self.num_features))[0]
        else:
            count = x.numel() // self.num_features
            if count == 1:
                raise ValueError(
                    f"x: a batch variance needs more than one value a channel, got {tuple(x.shape)}"
                )
            y, var = self._over_larger(x, None)
            unbiased = var * (count / (count - 1))
        if self.running_var is not None:
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return y

    def _over_larger(self, x: Tensor, var: Tensor | None) -> tuple[Tensor, Tensor]:
        """The output, and the variance of the batch, which is measured unless given."""
        return evonorm_batch(
            x, self.weight, self.bias, self._slope(), var, eps=self.eps, centred=self.centred
        )

    def _slope(self) -> Tensor | None:
        """The factors of x in the term that competes with the deviation of the batch."""
        return self.v

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, momentum={self.momentum:g}"


def _batch_card(x: tuple[int, ...]) -> Example:
    bad = {"num_features": 0, "momentum": 2.0, "eps": -1.0, "process_group": "all"}
    return Example({"num_features": x[1]}, (torch.randn(x),), bad_options=bad)


_batch_layer = register(
    paper=40,
    example=lambda: _batch_card((3, 4, 2, 3)),
    exempt=FIXED_RANK,
    compare=lambda: Comparison(
        {"num_features": 64}, (torch.randn(32, 64, 32, 32),), peers.NORM_ACTIVATIONS
    ),
)


@_batch_layer
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
    centred = True


@_batch_layer
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


@_batch_layer
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

    def _slope(self) -> Tensor:
        return torch.full_like(self.weight, -1.0)
