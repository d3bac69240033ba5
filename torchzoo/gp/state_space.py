"""Gaussian processes on the line as linear stochastic differential equations, in linear time.

A Matérn process of smoothness nu = p + 1/2 is the first component of the state x = (f, f', ...) of

    dx/dt = F x + e_p w,  lam = sqrt(2 nu) / l,

F being the companion matrix of (s + lam)^(p+1). With N = F + lam I, which is nilpotent, and P the
stationary covariance, steps over a time d are exactly

    A(d) = exp(-lam d) sum_(j <= p) (d N)^j / j!,  Q(d) = P - A(d) P A(d)^T,

so that a Kalman filter and smoother over the sorted inputs give what dense algebra does.

J. Hartikainen and S. Särkkä, "Kalman filtering and smoothing solutions to temporal Gaussian process
regression models", 2010; as a prior of factors: S. Fang, X. Yu, Z. Wang, S. Li, R. M. Kirby and S.
Zhe, "Functional Bayesian Tucker decomposition for continuous-indexed tensor data", 2024, section 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchzoo.common.filters import Filtered, Smoothed, information_filter, rts_smoother
from torchzoo.common.solvers import Solution, minimize_lbfgs
from torchzoo.gp.posterior import GaussianPosterior
from torchzoo.hub import ZooModel
from torchzoo.ops.calling import no_autocast
from torchzoo.registry import Example, register

MATERN = {"matern12": 0, "matern32": 1, "matern52": 2}
"""By name of a kernel, p."""


class MaternSDE(NamedTuple):
    """Independent Matérn processes in state-space form.

    Attributes:
        kernel: `"matern12"`, `"matern32"` or `"matern52"`.
        lengthscale: l, a scalar.
        variance: Variance of f, a scalar.
        copies: How many processes k; the state has their components one process after the other.

    Example:
        >>> sde = MaternSDE("matern12", torch.ones(()), torch.ones(()))
        >>> step, noise = sde.step(torch.tensor(math.log(2)))
        >>> round(step.item(), 4), round(noise.item(), 4)
        (0.5, 0.75)
    """

    kernel: str
    lengthscale: Tensor
    variance: Tensor
    copies: int = 1

    def stationary(self) -> Tensor:
        """Stationary covariance P.

        Shape:
            - output: `(n, n)`, n being k (p + 1)
        """
        return self._blocks(self._stationary())

    def step(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Transition A and noise covariance Q over times of at least 0.

        Shape:
            - delta: `(...)`
            - output: `(..., n, n)` twice
        """
        order, rate = MATERN[self.kernel], self._rate()
        eye = torch.eye(order + 1, dtype=rate.dtype, device=rate.device)
        column = torch.arange(order + 1, device=rate.device)
        binomials = eye.new_tensor([math.comb(order + 1, i) for i in range(order + 1)])
        last = -binomials * rate ** (order + 1 - column)
        nilpotent = torch.cat([eye[1:], last[None]]) + rate * eye
        term = step = eye.expand(*delta.shape, -1, -1)
        for j in range(1, order + 1):
            term = term @ nilpotent * (delta / j)[..., None, None]
            step = step + term
        step = (-rate * delta).exp()[..., None, None] * step
        stationary = self._stationary()
        noise = stationary - step @ stationary @ step.mT
        return self._blocks(step), self._blocks((noise + noise.mT) / 2)

    def readout(self) -> Tensor:
        """The matrix from a state to the values f.

        Shape:
            - output: `(k, n)`
        """
        rows = torch.eye(self.copies * (MATERN[self.kernel] + 1), device=self.variance.device)
        return rows[:: MATERN[self.kernel] + 1].to(self.variance.dtype)

    def _rate(self) -> Tensor:
        return math.sqrt(2 * MATERN[self.kernel] + 1) / self.lengthscale

    def _stationary(self) -> Tensor:
        """Of one process: derivatives of the kernel at 0."""
        shapes = {
            0: [[1.0]],
            1: [[1.0, 0.0], [0.0, 1.0]],
            2: [[1.0, 0.0, -1 / 3], [0.0, 1 / 3, 0.0], [-1 / 3, 0.0, 1.0]],
        }
        order, rate = MATERN[self.kernel], self._rate()
        powers = rate ** torch.arange(order + 1, device=rate.device)
        return self.variance * rate.new_tensor(shapes[order]) * powers[:, None] * powers

    def _blocks(self, matrix: Tensor) -> Tensor:
        """The block diagonal matrix of k copies."""
        eye = torch.eye(self.copies, dtype=matrix.dtype, device=matrix.device)
        blocks = eye[:, None, :, None] * matrix[..., None, :, None, :]
        return blocks.flatten(-2).flatten(-3, -2)


