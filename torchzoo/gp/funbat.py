"""FunBaT: Bayesian Tucker decomposition whose modes are indexed by real numbers.

An entry at the index (i_1, ..., i_K) is

    y = <W, U^1(i_1) kron ... kron U^K(i_K)> + e,  e ~ N(0, 1 / tau),

with a core vec W ~ N(0, I), a precision tau ~ Gamma(a0, b0), and factors U^k whose R_k components
are independent Matérn processes in state-space form. The posterior is a product of q(U^k), q(W) and
q(tau), found by message passing: with b = W_(k) (kron_(j != k) U^j), an entry tells U^k(i_k)

    Lambda = E[tau] E[b b^T],  eta = E[tau] y E[b];

messages at one index add up, and a Kalman filter and smoother along the mode turn them into q(U^k),
in time linear in the entries. New messages are mixed with the old, in natural parameters.

S. Fang, X. Yu, Z. Wang, S. Li, R. M. Kirby and S. Zhe, "Functional Bayesian Tucker decomposition
for continuous-indexed tensor data", 2024, sections 3 and 4. Deviations: messages use second moments
of all other variables, so that a step without damping never lowers the bound that `elbo` gives;
modes may be categorical, with a normal prior for each level; the length of a kernel that is not
given is a fifth of its mode's range; a fit keeps the noise at a tenth of the entries' power for its
first epochs, as an early estimate of it lets factors collapse to 0.
"""

from __future__ import annotations

import math
import string
from typing import Any

import torch
from torch import Tensor

from torchzoo.gp.functional_tensor import FunctionalTensor, Moments
from torchzoo.registry import Comparison, Example, register

_ROWS, _COLUMNS = string.ascii_lowercase[:25], string.ascii_uppercase[:25]  # z: the entries
_BAD: dict[str, Any] = {
    "num_modes": 0,
    "ranks": [2],
    "kernel": "rbf",
    "lengthscale": 0.0,
    "variance": [1.0],
    "noise_prior": (0.0, 1.0),
    "noise_variance": 0.0,
    "damping": 0.0,
    "mode_types": ["continuous"],
}


