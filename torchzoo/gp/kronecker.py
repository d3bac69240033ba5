"""A Gaussian process on a tensor grid: Kronecker algebra for its density, mean and derivatives.

With a product kernel on the grid X_1 x ... x X_D the covariance of the grid values is
K = K_1 kron ... kron K_D, with factors K_d = L_d L_d^T, so that

    log N(vec U; 0, K) = -1/2 sum_d (N / N_d) log det K_d - 1/2 vec(U)^T K^-1 vec(U)
                         - N/2 log 2 pi,
    d^m u(x) = (kron_d d^(m_d) k_d(x_d, X_d) K_d^-1) vec(U),

in time sum_d N_d^3 + N sum_d N_d and memory N + sum_d N_d^2. On a uniform axis a factor is made
from its N_d lags only. S. Fang and others, "Solving high frequency and multi-scale PDEs with
Gaussian processes", 2024, section 5.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from torchzoo.common.linalg import kron_logdet, kron_solve, psd_cholesky
from torchzoo.gp.kernels import StudentTMixtureKernel
from torchzoo.hub import ZooModel
from torchzoo.ops.calling import no_autocast
from torchzoo.registry import Example, register

_LARGE_JITTER = 1e-3


@register(
    paper=143,
    example=lambda: Example(
        {
            "grids": [[0.0, 0.2, 0.4, 0.6], [0.0, 0.3, 0.5]],
            "values": [[1.0, 0.5, -0.4], [0.2, 0.1, 0.9], [-1.0, 0.3, 0.2], [0.7, -0.6, 0.1]],
            "jitter": 1e-3,
        },
        (torch.rand(5, 2, generator=torch.Generator().manual_seed(0)),),
        bad_options={"grids": [[0.0, 0.2, 0.1], [0.0, 1.0]], "values": [0.0], "jitter": -1.0},
    ),
    compare="dense Gaussian processes can't hold grids of a size where speed counts",
)
class KroneckerGP(ZooModel):
    """Gaussian process with a product kernel, conditioned on its values on a tensor grid.

    The values are a parameter, so that they can be unknowns as well as data.

    Args:
        grids: The increasing coordinates of each dimension; tensors, or lists of numbers, which a
            saved model needs.
        values: The values U on the grid; None: zeros.
        kernel_factory: Makes the kernel of one dimension from `device` and `dtype`: a
            `StudentTMixtureKernel`, or another with its `derivative`.
        jitter: Added to the diagonal of each dimension's matrix; more where that is not enough.
        batch_shape: Shape of a batch of functions that share the kernel.
        device: Device of parameters and buffers.
        dtype: Their dtype; None: that of the grids. float64 is advised.

    Shape:
        - points: `(..., D)`
        - output: `(*batch_shape, ...)`

    Returns:
        The mean at the points.

    Raises:
        ValueError: A grid that does not increase, values of another shape than the grid's, an
            option out of its range, or points of another dimension.

    Source:
        S. Fang and others, "Solving high frequency and multi-scale PDEs with Gaussian processes",
        2024, section 5; Y. Saatçi, "Scalable inference for structured Gaussian process models",
        2011, chapter 5.

    Example:
        >>> x = torch.linspace(0, 1, 40, dtype=torch.float64)
        >>> gp = KroneckerGP([x], (6 * x).sin())
        >>> points = torch.tensor([[0.512]], dtype=torch.float64)
        >>> round(gp(points).item(), 2), round((6 * points).sin().item(), 2)
        (0.07, 0.07)
    """

    values: nn.Parameter
    jitters: Tensor

    def __init__(
        self,
        grids: Sequence[Tensor | Sequence[float]],
        values: Tensor | Sequence[Any] | None = None,
        *,
        kernel_factory: Callable[..., nn.Module] = StudentTMixtureKernel,
        jitter: float = 1e-6,
        batch_shape: Sequence[int] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        axes = [_axis(grid, f"grids[{d}]") for d, grid in enumerate(grids)]
        if not axes:
            raise ValueError("grids: expected at least one, got none")
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter: expected within [0, 1), got {jitter}")
        super().__init__()
        self.sizes = tuple(len(axis) for axis in axes)
        self.batch_shape = tuple(batch_shape)
        self.jitter = jitter
        if dtype is None:
            dtype = axes[0].dtype if isinstance(grids[0], Tensor) else torch.get_default_dtype()
        self._uniform = tuple(_is_uniform(axis) for axis in axes)
        options: dict[str, Any] = {"device": device or torch.get_default_device(), "dtype": dtype}
        for d, axis in enumerate(axes):
            self.register_buffer(f"grid_{d}", axis.to(**options))
        self.register_buffer("jitters", torch.full((len(axes),), jitter, **options))
        self.kernels = nn.ModuleList(kernel_factory(**options) for _ in axes)
        start = _data(values, "values", (*self.batch_shape, *self.sizes))
        self.values = nn.Parameter(start.to(**options))

    def reset_parameters(self) -> None:
        """The kernels' parameters as at the start, and values of 0."""
        for kernel in self.kernels:
            cast(Any, kernel).reset_parameters()
        with torch.no_grad():
            self.values.zero_()
            self.jitters.fill_(self.jitter)

    @property
    def grids(self) -> tuple[Tensor, ...]:
        """The coordinates of each dimension."""
        return tuple(getattr(self, f"grid_{d}") for d in range(len(self.sizes)))

    def forward(self, points: Tensor) -> Tensor:
        return self.derivative(points, 0)

    def derivative(self, points: Tensor, order: int | Sequence[int]) -> Tensor:
        """A derivative of the mean at points off or on the grid.

        Args:
            points: Where.
            order: Its order in each dimension; a number where there is one dimension.

        Shape:
            - points: `(..., D)`
            - output: `(*batch_shape, ...)`

        Raises:
            ValueError: Points or orders of another dimension.
        """
        orders = self.orders(order)
        x = self._points(points)
        with no_autocast(x):
            solved = self._flat(self.values)
            factors = self.factors()
            solved = _whiten(factors, solved)
            rows = [self.root(d, m, factors[d], x[:, d]) for d, m in enumerate(orders)]
            mean = solved.unflatten(-1, self.sizes)
            mean = torch.tensordot(mean, rows[0], ([len(self.batch_shape)], [1]))
            for row in rows[1:]:
                # the modes that are left, and the points at the end
                mean = torch.einsum("...np,pn->...p", mean.movedim(len(self.batch_shape), -2), row)
        return mean.reshape((*self.batch_shape, *points.shape[:-1]))

    def variance(self, points: Tensor) -> Tensor:
        """Variance given the values on the grid: `prod_d k_d(0) - prod_d k_d^T K_d^-1 k_d`.

        Shape:
            - points: `(..., D)`
            - output: `(...)`

        Raises:
            ValueError: Points of another dimension.
        """
        x = self._points(points)
        with no_autocast(x):
            prior, known = x.new_ones(len(x)), x.new_ones(len(x))
            for d, factor in enumerate(self.factors()):
                prior = prior * self.covariance(d, 0, x[:1, d], x[:1, d])[0, 0]
                known = known * self.root(d, 0, factor, x[:, d]).square().sum(-1)
        return (prior - known).clamp_min(0).reshape(points.shape[:-1])

    def log_prob(self) -> Tensor:
        """Log density of the values under the prior.

        The jitter of a dimension is raised, for good, where its factor fails otherwise; a warning
        says so where it comes above 1e-3.

        Shape:
            - output: `batch_shape`

        Raises:
            ValueError: A kernel matrix that is not positive semi-definite.
        """
        factors = self.factors(check=True)
        white = _whiten(factors, self._flat(self.values))
        constant = white.shape[-1] * math.log(2 * math.pi)
        return -kron_logdet(factors, lower=True) - (white.square().sum(-1) + constant) / 2

    def covariance(
        self, d: int, order: int = 0, x: Tensor | None = None, y: Tensor | None = None
    ) -> Tensor:
        """Derivatives of dimension d's kernel in its first argument, without jitter.

        Args:
            d: The dimension.
            order: Order of the derivative.
            x: First arguments, `(n,)`; None: the grid.
            y: Second arguments, `(m,)`; None: the grid.

        Shape:
            - output: `(n, m)`
        """
        kernel: Any = self.kernels[d]
        grid = self.grids[d]
        if x is None and y is None and self._uniform[d]:
            lags = (grid - grid[0])[:, None]
            column = kernel.derivative(lags, torch.zeros_like(lags[:1]), order)[:, 0]
            index = torch.arange(len(grid), device=grid.device)
            apart = index[:, None] - index
            matrix = column[apart.abs()]
            return torch.where(apart < 0, -matrix, matrix) if order % 2 else matrix
        x, y = (grid if at is None else at for at in (x, y))
        return kernel.derivative(x[:, None], y[:, None], order)

    def factors(self, *, check: bool = False) -> list[Tensor]:
        """Lower Cholesky factors of each dimension's matrix, with jitter.

        Args:
            check: Whether to raise the jitter where a factorisation fails.

        Shape:
            - output: D tensors `(N_d, N_d)`
        """
        return [self._factor(d, check) for d in range(len(self.sizes))]

    def gram(self, d: int, order: int = 0) -> Tensor:
        """`covariance` on the grid, for order 0 with jitter.

        Shape:
            - output: `(N_d, N_d)`
        """
        matrix = self.covariance(d, order)
        if order:
            return matrix
        eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        return matrix + self.jitters[d] * eye

    def root(self, d: int, order: int, factor: Tensor, x: Tensor | None = None) -> Tensor:
        """What takes whitened values to a derivative along dimension d: `d^m k(x, X) L^-T`.

        On the grid and for order 0 it is L, jitter included, so that values are met exactly.

        Shape:
            - factor: `(N_d, N_d)`
            - x: `(n,)`, or None for the grid
            - output: `(n, N_d)`
        """
        if order == 0 and x is None:
            return factor
        cross = self.covariance(d, order, x)
        return torch.linalg.solve_triangular(factor, cross.mT, upper=False).mT

    def orders(self, order: int | Sequence[int]) -> tuple[int, ...]:
        """Orders of a derivative, one for each dimension.

        Raises:
            ValueError: They are not one for each dimension, or below 0.
        """
        dims = len(self.sizes)
        orders = (order,) if isinstance(order, int) else tuple(order)
        if isinstance(order, int) and order == 0:
            orders = (0,) * dims
        if len(orders) != dims or any(m < 0 for m in orders):
            raise ValueError(f"order: expected {dims} orders of at least 0, got {order}")
        return orders

    def extra_repr(self) -> str:
        return f"grid={self.sizes}, batch_shape={self.batch_shape}, jitter={self.jitter:g}"

    def _factor(self, d: int, check: bool) -> Tensor:
        matrix = self.gram(d)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not check or not failed:
            return factor
        factor, added = psd_cholesky(matrix, jitter=max(self.jitter, 1e-8))
        self.jitters[d] += added
        share = (self.jitters[d] / matrix.detach().diagonal().mean()).item()
        if share > _LARGE_JITTER:
            warnings.warn(
                f"dimension {d}: its kernel matrix needs a jitter of {share:.1e} "
                f"of its diagonal in {str(matrix.dtype).removeprefix('torch.')}; use float64 or "
                "fewer grid points a lengthscale",
                stacklevel=4,
            )
        return factor

    def _flat(self, values: Tensor) -> Tensor:
        return values.flatten(len(self.batch_shape))

    def _points(self, points: Tensor) -> Tensor:
        if points.ndim == 0 or points.shape[-1] != len(self.sizes):
            raise ValueError(
                f"points: expected (..., {len(self.sizes)}), got {tuple(points.shape)}"
            )
        return rearrange(points.to(self.values.dtype), "... d -> (...) d")


