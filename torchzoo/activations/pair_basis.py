"""Pairs of shifted activations, p = act(x - l) and n = act(u - x), combined into one bump.

H.-T. Ta and A. Tran, AF-KAN: Activation Function-Based Kolmogorov-Arnold Networks for
Efficient Representation Learning, 2025. On a grid of g cells and
with order k there are K = g + k pairs, which start at

    l_j = (j - k) / g,    u_j = l_j + (k + 1) / g,    j = 0 .. K - 1,

all inputs share them, and they learn. With ReLU and `quad1` the start is the basis of ReLU-KAN but
for its constant factor 16 g^4 / (k + 1)^4.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from torchzoo import peers
from torchzoo.activations.basis import (
    ACTIVATIONS,
    UnivariateBasis,
    check_choice,
    check_count,
    steps,
)
from torchzoo.ops import pair_mixtures
from torchzoo.ops._elementwise import differentiate_formula
from torchzoo.ops.calling import no_autocast
from torchzoo.registry import Comparison, Example, register

COMBINATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "quad1": lambda p, n: (p * n).square(),
    "quad2": lambda p, n: p * n + p.square() + n.square(),
    "sum": lambda p, n: p + n,
    "prod": lambda p, n: p * n,
    "sum_prod": lambda p, n: p + n + p * n,
    "cubic1": lambda p, n: (p + n) * (p.square() + n.square()),
    "cubic2": lambda p, n: (p * n).pow(3),
}
"""What a pair becomes, by name."""

SCALINGS = ("sample", "batch", "none")
"""What the least and the largest function, which become 0 and 1, are taken over."""


def min_max(phi: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
    """Scale to [0, 1] over some dimensions, or all; where all values are equal they become 0."""
    dims = tuple(range(phi.ndim)) if dims is None else dims
    if phi.numel() == 0:
        return phi
    low = phi.amin(dims, keepdim=True)
    extent = phi.amax(dims, keepdim=True) - low
    return (phi - low) / extent.where(extent > 0, 1)


@register(
    paper=8,
    example=lambda: Example(
        {"grid_size": 3, "order": 2},
        (torch.rand(3, 4, generator=torch.Generator().manual_seed(0)),),
        bad_options={"grid_size": 0, "order": -1, "activation": "sine", "combine": "quad3"},
    ),
    compare=lambda: Comparison({"grid_size": 5}, (torch.randn(1024, 64),), peers.BASES),
)
class PairBasis(UnivariateBasis):
    """Combined pairs of shifted activations, whose shifts learn.

    Args:
        grid_size: Number of cells g in [0, 1].
        order: Cells k that a pair covers beyond its own; K = g + k functions.
        activation: A name out of softplus, sigmoid, silu, relu, leaky_relu, elu, gelu, selu, tanh.
        combine: quad1 (p n)^2, quad2 p n + p^2 + n^2, sum p + n, prod p n, sum_prod p + n + p n,
            cubic1 (p + n)(p^2 + n^2), cubic2 (p n)^3.
        train_grid: Whether the shifts learn.
        device: Device of the shifts.
        dtype: Type of the shifts.

    Shape:
        - x: `(..., D)`
        - output: `(..., D, K)`
        - low, high: `(K,)`

    Returns:
        The functions of each input.

    Raises:
        ValueError: A count out of range, an unknown activation or combination (the message lists
            them), or x without dimensions.

    Source:
        Ta and Tran, AF-KAN, 2025, and the authors' published code.

    Example:
        >>> PairBasis(2, 1, activation="relu", combine="prod")(torch.tensor([0.5])).tolist()
        [[0.0, 0.25, 0.0]]
    """

    grid_range = (0.0, 1.0)

    def __init__(
        self,
        grid_size: int = 5,
        order: int = 3,
        activation: str = "silu",
        combine: str = "quad1",
        *,
        train_grid: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("grid_size", grid_size)
        check_count("order", order, 0)
        check_choice("activation", activation, list(ACTIVATIONS))
        check_choice("combine", combine, list(COMBINATIONS))
        self.grid_size, self.order = grid_size, order
        self.activation, self.combine, self.train_grid = activation, combine, train_grid
        self.num_basis = grid_size + order
        low = torch.empty(self.num_basis, device=device, dtype=dtype)
        self.low = nn.Parameter(low, requires_grad=train_grid)
        self.high = nn.Parameter(torch.empty_like(low), requires_grad=train_grid)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Put the pairs on the grid."""
        with torch.no_grad():
            self.low.copy_((steps(self.num_basis, self.low)[:, 0] - self.order) / self.grid_size)
            self.high.copy_(self.low + (self.order + 1) / self.grid_size)

    def evaluate(self, x: Tensor) -> Tensor:
        return self.pairs(x.unsqueeze(-2), self.low.unsqueeze(-1), self.high.unsqueeze(-1))

    def pairs(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The functions with these shifts at x; all three broadcast."""
        act = ACTIVATIONS[self.activation]
        # signs change before the tensors grow: so do their gradients', after they have shrunk
        return COMBINATIONS[self.combine](act(x + -low), act(high + -x))

    def scaled(self, x: Tensor, scaling: str) -> Tensor:
        """The functions of x `(n, D)`, scaled as one of `SCALINGS` says: `(n, K, D)`."""
        phi = self.evaluate(x)
        if scaling == "none":
            return phi
        return min_max(phi, (-2, -1) if scaling == "sample" else None)

    def scaled_mixtures(self, x: Tensor, weight: Tensor, scaling: str) -> Tensor:
        """Sums of the scaled functions of x `(n, D)`, times weights `(M, K)`: `(n, M, D)`.

        As the scaling is affine, it is applied to the sums, which are fewer than the functions.
        """
        wanted = scaling != "none" and x.numel() > 0
        ends: Tensor | None
        if self.has_operator():
            mixed, ends = pair_mixtures(x, self.low, self.high, weight)
        else:
            mixed, ends = self._mixtures(x, weight, wanted)
        if not wanted or ends is None:
            return mixed
        if scaling == "batch":
            first = torch.stack([ends[:, 0].argmin(), ends[:, 1].argmax()])
            ends = ends.gather(0, first.unsqueeze(0))
        low, high = ends[:, :1, None], ends[:, 1:, None]
        extent = high - low
        lift = low * weight.to(mixed.dtype).sum(-1, keepdim=True)
        return (mixed - lift) / extent.where(extent > 0, 1)

    def has_operator(self) -> bool:
        """Whether one operator makes the mixtures, and nothing of K functions is held."""
        usual = self.activation == "silu" and self.combine == "quad1"
        return usual and not differentiate_formula()

    def _mixtures(self, x: Tensor, weight: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
        """Mixtures, and each sample's least and largest function `(n, 2)` where wanted.

        These are computed again at the input that they are of, and so are their gradients there.
        """
        phi = self.evaluate(x)  # (n, K, D)
        with no_autocast(x):  # of sums in half precision the scaling would leave little
            mixed = torch.bmm(weight.to(phi.dtype).expand(len(x), -1, -1), phi)
        if not wanted:
            return mixed, None
        known = phi.detach()
        places = torch.stack([known.amin(-2).argmin(-1), known.amax(-2).argmax(-1)], -1)
        at = self.evaluate(x.gather(-1, places))  # (n, K, 2)
        return mixed, torch.stack([at[..., 0].amin(-1), at[..., 1].amax(-1)], -1)

    def extra_repr(self) -> str:
        return (
            f"grid_size={self.grid_size}, order={self.order}, activation={self.activation!r}, "
            f"combine={self.combine!r}, train_grid={self.train_grid}"
        )