@register(
    paper=45,
    example=lambda: Example(
        {"num_modes": 2, "ranks": [2, 3]},
        (torch.rand(5, 2, generator=torch.Generator().manual_seed(0)),),
        bad_options=_BAD,
    ),
    compare=lambda: Comparison(
        {"num_modes": 2, "ranks": 3}, (torch.rand(1024, 2),), ("FunctionalCP",)
    ),
)
class FunBaT(FunctionalTensor):
    """Bayesian Tucker decomposition of scattered entries at real indexes, by message passing.

    Before `fit`, and far from all data, it gives the prior.

    Args:
        num_modes: Modes K.
        ranks: Ranks R_k; one number for all modes.
        kernel: Of the factor functions: `"matern12"`, `"matern32"` or `"matern52"`.
        lengthscale: Length of the kernel, one or one a mode; None: a fifth of the range of the
            mode's indexes.
        variance: Variance of the factor functions, one or one a mode.
        noise_prior: Shape a0 and rate b0 of the gamma prior of the noise's precision.
        noise_variance: The noise's variance where it is known.
        damping: Share of the new messages in natural parameters; 1: undamped.
        mode_types: `"continuous"` or `"categorical"` for each mode; None: all continuous. Levels of
            a categorical mode are numbers with independent normal priors.
        batch_shape: Shape of a batch of decompositions that share their indexes.
        device: Device of the buffers.
        dtype: Their dtype; the inference itself is in float64.

    Shape:
        - index: `(..., K)`
        - output: mean and variance of entries, noise included, `(*batch_shape, ...)`

    Returns:
        A `GaussianPosterior`.

    Raises:
        ValueError: An option out of its range, or an index of another dimension.

    Source:
        S. Fang, X. Yu, Z. Wang, S. Li, R. M. Kirby and S. Zhe, "Functional Bayesian Tucker
        decomposition for continuous-indexed tensor data", 2024, sections 3 and 4.

    Example:
        >>> index = torch.rand(300, 2, generator=torch.Generator().manual_seed(0))
        >>> y = (6 * index[:, 0]).sin() * (1 + index[:, 1])
        >>> model = FunBaT(2, 1).fit(index, y, generator=torch.Generator().manual_seed(1))
        >>> predicted = model(torch.tensor([[0.25, 0.5]]))
        >>> round(predicted.mean.item(), 1)  # sin 1.5 times 1.5
        1.5
    """

    _CORE = ("core_mean", "core_cov", "core_shift", "core_precision")

    core_mean: Tensor
    core_cov: Tensor
    core_shift: Tensor
    core_precision: Tensor

    def reset_parameters(self) -> None:
        """The prior, without data."""
        super().reset_parameters()
        like, total = self.noise_rate, math.prod(self.ranks)
        self.core_shift = like.new_zeros(*self.batch_shape, total)
        self.core_precision = like.new_zeros(*self.batch_shape, total, total)
        self._refresh_core()

    @property
    def core(self) -> tuple[Tensor, Tensor]:
        """Mean `(*batch_shape, R_1, ..., R_K)` and covariance `(*batch_shape, R, R)` of the core.

        The covariance is that of the flattened core, in row-major order; R is its length.
        """
        return self.core_mean.unflatten(-1, self.ranks), self.core_cov

    def _expect(self, moments: Moments, leave: int | None = None) -> tuple[Tensor, Tensor]:
        """Contract the core's moments with those of all modes but one."""
        means, seconds = moments
        modes = range(len(self.ranks))
        core = self.core_mean.double()
        products = self.core_cov.double() + core[..., :, None] * core[..., None, :]
        core = core.unflatten(-1, self.ranks)
        products = products.unflatten(-1, self.ranks).unflatten(len(self.batch_shape), self.ranks)
        first, second = (
            f"...{_ROWS[: len(modes)]}",
            f"...{_ROWS[: len(modes)]}{_COLUMNS[: len(modes)]}",
        )
        others = [j for j in modes if j != leave]
        ones = means[0].new_ones(means[0].shape[-2])
        first += "".join(f",...z{_ROWS[j]}" for j in others) + ",z->...z"
        second += "".join(f",...z{_ROWS[j]}{_COLUMNS[j]}" for j in others) + ",z->...z"
        if leave is not None:
            first, second = first + _ROWS[leave], second + _ROWS[leave] + _COLUMNS[leave]
        return (
            torch.einsum(first, core, *(means[j] for j in others), ones),
            torch.einsum(second, products, *(seconds[j] for j in others), ones),
        )

    def _core_messages(self, batch_size: int | None = None) -> tuple[Tensor, Tensor]:
        """Sums over the entries, `(*b, R)` and `(*b, R, R)`."""
        shift = torch.zeros_like(self.core_shift, dtype=torch.float64)
        precision = torch.zeros_like(self.core_precision, dtype=torch.float64)
        rows, columns = _ROWS[: len(self.ranks)], _COLUMNS[: len(self.ranks)]
        first = ",".join(f"...z{row}" for row in rows)
        second = ",".join(f"...z{row}{column}" for row, column in zip(rows, columns, strict=True))
        for chunk in self._chunks(batch_size):
            means, seconds = self._entries(chunk)
            seen = self.seen[..., chunk].double()
            sums = torch.einsum(f"...z,{first}->...{rows}", seen * self.y[..., chunk], *means)
            shift += sums.flatten(-len(rows))
            sums = torch.einsum(f"...z,{second}->...{rows}{columns}", seen, *seconds)
            precision += sums.flatten(-len(rows)).flatten(len(self.batch_shape), -2)
        tau = self._precision()[..., None]
        return tau * shift, tau[..., None] * precision

    def _update_core(self, batch_size: int | None) -> None:
        shift, precision = self._core_messages(batch_size)
        old, share = self.core_shift, self.damping
        self.core_shift = ((1 - share) * old + share * shift).to(old.dtype)
        self.core_precision = ((1 - share) * self.core_precision + share * precision).to(old.dtype)
        self._refresh_core()

    def _refresh_core(self) -> None:
        precision = self.core_precision.double()
        eye = torch.eye(precision.shape[-1], dtype=precision.dtype, device=precision.device)
        cov = torch.linalg.inv(precision + eye)
        cov = (cov + cov.mT) / 2
        like = self.core_shift
        self.core_cov = cov.to(like)
        self.core_mean = (cov @ like.double()[..., None])[..., 0].to(like)

    def _start(self, generator: torch.Generator | None) -> None:
        super()._start(generator)
        draw = torch.randn(self.core_mean.shape, generator=generator, dtype=torch.float64)
        self.core_mean = draw.to(self.core_mean)

    def _core_divergence(self) -> Tensor:
        cov, mean = self.core_cov.double(), self.core_mean.double()
        trace = cov.diagonal(dim1=-2, dim2=-1).sum(-1) + mean.square().sum(-1)
        return (trace - mean.shape[-1] - torch.linalg.slogdet(cov)[1]) / 2


