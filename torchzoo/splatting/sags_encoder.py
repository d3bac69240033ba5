"""Codes of points that know the points around them, and the cloud as a whole.

E. Ververas, R. A. Potamias, J. Song, J. Deng and S. Zafeiriou, "SAGS: Structure-Aware 3D Gaussian
Splatting", 2024. With features f, the k nearest points N(i) of point i, itself among them, the
greatest of each feature g, a hash grid gamma of the positions p in the cloud's box, and weights
w_ij that go as the inverse distance of i and j, 0 for j = i, with sum 1 over N(i), the paper's code
of a point is

    ReLU( sum_(j in N(i)) w_ij h(gamma(p_j), f_j - f_i, g) ),   h a small network.

What the authors' code computes is another thing, without h, and over two hops:

    m_i = max over the points c with i in N(c) of f_i - f_c,
    a_i = f_i + 1/2 mean over j in N(i) of w_ij m_j,
    code = alpha (gamma(p_i), a_i, g) + beta,   elementwise.

Deviations: the hash grid spans the cloud's box. The width of h and the activation are not in the
paper.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchzoo.common.encodings import HashGridEncoding
from torchzoo.hub import ZooModel
from torchzoo.ops.calling import values_readable
from torchzoo.registry import Example, register
from torchzoo.splatting.sags_points import neighbors

__all__ = ["StructureAwareEncoder", "knn_edges"]

VARIANTS = ("code", "paper")


def knn_edges(points: Tensor, k: int) -> Tensor:
    """Edges from each point to itself and to its k - 1 nearest others.

    Args:
        points: `(P, 3)`.
        k: Edges of a point.

    Returns:
        `(2, P k)`, rows of the centre and of the neighbour.

    Raises:
        ValueError: Points that are not `(P, 3)`, not finite, or fewer than k.

    Example:
        >>> knn_edges(torch.tensor([[0.0, 0, 0], [1, 0, 0], [3, 0, 0]]), 2).tolist()
        [[0, 0, 1, 1, 2, 2], [0, 1, 1, 0, 2, 1]]
    """
    table = neighbors(points, k)
    return torch.stack([table[:, :1].expand(-1, k).flatten(), table.flatten()])


def _example() -> Example:
    random = torch.Generator().manual_seed(0)
    points = torch.randn(6, 3, generator=random)
    return Example(
        kwargs={"dim": 4, "k": 3, "levels": 2, "log2_table": 6},
        inputs=(points, torch.randn(6, 4, generator=random), knn_edges(points, 3)),
        batch_dims=0,
        bad_options={"dim": 0, "k": 0, "levels": 0, "variant": "both", "log2_table": -1},
    )


@register(
    paper=134,
    example=_example,
    compare="a part of SAGSScene; graph networks for other jobs give other codes",
)
class StructureAwareEncoder(ZooModel):
    """A graph network over a cloud of points.

    Where all features of a point's neighbours are the same, as at the start of training, each of
    them gets an equal part of the gradient of the greatest.

    Args:
        dim: Features D of a point.
        k: Neighbours of a point, itself among them, where no edges are given.
        levels: Levels L of the hash grid, of two features each.
        variant: `"code"`, what the authors' code computes, or `"paper"`; see the module.
        log2_table: Entries of the hash grid's largest tables, as a power of 2.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - points: `(N, 3)`
        - feats: `(N, D)`
        - edges: `(2, E)`, int64, centres and their neighbours; None: those of `knn_edges`
        - subset: `(N,)`, bool
        - output: `(N, 2 L + 2 D)`

    Attributes:
        code_dim: Size of a code.
        grid: The `HashGridEncoding`.
        alpha: `(code_dim,)`, 1 at first, of the variant `"code"`.
        beta: `(code_dim,)`, 0 at first, likewise.
        h: The network of the variant `"paper"`.

    Returns:
        The codes. With `subset` those of the graph that these points and the edges among them are,
        in the box of all points, and zeros elsewhere.

    Raises:
        ValueError: An option out of its range, inputs of the wrong shape, edges to points that
            are not there, or fewer than k points without edges.

    Source:
        Ververas et al., "SAGS: Structure-Aware 3D Gaussian Splatting", 2024, the structure-aware
        encoder, and the authors' code.

    Example:
        >>> encoder = StructureAwareEncoder(log2_table=10)
        >>> encoder(torch.rand(50, 3), torch.zeros(50, 32)).shape
        torch.Size([50, 96])
    """

    def __init__(
        self,
        dim: int = 32,
        *,
        k: int = 10,
        levels: int = 16,
        variant: str = "code",
        log2_table: int = 15,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("k", k)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        if variant not in VARIANTS:
            raise ValueError(f"variant: got {variant!r}, expected one of {VARIANTS}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.k, self.variant = dim, k, variant
        self.grid = HashGridEncoding(3, levels=levels, log2_table=log2_table, **factory)
        place = levels * self.grid.features
        self.code_dim = place + 2 * dim
        if variant == "code":
            self.alpha = nn.Parameter(torch.empty(self.code_dim, **factory))
            self.beta = nn.Parameter(torch.empty(self.code_dim, **factory))
        else:
            self.h = nn.Sequential(
                nn.Linear(place + 2 * dim, dim, **factory),
                nn.ReLU(),
                nn.Linear(dim, self.code_dim, **factory),
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The grid's own, no affine change, torch's own network."""
        self.grid.reset_parameters()
        if self.variant == "code":
            nn.init.ones_(self.alpha)
            nn.init.zeros_(self.beta)
        else:
            for layer in self.h:
                if isinstance(layer, nn.Linear):
                    layer.reset_parameters()

    def forward(
        self,
        points: Tensor,
        feats: Tensor,
        edges: Tensor | None = None,
        subset: Tensor | None = None,
    ) -> Tensor:
        """Codes of points; see the class."""
        self._check(points, feats, edges, subset)
        if edges is None:
            edges = knn_edges(points, self.k)
        centers, others = edges
        low, high = points.amin(0), points.amax(0)
        place = self.grid((points - low) / (high - low).clamp_min(1e-12)).to(feats)
        if subset is None:
            kept, greatest = torch.ones_like(centers, dtype=torch.bool), feats.amax(0)
        else:
            kept = subset[centers] & subset[others]
            greatest = feats.masked_fill(~subset[:, None], -torch.inf).amax(0)
            greatest = torch.where(subset.any(), greatest, 0.0)
        weights = _weights(points, centers, others, kept).to(feats)[:, None]
        step = torch.zeros_like(feats)
        if self.variant == "code":
            rise = torch.where(kept[:, None], feats[others] - feats[centers], 0.0)
            index = others[:, None].expand_as(rise)
            highest = step.scatter_reduce(0, index, rise, "amax")  # a point's own rise is 0
            count = feats.new_zeros(len(feats)).index_add(0, centers, kept.to(feats))
            around = step.index_add(0, centers, weights * highest[others])
            local = feats + 0.5 * around / count.clamp_min(1)[:, None]
            parts = [place, local, greatest.expand_as(feats)]
            codes = self.alpha * torch.cat(parts, -1) + self.beta
        else:
            rise = feats[others] - feats[centers]
            messages = self.h(torch.cat([place[others], rise, greatest.expand_as(rise)], -1))
            zeros = feats.new_zeros(len(feats), self.code_dim)
            codes = zeros.index_add(0, centers, weights * messages.to(feats)).relu()
        return codes if subset is None else torch.where(subset[:, None], codes, 0.0)

    def _check(
        self, points: Tensor, feats: Tensor, edges: Tensor | None, subset: Tensor | None
    ) -> None:
        count = len(points) if points.dim() else 0
        if points.shape != (count, 3) or not count:
            raise ValueError(f"points: got {tuple(points.shape)}, expected (N, 3) with N above 0")
        if feats.shape != (count, self.dim):
            raise ValueError(f"feats: got {tuple(feats.shape)}, expected ({count}, {self.dim})")
        if subset is not None and (subset.shape != (count,) or subset.dtype != torch.bool):
            got = f"{tuple(subset.shape)} of {subset.dtype}"
            raise ValueError(f"subset: got {got}, expected ({count},) of torch.bool")
        if edges is None:
            return
        if edges.dim() != 2 or len(edges) != 2 or edges.dtype != torch.int64:
            got = f"{tuple(edges.shape)} of {edges.dtype}"
            raise ValueError(f"edges: got {got}, expected (2, E) of torch.int64")
        if values_readable(edges) and edges.numel():
            least, most = edges.aminmax()
            if least < 0 or most >= count:
                got = f"{int(least)} to {int(most)}"
                raise ValueError(f"edges: got rows {got}, expected 0 to {count - 1}")

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.dim}, k={self.k}, variant={self.variant!r}"


def _weights(points: Tensor, centers: Tensor, others: Tensor, kept: Tensor) -> Tensor:
    """Inverse distances of edges `(E,)`, with sum 1 for each centre; 0 for points that coincide."""
    square = (points[centers] - points[others]).square().sum(-1)
    apart = kept & (square > 0)
    near = torch.where(apart, torch.where(apart, square, 1.0).rsqrt(), 0.0)
    total = near.new_zeros(len(points)).index_add(0, centers, near)
    return near / torch.where(total > 0, total, 1.0)[centers]
