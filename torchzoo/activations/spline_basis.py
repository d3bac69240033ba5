"""B-splines: a closed form on a uniform grid, and their sparse form on any grid.

The closed form, an operator, needs two powers a cubic spline, no recursion over orders, and nothing
but the input for the backward pass: see `torchzoo.ops.basis_functions`.

On other knots, and in the sparse form, the order + 1 splines that are not 0 at an input come from
the local triangle of Cox and de Boor: C. de Boor, On Calculating with B-Splines, 1972.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchzoo.activations.basis import UnivariateBasis, check_count, check_range, steps
from torchzoo.ops import basis_functions
from torchzoo.registry import Comparison, Example, register


@register(
    example=lambda: Example(
        {"grid_size": 4, "order": 3},
        (2.4 * torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) - 1.2,),
        bad_options={"grid_size": 0, "order": 0, "grid_range": (1.0, -1.0), "in_features": 0},
    ),
    compare=lambda: Comparison(
        {"grid_size": 5},
        (torch.randn(1024, 64),),
        ("RBFBasis(num_basis=8)", "ChebyshevBasis(degree=7)"),
    ),
)
class BSplineBasis(UnivariateBasis):
    """B-splines on a grid that is continued beyond both ends, so that they fade out there.

    Inside the range they sum to 1. All inputs share the uniform grid; with `in_features` each has
    knots of its own, which `KANLinear.update_grid` fits to data, at the price of a slower form.

    Args:
        grid_size: Number of intervals g in the range.
        order: Degree k of the pieces, at least 1; K = g + k functions.
        grid_range: The interval that the grid divides.
        in_features: Number of inputs D, for knots of their own (a buffer).
        device: Device of the knots.
        dtype: Type of the knots.

    Shape:
        - x: `(..., D)`
        - output: `(..., D, K)`
        - knots: `(D, g + 2k + 1)` with `in_features`, else None

    Returns:
        The splines of each input; `support` gives only those that are not 0.

    Raises:
        ValueError: A count below 1, a range that doesn't ascend, or x of another width than
            `in_features`.

    Source:
        Liu, Wang, Vaidya, Ruehle, Halverson, Soljacic, Hou and Tegmark, KAN: Kolmogorov-Arnold
        Networks, 2024, section 2.4; de Boor, On Calculating with B-Splines, 1972.

    Example:
        >>> basis = BSplineBasis(5, 3)
        >>> values = basis(torch.linspace(-1, 1, 7))
        >>> values.shape, bool((values.sum(-1) - 1).abs().max() < 1e-6)
        (torch.Size([7, 8]), True)
    """

    knots: Tensor | None

    def __init__(
        self,
        grid_size: int = 5,
        order: int = 3,
        grid_range: tuple[float, float] = (-1.0, 1.0),
        *,
        in_features: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("grid_size", grid_size)
        check_count("order", order)
        if in_features is not None:
            check_count("in_features", in_features)
        self.grid_size, self.order, self.in_features = grid_size, order, in_features
        self.grid_range = check_range(grid_range)
        self.num_basis = grid_size + order
        knots = None
        if in_features is not None:
            like = torch.empty(0, device=device, dtype=dtype)
            knots = self._uniform_knots(like).mT.repeat(in_features, 1)
        self.register_buffer("knots", knots)

    @property
    def spacing(self) -> float:
        """Distance of neighbouring knots of the uniform grid."""
        low, high = self.grid_range
        return (high - low) / self.grid_size

    def _uniform_knots(self, like: Tensor) -> Tensor:
        """The uniform knots as a column, `(g + 2k + 1, 1)`."""
        return self.grid_range[0] + self.spacing * (
            steps(self.grid_size + 2 * self.order + 1, like) - self.order
        )

    def evaluate(self, x: Tensor) -> Tensor:
        if self.knots is None:
            return basis_functions(
                x,
                "splines",
                self.num_basis,
                order=self.order,
                low=self.grid_range[0],
                spacing=self.spacing,
            )
        index, values = self._local(x)
        padded = x.new_zeros(*x.shape[:-1], self.num_basis + 2 * self.order, x.shape[-1])
        return padded.scatter(-2, index, values).narrow(-2, self.order, self.num_basis)

    def support(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The sparse form: which order + 1 splines may differ from 0, and their values.

        Args:
            x: Inputs, `(..., D)`.

        Returns:
            int64 indices and values, both `(..., D, order + 1)`. Near the ends of the grid fewer
            splines exist; what is left over has the value 0 and some index of the others.

        Raises:
            ValueError: As `forward`.
        """
        self.check_inputs(x)
        index, values = self._local(x)
        index = index - self.order
        exists = (index >= 0) & (index < self.num_basis)
        index = index.clamp(0, self.num_basis - 1)
        return index.mT, values.where(exists, 0).mT

    def _local(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Indices and values of the splines at x, `(..., order + 1, D)` both.

        The grid is thought to go on for `order` knots more at both sides, so that every cell has
        its full set of splines; the indices count from the first of them.
        """
        n = self.order
        inner = self._uniform_knots(x) if self.knots is None else self.knots.to(x.dtype).mT
        below = inner[:1] + (inner[:1] - inner[1:2]) * (steps(n, x).flip(0) + 1)
        above = inner[-1:] + (inner[-1:] - inner[-2:-1]) * (steps(n, x) + 1)
        knots = torch.cat([below, inner, above])  # (g + 4k + 1, D or 1)
        column = x.unsqueeze(-2)
        cell = (column >= knots).sum(-2, keepdim=True) - 1
        cell = cell.clamp(n, len(knots) - 2 - n)
        around = cell + torch.arange(1 - n, n + 1, device=x.device).unsqueeze(-1)
        near = knots.expand(*x.shape[:-1], len(knots), x.shape[-1]).gather(-2, around)
        left = (column - near[..., :n, :]).flip(-2).unbind(-2)  # from the cell's own knot down
        right = (near[..., n:, :] - column).unbind(-2)
        values = [torch.ones_like(x)]
        for degree in range(1, n + 1):
            carried, raised = torch.zeros_like(x), []
            for r, value in enumerate(values):
                share = value / (right[r] + left[degree - 1 - r])
                raised.append(carried + right[r] * share)
                carried = left[degree - 1 - r] * share
            values = [*raised, carried]
        inside = (column >= knots[n]) & (column < knots[-1 - n])
        splines = torch.arange(n + 1, device=x.device).unsqueeze(-1)
        return cell - n + splines, torch.stack(values, -2) * inside

    @torch.no_grad()
    def fit_knots(self, x: Tensor, *, uniform: float = 0.02, margin: float = 0.01) -> None:
        """Move the knots of each input to where its data are.

        Args:
            x: Data, `(N, D)`.
            uniform: Weight of a uniform grid from the least to the greatest value; the rest of it
                is the grid with as many data in each interval.
            margin: How far the uniform grid goes beyond the data at both ends.

        Raises:
            ValueError: A basis without `in_features`, no data, or a weight outside (0, 1].
        """
        if self.knots is None:
            raise ValueError("in_features: expected a number for knots of their own, got None")
        if x.ndim != 2 or not len(x) or x.shape[-1] != self.in_features:
            raise ValueError(
                f"x: expected (N, {self.in_features}) with N > 0, got {tuple(x.shape)}"
            )
        if not 0 < uniform <= 1:
            raise ValueError(f"uniform: expected a weight in (0, 1], got {uniform!r}")
        x = x.to(self.knots)
        share = steps(self.grid_size + 1, x) / self.grid_size
        low, high = x.amin(0) - margin, x.amax(0) + margin
        inner = uniform * (low + share * (high - low))
        inner = inner + (1 - uniform) * torch.quantile(x, share.flatten(), dim=0)
        step = (inner[-1] - inner[0]) / self.grid_size
        beyond = step * (steps(self.order, x) + 1)
        self.knots.copy_(torch.cat([inner[0] - beyond.flip(0), inner, inner[-1] + beyond]).mT)

    def extra_repr(self) -> str:
        own = "" if self.in_features is None else f", in_features={self.in_features}"
        return f"grid_size={self.grid_size}, order={self.order}, range={self.grid_range}{own}"
