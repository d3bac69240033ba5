"""Posteriors of one mode of a tensor: vectors u at real numbers or levels, found from messages.

A mode keeps, at the distinct indexes of its entries, the messages exp(-u^T Lambda u / 2 + eta^T u)
and the moments that follow from them and the prior.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from torchzoo.common.filters import Filtered, Smoothed
from torchzoo.gp.state_space import MATERN, Chain, MaternSDE, read_chain, run_chain

_FIRM = 100.0  # precision of the random functions that a fit starts from
_WAVES = 50


class Factor(nn.Module):
    """A mode's posterior. Moments are in float64 where they are computed.

    Args:
        rank: R.
        batch_shape: Shape of a batch of posteriors with the same indexes.
        lengthscale: Length of the prior's kernel.
        variance: Variance of the prior.
    """

    knots: Tensor
    shift: Tensor
    precision: Tensor
    mean: Tensor
    cov: Tensor
    lengthscale: Tensor
    variance: Tensor

    def __init__(
        self,
        rank: int,
        batch_shape: tuple[int, ...],
        lengthscale: float,
        variance: float,
        **options: Any,
    ):
        super().__init__()
        self.rank, self.batch_shape = rank, batch_shape
        self._start = lengthscale, variance
        for name in ("lengthscale", "variance"):
            self.register_buffer(name, torch.empty((), **options))
        for name in ("knots", "shift", "precision", "mean", "cov"):
            self.register_buffer(name, torch.empty(0, **options))

    def reset_parameters(self) -> None:
        """The prior, without indexes."""
        self.lengthscale, self.variance = (self.variance.new_tensor(v) for v in self._start)
        self.knots = self.variance.new_zeros(0)
        self.shift = self.variance.new_zeros(*self.batch_shape, 0, self.rank)
        self.precision = self.variance.new_zeros(*self.batch_shape, 0, self.rank, self.rank)

    def grow(self, knots: Tensor) -> None:
        """Take more indexes; messages stay at theirs, and are 0 at new ones."""
        place = torch.searchsorted(knots, self.knots)
        for name, axis in (("shift", -2), ("precision", -3)):
            message = getattr(self, name)
            shape = list(message.shape)
            shape[axis] = len(knots)
            setattr(self, name, message.new_zeros(shape).index_copy(axis, place, message))
        self.knots = knots

    def place(self, t: Tensor) -> Tensor:
        """Where known indexes are among the knots."""
        return torch.searchsorted(self.knots, t.contiguous())

    def mix(self, shift: Tensor, precision: Tensor, share: float) -> None:
        """Take a share of new messages, and refresh the moments."""
        self.shift = ((1 - share) * self.shift + share * shift).to(self.shift.dtype)
        self.precision = ((1 - share) * self.precision + share * precision).to(self.shift.dtype)
        self.refresh()

    def start(self, generator: torch.Generator | None) -> None:
        """Make messages say that u is near a random function drawn from the prior, roughly."""
        near = self.variance.sqrt() * self.draw(generator).to(self.knots)
        self.shift = _FIRM * near
        eye = torch.eye(self.rank, dtype=near.dtype, device=near.device)
        self.precision = (_FIRM * eye).expand(*near.shape, -1).clone()
        self.refresh()

    def divergence(self) -> Tensor:
        """KL(posterior, prior) = E[log of the messages] - log of their expectation a priori.

        Shape:
            - output: `batch_shape`
        """
        mean, cov = self.at(slice(None))
        second = cov + mean[..., :, None] * mean[..., None, :]
        messages = (self.shift * mean).sum((-1, -2)) - (self.precision * second).sum(
            (-1, -2, -3)
        ) / 2
        return messages - self.log_normalizer()

    @abstractmethod
    def refresh(self) -> None:
        """Moments at the knots, from the messages."""

    @abstractmethod
    def at(self, place: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Mean `(*b, M, R)` and covariance `(*b, M, R, R)` at knots."""

    @abstractmethod
    def read(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The same at any indexes `(M,)`."""

    @abstractmethod
    def log_normalizer(self) -> Tensor:
        """Log prior expectation of the product of all messages."""

    @abstractmethod
    def draw(self, generator: torch.Generator | None) -> Tensor:
        """A random function of unit variance at the knots, `(*b, N_k, R)`."""

    def extra_repr(self) -> str:
        return f"rank={self.rank}, knots={len(self.knots)}"

    def _load_from_state_dict(  # type: ignore[override]
        self, state: Any, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        resize(self, state, prefix)
        super()._load_from_state_dict(state, prefix, *args, **kwargs)


class MaternFactor(Factor):
    """Independent Matérn processes of a real index, filtered and smoothed along it.

    Args:
        kernel: `"matern12"`, `"matern32"` or `"matern52"`.
        rank: See `Factor`, as for the rest.
        batch_shape: Shape of a batch.
        lengthscale: Length of the kernel.
        variance: Variance of the processes.
    """

    past: Tensor
    past_cov: Tensor

    def __init__(
        self,
        kernel: str,
        rank: int,
        batch_shape: tuple[int, ...],
        lengthscale: float,
        variance: float,
        **options: Any,
    ):
        super().__init__(rank, batch_shape, lengthscale, variance, **options)
        self.kernel = kernel
        for name in ("past", "past_cov"):
            self.register_buffer(name, torch.empty(0, **options))

    def reset_parameters(self) -> None:
        """The prior, without indexes."""
        super().reset_parameters()
        size = self.rank * (MATERN[self.kernel] + 1)
        self.mean = self.variance.new_zeros(*self.batch_shape, 0, size)
        self.cov = self.variance.new_zeros(*self.batch_shape, 0, size, size)
        self.past, self.past_cov = self.mean.clone(), self.cov.clone()

    def refresh(self) -> None:
        """Filter and smooth."""
        _, filtered, smoothed = self._run()
        parts = (*filtered[:2], *smoothed)
        self.past, self.past_cov, self.mean, self.cov = (p.to(self.variance.dtype) for p in parts)

    def at(self, place: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Moments at knots: values are every (p + 1)-th component of the states."""
        step = MATERN[self.kernel] + 1
        mean, cov = self.mean[..., place, ::step], self.cov[..., place, ::step, ::step]
        return mean.double(), cov.double()

    def read(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Moments anywhere."""
        past, past_cov = self.past.double(), self.past_cov.double()
        filtered = Filtered(past, past_cov, past.new_zeros(()))
        smoothed = Smoothed(self.mean.double(), self.cov.double())
        return read_chain(self._sde(), Chain(self.knots.double(), filtered, smoothed), t)

    def log_normalizer(self) -> Tensor:
        """From the filter."""
        return self._run().filtered.log_likelihood

    def draw(self, generator: torch.Generator | None) -> Tensor:
        """A sum of random waves."""
        waves = torch.randn(_WAVES, self.rank, generator=generator, dtype=torch.float64)
        shape = (2, *self.batch_shape, _WAVES, self.rank)
        weights = torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(_WAVES)
        angles = (self.knots / self.lengthscale).double().cpu()[:, None, None] * waves
        parts = torch.stack([angles.sin(), angles.cos()])
        return torch.einsum("s...wr,stwr->...tr", weights, parts)

    def _sde(self) -> MaternSDE:
        length, variance = self.lengthscale.double(), self.variance.double()
        return MaternSDE(self.kernel, length, variance, self.rank)

    def _run(self) -> Chain:
        messages = self.shift.double(), self.precision.double()
        return run_chain(self._sde(), self.knots.double(), *messages)


class CategoricalFactor(Factor):
    """Vectors with independent normal priors, one for each level; levels are numbers."""

    def reset_parameters(self) -> None:
        """The prior, without levels."""
        super().reset_parameters()
        self.mean, self.cov = self.shift.clone(), self.precision.clone()

    def refresh(self) -> None:
        """Condition each level on its message."""
        cov = torch.linalg.inv(self.precision.double() + self._eye() / self.variance)
        cov = (cov + cov.mT) / 2
        mean = (cov @ self.shift.double()[..., None])[..., 0]
        self.mean, self.cov = mean.to(self.variance.dtype), cov.to(self.variance.dtype)

    def at(self, place: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Moments of known levels."""
        return self.mean[..., place, :].double(), self.cov[..., place, :, :].double()

    def read(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Moments of any levels; those never seen have the prior."""
        mean, cov = self.at(slice(None))
        prior = self._eye() * self.variance
        mean = torch.cat([mean, mean.new_zeros(*self.batch_shape, 1, self.rank)], -2)
        cov = torch.cat([cov, prior.expand(*self.batch_shape, 1, -1, -1)], -3)
        matches = t[:, None] == self.knots
        found = (matches * torch.arange(1, len(self.knots) + 1, device=t.device)).sum(-1)
        place = torch.where(found > 0, found - 1, len(self.knots))
        return mean[..., place, :], cov[..., place, :, :]

    def log_normalizer(self) -> Tensor:
        """Of Gaussian factors."""
        inner = self._eye() + self.precision.double() * self.variance
        quadratic = (self.shift.double() * self.mean).sum((-1, -2))
        return (quadratic - torch.linalg.slogdet(inner)[1].sum(-1)) / 2

    def draw(self, generator: torch.Generator | None) -> Tensor:
        """Independent numbers."""
        shape = (*self.batch_shape, len(self.knots), self.rank)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def _eye(self) -> Tensor:
        return torch.eye(self.rank, dtype=torch.float64, device=self.variance.device)


def resize(module: nn.Module, state: Any, prefix: str) -> None:
    """Give buffers the sizes that they have in a state to be loaded: those of its data."""
    for name, old in module._buffers.items():
        new = state.get(prefix + name)
        if old is not None and new is not None and new.shape != old.shape:
            module._buffers[name] = old.new_empty(new.shape)