@register(
    paper=45,
    example=lambda: Example(
        {"num_modes": 3, "ranks": 2, "lengthscale": 0.3},
        (torch.rand(5, 3, generator=torch.Generator().manual_seed(0)),),
        bad_options={**_BAD, "ranks": [2, 2, 3]},
    ),
    compare=lambda: Comparison({"num_modes": 2, "ranks": 3}, (torch.rand(1024, 2),), ("FunBaT",)),
)
class FunctionalCP(FunctionalTensor):
    """Bayesian CP decomposition at real indexes: `FunBaT` with a core of ones on the diagonal.

    Args:
        num_modes: Modes K.
        ranks: The rank R; a list must have it for each mode.
        kernel: As for `FunBaT`, like all that follow.
        lengthscale: Length of the kernel.
        variance: Variance of the factor functions.
        noise_prior: Shape and rate of the prior of the noise's precision.
        noise_variance: The noise's variance where it is known.
        damping: Share of the new messages.
        mode_types: `"continuous"` or `"categorical"` for each mode.
        batch_shape: Shape of a batch of decompositions that share their indexes.
        device: Device of the buffers.
        dtype: Their dtype.

    Shape:
        - index: `(..., K)`
        - output: mean and variance of entries, noise included, `(*batch_shape, ...)`

    Returns:
        A `GaussianPosterior`.

    Raises:
        ValueError: An option out of its range, ranks that differ, or an index of another dimension.

    Source:
        S. Fang and others, "Functional Bayesian Tucker decomposition for continuous-indexed tensor
        data", 2024, section 4, with the core fixed.

    Example:
        >>> t = torch.linspace(0, 1, 40)[:, None]
        >>> model = FunctionalCP(1, 1, noise_variance=1e-4).fit(t, (6 * t[:, 0]).sin())
        >>> round(model(torch.tensor([0.25])).mean.item(), 2), round(math.sin(1.5), 2)
        (1.0, 1.0)
    """

    def reset_parameters(self) -> None:
        """The prior, without data."""
        if len(set(self.ranks)) > 1:
            raise ValueError(f"ranks: expected equal ones, got {self.ranks}")
        super().reset_parameters()

    def _expect(self, moments: Moments, leave: int | None = None) -> tuple[Tensor, Tensor]:
        means, seconds = moments
        others = [j for j in range(len(self.ranks)) if j != leave]
        first, second = torch.ones_like(means[0]), torch.ones_like(seconds[0])
        for j in others:
            first, second = first * means[j], second * seconds[j]
        if leave is None:
            return first.sum(-1), second.sum((-1, -2))
        return first, second
