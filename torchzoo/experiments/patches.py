"""A small vision transformer on 8×8 images, cut into 16 patches of 2×2 pixels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

PATCH, PATCHES = 2, 16


class PatchTransformer(nn.Module):
    """Pre-norm transformer encoder over patches, mean pooling, linear head.

    Its feed-forward layers are `linear2(act(linear1(x)))` with biases, no dropout and no gate.

    Args:
        dim: Features of a token.
        depth: Number of blocks.
        hidden: Hidden units of each feed-forward layer.
        activation: Makes the activation of a feed-forward layer; called once a block.
        heads: Attention heads.
        classes: Number of classes.

    Shape:
        - images: `(N, 1, 8, 8)`
        - output: `(N, classes)`

    Example:
        >>> model = PatchTransformer(32, 1, 64, activation=nn.GELU)
        >>> tuple(model(torch.rand(5, 1, 8, 8)).shape)
        (5, 10)
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        hidden: int,
        *,
        activation: Callable[[], nn.Module] = nn.ReLU,
        heads: int = 4,
        classes: int = 10,
    ):
        super().__init__()
        self.embed = nn.Linear(PATCH**2, dim)
        self.position = nn.Parameter(0.02 * torch.randn(PATCHES, dim))
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    *(dim, heads, hidden, 0.0, activation()), batch_first=True, norm_first=True
                )
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        patches = rearrange(images, "n 1 (h p) (w q) -> n (h w) (p q)", p=PATCH, q=PATCH)
        tokens = self.blocks(self.embed(patches) + self.position)
        return self.head(self.norm(tokens).mean(-2))
