"""Surrogates that are exact Gaussian processes: plain, on deep features, of infinite width.

Y. L. Li, T. G. J. Rudner and A. G. Wilson, "A study of Bayesian neural network surrogates for
Bayesian optimization", 2024; A. G. Wilson, Z. Hu, R. Salakhutdinov and E. P. Xing, "Deep kernel
learning", 2016.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import gpytorch
import torch
from gpytorch.kernels import Kernel, MaternKernel, RBFKernel, ScaleKernel
from gpytorch.priors import GammaPrior
from torch import Tensor, nn

from torchzoo.common.solvers import minimize_lbfgs
from torchzoo.gp.bnn_surrogates import StandardizedSurrogate
from torchzoo.gp.bnn_surrogates_nets import FlatMLP, descend
from torchzoo.gp.bnn_surrogates_posterior import JointGaussian
from torchzoo.gp.infinite_kernels import InfiniteWidthErfKernel, InfiniteWidthReLUKernel


class _ExactGP(gpytorch.models.ExactGP):
    """A Gaussian process of features of the inputs; each output of a problem is one of a batch."""

    def __init__(
        self,
        x: Tensor,
        z: Tensor,
        kernel: Kernel,
        mean: gpytorch.means.Mean,
        features: Callable[[Tensor], Tensor] = lambda x: x,
        theta: Tensor | None = None,
    ):
        batch = z.shape[:-2] + z.shape[-1:]
        likelihood = gpytorch.likelihoods.GaussianLikelihood(
            noise_prior=GammaPrior(1.1, 0.05),
            noise_constraint=gpytorch.constraints.GreaterThan(1e-4),
            batch_shape=batch,
        )
        rows = x[..., None, :, :].expand(*batch, *x.shape[-2:])
        super().__init__(rows, z.mT.contiguous(), likelihood)
        self.kernel, self.mean, self.features = kernel, mean, features
        if theta is not None:
            self.theta = nn.Parameter(theta)
        self.to(x)
        self.likelihood.noise = 0.1

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        x = self.features(x)
        return gpytorch.distributions.MultivariateNormal(self.mean(x), self.kernel(x))


class _GPSurrogate(StandardizedSurrogate):
    """Fitting by the marginal likelihood, and prediction; a subclass builds the model."""

    model: _ExactGP
    max_iter: int

    @abstractmethod
    def _build(self, x: Tensor, z: Tensor) -> _ExactGP:
        """The model at its start."""

    def _fit(self, x: Tensor, z: Tensor) -> None:
        self.model = self._build(x, z)
        self._train()
        self.model.eval().requires_grad_(False)

    def _train(self) -> None:
        model = self.model.train()
        minimize_lbfgs(self._objective(), model.parameters(), max_iter=self.max_iter)

    def _objective(self) -> Callable[[], Tensor]:
        """Minus the log marginal likelihood with priors, summed over problems and outputs."""
        model = self.model
        likelihood = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
        return lambda: -likelihood(model(*model.train_inputs), model.train_targets).sum()

    def _posterior(self, x: Tensor) -> JointGaussian:
        outputs = self.y.shape[-1]
        rows = x[..., None, :, :].expand(*x.shape[:-2], outputs, *x.shape[-2:])
        plain = gpytorch.settings.fast_computations(False, False, False)
        with plain, gpytorch.settings.debug(False):  # which warns of points in the data
            found = self.model(rows)
            covariance = found.covariance_matrix
        return JointGaussian(found.mean.mT, covariance, self.model.likelihood.noise.mT)

    def _state(self) -> dict[str, Tensor]:
        return {f"model.{name}": value for name, value in self.model.state_dict().items()}

    def _load(self, state: Mapping[str, Tensor]) -> None:
        x, z = self._scaled(self.x), (self.y - self._shift) / self._scale
        self.model = self._build(x, z)
        prefix = "model."
        self.model.load_state_dict(
            {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        )
        self.model.eval().requires_grad_(False)


class GPSurrogate(_GPSurrogate):
    """A Gaussian process with a Matérn-5/2 kernel, a lengthscale each input, at the mode.

    Priors are those of botorch until 2024, Gamma(3, 6) for lengthscales, Gamma(2, 0.15) for the
    scale, Gamma(1.1, 0.05) for the noise: they expect functions of few inputs.

    Args:
        max_iter: Iterations of L-BFGS.
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
        >>> posterior = GPSurrogate().fit(x, (6 * x).sin()).posterior(x + 0.05)
        >>> bool(((posterior.mean - (6 * x + 0.3).sin()).abs() < 0.2).all())
        True
    """

    def __init__(self, *, max_iter: int = 100, **kwargs: Any):
        if max_iter < 1:
            raise ValueError(f"max_iter: expected at least 1, got {max_iter}")
        super().__init__(**kwargs)
        self.max_iter = max_iter

    def _build(self, x: Tensor, z: Tensor) -> _ExactGP:
        batch = z.shape[:-2] + z.shape[-1:]
        matern = MaternKernel(
            nu=2.5,
            ard_num_dims=x.shape[-1],
            batch_shape=batch,
            lengthscale_prior=GammaPrior(3.0, 6.0),
        )
        kernel = ScaleKernel(matern, batch_shape=batch, outputscale_prior=GammaPrior(2.0, 0.15))
        return _ExactGP(x, z, kernel, gpytorch.means.ConstantMean(batch_shape=batch))


class InfiniteWidthSurrogate(_GPSurrogate):
    """A Gaussian process with the kernel of a network of infinite width.

    Only a scale and the noise are fitted.

    Args:
        activation: `"relu"` or `"erf"`.
        var_w: Variance of the weights, times their fan-in.
        var_b: Variance of the biases.
        depth: Hidden layers.
        max_iter: Iterations of L-BFGS.
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
        >>> x = torch.rand(30, 50, dtype=torch.float64)
        >>> surrogate = InfiniteWidthSurrogate().fit(x, x.sum(1, keepdim=True))
        >>> surrogate.posterior(x[:2]).covariance.shape
        torch.Size([1, 2, 2])
    """

    def __init__(
        self,
        *,
        activation: Literal["relu", "erf"] = "relu",
        var_w: float = 10.0,
        var_b: float = 1.6,
        depth: int = 3,
        max_iter: int = 100,
        **kwargs: Any,
    ):
        if max_iter < 1:
            raise ValueError(f"max_iter: expected at least 1, got {max_iter}")
        kinds = {"relu": InfiniteWidthReLUKernel, "erf": InfiniteWidthErfKernel}
        if activation not in kinds:
            raise ValueError(f"activation: expected 'relu' or 'erf', got {activation!r}")
        super().__init__(**kwargs)
        self.max_iter = max_iter
        self.kind = kinds[activation]
        self.options: dict[str, Any] = {"var_w": var_w, "var_b": var_b, "depth": depth}
        self.kind(1, **self.options)  # what is wrong with the options, before any data

    def _build(self, x: Tensor, z: Tensor) -> _ExactGP:
        batch = z.shape[:-2] + z.shape[-1:]
        infinite = self.kind(x.shape[-1], **self.options)
        kernel = ScaleKernel(infinite, batch_shape=batch, outputscale_prior=GammaPrior(2.0, 0.15))
        return _ExactGP(x, z, kernel, gpytorch.means.ZeroMean(batch_shape=batch))


class DKLSurrogate(_GPSurrogate):
    """A Gaussian process with an RBF kernel of the last hidden layer of a network.

    The network is trained with a linear output first, then with the kernel, on the marginal
    likelihood. Outputs share the network.

    Args:
        hidden: Widths of the hidden layers; empty: a Gaussian process of the inputs.
        pretrain_steps: Steps of Adam on squared errors.
        num_steps: Steps of Adam on the marginal likelihood.
        lr: Rate of both.
        **kwargs: `bounds` and `generator`.

    Shape:
        - X: `(*b, n, d)`
        - Y: `(*b, n, m)`

    Raises:
        ValueError: An option out of its range.

    Source:
        A. G. Wilson and others, "Deep kernel learning", 2016, equation 5; Y. L. Li and others, "A
        study of Bayesian neural network surrogates for Bayesian optimization", 2024.

    Example:
        >>> x = torch.linspace(0, 1, 8, dtype=torch.float64)[:, None]
        >>> surrogate = DKLSurrogate(hidden=(16, 4), pretrain_steps=50, num_steps=20)
        >>> surrogate.fit(x, (6 * x).sin()).posterior(x).mean.shape
        torch.Size([8, 1])
    """

    def __init__(
        self,
        *,
        hidden: Sequence[int] = (128, 128, 128),
        pretrain_steps: int = 1000,
        num_steps: int = 5000,
        lr: float = 1e-3,
        **kwargs: Any,
    ):
        if any(width < 1 for width in hidden):
            raise ValueError(f"hidden: expected widths of at least 1, got {hidden}")
        for name, value in {"pretrain_steps": pretrain_steps, "num_steps": num_steps}.items():
            if value < 0:
                raise ValueError(f"{name}: expected at least 0, got {value}")
        super().__init__(**kwargs)
        self.hidden, self.pretrain_steps = tuple(hidden), pretrain_steps
        self.num_steps, self.lr = num_steps, lr

    def _fit(self, x: Tensor, z: Tensor) -> None:
        net = FlatMLP((x.shape[-1], *self.hidden, z.shape[-1]))
        start = net.initial(x.shape[:-2], x, self._draws(x.device))
        self._theta = descend(
            lambda theta: (z - net(theta, x)).square().mean((-2, -1)),
            start,
            steps=self.pretrain_steps,
            lr=self.lr,
        )
        super()._fit(x, z)

    def _build(self, x: Tensor, z: Tensor) -> _ExactGP:
        batch = z.shape[:-2] + z.shape[-1:]
        net = FlatMLP((x.shape[-1], *self.hidden, z.shape[-1]))
        kernel = ScaleKernel(
            RBFKernel(batch_shape=batch, lengthscale_prior=GammaPrior(3.0, 6.0)),
            batch_shape=batch,
            outputscale_prior=GammaPrior(2.0, 0.15),
        )
        mean = gpytorch.means.ConstantMean(batch_shape=batch)

        def features(x: Tensor) -> Tensor:
            return net.activations(model.theta[..., None, :], x)[-1]

        model = _ExactGP(x, z, kernel, mean, features, self._theta)
        return model

    def _train(self) -> None:
        optimizer = torch.optim.Adam(self.model.train().parameters(), lr=self.lr)
        objective = self._objective()
        for _ in range(self.num_steps):
            optimizer.zero_grad()
            objective().backward()
            optimizer.step()

    def _load(self, state: Mapping[str, Tensor]) -> None:
        self._theta = state["model.theta"]
        super()._load(state)
