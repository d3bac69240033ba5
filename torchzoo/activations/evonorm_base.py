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
from typing import Any

import torch
from torch import Tensor, nn

from torchzoo.activations.evonorm_functions import affine, widened
from torchzoo.hub import ZooModel

FIXED_RANK = {"fixed-rank": "one batch axis, one channel axis, and all others are space"}


class EvoNorm(ZooModel):
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
