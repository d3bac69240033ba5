"""Gauss-Newton steps of the grid values of a differential equation, and what makes them quick.

With whitened values z, `vec U = (kron_d L_d) z`, and weighted residuals s(z) of Jacobian J, a step
solves `H dz = -(z + J^T s)`, `H = I + J^T J`. Some thousands of unknowns are solved for from H
itself. More are solved for by conjugate gradients whose products are Kronecker algebra. H has a
condition number of 1e12 and above, the square of the differential operator's, so that all depends
on what they are preconditioned with: here an H that is exact for constant coefficients,

    H = I + sum_mn w_mn kron_d R_dm^T R_dn + B^T W B,    w_mn = v mean(c_m c_n),

c_m being the derivative of the residual in the field `d^m u`, a function on the grid, R_dm what
takes whitened values to the m-th derivative along dimension d, and B the rows of the boundary.

A reflection of a dimension leaves this H as it is if the dimension's points and the boundary are
symmetric and m_d - n_d is even wherever w_mn is not 0, as kernels are even functions. Even and odd
functions are then solved for apart: 2^D blocks of `N / 2^D` unknowns, `4^D` times quicker to
factorise than H, in `2^D` times less memory. Each basis is made of the singular
vectors of `T L_d`, T taking values to their even or odd part: kernel matrices are diagonal there,
derivatives nearly so. Scaled to a diagonal of 1, blocks have condition numbers of about 1e7 only.

J. P. Boyd, "Chebyshev and Fourier spectral methods", 2001, chapter 8, has even and odd functions
solved for apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from torchzoo.common.linalg import kron_matvec
from torchzoo.common.solvers import conjugate_gradient

BLOCK = 5000  # unknowns up to which a block is factorised

Orders = tuple[int, ...]
Weights = Mapping[tuple[Orders, Orders], Tensor]
Roots = Callable[[int, int], Tensor]
Residuals = Callable[[Tensor], Tensor]


def dense_step(weighted: Residuals, white: Tensor, s: Tensor) -> Tensor:
    """A Gauss-Newton step from the normal equations, refined once."""
    eye = torch.eye(white.shape[-1], dtype=white.dtype, device=white.device)
    columns = vmap(lambda t: jvp(weighted, (white,), (t.expand_as(white),))[1])(eye)
    jacobian = columns.movedim(0, -1)
    normal = torch.linalg.cholesky(jacobian.mT @ jacobian + eye)
    step = torch.zeros_like(white)
    for _ in range(2):
        rest = white + step + (jacobian.mT @ (s + _matvec(jacobian, step))[..., None])[..., 0]
        step = step - torch.cholesky_solve(rest[..., None], normal)[..., 0]
    return step


def iterative_step(
    weighted: Residuals,
    white: Tensor,
    s: Tensor,
    preconditioner: Preconditioner,
    *,
    tol: float = 1e-8,
    max_iter: int = 500,
) -> Tensor:
    """A Gauss-Newton step by conjugate gradients, for `C^-1 H C^-T` with H about C C^T.

    The norm of its residual is that of the error in the metric of H: what the objective feels.
    """
    transposed = vjp(weighted, white)[1]

    def product(t: Tensor) -> Tensor:
        t = preconditioner.solve(t, transposed=True)
        return preconditioner.solve(t + transposed(jvp(weighted, (white,), (t,))[1])[0])

    downhill = preconditioner.solve(-(white + transposed(s)[0]))
    found = conjugate_gradient(product, downhill, tol=tol, max_iter=max_iter)
    return preconditioner.solve(found.value, transposed=True)


def backtrack(weighted: Residuals, white: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Halve a step until the objective falls; the new point, and the step taken."""

    def objective(z: Tensor) -> Tensor:
        return z.square().sum() + weighted(z).square().sum()

    start = objective(white)
    for _ in range(30):
        if objective(white + step) <= start:
            return white + step, step
        step = step / 2
    return white, torch.zeros_like(step)


