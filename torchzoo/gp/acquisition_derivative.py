"""The knowledge gradient of observations that come with gradients.

Let o(x) = (f(x), grad f(x)) at q points be r = q (1 + d) numbers, observed with independent noise,
and L L^T their predictive covariance. Posterior means at the points of a set A become

    mu_(n+1)(x') = mu_n(x') + cov_n(f(x'), o(x)) L^-T Z,    Z ~ N(0, I_r),

and the knowledge gradient is E[max_A mu_(n+1)] - max_A mu_n, the expected maximum of functions that
are affine in Z. Given all but the first entry of Z they are lines, whose expected maximum is exact;
the other entries are Sobol points, with the negative of each, so that by convexity the result is
never below 0.

J. Wu, M. Poloczek, A. G. Wilson and P. I. Frazier, "Bayesian optimization with gradients", 2017,
section 3; P. I. Frazier, "A tutorial on Bayesian optimization", 2018, section 5.6. Deviations: a
finite set A, and an expectation that is in part exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchzoo.common.linalg import psd_cholesky
from torchzoo.gp.acquisition import expected_rise
from torchzoo.gp.acquisition_modules import OneStep, seeded, sobol_normal
from torchzoo.gp.bnn_surrogates_posterior import JointGaussian


def gaussian_with_gradient(model: Any, x: Tensor) -> JointGaussian:
    """The joint posterior of values and gradients of any model of both.

    Args:
        model: A `DerivativeGP`, or a gpytorch `ExactGP` of values and gradients, as with its
            `RBFKernelGrad`.
        x: Points.

    Shape:
        - x: `(n, d)`
        - mean: `(n (1 + d), 1)`; all values, then the gradient of each point

    Raises:
        ValueError: The model has no gradients.

    Example:
        >>> from torchzoo.gp import DerivativeGP
        >>> x = torch.linspace(0, 1, 4, dtype=torch.float64)[:, None]
        >>> gaussian_with_gradient(DerivativeGP().fit(x, x, grad=0 * x + 1), x).mean.shape
        torch.Size([8, 1])
    """
    import gpytorch

    if hasattr(model, "joint"):
        return model.joint(x)
    size = x.shape[-1] + 1
    normal = None
    if isinstance(model, gpytorch.models.ExactGP):
        plain = gpytorch.settings.fast_computations(False, False, False)
        with plain, gpytorch.settings.debug(False):  # which warns of points in the data
            normal = model(x)
            observed = model.likelihood(normal)
    if normal is None or normal.mean.shape != (len(x), size):
        raise ValueError(
            f"model: expected a DerivativeGP, or an ExactGP of values and gradients, got a "
            f"{type(model).__name__}"
        )
    order = torch.arange(len(x) * size, device=x.device).reshape(len(x), size)
    order = torch.cat([order[:, 0], order[:, 1:].flatten()])
    noise = (observed.variance - normal.variance).flatten()[order, None]
    covariance = normal.covariance_matrix[order][:, order]
    return JointGaussian(normal.mean.flatten()[order, None], covariance[None], noise)


class DerivativeKnowledgeGradient(OneStep):
    """How much the highest posterior mean over a finite set rises by values with gradients.

    Args:
        model: A fitted model of what is to be maximised and of its gradient; see
            `gaussian_with_gradient`.
        candidates: The set A of points that may be reported.
        num_samples: Values of what is not integrated exactly, an even number.
        generator: Scrambles the Sobol points, once; None: a new one, seeded by torch's.

    Shape:
        - candidates: `(M, d)`
        - x: `(..., q, d)`, q points that are observed together
        - output: `(...)`

    Raises:
        ValueError: An option out of its range, or shapes that don't fit.

    Source:
        J. Wu and others, "Bayesian optimization with gradients", 2017, equation 3.2.

    Example:
        >>> from torchzoo.gp import DerivativeGP
        >>> x = torch.linspace(0, 1, 4, dtype=torch.float64)[:, None]
        >>> model = DerivativeGP().fit(x, (5 * x).sin(), grad=5 * (5 * x).cos())
        >>> acquisition = DerivativeKnowledgeGradient(model, torch.rand(20, 1).double())
        >>> bool((acquisition(torch.rand(3, 1, 1).double()) >= 0).all())
        True
    """

    def __init__(
        self,
        model: Any,
        candidates: Tensor,
        *,
        num_samples: int = 64,
        generator: torch.Generator | None = None,
    ):
        if num_samples < 2 or num_samples % 2:
            raise ValueError(f"num_samples: expected an even number above 0, got {num_samples}")
        super().__init__("candidates", model, candidates, None, False)
        self.num_samples = num_samples
        self.seed = int(torch.randint(2**62, (), generator=seeded(generator)))

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[-1] != self.points.shape[-1] or not x.shape[-2]:
            expected = f"(..., q, {self.points.shape[-1]})"
            raise ValueError(f"x: expected {expected}, got {tuple(x.shape)}")
        mean, slope = self._slopes(x.reshape(-1, *x.shape[-2:]))
        half = sobol_normal(
            self.num_samples // 2, slope.shape[-1] - 1, torch.Generator().manual_seed(self.seed)
        ).to(mean)
        other = torch.cat([half, -half]) @ slope[..., 1:].flatten(0, 1).mT
        a = mean + other.unflatten(-1, slope.shape[:2])
        # at least 0 but for rounding, as each point has its negative
        ahead = (a.amax(-1) - mean.amax()).mean(0).clamp_min(0)
        return (ahead + expected_rise(a, slope[..., 0]).mean(0)).reshape(x.shape[:-2])

    def _slopes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Means over A, `(M,)`, and how they rise by Z, `(B, M, r)`, for x `(B, q, d)`."""
        m, (batch, q, d) = len(self.points), x.shape
        found = gaussian_with_gradient(self.model, torch.cat([self.points.to(x), x.flatten(0, 1)]))
        mean, covariance = found.mean[:, 0], found.covariance[0]
        at = torch.arange(batch * q, device=x.device).reshape(batch, q) + m
        entry = torch.arange(d, device=x.device)
        gradients = (m + batch * q) + at[..., None] * d + entry
        at = torch.cat([at, gradients.flatten(1)], 1)
        noise = found.noise.expand(found.mean.shape)[at, 0]
        factor, _ = psd_cholesky(covariance[at[:, :, None], at[:, None, :]] + noise.diag_embed())
        cross = covariance[at, :m]
        slope = torch.linalg.solve_triangular(factor, cross, upper=False)
        return mean[:m], slope.mT
