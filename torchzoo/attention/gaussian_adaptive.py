"""Gaussian adaptive attention: every element is gated by a learned Gaussian of its z-score.

G. Ioannides, A. Chadha, A. Elkins, Gaussian Adaptive Attention is All You Need: Robust Contextual
Representations Across Multiple Modalities, 2024. Along the norm axis, per head (a contiguous
chunk of that axis) and per feature, with mean mu and variance var of the chunk:

    z_i = (x - mu - delta_i) / sqrt(var + eps)                          learned offset, data units
    M   = sum_i softmax(omega)_i exp(-z_i^2 / (2 xi_i))                 mixing="sum"
    M   = prod_i exp(-z_i^2 / (2 xi_i))                                 mixing="product"
    y   = x * M    or, with normalize=True,    y = x * M / sum_axis M

Deviations. The variance is the mean of squared deviations, exact in half precision, where the
paper's E[x^2] - mu^2 cancels. Masked elements take no part in the statistics. M is formed in log
space, so that normalised weights sum to one even where every M underflows. K > 1 components of a
sum start with different widths: equal ones would have equal gradients and stay one Gaussian.
A product of Gaussians in one coordinate is one Gaussian; only sums and heads are multimodal.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from torchzoo import peers
from torchzoo.hub import ZooModel
from torchzoo.registry import Comparison, Example, register

Mixing = Literal["sum", "product"]


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")


def check_mask(mask: Tensor | None, x: Tensor) -> None:
    """Raise a ValueError unless `mask` is None or a bool for each row of x (..., n, D)."""
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:-1]):
        raise ValueError(
            f"mask: expected bool of shape {tuple(x.shape[:-1])} (True = keep), "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )


@register(
    paper=48,
    example=lambda: Example(
        {"dim": 6, "num_heads": 2, "num_gaussians": 2},
        (torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0)),),
        bad_options={
            "dim": 0,
            "num_heads": 0,
            "num_gaussians": 0,
            "norm_dim": 0,
            "mixing": "mean",
            "rescale": True,
            "init_xi": 0.0,
            "eps": -1.0,
        },
    ),
    compare=lambda: Comparison({"dim": 256}, (torch.randn(4, 256, 256),), peers.SELF_ATTENTION),
)
class MultiHeadGaussianAdaptiveAttention(ZooModel):
    """Gate each element by learned Gaussians of its z-score, one set a chunk of the norm axis.

    The norm axis of length n is cut into `num_heads` contiguous chunks of `n // num_heads` (the
    last takes the remainder), each with its own statistics and parameters. Chunks should have
    three elements or more: with two, z is 1 or -1 for every input and the gate of a fresh module
    is constant, with one it is 1; a shorter chunk gives one warning.

    Args:
        dim: Number of features D.
        num_heads: Number of chunks H.
        norm_dim: Axis of the statistics: -2 (time, layers, ...) or -1 (features).
        num_gaussians: Gaussians K in each head.
        mixing: `"sum"`, a mixture with weights softmax(omega), or `"product"`.
        normalize: Divide the gate by its sum along the chunk, so that the output shrinks by about
            the chunk's length.
        rescale: Undo that by multiplying with the number of (kept) elements of the chunk.
        per_feature: Own parameters for each feature; always off for `norm_dim=-1`.
        init_xi: Initial scaled variance xi; K > 1 summed components get it times 1/2 to 2.
        eps: Added to the variance.
        unbiased: Divide squared deviations by the count less one.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - x: `(..., n, D)`; statistics are in float32, or float64 for float64
        - mask: `(..., n)`, bool, True = keep; the others give zero output and zero weight
        - output and weights: as x, with output = x * weights
        - delta, log_xi: `(H, K, D)`, or `(H, K, 1)` without `per_feature`; xi = exp(log_xi)
        - omega: `(H, K)`, only for K > 1 with `mixing="sum"`

    Returns:
        The output, or with `return_weights=True` the pair of output and weights. A row without
        any kept element is zero.

    Raises:
        ValueError: An option out of range; x or mask of another shape; fewer elements along the
            norm axis than heads.

    Source:
        Ioannides, Chadha, Elkins, Gaussian Adaptive Attention is All You Need, 2024, Algorithm 1
        and Section 2; the normalised product is the authors' published code.

    Example:
        >>> attention = MultiHeadGaussianAdaptiveAttention(16, num_heads=4)
        >>> y, weights = attention(torch.randn(2, 20, 16), return_weights=True)
        >>> y.shape, bool(weights.max() <= 1)
        (torch.Size([2, 20, 16]), True)
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        norm_dim: int = -2,
        num_gaussians: int = 1,
        mixing: Mixing = "sum",
        normalize: bool = False,
        rescale: bool = False,
        per_feature: bool = True,
        init_xi: float = 2.0,
        eps: float = 1e-5,
        unbiased: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_positive(dim=dim, num_heads=num_heads, num_gaussians=num_gaussians)
        if norm_dim not in (-2, -1):
            raise ValueError(f"norm_dim: expected -2 or -1, got {norm_dim!r}")
        if norm_dim == -1 and num_heads > dim:
            raise ValueError(
                f"num_heads must be in [1, dim] for norm_dim=-1; got {num_heads=} with {dim=}"
            )
        if mixing not in ("sum", "product"):
            raise ValueError(f"mixing: expected 'sum' or 'product', got {mixing!r}")
        if rescale and not normalize:
            raise ValueError("rescale: expected False without normalize=True, got True")
        if not 0 < init_xi < math.inf:
            raise ValueError(f"init_xi: expected a positive number, got {init_xi!r}")
        if not 0 <= eps < math.inf:
            raise ValueError(f"eps: expected a number of at least 0, got {eps!r}")
        self.dim, self.num_heads, self.num_gaussians = dim, num_heads, num_gaussians
        self.norm_dim, self.mixing, self.init_xi, self.eps = norm_dim, mixing, init_xi, eps
        self.normalize, self.rescale, self.unbiased = normalize, rescale, unbiased
        self._warned = False
        shape = (num_heads, num_gaussians, dim if per_feature and norm_dim == -2 else 1)
        self.delta = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.log_xi = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.omega: nn.Parameter | None = None
        if mixing == "sum" and num_gaussians > 1:
            self.omega = nn.Parameter(torch.empty(shape[:2], device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set delta = 0 and xi = `init_xi`, the paper's start, and equal mixture weights."""
        nn.init.zeros_(self.delta)
        nn.init.constant_(self.log_xi, math.log(self.init_xi))
        if self.omega is not None:
            nn.init.ones_(self.omega)
            spread = torch.linspace(-1, 1, self.num_gaussians, device=self.log_xi.device)
            with torch.no_grad():
                self.log_xi.add_((math.log(2) * spread)[:, None])

    @property
    def xi(self) -> Tensor:
        """The scaled variances of the Gaussians, in units of the chunk's variance."""
        return self.log_xi.exp()

    def forward(
        self, x: Tensor, mask: Tensor | None = None, return_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        self.check_inputs(x, mask)
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        valid = None
        if mask is not None:
            valid = mask.unsqueeze(-1).expand_as(x)
            values = values.where(valid, 0)  # also keeps a NaN in the padding out of the sums
        if self.norm_dim == -1:
            weights = self._weights(values.mT, None if valid is None else valid.mT).mT
        else:
            weights = self._weights(values, valid)
        y = (values * weights).to(x.dtype)
        return (y, weights.to(x.dtype)) if return_weights else y

    def _weights(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """The weights for x (..., n, D): equal chunks at once, a longer last one by itself."""
        length, rest = divmod(x.shape[-2], self.num_heads)
        if not rest:
            return self._equal_chunks(x, valid, slice(None), slice(None))
        cut = (self.num_heads - 1) * length
        even = self._equal_chunks(x, valid, slice(cut), slice(-1))
        last = self._equal_chunks(x, valid, slice(cut, None), slice(-1, None))
        return torch.cat([even, last], dim=-2)

    def _equal_chunks(self, x: Tensor, valid: Tensor | None, rows: slice, heads: slice) -> Tensor:
        """The weights for some rows of x (..., n, D), which these heads share equally."""
        h = len(self.delta[heads])
        x = rearrange(x[..., rows, :], "... (h n) d -> ... h n d", h=h)
        count: Tensor | int = x.shape[-2]
        if valid is not None:
            valid = rearrange(valid[..., rows, :], "... (h n) d -> ... h n d", h=h)
            count = valid.sum(-2, keepdim=True)
        deviation = x - x.sum(-2, keepdim=True) / _at_least_one(count)
        if valid is not None:
            deviation = deviation.where(valid, 0)
        degrees = _at_least_one(count - int(self.unbiased))
        variance = deviation.square().sum(-2, keepdim=True) / degrees

        log_m = self._log_mixture(deviation, variance, heads)
        if self.normalize:
            if valid is not None:
                log_m = log_m.masked_fill(~valid, torch.finfo(x.dtype).min)
            weights = log_m.softmax(-2)  # M / sum M
            weights = weights * count if self.rescale else weights
        else:
            weights = log_m.exp()
        if valid is not None:
            weights = weights.where(valid, 0)
        return rearrange(weights, "... h n d -> ... (h n) d")

    def _log_mixture(self, deviation: Tensor, variance: Tensor, heads: slice) -> Tensor:
        """The log of M for x - mu of shape (..., h, n, D), without the Gaussians' constants."""
        delta = self.delta[heads].to(deviation.dtype).unsqueeze(-2)  # (h, K, 1, D)
        log_xi = self.log_xi[heads].to(deviation.dtype).unsqueeze(-2)
        offset = deviation.unsqueeze(-3) - delta  # (..., h, K, n, D)
        z_square = offset.square() / (variance + self.eps).unsqueeze(-3)
        log_gauss = -0.5 * z_square * torch.exp(-log_xi)
        if self.omega is None:
            return log_gauss.sum(-3)
        log_share = self.omega[heads].to(deviation.dtype).log_softmax(-1)
        return torch.logsumexp(log_gauss + log_share[..., None, None], dim=-3)

    def check_inputs(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Raise the ValueError that `forward` raises for these shapes, if any."""
        if x.ndim < 2 or x.shape[-1] != self.dim or not x.is_floating_point():
            raise ValueError(
                f"x: expected floating point of shape (..., n, {self.dim}), "
                f"got {x.dtype} of shape {tuple(x.shape)}"
            )
        n = x.shape[self.norm_dim]
        if n < self.num_heads:
            raise ValueError(
                f"num_heads must be in [1, n]; got num_heads={self.num_heads} "
                f"with x.shape[{self.norm_dim}]={n}"
            )
        check_mask(mask, x)
        if not torch.compiler.is_compiling() and not self._warned and n // self.num_heads < 3:
            self._warned = True
            warnings.warn(
                f"chunks of fewer than 3 elements, with num_heads={self.num_heads} on {n}: "
                "such z-scores hardly depend on the input",
                stacklevel=3,
            )

    @staticmethod
    def from_official(
        state_dict: Mapping[str, Tensor], dim: int, *, norm_dim: int = -2
    ) -> MultiHeadGaussianAdaptiveAttention:
        """Build the module that equals the authors' published one on unpadded input.

        Theirs is a normalised product, each Gaussian with one offset and one width c, xi = c^2.

        Args:
            state_dict: The state of the authors' module of the same name.
            dim: Number of features of the input, which the state doesn't tell.
            norm_dim: Axis of the statistics, -2 or -1.

        Raises:
            ValueError: The keys are not the offsets and widths of numbered heads.
        """
        heads = len(state_dict) // 2
        offsets = [f"attention_heads.{head}.mean_offsets" for head in range(heads)]
        widths = [f"attention_heads.{head}.c" for head in range(heads)]
        if not heads or set(state_dict) != {*offsets, *widths}:
            raise ValueError(
                "state_dict: expected the keys attention_heads.<h>.mean_offsets and "
                f"attention_heads.<h>.c, got {sorted(state_dict)}"
            )
        delta = torch.stack([state_dict[name] for name in offsets]).unsqueeze(-1)
        log_xi = torch.stack([state_dict[name] for name in widths]).unsqueeze(-1).square().log()
        module = MultiHeadGaussianAdaptiveAttention(
            dim,
            heads,
            norm_dim=norm_dim,
            num_gaussians=delta.shape[1],
            mixing="product",
            normalize=True,
            per_feature=False,
            eps=1e-8,
            unbiased=True,
            device=delta.device,
            dtype=delta.dtype,
        )
        module.load_state_dict({"delta": delta, "log_xi": log_xi})
        return module

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, num_heads={self.num_heads}, norm_dim={self.norm_dim}, "
            f"num_gaussians={self.num_gaussians}, mixing={self.mixing!r}, "
            f"normalize={self.normalize}"
        )


def _at_least_one(count: Tensor | int) -> Tensor | int:
    return count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1)


@register(
    paper=48,
    example=lambda: Example(
        {"dim": 6},
        (torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)),),
        bad_options={"dim": 0, "num_gaussians": 0, "norm_dim": 0, "mixing": "mean"},
    ),
    compare=lambda: Comparison({"dim": 256}, (torch.randn(4, 256, 256),), peers.SELF_ATTENTION),
)
class GaussianAdaptiveAttention(MultiHeadGaussianAdaptiveAttention):
    """Gate each element by learned Gaussians of its z-score along the whole norm axis.

    The form with one head; equivariant to permutations along the norm axis.

    Args:
        dim: Number of features D.
        norm_dim: This and the other options are those of `MultiHeadGaussianAdaptiveAttention`.
        num_gaussians: Gaussians K.
        mixing: See there.
        normalize: See there.
        rescale: See there.
        per_feature: See there.
        init_xi: See there.
        eps: See there.
        unbiased: See there.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - x, output and weights: `(..., n, D)`; mask: `(..., n)`, bool, True = keep
        - delta, log_xi: `(1, K, D)`, or `(1, K, 1)` without `per_feature`; omega: `(1, K)`

    Returns:
        The output, or with `return_weights=True` the pair of output and weights.

    Raises:
        ValueError: An option out of range; x or mask of another shape.

    Source:
        Ioannides, Chadha, Elkins, Gaussian Adaptive Attention is All You Need, 2024, Algorithm 1.

    Example:
        >>> attention = GaussianAdaptiveAttention(1, init_xi=0.75, eps=0.0)
        >>> attention(torch.tensor([[-1.0], [0.0], [1.0]])).mT  # z^2 = 3/2, so ±exp(-1)
        tensor([[-0.3679,  0.0000,  0.3679]], grad_fn=<TransposeBackward0>)
    """

    def __init__(
        self,
        dim: int,
        *,
        norm_dim: int = -2,
        num_gaussians: int = 1,
        mixing: Mixing = "sum",
        normalize: bool = False,
        rescale: bool = False,
        per_feature: bool = True,
        init_xi: float = 2.0,
        eps: float = 1e-5,
        unbiased: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            1,
            norm_dim=norm_dim,
            num_gaussians=num_gaussians,
            mixing=mixing,
            normalize=normalize,
            rescale=rescale,
            per_feature=per_feature,
            init_xi=init_xi,
            eps=eps,
            unbiased=unbiased,
            device=device,
            dtype=dtype,
        )