def _whiten(factors: Sequence[Tensor], values: Tensor) -> Tensor:
    """`(kron L_d)^-1 vec(U)`, of shape (..., N)."""
    return kron_solve(factors, values, lower=True)


def _axis(grid: Tensor | Sequence[float], name: str) -> Tensor:
    """Coordinates, checked."""
    axis = torch.as_tensor(grid, device=None if isinstance(grid, Tensor) else "cpu").detach()
    axis = axis if axis.is_floating_point() else axis.to(torch.get_default_dtype())
    if axis.ndim != 1 or len(axis) < 2 or not (axis.diff() > 0).all():
        raise ValueError(
            f"{name}: expected at least 2 increasing numbers, of {name.partition('[')[0]}, "
            f"got shape {tuple(axis.shape)}"
        )
    return axis


def _is_uniform(axis: Tensor) -> bool:
    """Whether steps are equal up to the rounding of the coordinates."""
    steps = axis.double().diff()
    rounding = 8 * torch.finfo(axis.dtype).eps * axis.double().abs().max()
    return bool((steps - steps.mean()).abs().max() <= rounding)


def _data(values: Tensor | Sequence[Any] | None, name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers of a shape; zeros for None."""
    if values is None:
        return torch.zeros(shape, device="cpu")
    data = values if isinstance(values, Tensor) else torch.tensor(values, device="cpu")
    if data.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(data.shape)}")
    return data.detach().clone()
