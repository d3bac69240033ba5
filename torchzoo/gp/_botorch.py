"""The family's models in botorch's terms; importing this needs botorch."""

from __future__ import annotations

from typing import Any

import torch
from botorch.models.model import Model
from botorch.posteriors import GPyTorchPosterior
from gpytorch.distributions import MultivariateNormal
from linear_operator.operators import DenseLinearOperator
from torch import Tensor


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
