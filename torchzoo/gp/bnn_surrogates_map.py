"""Surrogates around modes: ensembles, and Laplace's approximation.

Laplace's posterior over functions is that of the network linearised at the mode,

    f(x) = f(x; theta*) + J(x) (theta - theta*),    theta ~ N(theta*, Lambda^-1),
    Lambda = H / s^2 + I / prior_var,               H = sum_i J(x_i)^T J(x_i),

for all weights, for those of the last layer, or with the blocks of H of each layer replaced by
Kronecker products (sum_i a_i a_i^T) (x) (sum_i g_i^T g_i) / n. All three are known by the
eigenvalues h of H, and so is the evidence

    log p(y) ~ log p(y | theta*) - theta*^T theta* / (2 prior_var)
               - sum_r log(1 + h_r prior_var / s^2) / 2,

by which the two variances are tuned.

B. Lakshminarayanan, A. Pritzel and C. Blundell, "Simple and scalable predictive uncertainty
estimation using deep ensembles", 2017; E. Daxberger and others, "Laplace redux - effortless
Bayesian deep learning", 2021.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from torchzoo.common.solvers import minimize_lbfgs
from torchzoo.gp.bnn_surrogates import StandardizedSurrogate
from torchzoo.gp.bnn_surrogates_nets import FlatMLP, NetworkSurrogate, descend, potential
from torchzoo.gp.bnn_surrogates_posterior import JointGaussian

Structure = Literal["full", "last_layer", "kron"]


class EnsembleSurrogate(NetworkSurrogate):
    """Networks trained from different starts, each on its own random part of the data.

    Args:
        hidden: Widths of the hidden layers.
        prior_var: Variance of the prior of every weight.
        noise_var: Variance of the noise of standardised outputs.
        num_nets: Networks.
        fraction: Share of the rows that a network sees, rounded up.
        num_steps: Steps of Adam.
        lr: Their rate.
        **kwargs: `bounds` and `generator`.

    Shape:
        - X: `(*b, n, d)`
        - Y: `(*b, n, m)`

    Raises:
        ValueError: An option out of its range.

    Source:
        Y. L. Li and others, "A study of Bayesian neural network surrogates for Bayesian
        optimization", 2024.

    Example:
        >>> x = torch.linspace(0, 1, 8, dtype=torch.float64)[:, None]
        >>> surrogate = EnsembleSurrogate(hidden=(16,), num_nets=4, num_steps=100)
        >>> surrogate.fit(x, (6 * x).sin()).posterior(x).values.shape
        torch.Size([4, 8, 1])
    """

    def __init__(
        self,
        *,
        hidden: Sequence[int] = (128, 128, 128),
        prior_var: float = 10.0,
        noise_var: float = 1.0,
        num_nets: int = 10,
        fraction: float = 0.8,
        num_steps: int = 1000,
        lr: float = 1e-3,
        **kwargs: Any,
    ):
        if num_nets < 1:
            raise ValueError(f"num_nets: expected at least 1, got {num_nets}")
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction: expected within (0, 1], got {fraction}")
        super().__init__(hidden=hidden, prior_var=prior_var, noise_var=noise_var, **kwargs)
        self.num_nets, self.fraction, self.num_steps, self.lr = num_nets, fraction, num_steps, lr

    def _sample(self, x: Tensor, z: Tensor) -> Tensor:
        generator = self._draws(x.device)
        shape = (self.num_nets, *x.shape[:-2])
        start = self.net.initial(shape, x, generator)
        coins = x.new_empty(*shape, x.shape[-2]).uniform_(generator=generator)
        count = math.ceil(self.fraction * x.shape[-2])
        seen = (coins.argsort(-1).argsort(-1) < count).to(x.dtype)

        def loss(theta: Tensor) -> Tensor:
            return potential(
                self.net, theta, x, z,
                prior_var=self.prior_var, noise_var=self.noise_var, weight=seen,
            )  # fmt: skip

        return descend(loss, start, steps=self.num_steps, lr=self.lr)


class LaplaceSurrogate(StandardizedSurrogate):
    """The network linearised at the mode of its weights, with Laplace's posterior of these.

    Args:
        hidden: Widths of the hidden layers.
        structure: `"full"`, `"last_layer"` or `"kron"`.
        prior_var: Variance of the prior of every weight.
        noise_var: Variance of the noise of standardised outputs.
        tune: Whether both variances are tuned by the evidence, once the mode is found.
        max_iter: Iterations of L-BFGS towards the mode.
        **kwargs: `bounds` and `generator`.

    Shape:
        - X: `(*b, n, d)`
        - Y: `(*b, n, m)`

    Raises:
        ValueError: An option out of its range.

    Source:
        E. Daxberger and others, "Laplace redux - effortless Bayesian deep learning", 2021,
        sections 2 and 3.

    Example:
        >>> x = torch.linspace(0, 1, 8, dtype=torch.float64)[:, None]
        >>> surrogate = LaplaceSurrogate(hidden=(16,), structure="last_layer")
        >>> posterior = surrogate.fit(x, (6 * x).sin()).posterior(torch.tensor([[0.5], [3.0]]))
        >>> bool(posterior.variance[1] > posterior.variance[0])
        True
    """

    theta: Tensor
    prior_var: Tensor
    noise_var: Tensor

    def __init__(
        self,
        *,
        hidden: Sequence[int] = (128, 128, 128),
        structure: Structure = "full",
        prior_var: float = 10.0,
        noise_var: float = 0.1,
        tune: bool = True,
        max_iter: int = 500,
        **kwargs: Any,
    ):
        if any(width < 1 for width in hidden):
            raise ValueError(f"hidden: expected widths of at least 1, got {hidden}")
        if structure not in ("full", "last_layer", "kron"):
            raise ValueError(
                f"structure: expected 'full', 'last_layer' or 'kron', got {structure!r}"
            )
        for name, value in {"prior_var": prior_var, "noise_var": noise_var}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a number above 0, got {value}")
        super().__init__(**kwargs)
        self.hidden, self.structure, self.tune = tuple(hidden), structure, tune
        self.start_var, self.max_iter = (prior_var, noise_var), max_iter

    def _fit(self, x: Tensor, z: Tensor) -> None:
        self.net = self._network()
        prior, noise = self.start_var
        start = self.net.initial(x.shape[:-2], x, self._draws(x.device)).requires_grad_()
        minimize_lbfgs(
            lambda: potential(self.net, start, x, z, prior_var=prior, noise_var=noise).sum(),
            [start],
            max_iter=self.max_iter,
        )
        self.theta = start.detach()
        self.prior_var, self.noise_var = (x.new_full(x.shape[:-2], v) for v in self.start_var)
        self._decompose(x)
        if self.tune:
            logs = torch.stack([self.prior_var, self.noise_var]).log()
            found = descend(
                lambda v: -self.evidence(*v.exp(), misfit=self._misfit(x, z)),
                logs,
                steps=100,
                lr=0.1,
            )
            self.prior_var, self.noise_var = found.exp().unbind()

    def evidence(
        self,
        prior_var: Tensor | None = None,
        noise_var: Tensor | None = None,
        *,
        misfit: Tensor | None = None,
    ) -> Tensor:
        """Laplace's log evidence of the standardised outputs, for each problem.

        Args:
            prior_var: None: the fitted one.
            noise_var: None: the fitted one.
            misfit: Sum of squared residuals; None: it is computed.
        """
        prior = self.prior_var if prior_var is None else prior_var
        noise = self.noise_var if noise_var is None else noise_var
        if misfit is None:
            misfit = self._misfit(self._scaled(self.x), (self.y - self._shift) / self._scale)
        count = self.y.shape[-2] * self.y.shape[-1]
        fit = -misfit / (2 * noise) - count / 2 * (2 * math.pi * noise).log()
        weights = self.theta
        if self.structure == "last_layer":
            weights = weights[..., -self.net.sizes[-1] * (self.net.sizes[-2] + 1) :]
        spread = (1 + self.eigenvalues * (prior / noise)[..., None]).log().sum(-1)
        return fit - weights.square().sum(-1) / (2 * prior) - spread / 2

    def _posterior(self, x: Tensor) -> JointGaussian:
        mean = self.net(self.theta, x)
        jacobian, rotated = self._jacobians(x)
        prior, noise = self.prior_var[..., None], self.noise_var[..., None]
        # what data tell, off the prior: prior - 1 / (h / s^2 + 1 / prior)
        gain = prior.square() * self.eigenvalues / (noise + prior * self.eigenvalues)
        jacobian, rotated = jacobian.movedim(-2, -3), rotated.movedim(-2, -3)
        covariance = prior[..., None, None] * (jacobian @ jacobian.mT)
        covariance = covariance - (rotated * gain[..., None, None, :]) @ rotated.mT
        return JointGaussian(mean, covariance, noise[..., None])

    def _decompose(self, x: Tensor) -> None:
        """Eigenvalues of H, and what rotates Jacobians into its eigenvectors."""
        factors = self._factors(x)
        self.bases: list[tuple[Tensor, Tensor]] = []
        if self.structure != "kron":
            rows = _products(factors).flatten(-3, -2)
            _, singular, basis = torch.linalg.svd(rows, full_matrices=False)
            self.eigenvalues, self.basis = singular.square(), basis.mT
            return
        values = []
        for a, g in factors:
            g = g.flatten(-3, -2)
            left, right = torch.linalg.eigh(g.mT @ g), torch.linalg.eigh(a.mT @ a)
            self.bases.append((right.eigenvectors, left.eigenvectors))
            product = left.eigenvalues[..., :, None] * right.eigenvalues[..., None, :]
            values.append(product.flatten(-2) / x.shape[-2])
        self.eigenvalues = torch.cat(values, -1).clamp_min(0)

    def _jacobians(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """By the weights in question, and that in the basis of eigenvectors, `(..., q, m, R)`."""
        factors = self._factors(x)
        jacobian = _products(factors)
        if self.structure != "kron":
            return jacobian, jacobian @ self.basis[..., None, :, :]
        rotated = [
            (a @ right, g @ left[..., None, :, :])
            for (a, g), (right, left) in zip(factors, self.bases, strict=True)
        ]
        return jacobian, _products(rotated)

    def _factors(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        factors = self.net.factors(self.theta, x)
        return factors[-1:] if self.structure == "last_layer" else factors

    def _misfit(self, x: Tensor, z: Tensor) -> Tensor:
        return (z - self.net(self.theta, x)).square().sum((-2, -1))

    def _network(self) -> FlatMLP:
        return FlatMLP((self.x.shape[-1], *self.hidden, self.y.shape[-1]))

    def _state(self) -> dict[str, Tensor]:
        return {"theta": self.theta, "prior_var": self.prior_var, "noise_var": self.noise_var}

    def _load(self, state: Mapping[str, Tensor]) -> None:
        self.net, self.theta = self._network(), state["theta"]
        self.prior_var, self.noise_var = state["prior_var"], state["noise_var"]
        self._decompose(self._scaled(self.x))


def _products(factors: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Jacobians `(..., n, m, P)` from inputs and slopes of all layers."""
    parts = [(g[..., None] * a[..., None, None, :]).flatten(-2) for a, g in factors]
    return torch.cat(parts, -1)
