"""A small image classifier of zoo parts: Gaussian adaptive attention and mixtures of experts.

    x = patches W_e + positions
    x = x + attention(norm(x)),   x = x + experts(norm(x))      `depth` times
    logits = norm(x), flattened, W_h + b_h

The attention is that of Ioannides, Chadha and Elkins, "Gaussian Adaptive Attention is All You
Need", 2024; the gate of the experts goes from dense to sparse as its temperature falls, after Nie
et al., "EvoMoE", 2021.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from torchzoo.attention import MultiHeadGaussianAdaptiveAttention
from torchzoo.hub import ZooModel
from torchzoo.moe import DenseToSparseGate, GroupedExperts, MoELayer, Routing


class PatchEmbedding(nn.Module):
    """Cut an image into square patches and map each, with its position, to a token.

    Args:
        image_size: Side of the image.
        patch_size: Side p of a patch; has to divide `image_size`.
        dim: Features D of a token.

    Shape:
        - images: `(N, 1, S, S)`
        - output: `(N, L, D)` with L = (S / p)² tokens, row by row

    Raises:
        ValueError: A patch size that doesn't divide the image size.
    """

    def __init__(self, image_size: int, patch_size: int, dim: int) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(
                f"patch_size: expected a divisor of image_size={image_size}, got {patch_size}"
            )
        self.patch_size = patch_size
        self.tokens = (image_size // patch_size) ** 2
        self.project = nn.Linear(patch_size**2, dim)
        self.position = nn.Parameter(torch.empty(self.tokens, dim))
        nn.init.normal_(self.position, std=0.2)

    def patches(self, images: Tensor) -> Tensor:
        """The pixels of each patch, `(N, L, p²)`."""
        p = self.patch_size
        return rearrange(images, "n 1 (i p) (j q) -> n (i j) (p q)", p=p, q=p)

    def forward(self, images: Tensor) -> Tensor:
        return self.project(self.patches(images)) + self.position


class ZooBlock(nn.Module):
    """Attention, then experts, each normalised before and added to what came in.

    Shape:
        - x: `(N, L, D)`
        - output: the same, and the `Routing` of the N · L tokens
    """

    def __init__(self, dim: int, heads: int, experts: int, hidden: int, anneal_steps: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = MultiHeadGaussianAdaptiveAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        gate = DenseToSparseGate(
            dim,
            experts,
            temperature=2.0,
            final_temperature=0.25,
            steps=anneal_steps,
            threshold=0.1,
            noise=None,
        )
        self.moe = MoELayer(
            gate, GroupedExperts(dim, hidden, experts, activation="relu", bias=True)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        x = x + self.attention(self.norm1(x))
        y, routing = self.moe(self.norm2(x), return_routing=True)
        return x + y, routing


class ZooVisionModel(ZooModel):
    """Classify small grey images with Gaussian adaptive attention and mixtures of experts.

    Each head of the attention looks at one contiguous run of tokens: with as many heads as rows
    of patches, at one row.

    Args:
        num_classes: Classes K.
        image_size: Side S of the image.
        patch_size: Side of a patch.
        dim: Features of a token.
        depth: Blocks.
        num_heads: Heads of the attention.
        num_experts: Experts in each block.
        hidden_dim: Hidden features of an expert.
        anneal_steps: Calls of `anneal` in which the gates go from dense to sparse.

    Shape:
        - images: `(N, 1, S, S)`
        - output: `(N, K)`

    Returns:
        The logits; with `return_routing=True` also the list of each block's `Routing`.

    Raises:
        ValueError: A size that a part refuses.

    Source:
        The parts: Ioannides, Chadha, Elkins, "Gaussian Adaptive Attention is All You Need", 2024;
        Nie et al., "EvoMoE", 2021. Their composition is this package's own.

    Example:
        >>> model = ZooVisionModel(5)
        >>> logits, routings = model(torch.rand(2, 1, 12, 12), return_routing=True)
        >>> logits.shape, len(routings)
        (torch.Size([2, 5]), 2)
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
        num_experts: int = 4,
        hidden_dim: int = 64,
        anneal_steps: int = 200,
    ) -> None:
        super().__init__()
        self.embedding = PatchEmbedding(image_size, patch_size, dim)
        self.blocks = nn.ModuleList(
            ZooBlock(dim, num_heads, num_experts, hidden_dim, anneal_steps) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(self.embedding.tokens * dim, num_classes)

    def forward(
        self, images: Tensor, *, return_routing: bool = False
    ) -> Tensor | tuple[Tensor, list[Routing]]:
        x, routings = self.embedding(images), []
        for block in self.blocks:
            x, routing = block(x)
            routings.append(routing)
        logits = self.head(self.norm(x).flatten(1))
        return (logits, routings) if return_routing else logits

    @property
    def gates(self) -> list[DenseToSparseGate]:
        """The gate of each block."""
        return [module for module in self.modules() if isinstance(module, DenseToSparseGate)]

    def anneal(self) -> None:
        """Lower the gates' temperature by one step; call it after each update."""
        for gate in self.gates:
            gate.step()

    @torch.no_grad()
    def start_over(self) -> None:
        """Forget the classes but not the features: a fresh head, and gates that are dense again."""
        self.head.reset_parameters()
        for gate in self.gates:
            learned = gate.weight.clone()
            gate.reset_parameters()
            gate.weight.copy_(learned)
