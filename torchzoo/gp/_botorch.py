"""The family's models in botorch's terms; importing this needs botorch."""

from __future__ import annotations

from typing import Any

import torch
from botorch.models.model import Model
from botorch.posteriors import GPyTorchPosterior
from botorch.posteriors.ensemble import EnsemblePosterior
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from linear_operator.operators import DenseLinearOperator
from torch import Tensor

from torchzoo.gp.bnn_surrogates import StandardizedSurrogate
from torchzoo.gp.bnn_surrogates_posterior import FunctionSamples


class SketchedModel(Model):
    """A bandit's posterior as a botorch model of one output."""

    def __init__(self, bandit: Any):
        super().__init__()
        self.bandit = bandit

    @property
    def num_outputs(self) -> int:
        return 1

    @property
    def batch_shape(self) -> torch.Size:
        return torch.Size()

    def posterior(
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: Any = None,
    ) -> Any:
        """Joint posterior of the points of each batch, `(..., q, d)`."""
        covariance = self.bandit.covariance(X)
        noise = self.bandit.lam if observation_noise is True else observation_noise
        if noise is not False:
            covariance = covariance + torch.diag_embed(
                torch.as_tensor(noise).to(covariance).expand(covariance.shape[:-1])
            )
        normal = MultivariateNormal(self.bandit.posterior(X).mean, DenseLinearOperator(covariance))
        found = GPyTorchPosterior(normal)
        return found if posterior_transform is None else posterior_transform(found)


class SurrogateModel(Model):
    """A surrogate as a botorch model: sampled functions as an ensemble, else a joint Gaussian."""

    def __init__(self, surrogate: StandardizedSurrogate):
        super().__init__()
        self.surrogate = surrogate

    @property
    def num_outputs(self) -> int:
        return int(self.surrogate.y.shape[-1])

    @property
    def batch_shape(self) -> torch.Size:
        return self.surrogate.x.shape[:-2]

    def posterior(
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: Any = None,
    ) -> Any:
        """Joint posterior of the points of each batch, `(..., q, d)`."""
        found = self.surrogate.posterior(X)
        index = list(range(self.num_outputs)) if output_indices is None else output_indices
        if isinstance(found, FunctionSamples):
            if observation_noise is not False:
                raise ValueError(
                    "observation_noise: expected False for sampled functions, got "
                    f"{observation_noise}"
                )
            posterior: Any = EnsemblePosterior(found.values[..., index].movedim(0, -3))
        else:
            mean, covariance = found.mean[..., index], found.covariance[..., index, :, :]
            if observation_noise is not False:
                noise = found.noise if observation_noise is True else observation_noise
                noise = torch.as_tensor(noise).expand(found.mean.shape)[..., index]
                covariance = covariance + torch.diag_embed(noise.mT)
            if len(index) == 1:
                normal = MultivariateNormal(
                    mean[..., 0], DenseLinearOperator(covariance[..., 0, :, :])
                )
            else:
                each = MultivariateNormal(mean.mT, DenseLinearOperator(covariance))
                normal = MultitaskMultivariateNormal.from_batch_mvn(each, task_dim=-1)
            posterior = GPyTorchPosterior(normal)
        return posterior if posterior_transform is None else posterior_transform(posterior)
