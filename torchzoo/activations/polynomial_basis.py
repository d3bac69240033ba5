"""Orthogonal polynomials of tanh(x), each by its three-term recurrence, with z = tanh(x):

    Chebyshev   T_(n+1) = 2 z T_n - T_(n-1)
    Jacobi      P_(n+1) = ((p_n z + q_n) P_n - r_n P_(n-1)) / s_n     with parameters a, b
    Gram        G_(n+1) = z G_n - beta_n G_(n-1)                      beta learns

S. Seydi, Exploring the Potential of Polynomial Basis Functions in Kolmogorov-Arnold Networks: A
Comparative Study of Different Groups of Polynomials, 2024. The squashing keeps the inputs in
[-1, 1], where the polynomials are bounded and orthogonal.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchzoo import peers
from torchzoo.activations.basis import UnivariateBasis, check_count
from torchzoo.ops import basis_functions
from torchzoo.registry import Comparison, Example, register


class _Polynomials(UnivariateBasis):
    """Polynomials of tanh(x) up to a degree, the first two of them 1 and `first(z)`."""

    def __init__(self, degree: int) -> None:
        super().__init__()
        check_count("degree", degree)
        self.degree = degree
        self.num_basis = degree + 1

    def first(self, z: Tensor) -> Tensor:
        """The polynomial of degree 1."""
        return z

    def following(self, n: int, z: Tensor, last: Tensor, before: Tensor) -> Tensor:
        """The polynomial of degree n + 1 from those of degree n and n - 1."""
        raise NotImplementedError

    def evaluate(self, x: Tensor) -> Tensor:
        z = x.tanh()
        values = [torch.ones_like(z), self.first(z)]
        for n in range(1, self.degree):
            values.append(self.following(n, z, values[-1], values[-2]))
        return torch.stack(values, -2)

    def extra_repr(self) -> str:
        return f"degree={self.degree}"


@register(
    example=lambda: Example(
        {"degree": 4},
        (torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),),
        bad_options={"degree": 0},
    ),
    compare=lambda: Comparison({"degree": 7}, (torch.randn(1024, 64),), peers.BASES),
)
class ChebyshevBasis(_Polynomials):
    """Chebyshev polynomials of the first kind, T_0 to T_degree, of tanh(x).

    Args:
        degree: Highest degree; K = degree + 1 functions.

    Shape:
        - x: `(..., D)`
        - output: `(..., D, K)`

    Returns:
        The polynomials of each input.

    Raises:
        ValueError: `degree` below 1, or x without dimensions.

    Source:
        Sidharth, Keerthana, Gokul and Anas, Chebyshev Polynomial-Based Kolmogorov-Arnold
        Networks, 2024, equation 3.

    Example:
        >>> ChebyshevBasis(4)(torch.zeros(1))[:, ::2].tolist()
        [[1.0, -1.0, 1.0]]
    """

    def __init__(self, degree: int = 4) -> None:
        super().__init__(degree)

    def evaluate(self, x: Tensor) -> Tensor:
        return basis_functions(x, "chebyshev", self.num_basis)


@register(
    example=lambda: Example(
        {"degree": 4, "a": 0.5},
        (torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),),
        bad_options={"degree": 0, "a": -1.0, "b": -2.0},
    ),
    compare=lambda: Comparison({"degree": 7, "a": 0.5}, (torch.randn(1024, 64),), peers.BASES),
)
class JacobiBasis(_Polynomials):
    """Jacobi polynomials of tanh(x), orthogonal under the weight (1 - z)^a (1 + z)^b.

    Args:
        degree: Highest degree; K = degree + 1 functions.
        a: Exponent at z = 1, above -1.
        b: Exponent at z = -1, above -1.

    Shape:
        - x: `(..., D)`
        - output: `(..., D, K)`

    Returns:
        The polynomials of each input.

    Raises:
        ValueError: `degree` below 1, `a` or `b` not above -1, or x without dimensions.

    Source:
        Aghaei, fKAN: Fractional Kolmogorov-Arnold Networks with Trainable Jacobi Basis Functions,
        2024; the recurrence is 18.9.2 of the NIST Digital Library of Mathematical Functions.

    Example:
        >>> JacobiBasis(2)(torch.zeros(1)).tolist()
        [[1.0, 0.0, -0.75]]
    """

    def __init__(self, degree: int = 4, a: float = 1.0, b: float = 1.0) -> None:
        super().__init__(degree)
        for name, value in (("a", a), ("b", b)):
            if not value > -1:
                raise ValueError(f"{name}: expected a number above -1, got {value!r}")
        self.a, self.b = float(a), float(b)

    def first(self, z: Tensor) -> Tensor:
        return (self.a + 1) + (self.a + self.b + 2) * (z - 1) / 2

    def following(self, n: int, z: Tensor, last: Tensor, before: Tensor) -> Tensor:
        a, b = self.a, self.b
        c = 2 * n + a + b
        slope = (c + 1) * (c + 2) * c
        offset = (c + 1) * (a * a - b * b)
        back = 2 * (n + a) * (n + b) * (c + 2)
        return ((slope * z + offset) * last - back * before) / (2 * (n + 1) * (n + a + b + 1) * c)

    def extra_repr(self) -> str:
        return f"degree={self.degree}, a={self.a}, b={self.b}"


@register(
    example=lambda: Example(
        {"degree": 4},
        (torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),),
        bad_options={"degree": 0, "num_points": 4},
    ),
    compare=lambda: Comparison({"degree": 7}, (torch.randn(1024, 64),), peers.BASES),
)
class GramBasis(_Polynomials):
    """Gram polynomials of tanh(x), whose recurrence learns.

    They start as the monic polynomials that are orthogonal over equidistant points in [-1, 1],
    beta_n = n^2 (m^2 - n^2) / ((m - 1)^2 (4 n^2 - 1)) for m points.

    Args:
        degree: Highest degree; K = degree + 1 functions.
        num_points: Number m of points, above the degree.
        device: Device of the recurrence.
        dtype: Type of the recurrence.

    Shape:
        - x: `(..., D)`
        - output: `(..., D, K)`
        - beta: `(degree - 1,)`

    Returns:
        The polynomials of each input.

    Raises:
        ValueError: `degree` below 1, `num_points` not above it, or x without dimensions.

    Source:
        Drokin, Kolmogorov-Arnold Convolutions: Design Principles and Empirical Studies, 2024 (its
        Gram layer has a recurrence with learned weights; the start is ours); the polynomials are
        those of Gram, Ueber die Entwickelung reeller Functionen in Reihen, 1883.

    Example:
        >>> GramBasis(3)(torch.ones(2, 5)).shape
        torch.Size([2, 5, 4])
    """

    def __init__(
        self,
        degree: int = 4,
        num_points: int = 16,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(degree)
        check_count("num_points", num_points, degree + 1)
        self.num_points = num_points
        self.beta = nn.Parameter(torch.empty(degree - 1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set beta to the recurrence of the polynomials that are orthogonal over the points."""
        n = torch.arange(1, self.degree, device=self.beta.device, dtype=torch.float64)
        n2 = n.square()
        m = self.num_points
        with torch.no_grad():
            self.beta.copy_(n2 * (m * m - n2) / ((m - 1) ** 2 * (4 * n2 - 1)))

    def following(self, n: int, z: Tensor, last: Tensor, before: Tensor) -> Tensor:
        return z * last - self.beta[n - 1] * before

    def extra_repr(self) -> str:
        return f"degree={self.degree}, num_points={self.num_points}"
