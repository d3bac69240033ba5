"""The baseline: a pre-norm transformer of dot-product attention and dense feed-forward layers.

Patches, positions, head and number of parameters are those of `ZooVisionModel`, so that the blocks
are what differs. The blocks are PyTorch's own.
"""

from __future__ import annotations

from torch import Tensor, nn

from torchzoo.experiments.quickstart.model import PatchEmbedding
from torchzoo.hub import ZooModel


class TransformerModel(ZooModel):
    """Classify small grey images with dot-product attention and dense feed-forward layers.

    Args:
        num_classes: Classes K.
        image_size: Side S of the image.
        patch_size: Side of a patch.
        dim: Features of a token.
        depth: Blocks.
        num_heads: Heads of the attention.
        hidden_dim: Hidden features of the feed-forward layers.

    Shape:
        - images: `(N, 1, S, S)`
        - output: `(N, K)`

    Raises:
        ValueError: A patch size that doesn't divide the image size.

    Source:
        Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021, with a head on all tokens.

    Example:
        >>> import torch
        >>> TransformerModel(5)(torch.rand(2, 1, 12, 12)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        num_classes: int,
        *,
        image_size: int = 12,
        patch_size: int = 3,
        dim: int = 48,
        depth: int = 2,
        num_heads: int = 4,
        hidden_dim: int = 167,
    ) -> None:
        super().__init__()
        self.embedding = PatchEmbedding(image_size, patch_size, dim)
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    dim,
                    num_heads,
                    hidden_dim,
                    dropout=0.0,
                    activation="gelu",
                    batch_first=True,
                    norm_first=True,
                )
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(self.embedding.tokens * dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(images))).flatten(1))

    def start_over(self) -> None:
        """Forget the classes but not the features: a fresh head."""
        self.head.reset_parameters()
