"""GP-HM: partial differential equations solved by a Gaussian process with a mixture spectrum.

The unknown is the tensor U of a solution's values on a grid, with a Gaussian process prior whose
kernel is learned (see `torchzoo.gp.kronecker` and `torchzoo.gp.kernels`). Minimised is

    -log p = -log N(vec U; 0, K) - lam [N_b/2 log tau - tau/2 sum (U_b - g)^2]
             - [N_c/2 log v - v/2 sum F(u, du, ...)^2],

g being boundary values, F the residual of the equation on the grid, tau and v learned precisions.

S. Fang, M. Cooley, D. Long, S. Li, R. M. Kirby and S. Zhe, "Solving high frequency and multi-scale
PDEs with Gaussian processes", 2024, sections 4 and 5. Deviations: by default U is solved for at
each step, as the loss is quadratic in it for a linear equation, and only kernel and precisions take
gradient steps (`method="joint"` is the paper's way); tau and v have a ceiling, as both run away
where the residual goes to 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from functools import cache, partial
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import jvp

from torchzoo.common.linalg import kron_logdet, kron_matvec, kron_solve
from torchzoo.gp.gp_pde_solver import (
    Preconditioner,
    backtrack,
    dense_step,
    iterative_step,
    mean_normal,
)
from torchzoo.gp.kernels import StudentTMixtureKernel
from torchzoo.gp.kronecker import KroneckerGP, _whiten
from torchzoo.registry import Example, register

_CEILING = (3.0, 2.0)  # of log tau and log v
_DENSE = 2048  # unknowns up to which the normal equations are formed
_FLAT_STEPS = 50


class Fields:
    """A function on the grid and its derivatives, as an operator sees them.

    Made by `GPHM`. All have the shape `(*batch_shape, N_1, ..., N_D)`.

    Attributes:
        x: The coordinates of each dimension, of shapes that broadcast with the fields.
    """

    def __init__(
        self,
        coefficients: Tensor,
        basis: Callable[[int, int], Tensor],
        grids: Sequence[Tensor],
    ):
        self._coefficients, self._basis = coefficients, basis
        self._found: dict[tuple[int, ...], Tensor] = {}
        dims = len(grids)
        self.x = tuple(
            grid.reshape(*[1] * d, -1, *[1] * (dims - 1 - d)) for d, grid in enumerate(grids)
        )

    @property
    def u(self) -> Tensor:
        """The function itself."""
        return self.mixed([0] * len(self.x))

    def dx(self, d: int, order: int = 1) -> Tensor:
        """The derivative of an order in dimension d."""
        return self.mixed([order if i == d else 0 for i in range(len(self.x))])

    def mixed(self, orders: Sequence[int]) -> Tensor:
        """The derivative with an order for each dimension."""
        key = tuple(orders)
        if key not in self._found:
            bases = [self._basis(d, order) for d, order in enumerate(key)]
            field = kron_matvec(bases, self._coefficients)
            self._found[key] = field.unflatten(-1, [len(b) for b in bases])
        return self._found[key]

    def _slopes(self, operator: Callable[[Fields], Tensor]) -> dict[tuple[int, ...], Tensor]:
        """Derivatives of an operator, here, in each field that it looks at, by its orders.

        They are those of the equation made linear if the operator acts point by point.
        """
        operator(self)
        _ = self.u  # an operator may look at none
        found = dict(self._found)

        def given(fields: dict[tuple[int, ...], Tensor]) -> Tensor:
            known = copy(self)
            known._found = dict(fields)
            return operator(known)

        still = {key: torch.zeros_like(field) for key, field in found.items()}
        return {
            key: jvp(given, (found,), (still | {key: torch.ones_like(field)},))[1]
            for key, field in found.items()
        }


def laplace(fields: Fields) -> Tensor:
    """The residual of the Laplace equation: the sum of all second derivatives."""
    return torch.stack([fields.dx(d, 2) for d in range(len(fields.x))]).sum(0)


@register(
    paper=143,
    example=lambda: Example(
        {
            "grids": [[0.0, 0.2, 0.4, 0.6], [0.0, 0.3, 0.5]],
            "boundary": ([[True] * 3, [False] * 3, [False] * 3, [True] * 3], [0.1] * 6),
            "jitter": 1e-3,
        },
        (torch.rand(5, 2, generator=torch.Generator().manual_seed(0)),),
        bad_options={
            "grids": [[0.0, 0.2, 0.1], [0.0, 1.0]],
            "boundary": ([True, False], [0.0]),
            "boundary_weight": -1.0,
        },
    ),
    compare="dense Gaussian processes can't hold grids of a size where speed counts",
)
class GPHM(KroneckerGP):
    """Solver of differential equations whose solutions have high or several frequencies.

    Args:
        grids: The increasing coordinates of each dimension; tensors, or lists of numbers, which a
            saved model needs.
        operator: From the `Fields` of a function to the residual of the equation on the grid,
            `(*batch_shape, N_1, ..., N_D)`, source included, in differentiable operations.
        boundary: A mask of the grid's shape and the values where it is True, `(N_b,)` or
            `(*batch_shape, N_b)`; None: no conditions.
        kernel_factory: Makes the kernel of one dimension from `device` and `dtype`, as
            `lambda **options: StudentTMixtureKernel(30, freq_scale=40.0, **options)`; its
            frequencies should reach the highest of the solution.
        boundary_weight: Weight lam of the boundary's log likelihood.
        jitter: Added to the diagonal of each dimension's kernel matrix; more where
            that is not enough.
        batch_shape: Shape of a batch of solutions, as for several parameters of an equation; they
            share the kernel.
        device: Device of parameters and buffers.
        dtype: Their dtype; None: that of the grids. float64 is advised.

    Shape:
        - points: `(..., D)`
        - output: `(*batch_shape, ...)`

    Returns:
        The solution's mean at the points.

    Raises:
        ValueError: A grid that does not increase, boundary or residual of a wrong shape, an option
            out of its range, or points of another dimension.

    Source:
        S. Fang, M. Cooley, D. Long, S. Li, R. M. Kirby and S. Zhe, "Solving high frequency and
        multi-scale PDEs with Gaussian processes", 2024, sections 4 and 5.

    Example:
        >>> x = torch.linspace(0, 1, 60, dtype=torch.float64)
        >>> ends = (x == 0) | (x == 1)
        >>> exact = (10 * x).sin()
        >>> solver = GPHM([x], lambda f: f.dx(0, 2) + 100 * exact, (ends, exact[ends]))
        >>> losses = solver.fit(100)
        >>> bool((solver(x[:, None]) - exact).abs().max() < 0.02)
        True
    """

    log_precisions: Tensor
    boundary_index: Tensor
    boundary_values: Tensor

    def __init__(
        self,
        grids: Sequence[Tensor | Sequence[float]],
        operator: Callable[[Fields], Tensor] = laplace,
        boundary: tuple[Tensor | Sequence[Any], Tensor | Sequence[Any]] | None = None,
        *,
        kernel_factory: Callable[..., nn.Module] = StudentTMixtureKernel,
        boundary_weight: float = 200.0,
        jitter: float = 1e-6,
        batch_shape: Sequence[int] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if not boundary_weight >= 0:
            raise ValueError(f"boundary_weight: expected at least 0, got {boundary_weight}")
        super().__init__(
            grids,
            kernel_factory=kernel_factory,
            jitter=jitter,
            batch_shape=batch_shape,
            device=device,
            dtype=dtype,
        )
        self.operator = operator
        self.boundary_weight = boundary_weight
        index, known = _conditions(boundary, self.sizes, self.batch_shape)
        like = self.grids[0]
        self.register_buffer("boundary_index", index.to(like.device))
        self.register_buffer("boundary_values", known.to(like))
        self.register_buffer("log_precisions", like.new_zeros(2))

    def loss(self) -> Tensor:
        """The negative log joint density, but for constants, summed over the batch."""
        return self._negative_log_joint(self.values, self.log_precisions)

    def fit(
        self,
        steps: int = 400,
        *,
        method: Literal["profile", "joint"] = "profile",
        optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] | None = None,
    ) -> Tensor:
        """Learn the solution, the kernels and the precisions; stops early where the loss is flat.

        Args:
            steps: Most steps of the optimizer.
            method: `"profile"` solves for the grid values at every step, see `solve`; `"joint"`
                takes gradient steps on them, too, and needs 10^5 of them or more.
            optimizer: Makes an optimizer of the tensors to learn; None: Adam with rate 0.01.

        Returns:
            The loss before each step.

        Raises:
            ValueError: An unknown method, or no step.
            RuntimeError: The loss is not finite.
        """
        if method not in ("profile", "joint"):
            raise ValueError(f"method: expected 'profile' or 'joint', got {method!r}")
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, got {steps}")
        joint = method == "joint"
        values = self.values if joint else self.values.detach()
        precisions = self.log_precisions.clone().requires_grad_()
        learned = [p for p in self.kernels.parameters() if p.requires_grad] + [precisions]
        learned += [values] if joint else []
        update = (optimizer or _adam)(learned)
        ceiling = precisions.new_tensor(_CEILING)
        losses: list[float] = []

        def closure() -> Tensor:
            update.zero_grad()
            loss = self._negative_log_joint(values, precisions)
            loss.backward()
            return loss.detach()

        for step in range(steps):
            if not joint:
                self.solve()
            losses.append(float(update.step(closure)))  # type: ignore[arg-type]
            with torch.no_grad():
                precisions.copy_(torch.minimum(precisions, ceiling))
                self.log_precisions.copy_(precisions)
            if not math.isfinite(losses[-1]):
                raise RuntimeError(f"the loss is {losses[-1]} at step {step}")
            if _is_flat(losses):
                break
        update.zero_grad()
        if not joint:
            self.solve()
        return torch.tensor(losses, dtype=torch.float64)

    @torch.no_grad()
    def solve(self, max_iter: int = 20) -> None:
        """Set the grid values to the minimum of the loss, kernels and precisions being fixed.

        One step of Gauss and Newton where the operator is linear, else up to `max_iter`, with
        step halving. In the whitened values z, `vec U = (kron L_d) z`, the normal equations are
        `(I + J^T J) dz = -(z + J^T s)`, s being the weighted residuals. They are formed for up to
        2,048 unknowns. More are solved by at most 500 conjugate gradients, each product by
        Kronecker algebra, preconditioned by `torchzoo.gp.gp_pde_solver.Preconditioner`: even and
        odd functions of each dimension apart, for the operator's mean coefficients, by blocks of
        up to 5,000 unknowns. On a square of 100 x 100 points those are 4 of 2,500. Where blocks
        are larger, the gradients may not suffice, but the next call goes on from what they found.
        """
        factors = self.factors(check=True)
        white = _whiten(factors, self._flat(self.values))
        root: Callable[[int, int], Tensor] = cache(lambda d, m: self.root(d, m, factors[d]))
        newton: Callable[..., Tensor] = dense_step
        if math.prod(self.sizes) > _DENSE:
            white, root, preconditioner = self._rotated(white, root)
            newton = partial(iterative_step, preconditioner=preconditioner)

        def weighted(z: Tensor) -> Tensor:
            return self._weighted(Fields(z, root, self.grids))

        for _ in range(max_iter):
            s = weighted(white)
            step = newton(weighted, white, s)
            expected = s + jvp(weighted, (white,), (step,))[1]
            found = weighted(white + step)
            if (found - expected).norm() <= 1e-7 * s.norm():  # a linear operator
                white = white + step
                break
            white, step = backtrack(weighted, white, step)
            if step.norm() <= 1e-8 * white.norm():
                break
        fields = Fields(white, root, self.grids)
        self.values.copy_(fields.u)

    def _negative_log_joint(self, values: Tensor, precisions: Tensor) -> Tensor:
        factors = self.factors(check=True)
        white = _whiten(factors, self._flat(values))
        solved = kron_solve([factor.mT for factor in factors], white, upper=True)  # K^-1 vec(U)
        fields = Fields(solved, cache(self.gram), self.grids)
        residual, miss = self._residuals(fields)
        batch = math.prod(self.batch_shape)
        log_tau, log_v = precisions
        prior = -batch * kron_logdet(factors, lower=True) - white.square().sum() / 2
        known = _log_normal(miss, log_tau)
        equation = _log_normal(residual, log_v)
        return -(prior + self.boundary_weight * known + equation)

    def _residuals(self, fields: Fields) -> tuple[Tensor, Tensor]:
        """Of the equation `(*b, N)` and of the boundary `(*b, N_b)`."""
        shape = (*self.batch_shape, *self.sizes)
        residual = self.operator(fields)
        if residual.shape != shape:
            raise ValueError(
                f"operator: expected a residual of shape {shape}, got {tuple(residual.shape)}"
            )
        known = self._flat(fields.u)[..., self.boundary_index] - self.boundary_values
        return self._flat(residual), known

    def _weighted(self, fields: Fields) -> Tensor:
        """Residuals whose half sum of squares is what the loss has of them."""
        residual, miss = self._residuals(fields)
        tau, v = self.log_precisions.exp()
        return torch.cat([v.sqrt() * residual, (self.boundary_weight * tau).sqrt() * miss], -1)

    def _rotated(
        self, white: Tensor, root: Callable[[int, int], Tensor]
    ) -> tuple[Tensor, Callable[[int, int], Tensor], Preconditioner]:
        """The same in a basis of even and odd functions, and a preconditioner there."""
        slopes = Fields(white, root, self.grids)._slopes(self.operator)
        tau, v = self.log_precisions.exp()
        means = {(m, n): (slopes[m] * slopes[n]).mean() for m, n in product(slopes, repeat=2)}
        weights = {(m, n): v * w for (m, n), w in means.items() if w != 0 or not any(m + n)}
        known = white.new_zeros(math.prod(self.sizes))
        known[self.boundary_index] = self.boundary_weight * tau
        basis, normal = mean_normal(root, self.grids, weights, known.reshape(self.sizes))
        white = kron_matvec([vectors.mT for vectors in basis], white)
        return white, normal.roots, Preconditioner(normal)


def _conditions(
    boundary: tuple[Tensor | Sequence[Any], Tensor | Sequence[Any]] | None,
    sizes: tuple[int, ...],
    batch_shape: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """Places `(N_b,)` in the flattened grid, and values there, checked."""
    if boundary is None:
        return torch.zeros(0, dtype=torch.long, device="cpu"), torch.zeros(0, device="cpu")
    mask, values = (
        part.detach() if isinstance(part, Tensor) else torch.tensor(part, device="cpu")
        for part in boundary
    )
    if mask.shape != sizes or mask.dtype != torch.bool:
        raise ValueError(
            f"boundary: expected a mask of booleans of shape {sizes}, "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    index = mask.flatten().nonzero()[:, 0]
    if values.shape not in ((len(index),), (*batch_shape, len(index))):
        raise ValueError(
            f"boundary: expected values of shape {(*batch_shape, len(index))}, one for each True "
            f"of the mask, got {tuple(values.shape)}"
        )
    return index, values.clone()


def _log_normal(residual: Tensor, log_precision: Tensor) -> Tensor:
    """Log likelihood of zeros, constant dropped."""
    count = residual.numel()
    return (count * log_precision - log_precision.exp() * residual.square().sum()) / 2


def _adam(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.01)


def _is_flat(losses: list[float]) -> bool:
    """Whether the loss stands still over the last steps."""
    if len(losses) <= _FLAT_STEPS:
        return False
    return abs(losses[-1] - losses[-1 - _FLAT_STEPS]) <= 1e-6 * abs(losses[-1])