def mirrored_dims(grids: Sequence[Tensor], weights: Weights, boundary: Tensor) -> list[bool]:
    """Whether a reflection of each dimension leaves the normal matrix as it is.

    Where blocks would be too large, also those whose reflection only leaves points and boundary.
    """
    symmetric, exact = [], []
    for d, grid in enumerate(grids):
        middle = grid + grid.flip(0)
        rounding = 8 * torch.finfo(grid.dtype).eps * grid.abs().max()
        even = bool((middle - middle.mean()).abs().max() <= rounding)
        symmetric.append(even and torch.equal(boundary, boundary.flip(d)))
        odd = (abs(w) for (m, n), w in weights.items() if (m[d] - n[d]) % 2)
        exact.append(symmetric[d] and not any(odd))
    block = math.prod(-(-len(g) // (1 + even)) for g, even in zip(grids, exact, strict=True))
    return exact if block <= BLOCK else symmetric


def rotation(factor: Tensor, mirrored: bool) -> list[Tensor]:
    """Orthonormal `(N, k)` for whitened values: those of even and of odd functions, or of all.

    Args:
        factor: The Cholesky factor L `(N, N)` of a matrix that the reflection of its points leaves
            as it is, if `mirrored`.
        mirrored: Whether to part even from odd.
    """
    eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    parts = [eye]
    if mirrored:
        half = len(eye) // 2
        parts = [(eye + eye.flip(0))[: len(eye) - half], (eye - eye.flip(0))[:half]]
        parts = [part / part.norm(dim=1, keepdim=True) for part in parts]
    return [torch.linalg.svd(part @ factor, full_matrices=False).Vh.mT for part in parts]


@dataclass
class Normal:
    """`I + J^T J` of a differential operator with coefficients averaged over the grid.

    Attributes:
        roots: The matrices R_dm `(N_d, N_d)` in the rotated basis, by dimension and order.
        parts: How many columns the even and the odd part of each dimension have, one after the
            other; one number where they are not parted.
        weights: w_mn by the orders m and n of two fields.
        boundary: Weight of each grid point's value, `(N_1, ..., N_D)`.
    """

    roots: Roots
    parts: Sequence[Sequence[int]]
    weights: Weights
    boundary: Tensor

    def places(self) -> list[tuple[slice, ...]]:
        """Where the blocks are: one of even or odd functions for each dimension."""
        slices = []
        for sizes in self.parts:
            ends = torch.tensor(sizes).cumsum(0).tolist()
            slices.append([slice(b - k, b) for b, k in zip(ends, sizes, strict=True)])
        return list(product(*slices))

    def block(self, places: Sequence[slice]) -> Tensor:
        """The rows and columns with these places in each dimension, `(n, n)`."""
        columns = [
            {m: self.roots(d, m)[:, at] for m in {0, *(pair[0][d] for pair in self.weights)}}
            for d, at in enumerate(places)
        ]
        grams = [
            torch.stack([own[m[d]].mT @ own[n[d]] for m, n in self.weights])
            for d, own in enumerate(columns)
        ]
        weights = torch.stack(list(self.weights.values()))
        total = _kron_sum([weights[:, None, None] * grams[0], *grams[1:]])
        boundary = self._folded()
        seen = boundary.nonzero(as_tuple=True)
        rows = boundary[seen].sqrt()[:, None]
        for own, index in zip(columns, seen, strict=True):
            rows = (rows[:, :, None] * own[0][index][:, None]).flatten(1)
        total.addmm_(rows.mT, rows)
        total.diagonal().add_(1)
        return total

    def diagonal(self) -> Tensor:
        """The diagonal `(N_1, ..., N_D)`."""
        dims = range(self.boundary.ndim)
        squares = [self.roots(d, 0).square().mT for d in dims]
        total = 1 + kron_matvec(squares, self.boundary.flatten())
        for (m, n), weight in self.weights.items():
            own = [(self.roots(d, m[d]) * self.roots(d, n[d])).sum(0) for d in dims]
            total = total + weight * reduce(torch.kron, own)
        return total.reshape(self.boundary.shape)

    def _folded(self) -> Tensor:
        """Weights of the boundary with mirror images added up, as their rows differ by a sign."""
        folded = self.boundary
        for d, sizes in enumerate(self.parts):
            if len(sizes) == 2:
                near, far = folded.split(list(sizes), d)
                twice, middle = near.split([sizes[1], sizes[0] - sizes[1]], d)
                folded = torch.cat([twice + far.flip(d), middle], d)
        return folded


class Preconditioner:
    """`C` with `C C^T` about the normal matrix: by blocks, or by its diagonal if they are large.

    Attributes:
        scale: One over the root of the diagonal, `(N_1, ..., N_D)`.
        blocks: Cholesky factors of the blocks, scaled to a diagonal of 1; none if they are large.
    """

    def __init__(self, normal: Normal):
        self.scale = normal.diagonal().rsqrt()
        self._places = normal.places()
        self.blocks: list[Tensor] = []
        if math.prod(max(sizes) for sizes in normal.parts) <= BLOCK:
            for at in self._places:
                scale = self.scale[at].flatten()
                block = normal.block(at).mul_(scale).mul_(scale[:, None])
                self.blocks.append(torch.linalg.cholesky(block))

    def solve(self, x: Tensor, *, transposed: bool = False) -> Tensor:
        """`C^-1 x`, or `C^-T x`, for x of shape `(..., N)`."""
        scale, dims = self.scale, self.scale.ndim
        x = x.unflatten(-1, scale.shape)
        x = x if transposed else x * scale
        found = torch.empty_like(x) if self.blocks else x
        for at, factor in zip(self._places, self.blocks, strict=bool(self.blocks)):
            here: tuple[Any, ...] = (..., *at)
            own = x[here]
            lower = factor.mT if transposed else factor
            columns = own.reshape(-1, len(factor)).mT
            solved = torch.linalg.solve_triangular(lower, columns, upper=transposed)
            found[here] = solved.mT.reshape(own.shape)
        return (found * scale if transposed else found).flatten(-dims)


def mean_normal(
    root: Roots, grids: Sequence[Tensor], weights: Weights, boundary: Tensor
) -> tuple[list[Tensor], Normal]:
    """The basis of each dimension's whitened values `(N_d, N_d)`, and the normal matrix in it.

    Args:
        root: What takes whitened values to derivatives, by dimension and order.
        grids: The points of each dimension.
        weights: As for `Normal`.
        boundary: As for `Normal`.
    """
    mirrored = mirrored_dims(grids, weights, boundary)
    parts = [rotation(root(d, 0), even) for d, even in enumerate(mirrored)]
    basis = [torch.cat(part, 1) for part in parts]
    sizes = [[vectors.shape[1] for vectors in part] for part in parts]
    rotated = cache(lambda d, m: root(d, m) @ basis[d])
    return basis, Normal(rotated, sizes, weights, boundary)


def _kron_sum(grams: Sequence[Tensor]) -> Tensor:
    """`sum_p kron_d G_dp` from stacks `(P, n_d, n_d)`."""
    first, *others = grams
    while len(others) > 1:
        first = torch.einsum("pij,pkl->pikjl", first, others.pop(0)).flatten(3).flatten(1, 2)
    if not others:
        return first.sum(0)
    n, k = first.shape[-1], others[0].shape[-1]
    total = first.flatten(1).mT @ others[0].flatten(1)
    return total.reshape(n, n, k, k).transpose(1, 2).reshape(n * k, n * k)


def _matvec(matrix: Tensor, x: Tensor) -> Tensor:
    return (matrix @ x[..., None])[..., 0]
