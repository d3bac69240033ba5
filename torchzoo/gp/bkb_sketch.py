"""The posterior over arms on inducing points that `torchzoo.gp.bkb` changes in every round.

With Nyström features z(x) = K_SS^(+1/2) k_S(x) of inducing points S, n_a pulls of arm a and sums of
their rewards r_a,

    V = sum_a n_a z(a) z(a)^T + lambda I,    mu(x) = z(x)^T V^-1 sum_a r_a z(a),
    sigma^2(x) = (k(x, x) - z(x)^T z(x)) / lambda + z(x)^T V^-1 z(x).

Kernel values of all arms with inducing points that stay are kept from one round to the next.

D. Calandriello, L. Carratino, A. Lazaric, M. Valko and L. Rosasco, "Gaussian process optimization
with adaptive sketching: scalable and no regret", 2019, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchzoo.gp.posterior import GaussianPosterior
from torchzoo.gp.sparse import LeverageScoreSampler, as_covariance, inverse_root

STATE = {
    "arms": "arms",
    "prior": "_prior",
    "counts": "_counts",
    "sums": "_sums",
    "inducing_index": "_inducing",
    "columns": "_columns",
}
"""Names of the tensors that a state has, and where they are."""


class SketchedPosterior:
    """Means and variances of arms, from rewards of some of them.

    Args:
        kernel: A gpytorch kernel; or a function of two sets of points, with or without a `diag`.
        lam: Regulariser lambda.
        sampler: Draws inducing points.

    Attributes:
        arms: All arms, `(A, d)`.
        means: Their means, `(A,)`.
        variances: Their variances over lambda, `(A,)`.
    """

    means: Tensor
    variances: Tensor
    arms: Tensor

    def __init__(self, kernel: Any, lam: float, sampler: LeverageScoreSampler):
        self.kernel, self.lam, self.sampler = as_covariance(kernel), lam, sampler

    @property
    def inducing_index(self) -> Tensor:
        """Which arms are inducing points, `(m,)`."""
        self._check_initialized()
        return self._inducing

    @property
    def effective_dimension(self) -> Tensor:
        """Sum of the variances over pulls, an estimate of `tr K (K + lambda I)^-1`."""
        self._check_initialized()
        return (self._counts * self.variances).sum()

    def posterior(self, x: Tensor | None = None, *, scaled: bool = True) -> GaussianPosterior:
        """Mean and variance of the reward function, differentiable in the points.

        Args:
            x: Where; None: at all arms.
            scaled: Whether the variance is over lambda, as in the formulas.

        Shape:
            - x: `(..., n, d)`
            - mean, variance: `(..., n)`, or `(A,)`

        Raises:
            RuntimeError: Before `initialize`.
            ValueError: Points of another dimension.
        """
        self._check_initialized()
        if x is None:
            found = GaussianPosterior(self.means, self.variances)
        else:
            found = self._at(self._cross(x, "x"), self.kernel.diag(x))
        return found if scaled else GaussianPosterior(found.mean, self.lam * found.variance)

    def covariance(self, x: Tensor) -> Tensor:
        """Posterior covariance of the reward function between points, not over lambda.

        Shape:
            - x: `(..., n, d)`
            - output: `(..., n, n)`
        """
        self._check_initialized()
        z = self._cross(x, "x") @ self._root
        white = self._whiten(z)
        return self.kernel(x, x) - z @ z.mT + self.lam * white.mT @ white

    def draw_inducing(self) -> Tensor:
        """Inducing points of the next round, by the last variances and present counts, `(m,)`."""
        return self.sampler.sample(self.variances, self._counts)

    def _check_initialized(self) -> None:
        if not hasattr(self, "_factor"):
            raise RuntimeError(f"this {type(self).__name__} has no arms yet; call initialize first")

    def _set_arms(self, arms: Tensor) -> None:
        """Begin anew, with arms that have not been pulled."""
        self.arms = arms
        self._prior = self.kernel.diag(self.arms)
        self._counts = torch.zeros_like(self._prior)
        self._sums = torch.zeros_like(self._prior)
        self._inducing = torch.empty(0, dtype=torch.int64, device=self.arms.device)
        self._columns = self.arms.new_empty(len(self.arms), 0)
        self.means, self.variances = torch.zeros_like(self._prior), self._prior / self.lam

    def _add(self, index: Tensor, y: Tensor) -> None:
        """Count pulls of arms, and their rewards."""
        index, y = index.to(self.arms.device), y.to(self._sums)
        self._counts.index_add_(0, index, torch.ones_like(y))
        self._sums.index_add_(0, index, y)

    def _append(self, points: Tensor) -> Tensor:
        """Make points new arms; their indices."""
        mean, variance, _ = self.posterior(points)
        columns, prior = self._cross(points, "candidates"), self.kernel.diag(points)
        zeros = torch.zeros_like(prior)
        for name, rows in {
            "arms": points,
            "means": mean,
            "variances": variance,
            "_columns": columns,
            "_prior": prior,
            "_counts": zeros,
            "_sums": zeros,
        }.items():
            setattr(self, name, torch.cat([getattr(self, name), rows]))
        return torch.arange(len(self.arms) - len(points), len(self.arms))

    def _sketch(self, inducing: Tensor) -> None:
        """Change to other inducing points; kernel columns of those that stay are kept."""
        place = torch.full((len(self.arms),), -1, device=self.arms.device)
        place[self._inducing] = torch.arange(len(self._inducing), device=self.arms.device)
        old = place[inducing]
        columns = self._columns[:, old.clamp_min(0)] if len(self._inducing) else None
        new = inducing[old < 0]
        if columns is None or len(new) == len(inducing):
            columns = self._columns.new_empty(len(self.arms), len(inducing))
        if len(new):
            columns[:, old < 0] = self.kernel(self.arms, self.arms[new])
        self._inducing, self._columns = inducing, columns.contiguous()
        self._fit()

    def _fit(self) -> None:
        """Features and posterior at all arms; repeated pulls of an arm count as its weight."""
        self._root = inverse_root(self._columns[self._inducing])
        pulled = self._counts.nonzero()[:, 0]
        z = self._columns[pulled] @ self._root
        v = (z.mT @ (self._counts[pulled, None] * z)).double()
        v.diagonal().add_(self.lam)
        factor = torch.linalg.cholesky(v)
        right = (z.mT @ self._sums[pulled, None]).double()
        self._weights = torch.cholesky_solve(right, factor)[:, 0].to(z)
        self._factor = factor.to(z)
        self.means, self.variances, _ = self._at(self._columns, self._prior)

    def _cross(self, x: Tensor, name: str) -> Tensor:
        if x.ndim < 2 or x.shape[-1] != self.arms.shape[-1]:
            raise ValueError(
                f"{name}: expected (..., n, {self.arms.shape[-1]}), got {tuple(x.shape)}"
            )
        return self.kernel(x, self.arms[self._inducing])

    def _at(self, cross: Tensor, prior: Tensor) -> GaussianPosterior:
        """Mean and scaled variance from kernel values with the inducing points."""
        z = cross @ self._root
        unexplained = (prior - z.square().sum(-1)).clamp_min(0)
        variance = unexplained / self.lam + self._whiten(z).square().sum(-2)
        return GaussianPosterior(z @ self._weights, torch.minimum(variance, prior / self.lam))

    def _whiten(self, z: Tensor) -> Tensor:
        """`L^-1 z^T`, with `V = L L^T`."""
        return torch.linalg.solve_triangular(self._factor, z.mT, upper=False)