class Chain(NamedTuple):
    """States at increasing times.

    Attributes:
        times: `(T,)`.
        filtered: Moments given what is known at or before each time.
        smoothed: Moments given all.
    """

    times: Tensor
    filtered: Filtered
    smoothed: Smoothed


def run_chain(
    sde: MaternSDE, times: Tensor, shift: Tensor, precision: Tensor, *, parallel: bool = True
) -> Chain:
    """Filter and smooth factors exp(-f^T Lambda f / 2 + eta^T f) of the values at some times.

    Args:
        sde: The prior of the k values.
        times: Increasing times.
        shift: The vectors eta.
        precision: The matrices Lambda.
        parallel: Whether to use an associative scan instead of a loop over time.

    Shape:
        - times: `(T,)`
        - shift: `(*batch, T, k)`
        - precision: `(*batch, T, k, k)`

    Example:
        >>> sde = MaternSDE("matern32", torch.ones(()), torch.ones(()))
        >>> chain = run_chain(sde, torch.zeros(1), torch.ones(1, 1), torch.ones(1, 1, 1))
        >>> chain.smoothed.mean
        tensor([[0.5000, 0.0000]])
    """
    step, noise = sde.step(times.diff(prepend=times[:1]))
    prior = sde.stationary()
    start = torch.zeros_like(prior[0])
    filtered = information_filter(
        shift, precision, step, noise, sde.readout(), start, prior, parallel=parallel
    )
    smoothed = rts_smoother(filtered.mean, filtered.cov, step, noise, parallel=parallel)
    return Chain(times, filtered, smoothed)


