"""Gaussian adaptive attention built into a transformer block and into grouped-query attention.

G. Ioannides, A. Chadha, A. Elkins, Gaussian Adaptive Attention is All You Need: Robust Contextual
Representations Across Multiple Modalities, 2024, and its later version, where a Gaussian gate of
8 heads stands before 8 query heads on 2 key and value heads.

Deviations. The paper gives no block wiring: the pre-norm block with residuals is our packaging.
The wiring of gate and grouped-query attention is our reading: the gate recalibrates the one input
from which queries, keys and values are projected.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from torchzoo import peers
from torchzoo.attention.gaussian_adaptive import MultiHeadGaussianAdaptiveAttention
from torchzoo.hub import ZooModel
from torchzoo.registry import Comparison, Example, register


@register(
    paper=48,
    example=lambda: Example(
        {"dim": 6, "num_heads": 2},
        (torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(0)),),
        bad_options={"dim": 0, "num_heads": 0, "mlp_ratio": 0, "dropout": 1.5, "norm_dim": 0},
    ),
    compare=lambda: Comparison(
        {"dim": 256, "num_heads": 8},
        (torch.randn(4, 256, 256),),
        {"TransformerEncoderLayer": peers.SEQUENCES["TransformerEncoderLayer"]},
    ),
)
class GaussianAdaptiveTransformerBlock(ZooModel):
    """A pre-norm transformer block whose mixing is Gaussian adaptive attention.

    h = x + gate(LN(x)) and y = h + FFN(LN(h)), with a GELU between the two layers of the FFN.

    Args:
        dim: Number of features D.
        num_heads: Chunks of the norm axis.
        mlp_ratio: Width of the FFN's hidden layer in units of D.
        dropout: Probability of a zero after each layer of the FFN.
        norm_dim: Axis of the gate's statistics, -2 or -1.
        device: Device of the parameters.
        dtype: Type of the parameters.
        **gaam: More options of `MultiHeadGaussianAdaptiveAttention`.

    Shape:
        - x and output: `(..., n, D)`
        - mask: `(..., n)`, bool, True = keep; no kept output depends on the others

    Returns:
        The block's output.

    Raises:
        ValueError: An option out of range; x or mask of another shape; n below `num_heads`.

    Source:
        Ioannides, Chadha, Elkins, Gaussian Adaptive Attention is All You Need, 2024: the
        attention; the block around it is our packaging.

    Example:
        >>> block = GaussianAdaptiveTransformerBlock(16, num_heads=4)
        >>> block(torch.randn(2, 20, 16)).shape
        torch.Size([2, 20, 16])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        mlp_ratio: float = 4,
        dropout: float = 0.0,
        norm_dim: int = -2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **gaam: Any,
    ) -> None:
        super().__init__()
        self.attention = MultiHeadGaussianAdaptiveAttention(
            dim, num_heads, norm_dim=norm_dim, device=device, dtype=dtype, **gaam
        )
        hidden = int(dim * mlp_ratio)
        if hidden < 1:
            raise ValueError(f"mlp_ratio: expected at least 1 / dim, got {mlp_ratio!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a number in [0, 1), got {dropout!r}")
        self.norm1 = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.norm2 = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden, device=device, dtype=dtype),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, dim, device=device, dtype=dtype),
            nn.Dropout(dropout),
        )

    def reset_parameters(self) -> None:
        """Initialise the parts as they do themselves."""
        for part in (self.attention, self.norm1, self.norm2, *self.mlp):
            if isinstance(part, (MultiHeadGaussianAdaptiveAttention, nn.LayerNorm, nn.Linear)):
                part.reset_parameters()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.attention.check_inputs(x, mask)
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


@register(
    paper=48,
    example=lambda: Example(
        {"dim": 8, "num_heads": 4, "num_kv_heads": 2, "gaussian_heads": 2},
        (torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(0)),),
        bad_options={"dim": 10, "num_heads": 3, "num_kv_heads": 3, "gaussian_heads": 0},
    ),
    compare=lambda: Comparison(
        {"dim": 256, "num_heads": 8, "num_kv_heads": 2},
        (torch.randn(4, 256, 256),),
        peers.SELF_ATTENTION,
    ),
)
class GroupedQueryGaussianAttention(ZooModel):
    """Grouped-query attention on an input that a Gaussian gate has recalibrated.

    With g = x * gate(x): queries of every head and keys and values of the fewer heads are
    projections of g without bias, then softmax(q k^T / sqrt(head width)) v, each key and value
    head serving `num_heads / num_kv_heads` query heads, then an output projection.

    Args:
        dim: Number of features D.
        num_heads: Query heads; divides D.
        num_kv_heads: Key and value heads; divides `num_heads`.
        gaussian_heads: Heads of the gate, chunks of the norm axis.
        device: Device of the parameters.
        dtype: Type of the parameters.
        **gaam: More options of `MultiHeadGaussianAdaptiveAttention`.

    Shape:
        - x and output: `(..., L, D)`
        - mask: `(..., L)`, bool, True = keep; the others are no keys, and their output is zero

    Returns:
        The attention's output.

    Raises:
        ValueError: An option out of range; x or mask of another shape; L below `gaussian_heads`.

    Source:
        Ioannides, Chadha, Elkins, Gaussian Adaptive Attention is All You Need, 2024, later
        version; J. Ainslie et al., GQA, 2023. The wiring of the two is our reading.

    Example:
        >>> attention = GroupedQueryGaussianAttention(32, gaussian_heads=4)
        >>> attention(torch.randn(2, 20, 32)).shape
        torch.Size([2, 20, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_kv_heads: int = 2,
        *,
        gaussian_heads: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **gaam: Any,
    ) -> None:
        super().__init__()
        if gaussian_heads < 1:
            raise ValueError(f"gaussian_heads: expected a positive integer, got {gaussian_heads!r}")
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of {dim=}, got {num_heads!r}")
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a divisor of {num_heads=}, got {num_kv_heads!r}"
            )
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.gate = MultiHeadGaussianAdaptiveAttention(
            dim, gaussian_heads, device=device, dtype=dtype, **gaam
        )
        kv_dim = num_kv_heads * (dim // num_heads)
        self.query = nn.Linear(dim, dim, bias=False, device=device, dtype=dtype)
        self.key = nn.Linear(dim, kv_dim, bias=False, device=device, dtype=dtype)
        self.value = nn.Linear(dim, kv_dim, bias=False, device=device, dtype=dtype)
        self.out = nn.Linear(dim, dim, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Initialise the gate and the projections as they do themselves."""
        for part in (self.gate, self.query, self.key, self.value, self.out):
            part.reset_parameters()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        g = self.gate(x, mask)
        q = rearrange(self.query(g), "... l (h e) -> ... h l e", h=self.num_heads)
        k = rearrange(self.key(g), "... l (h e) -> ... h l e", h=self.num_kv_heads)
        v = rearrange(self.value(g), "... l (h e) -> ... h l e", h=self.num_kv_heads)
        keep = None
        if mask is not None:  # a row that keeps nothing is zero anyhow, so it may see everything
            keep = (mask | ~mask.any(-1, keepdim=True))[..., None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=True)
        y = self.out(rearrange(y, "... h l e -> ... l (h e)"))
        return y if mask is None else y.where(mask.unsqueeze(-1), 0)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"
