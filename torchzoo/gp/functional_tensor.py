"""Bayesian decompositions of tensors with real indexes: data, messages, noise and the loop.

`torchzoo.gp.factors` has the posteriors of the modes, `torchzoo.gp.funbat` the model and its
source.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from torchzoo.gp.factors import CategoricalFactor, Factor, MaternFactor, resize
from torchzoo.gp.posterior import GaussianPosterior
from torchzoo.gp.state_space import check_kernel
from torchzoo.hub import ZooModel
from torchzoo.ops.calling import no_autocast

_MODES = ("continuous", "categorical")
_KEPT = 10  # epochs that keep the noise
_NOISE = 0.1  # of the power of the entries, at the start

Moments = tuple[list[Tensor], list[Tensor]]


class FunctionalTensor(ZooModel):
    """Base of decompositions; a subclass gives the expectations of b, and learns its core.

    `torchzoo.gp.FunBaT` documents the arguments.
    """

    _CORE: tuple[str, ...] = ()

    index: Tensor
    y: Tensor
    seen: Tensor
    noise_shape: Tensor
    noise_rate: Tensor

    def __init__(
        self,
        num_modes: int,
        ranks: int | Sequence[int],
        *,
        kernel: str = "matern32",
        lengthscale: float | Sequence[float] | None = None,
        variance: float | Sequence[float] = 1.0,
        noise_prior: tuple[float, float] = (1e-3, 1e-3),
        noise_variance: float | None = None,
        damping: float = 0.5,
        mode_types: Sequence[Literal["continuous", "categorical"]] | None = None,
        batch_shape: Sequence[int] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if num_modes < 1:
            raise ValueError(f"num_modes: expected at least 1, got {num_modes}")
        ranks = (ranks,) * num_modes if isinstance(ranks, int) else tuple(ranks)
        if len(ranks) != num_modes or min(ranks) < 1:
            raise ValueError(f"ranks: expected {num_modes} of at least 1, got {ranks}")
        check_kernel(kernel)
        types = tuple(mode_types or ["continuous"] * num_modes)
        if len(types) != num_modes or not set(types) <= set(_MODES):
            raise ValueError(f"mode_types: expected {num_modes} of {_MODES}, got {types}")
        if not min(noise_prior) > 0:
            raise ValueError(f"noise_prior: expected two numbers above 0, got {noise_prior}")
        if noise_variance is not None and not noise_variance > 0:
            raise ValueError(f"noise_variance: expected above 0 or None, got {noise_variance}")
        if not 0 < damping <= 1:
            raise ValueError(f"damping: expected within (0, 1], got {damping}")
        lengths = _each("lengthscale", 1.0 if lengthscale is None else lengthscale, num_modes)
        variances = _each("variance", variance, num_modes)
        super().__init__()
        self.ranks, self.kernel = ranks, kernel
        self.noise_prior, self.noise_variance = tuple(noise_prior), noise_variance
        self.damping, self.batch_shape = damping, tuple(batch_shape)
        self._given = lengthscale is not None
        options: dict[str, Any] = {
            "device": device or torch.get_default_device(),
            "dtype": dtype or torch.get_default_dtype(),
        }
        for name in ("index", "y", "noise_shape", "noise_rate", *self._CORE):
            self.register_buffer(name, torch.empty(0, **options))
        self.register_buffer("seen", torch.empty(0, device=options["device"], dtype=torch.bool))
        made: list[Factor] = []
        for rank, kind, length, scale in zip(ranks, types, lengths, variances, strict=True):
            given = (rank, self.batch_shape, length, scale)
            if kind == "continuous":
                made.append(MaternFactor(kernel, *given, **options))
            else:
                made.append(CategoricalFactor(*given, **options))
        self.factors = nn.ModuleList(made)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The prior, without data."""
        like, batch = self.noise_rate, self.batch_shape
        self.index = like.new_zeros(0, len(self.ranks))
        self.y, self.seen = like.new_zeros(*batch, 0), self.seen.new_zeros(*batch, 0)
        self.noise_shape, self.noise_rate = like.new_full(batch, 2.0), like.new_ones(batch)
        for factor in self._modes():
            factor.reset_parameters()

    def forward(self, index: Tensor) -> GaussianPosterior:
        if index.ndim == 0 or index.shape[-1] != len(self.ranks):
            raise ValueError(f"index: expected (..., {len(self.ranks)}), got {tuple(index.shape)}")
        shape = (*self.batch_shape, *index.shape[:-1])
        with no_autocast(index):
            flat = index.reshape(-1, len(self.ranks)).double()
            factors = [factor.read(t) for factor, t in zip(self._modes(), flat.mT, strict=True)]
            first, second = self._expect(_moments(factors))
            variance = second - first**2 + self._noise()[..., None]
        like = self.noise_rate.dtype
        return GaussianPosterior(first.to(like).reshape(shape), variance.to(like).reshape(shape))

    def factor(self, mode: int, t: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior of a mode's factor functions.

        Args:
            mode: The mode, from 0.
            t: Indexes.

        Shape:
            - t: `(M,)`
            - output: means and variances, `(*batch_shape, M, R_k)`

        Raises:
            ValueError: No such mode, or t of another shape.
        """
        if not 0 <= mode < len(self.ranks):
            raise ValueError(f"mode: expected 0 to {len(self.ranks) - 1}, got {mode}")
        if t.ndim != 1:
            raise ValueError(f"t: expected (M,), got {tuple(t.shape)}")
        mean, cov = self._modes()[mode].read(t.double())
        variance = cov.diagonal(dim1=-2, dim2=-1)
        return mean.to(self.noise_rate.dtype), variance.to(self.noise_rate.dtype)

    def fit(
        self,
        index: Tensor,
        y: Tensor,
        *,
        mask: Tensor | None = None,
        num_epochs: int = 50,
        batch_size: int | None = None,
        callback: Callable[[int, Self], None] | None = None,
        generator: torch.Generator | None = None,
    ) -> Self:
        """Find the posterior from a random start.

        Args:
            index: Indexes of the entries.
            y: The entries.
            mask: Which entries count; None: all.
            num_epochs: Passes over all modes.
            batch_size: Entries whose messages are computed at a time, to save memory; None: all.
            callback: Called after each epoch with its number and this model.
            generator: For the start.

        Shape:
            - index: `(N, K)`
            - y: `(N,)` or `(*batch_shape, N)`
            - mask: like y

        Raises:
            ValueError: Wrong shapes, or entries or indexes that are not finite.
        """
        index, y, seen = self._data(index, y, mask)
        self.reset_parameters()
        if not self._given:
            extent = index.amax(0) - index.amin(0)
            lengths = torch.where(extent > 0, extent / 5, 1.0)
            for factor, length in zip(self._modes(), lengths, strict=True):
                factor.lengthscale = length
        self._add(index, y, seen)
        self._start(generator)
        return self._run(num_epochs, batch_size, callback, keep=min(_KEPT, num_epochs // 5))

    def update(
        self,
        index: Tensor,
        y: Tensor,
        *,
        mask: Tensor | None = None,
        num_epochs: int = 10,
        batch_size: int | None = None,
        callback: Callable[[int, Self], None] | None = None,
    ) -> Self:
        """Add entries to those fitted, and go on from the present posterior.

        Args:
            index: Indexes of the new entries.
            y: The new entries.
            mask: Which of them count; None: all.
            num_epochs: Passes over all modes.
            batch_size: Entries whose messages are computed at a time; None: all.
            callback: Called after each epoch with its number and this model.

        Raises:
            ValueError: As `fit`, or nothing was fitted yet.
        """
        if not len(self.index):
            raise ValueError("index: expected a model that was fitted, got one without entries")
        self._add(*self._data(index, y, mask))
        return self._run(num_epochs, batch_size, callback)

    @torch.no_grad()
    def elbo(self) -> Tensor:
        """Lower bound of the log evidence that the posterior attains.

        Shape:
            - output: `batch_shape`
        """
        first, second = self._expect(self._entries())
        miss = self._squared_error(first, second)
        log_tau = self._log_precision()
        terms = self.seen * (log_tau[..., None] - math.log(2 * math.pi))
        bound = (terms.sum(-1) - self._precision() * miss) / 2
        for factor in self._modes():
            bound = bound - factor.divergence()
        return bound - self._core_divergence() - self._noise_divergence()

    def extra_repr(self) -> str:
        return f"ranks={self.ranks}, kernel={self.kernel}, entries={len(self.index)}"

    # --- the inference ---

    @torch.no_grad()
    def _run(
        self,
        num_epochs: int,
        batch_size: int | None,
        callback: Callable[[int, Self], None] | None,
        keep: int = 0,
    ) -> Self:
        """Epochs, of which the first keep the noise as it is."""
        for epoch in range(num_epochs):
            for k, factor in enumerate(self._modes()):
                factor.mix(*self._messages(k, batch_size), self.damping)
            self._update_core(batch_size)
            if self.noise_variance is None and epoch >= keep:
                self._update_noise()
            if callback is not None:
                callback(epoch, self)
        return self

    def _messages(self, k: int, batch_size: int | None = None) -> tuple[Tensor, Tensor]:
        """Sums of the messages at each index of a mode, `(*b, N_k, R_k)` and a matrix each."""
        factor = self._modes()[k]
        shift = torch.zeros_like(factor.shift, dtype=torch.float64)
        precision = torch.zeros_like(factor.precision, dtype=torch.float64)
        for chunk in self._chunks(batch_size):
            first, second = self._expect(self._entries(chunk), k)
            place = factor.place(self.index[chunk, k])
            seen = self.seen[..., chunk, None].double()
            shift.index_add_(-2, place, seen * self.y[..., chunk, None] * first)
            precision.index_add_(-3, place, seen[..., None] * second)
        tau = self._precision()[..., None, None]
        return tau * shift, tau[..., None] * precision

    def _update_core(self, batch_size: int | None) -> None:
        """A fixed core has nothing to learn."""

    def _update_noise(self) -> None:
        first, second = self._expect(self._entries())
        like = self.noise_rate.dtype
        self.noise_shape = (self.noise_prior[0] + self.seen.sum(-1) / 2).to(like)
        error = self._squared_error(first, second)
        self.noise_rate = (self.noise_prior[1] + error / 2).to(like)

    def _expect(self, moments: Moments, leave: int | None = None) -> tuple[Tensor, Tensor]:
        """First and second moments of b, or with `leave` None of the noiseless entry."""
        raise NotImplementedError

    def _squared_error(self, first: Tensor, second: Tensor) -> Tensor:
        y = self.y.double()
        return (self.seen * (y**2 - 2 * y * first + second)).sum(-1)

    # --- what is kept ---

    def _modes(self) -> list[Factor]:
        return cast(list[Factor], list(self.factors))

    def _entries(self, chunk: slice = slice(None)) -> Moments:
        """Moments of all factors at the entries."""
        modes = enumerate(self._modes())
        return _moments([factor.at(factor.place(self.index[chunk, k])) for k, factor in modes])

    def _chunks(self, batch_size: int | None) -> list[slice]:
        size = batch_size or max(len(self.index), 1)
        return [slice(i, i + size) for i in range(0, len(self.index), size)]

    def _data(self, index: Tensor, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Entries as they are kept, checked."""
        if index.ndim != 2 or index.shape[1] != len(self.ranks) or not len(index):
            raise ValueError(
                f"index: expected (N, {len(self.ranks)}), N > 0, got {tuple(index.shape)}"
            )
        if not index.isfinite().all():
            raise ValueError("index: expected finite numbers, got NaN or infinity")
        allowed = ((len(index),), (*self.batch_shape, len(index)))
        if y.shape not in allowed:
            raise ValueError(f"y: expected {allowed[1]}, got {tuple(y.shape)}")
        if not y.isfinite().all():
            raise ValueError("y: expected finite numbers, got NaN or infinity; see mask")
        if mask is not None and (mask.shape not in allowed or mask.dtype != torch.bool):
            raise ValueError(
                f"mask: expected booleans {allowed[1]}, got {mask.dtype} {tuple(mask.shape)}"
            )
        seen = torch.ones_like(y, dtype=torch.bool) if mask is None else mask
        like = self.noise_rate
        return (
            index.detach().to(like),
            y.detach().to(like).expand(allowed[1]),
            seen.to(like.device).expand(allowed[1]),
        )

    def _add(self, index: Tensor, y: Tensor, seen: Tensor) -> None:
        """Append entries; messages stay at their indexes, and are 0 at new ones."""
        self.index = torch.cat([self.index, index])
        self.y, self.seen = torch.cat([self.y, y], -1), torch.cat([self.seen, seen], -1)
        for k, factor in enumerate(self._modes()):
            factor.grow(self.index[:, k].unique())
            factor.refresh()

    def _start(self, generator: torch.Generator | None) -> None:
        """Break the symmetry, and take the noise for a tenth of the entries' power."""
        for factor in self._modes():
            factor.start(generator)
        power = (self.seen * self.y.square()).sum(-1) / self.seen.sum(-1).clamp_min(1)
        self.noise_rate = self.noise_shape * (_NOISE * power).clamp_min(1e-12)

    def _load_from_state_dict(  # type: ignore[override]
        self, state: Any, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        resize(self, state, prefix)
        super()._load_from_state_dict(state, prefix, *args, **kwargs)

    # --- noise and divergences ---

    def _precision(self) -> Tensor:
        """E[tau]."""
        if self.noise_variance is not None:
            return torch.full_like(self.noise_rate, 1 / self.noise_variance, dtype=torch.float64)
        return self.noise_shape.double() / self.noise_rate

    def _log_precision(self) -> Tensor:
        """E[log tau]."""
        if self.noise_variance is not None:
            return self._precision().log()
        return torch.digamma(self.noise_shape.double()) - self.noise_rate.double().log()

    def _noise(self) -> Tensor:
        """E[1 / tau]."""
        if self.noise_variance is not None:
            return 1 / self._precision()
        return self.noise_rate.double() / (self.noise_shape.double() - 1)

    def _noise_divergence(self) -> Tensor:
        if self.noise_variance is not None:
            return torch.zeros_like(self.noise_rate, dtype=torch.float64)
        shape, rate = (
            torch.full_like(self.noise_rate, p, dtype=torch.float64) for p in self.noise_prior
        )
        prior = torch.distributions.Gamma(shape, rate)
        posterior = torch.distributions.Gamma(self.noise_shape.double(), self.noise_rate.double())
        return torch.distributions.kl_divergence(posterior, prior)

    def _core_divergence(self) -> Tensor:
        return torch.zeros_like(self.noise_rate, dtype=torch.float64)


def _moments(factors: list[tuple[Tensor, Tensor]]) -> Moments:
    """Means and second moments, from means and covariances."""
    means = [mean for mean, _ in factors]
    return means, [cov + mean[..., :, None] * mean[..., None, :] for mean, cov in factors]


def _each(name: str, values: float | Sequence[float], count: int) -> list[float]:
    found = [float(values)] * count if isinstance(values, (int, float)) else list(values)
    if len(found) != count or not all(0 < v < math.inf for v in found):
        raise ValueError(f"{name}: expected {count} numbers above 0, got {values}")
    return found
