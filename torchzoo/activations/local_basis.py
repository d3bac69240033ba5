"""Bumps and waves on a grid: h is the spacing of the centres c.

RBFBasis           exp(-((x - c) / h)^2)
RSWAFBasis         1 - tanh((x - c) / h)^2
ReLUProductBasis   (relu(e - x) relu(x - s))^2 16 / (e - s)^4     on intervals (s, e)
WaveletBasis       psi((x - shift) / scale)                       shift and scale learn
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo import peers
from torchzoo.activations.basis import (
    UnivariateBasis,
    check_choice,
    check_count,
    check_range,
    steps,
)
from torchzoo.ops import basis_functions, mexican_hats
from torchzoo.registry import Comparison, Example, register


def _input() -> tuple[Tensor]:
    return (torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),)


class _Centred(UnivariateBasis):
    """One function of (x - c) / h for each of K centres that divide a range evenly."""

    def __init__(self, num_basis: int, grid_range: tuple[float, float]) -> None:
        super().__init__()
        check_count("num_basis", num_basis, 2)
        self.num_basis = num_basis
        self.grid_range = check_range(grid_range)

    @property
    def spacing(self) -> float:
        """Distance of neighbouring centres."""
        low, high = self.grid_range
        return (high - low) / (self.num_basis - 1)

    def offset(self, x: Tensor) -> Tensor:
        """(x - c) / h, `(..., K, D)`."""
        u = (x - self.grid_range[0]) / self.spacing
        return u.unsqueeze(-2) - steps(self.num_basis, x)

    def extra_repr(self) -> str:
        return f"num_basis={self.num_basis}, range={self.grid_range}"


@register(
    example=lambda: Example(
        {"num_basis": 5}, _input(), bad_options={"num_basis": 1, "grid_range": (0.0, 0.0)}
    ),
    compare=lambda: Comparison({"num_basis": 8}, (torch.randn(1024, 64),), peers.BASES),
)
class RBFBasis(_Centred):
    """Gaussians on a grid, as wide as the grid's spacing.

    Args:
        num_basis: Number of centres K, at least 2.
        grid_range: The first and the last centre.

    Shape:
        - x: `(..., D)`
        - output: `(..., D, K)`

    Returns:
        The functions of each input, in (0, 1].

    Raises:
        ValueError: `num_basis` below 2, a range that doesn't ascend, or x without dimensions.

    Source:
        Li, Kolmogorov-Arnold Networks are Radial Basis Function Networks, 2024, equation 5.

    Example:
        >>> RBFBasis(3)(torch.zeros(1))
        tensor([[0.3679, 1.0000, 0.3679]])
    """

    def __init__(self, num_basis: int = 8, grid_range: tuple[float, float] = (-1.0, 1.0)) -> None:
        super().__init__(num_basis, grid_range)

    def evaluate(self, x: Tensor) -> Tensor:
        return basis_functions(
            x, "gaussians", self.num_basis, low=self.grid_range[0], spacing=self.spacing
        )


@register(
    example=lambda: Example(
        {"num_basis": 5}, _input(), bad_options={"num_basis": 1, "grid_range": (0.0, 0.0)}
    ),
    compare=lambda: Comparison({"num_basis": 8}, (torch.randn(1024, 64),), peers.BASES),
)
class RSWAFBasis(_Centred):
    """Reflectional switches on a grid, 1 - tanh^2: bumps with exponential tails.

    Args:
        num_basis: Number of centres K, at least 2.
        grid_range: The first and the last centre.

    Shape:
        - x: `(..., D)`
        - output: `(..., D, K)`

    Returns:
        The functions of each input, in (0, 1].

    Raises:
        ValueError: `num_basis` below 2, a range that doesn't ascend, or x without dimensions.

    Source:
        Delis, FasterKAN, 2024; the width is one spacing of the grid.

    Example:
        >>> RSWAFBasis(3)(torch.zeros(1))
        tensor([[0.4200, 1.0000, 0.4200]])
    """

    def __init__(self, num_basis: int = 8, grid_range: tuple[float, float] = (-1.0, 1.0)) -> None:
        super().__init__(num_basis, grid_range)

    def evaluate(self, x: Tensor) -> Tensor:
        return 1 - self.offset(x).tanh().square()


@register(
    example=lambda: Example(
        {"grid_size": 4},
        (torch.rand(3, 4, generator=torch.Generator().manual_seed(0)),),
        bad_options={"grid_size": 0, "order": -1, "grid_range": (0.0, 0.0)},
    ),
    compare=lambda: Comparison({"grid_size": 5}, (torch.randn(1024, 64),), peers.BASES),
)
class ReLUProductBasis(UnivariateBasis):
    """Squared products of two ReLUs: bumps on overlapping intervals, with 1 as their maximum.

    Args:
        grid_size: Number of cells g in the range.
        order: Cells k that an interval covers beyond its own; K = g + k functions on intervals
            from s_j = low + (j - k) h to s_j + (k + 1) h.
        grid_range: The interval that the cells divide.

    Shape:
        - x: `(..., D)`
        - output: `(..., D, K)`

    Returns:
        The functions of each input, in [0, 1].

    Raises:
        ValueError: A count out of range, a range that doesn't ascend, or x without dimensions.

    Source:
        Qiu, Zhu, Gong, Chen and Ning, ReLU-KAN: New Kolmogorov-Arnold Networks that Only Need
        Matrix Addition, Dot Multiplication, and ReLU, 2024, equation 4.

    Example:
        >>> ReLUProductBasis(2, 1)(torch.tensor([0.5])).tolist()
        [[0.0, 1.0, 0.0]]
    """

    def __init__(
        self,
        grid_size: int = 5,
        order: int = 3,
        grid_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__()
        check_count("grid_size", grid_size)
        check_count("order", order, 0)
        self.grid_size, self.order = grid_size, order
        self.grid_range = check_range(grid_range)
        self.num_basis = grid_size + order

    def evaluate(self, x: Tensor) -> Tensor:
        low, high = self.grid_range
        width = self.order + 1
        u = (x - low) * (self.grid_size / (high - low))
        from_start = u.unsqueeze(-2) - (steps(self.num_basis, x) - self.order)
        product = F.relu(from_start) * F.relu(width - from_start)
        return product.square() * (16 / width**4)

    def extra_repr(self) -> str:
        return f"grid_size={self.grid_size}, order={self.order}, range={self.grid_range}"


def _morlet(u: Tensor) -> Tensor:
    return torch.cos(5 * u) * (-u.square() / 2).exp()


def _derivative_of_gaussian(u: Tensor) -> Tensor:
    return -u * (-u.square() / 2).exp()


_WAVELETS: dict[str, Callable[[Tensor], Tensor]] = {
    "morlet": _morlet,
    "dog": _derivative_of_gaussian,
}


@register(
    example=lambda: Example(
        {"in_features": 4, "num_basis": 5},
        _input(),
        bad_options={
            "in_features": 0,
            "num_basis": 1,
            "kind": "haar",
            "grid_range": (0.0, 0.0),
        },
    ),
    compare=lambda: Comparison(
        {"in_features": 64, "num_basis": 8}, (torch.randn(1024, 64),), peers.BASES
    ),
)
class WaveletBasis(UnivariateBasis):
    """Translates of a wavelet on a grid, each input's with a shift and a scale that learn.

    Args:
        in_features: Number of inputs D.
        num_basis: Number of translates K, at least 2.
        kind: `"mexican_hat"` (of norm 1), `"morlet"` (cos(5 u) under a Gaussian) or `"dog"` (the
            derivative of a Gaussian).
        grid_range: First and last shift at the start; the first scale is the spacing.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - x: `(..., D)`
        - output: `(..., D, K)`
        - shift, log_scale: `(K, D)`

    Returns:
        The functions of each input.

    Raises:
        ValueError: A count out of range, an unknown kind, a range that doesn't ascend, or x of
            another width.

    Source:
        Bozorgasl and Chen, Wav-KAN: Wavelet Kolmogorov-Arnold Networks, 2024, equation 11 and
        table 1; there each edge has a shift and a scale, here outputs share them.

    Example:
        >>> WaveletBasis(2)(torch.zeros(7, 2)).shape
        torch.Size([7, 2, 8])
    """

    in_features: int

    def __init__(
        self,
        in_features: int,
        num_basis: int = 8,
        kind: str = "mexican_hat",
        grid_range: tuple[float, float] = (-1.0, 1.0),
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("in_features", in_features)
        check_count("num_basis", num_basis, 2)
        check_choice("kind", kind, ("mexican_hat", *_WAVELETS))
        self.in_features, self.num_basis, self.kind = in_features, num_basis, kind
        self.grid_range = check_range(grid_range)
        shape = (num_basis, in_features)
        self.shift = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.log_scale = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Put the translates on the grid, as wide as its spacing."""
        low, high = self.grid_range
        spacing = (high - low) / (self.num_basis - 1)
        with torch.no_grad():
            self.shift.copy_(
                (low + spacing * steps(self.num_basis, self.shift)).expand_as(self.shift)
            )
            self.log_scale.fill_(math.log(spacing))

    def evaluate(self, x: Tensor) -> Tensor:
        rate = (-self.log_scale).exp()
        if self.kind == "mexican_hat":
            return mexican_hats(x, self.shift, rate)
        u = torch.addcmul(-self.shift * rate, x.unsqueeze(-2), rate)
        return _WAVELETS[self.kind](u)

    def select(self, inputs: Tensor) -> WaveletBasis:
        """The basis of some of the inputs, with a copy of their shifts and scales."""
        chosen = WaveletBasis(
            len(inputs),
            self.num_basis,
            self.kind,
            self.grid_range,
            device=self.shift.device,
            dtype=self.shift.dtype,
        )
        with torch.no_grad():
            chosen.shift.copy_(self.shift[:, inputs])
            chosen.log_scale.copy_(self.log_scale[:, inputs])
        return chosen

    def extra_repr(self) -> str:
        return f"{self.in_features}, num_basis={self.num_basis}, kind={self.kind!r}"