def read_chain(sde: MaternSDE, chain: Chain, t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the k values at any times, given all that the chain knows.

    Between two times of the chain the state is predicted from the filtered one at the earlier, then
    smoothed with the one at the later.

    Args:
        sde: The chain's prior.
        chain: A chain, of T >= 0 times.
        t: Where.

    Shape:
        - t: `(M,)`
        - output: `(*batch, M, k)` and `(*batch, M, k, k)`
    """
    readout, prior = sde.readout(), sde.stationary()
    times, filtered, smoothed = chain
    batch, count = filtered.mean.shape[:-2], len(times)
    if count == 0:
        mean = (0 * t)[:, None].expand(*batch, -1, len(readout))
        return mean, (readout @ prior @ readout.mT).expand(*batch, len(t), -1, -1)
    index = torch.searchsorted(times.detach(), t.detach().contiguous(), right=True)
    before = (index - 1).clamp_min(0)
    first = (index == 0)[:, None]
    start = torch.where(index == 0, t, times[before])
    past = torch.where(first, torch.zeros_like(prior[0]), filtered.mean[..., before, :])
    spread = torch.where(first[..., None], prior, filtered.cov[..., before, :, :])
    step, noise = sde.step(t - start)
    mean, cov = _apply(step, past), step @ spread @ step.mT + noise
    after = index.clamp_max(count - 1)
    step, noise = sde.step((times[after] - t).clamp_min(0))
    ahead = step @ cov @ step.mT + noise
    gain = torch.linalg.solve(ahead, step @ cov).mT
    gain = torch.where((index == count)[:, None, None], 0.0, gain)
    mean = mean + _apply(gain, smoothed.mean[..., after, :] - _apply(step, mean))
    cov = cov + gain @ (smoothed.cov[..., after, :, :] - ahead) @ gain.mT
    return _apply(readout, mean), readout @ cov @ readout.mT


@register(
    paper=45,
    example=lambda: Example(
        {"t": [0.0, 0.3, 0.3, 1.0], "y": [0.5, -0.2, 0.1, 0.9], "kernel": "matern52"},
        (torch.tensor([-0.5, 0.2, 0.3, 0.6, 1.7]),),
        bad_options={
            "t": [0.0, float("nan"), 1.0, 2.0],
            "y": [0.0],
            "kernel": "rbf",
            "lengthscale": 0.0,
            "variance": -1.0,
            "noise": 0.0,
        },
    ),
    compare="an exact process of gpytorch, cubic in the observations, has no such forward pass",
)
class StateSpaceGP(ZooModel):
    """Gaussian process regression on the line with a Matérn kernel, in linear time and memory.

    Args:
        t: Inputs in any order, some perhaps equal; a tensor, or a list, which a saved model needs.
        y: Values there; NaN is a missing one.
        kernel: `"matern12"`, `"matern32"` or `"matern52"`.
        lengthscale: Initial length of the kernel.
        variance: Its initial variance.
        noise: Initial variance of the noise.
        parallel: Whether to use an associative scan instead of a loop over time.
        device: Device of parameters and buffers.
        dtype: Their dtype; None: that of t. float64 is advised.

    Shape:
        - t: `(N,)`
        - y: `(*batch_shape, N)`
        - points: `(...)`
        - output: mean and variance of the function, without noise, `(*batch_shape, ...)`

    Returns:
        A `GaussianPosterior`.

    Raises:
        ValueError: t that is not finite, y of another length, an unknown kernel, or a number that
            is not above 0.

    Source:
        J. Hartikainen and S. Särkkä, "Kalman filtering and smoothing solutions to temporal Gaussian
        process regression models", 2010.

    Example:
        >>> t = torch.linspace(0, 6, 50, dtype=torch.float64)
        >>> gp = StateSpaceGP(t, t.sin(), noise=1e-4)
        >>> _ = gp.fit()
        >>> round(gp(torch.tensor(1.55)).mean.item(), 2)
        1.0
    """

    times: Tensor
    place: Tensor
    y: Tensor
    log_lengthscale: Tensor
    log_variance: Tensor
    log_noise: Tensor

    def __init__(
        self,
        t: Tensor | Sequence[float],
        y: Tensor | Sequence[float],
        *,
        kernel: str = "matern32",
        lengthscale: float = 1.0,
        variance: float = 1.0,
        noise: float = 0.1,
        parallel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        inputs, values = (
            x.detach() if isinstance(x, Tensor) else torch.tensor(x, device="cpu") for x in (t, y)
        )
        if inputs.ndim != 1 or not len(inputs) or not inputs.isfinite().all():
            raise ValueError(f"t: expected finite (N,), N > 0, got {tuple(inputs.shape)}")
        if values.ndim == 0 or values.shape[-1] != len(inputs):
            raise ValueError(f"y: expected (..., {len(inputs)}), got {tuple(values.shape)}")
        check_kernel(kernel)
        self._start = {"lengthscale": lengthscale, "variance": variance, "noise": noise}
        for name, value in self._start.items():
            if not value > 0:
                raise ValueError(f"{name}: expected above 0, got {value}")
        super().__init__()
        self.kernel, self.parallel = kernel, parallel
        dtype = dtype or (t.dtype if isinstance(t, Tensor) else torch.get_default_dtype())
        device = device or torch.get_default_device()
        times, place = inputs.to(dtype).unique(return_inverse=True)
        self.register_buffer("times", times.to(device))
        self.register_buffer("place", place.to(device))
        self.register_buffer("y", values.to(device, dtype))
        for name in self._start:
            parameter = nn.Parameter(torch.empty((), device=device, dtype=dtype))
            self.register_parameter(f"log_{name}", parameter)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial length and variances."""
        with torch.no_grad():
            for name, value in self._start.items():
                getattr(self, f"log_{name}").fill_(math.log(value))

    def forward(self, points: Tensor) -> GaussianPosterior:
        with no_autocast(points):
            mean, cov = read_chain(self._sde(), self._chain(), points.flatten().to(self.y.dtype))
        shape = (*self.y.shape[:-1], *points.shape)
        return GaussianPosterior(mean[..., 0].reshape(shape), cov[..., 0, 0].reshape(shape))

    def log_likelihood(self) -> Tensor:
        """Log marginal likelihood of the values.

        Shape:
            - output: `batch_shape`
        """
        seen = ~self.y.isnan()
        noise = self.log_noise.exp()
        known = torch.where(seen, self.y, 0.0)
        each = known.square() / noise + seen * (math.log(2 * math.pi) + self.log_noise)
        return self._chain().filtered.log_likelihood - each.sum(-1) / 2

    def fit(self, max_iter: int = 100) -> Solution:
        """Maximise the likelihood in length, variance and noise by L-BFGS."""
        return minimize_lbfgs(
            lambda: -self.log_likelihood().sum() / self.y.numel(),
            self.parameters(),
            max_iter=max_iter,
            tol=1e-6,
        )

    def extra_repr(self) -> str:
        return f"{self.kernel}, {self.y.shape[-1]} values"

    def _sde(self) -> MaternSDE:
        return MaternSDE(self.kernel, self.log_lengthscale.exp(), self.log_variance.exp())

    def _chain(self) -> Chain:
        seen = ~self.y.isnan()
        zeros = self.y.new_zeros(*self.y.shape[:-1], len(self.times))
        known = torch.where(seen, self.y, 0.0)
        shift = zeros.index_add(-1, self.place, known) / self.log_noise.exp()
        precision = zeros.index_add(-1, self.place, seen.to(known)) / self.log_noise.exp()
        return run_chain(
            self._sde(),
            self.times,
            shift[..., None],
            precision[..., None, None],
            parallel=self.parallel,
        )


def check_kernel(kernel: str) -> None:
    """Raise a ValueError for a name that is not in `MATERN`."""
    if kernel not in MATERN:
        raise ValueError(f"kernel: expected one of {', '.join(MATERN)}, got {kernel!r}")


def _apply(matrix: Tensor, x: Tensor) -> Tensor:
    return (matrix @ x[..., None])[..., 0]
