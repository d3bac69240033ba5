"""The independent interval approximation of excursions of a stationary Gaussian process.

The signs of the process after an up-crossing are taken for those of a switching process with
independent times T between switches, matched in expectation: with E(t) the expected sign (see
`torchzoo.gp.slepian`) and L the Laplace transform,

    L[f_T](s) = (1 - s L[E](s)) / (1 + s L[E](s)).

Where E does not increase it is the survival function of a time W, and

    T = W_1 + ... + W_nu,   nu geometric with P(nu = k) = 2^-k,   W_i independent,
    S(t) = P(T > t) = E(t) + 1/2 int_0^t S(t - u) d(1 - E(u)),
    E[T] = 2 int E = pi / sqrt(lam2), Rice's mean,
    P(T > t) ~ C exp(-theta t)  with  theta int_0^inf exp(theta t) E(t) dt = 1.

Deviation: the integral equation is solved for S by the trapezoidal rule, in Stieltjes form, and the
density is its slope.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchzoo.gp.slepian import SlepianProcess
from torchzoo.gp.stationary import half_width

_NEGLIGIBLE = 1e-26  # of E: e^(theta t) E is then about its root
_PANELS = 192
_TABLE = 2**15


class IndependentIntervalApproximation:
    """Approximate law of the time between zero crossings; made by `slepian_iia`.

    Args:
        process: The process, seen from an up-crossing.
        t_max: End of the grid on which distributions are tabulated.
        num_points: Points of that grid.

    Attributes:
        t: The grid, `(num_points,)`.
        expected_sign: E on the grid.
    """

    def __init__(self, process: SlepianProcess, t_max: float, num_points: int):
        self.process = process
        self.t = torch.linspace(0, t_max, num_points, dtype=torch.float64)
        self.expected_sign = process.expected_clipped(self.t)

    @property
    def is_valid(self) -> bool:
        """Whether E does not increase on the grid, and so is a survival function."""
        return _first_increase(self.expected_sign) is None

    def check(self) -> None:
        """Raise a ValueError unless the approximation is a distribution."""
        at = _first_increase(self.expected_sign)
        if at is not None:
            raise ValueError(
                f"covariance is not monotone at t={self.t[at].item():.4g}, IIA is not a valid "
                f"distribution: the expected sign rises there to {self.expected_sign[at]:.4g}"
            )

    def survival_w(self, t: Tensor) -> Tensor:
        """P(W > t) = E(t)."""
        return self.process.expected_clipped(t)

    def survival(self, t: Tensor) -> Tensor:
        """P(T > t), interpolated on the grid; exact at no finite grid, of second order in its step.

        Shape:
            - t: `(...)`, in [0, t_max]
            - output: `(...)`

        Raises:
            ValueError: t outside the grid.
        """
        return self._interpolate(self._survival(), t)

    def pdf(self, t: Tensor) -> Tensor:
        """Density of T, interpolated on the grid.

        Where `is_valid` is False it is still what matching implies, and may be below 0.
        """
        (slope,) = torch.gradient(self._survival(), spacing=(self.t,), edge_order=2)
        return self._interpolate(-slope, t)

    def survival_from_random_time(self, t: Tensor) -> Tensor:
        """P(the next crossing after a time chosen at random is later than t)."""
        survival = self._survival()
        beyond = torch.cumulative_trapezoid(survival, self.t)
        beyond = torch.cat([beyond.new_zeros(1), beyond])
        return self._interpolate(1 - beyond / self.mean, t)

    @property
    def mean(self) -> Tensor:
        """E[T] = 2 int E, by quadrature."""
        nodes, weights = _quadrature(self.process)
        return 2 * (weights * self.process.expected_clipped(nodes)).sum()

    @property
    def exponent(self) -> Tensor:
        """The persistency exponent; see `persistency_exponent`."""
        return persistency_exponent(self.process.cov)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw T: geometric sums of times W, each by inverting E.

        Args:
            n: Number of draws.
            generator: Draws on its own device.

        Shape:
            - output: `(n,)`, float64

        Raises:
            ValueError: The approximation is not a distribution (`is_valid` is False).
        """
        self.check()
        device = generator.device if generator is not None else None
        draws = torch.rand(2, n, dtype=torch.float64, device=device, generator=generator)
        counts = 1 + (-torch.log2(1 - draws[0])).floor().long()
        total = int(counts.sum())
        uniform = torch.rand(total, dtype=torch.float64, device=device, generator=generator)
        owner = torch.repeat_interleave(torch.arange(n, device=device), counts)
        return torch.zeros(n, dtype=torch.float64, device=device).index_add(
            0, owner, self._inverse(uniform.cpu()).to(uniform)
        )

    def _survival(self) -> Tensor:
        """S on the grid: a Toeplitz system, lower triangular."""
        e = self.expected_sign
        drop = torch.cat([e.new_zeros(1), e[:-1] - e[1:], e.new_zeros(1)]) / 4
        kernel = drop[:-1] + drop[1:]  # half of a step's drop for either of its ends
        lag = torch.arange(len(e))[:, None] - torch.arange(len(e))
        matrix = torch.where(lag >= 0, -kernel[lag.clamp_min(0)], 0.0)
        # the first value, S(0) = 1, is known; its weight is that of its one neighbouring step
        matrix = matrix + torch.eye(len(e), dtype=e.dtype)
        first = torch.zeros_like(e)
        first[1:] = drop[1:-1]
        right = e[1:] + first[1:]
        rest = torch.linalg.solve_triangular(matrix[1:, 1:], right[:, None], upper=False)[:, 0]
        return torch.cat([e.new_ones(1), rest])

    def _interpolate(self, values: Tensor, t: Tensor) -> Tensor:
        t = torch.as_tensor(t).double()
        if t.numel() and not (t.min() >= 0 and t.max() <= self.t[-1]):
            raise ValueError(
                f"t: expected times in [0, {self.t[-1].item():g}], got "
                f"{t.min().item():g} to {t.max().item():g}"
            )
        place = t / self.t[1]
        left = place.floor().long().clamp(0, len(values) - 2)
        return torch.lerp(values[left], values[left + 1], place - left)

    def _inverse(self, uniform: Tensor) -> Tensor:
        """The time at which E falls to each number, linear between the points of a fine table."""
        with torch.no_grad():
            t = torch.linspace(0, _end(self.process), _TABLE, dtype=torch.float64)
            table = self.process.expected_clipped(t)
        right = torch.searchsorted(-table, -uniform).clamp(1, _TABLE - 1)
        above, below = table[right - 1], table[right]
        share = ((above - uniform) / (above - below)).clamp(0, 1)
        return torch.lerp(t[right - 1], t[right], share)


def slepian_iia(
    cov: Any, *, t_max: float | None = None, num_points: int = 1024
) -> IndependentIntervalApproximation:
    """Approximate the law of the times between zero crossings of a stationary Gaussian process.

    Args:
        cov: The covariance, in any form that `torchzoo.gp.as_stationary` takes.
        t_max: End of the grid of tabulated distributions; None: 12 Rice means.
        num_points: Points of the grid; tabulating takes memory for its square.

    Raises:
        ValueError: An option out of its range, or a covariance that `as_stationary` refuses.

    Source:
        H. Bengtsson and K. Podgórski, "The Slepian model based independent interval approximation
        of persistency and zero-level exceedance distributions", 2024.

    Example:
        >>> iia = slepian_iia(lambda t: torch.exp(-(t**2) / 2))
        >>> round(iia.mean.item(), 6), round(iia.exponent.item(), 4)
        (3.141593, 0.4115)
    """
    if num_points < 8:
        raise ValueError(f"num_points: expected at least 8, got {num_points}")
    process = SlepianProcess(cov)
    if t_max is None:
        t_max = 12 * torch.pi / float(process.spectral_moment.detach()) ** 0.5
    if not t_max > 0:
        raise ValueError(f"t_max: expected a number above 0, got {t_max}")
    return IndependentIntervalApproximation(process, t_max, num_points)


def check_iia_valid(cov: Any, *, t_max: float | None = None, num_points: int = 1024) -> None:
    """Raise a ValueError where the approximation for a covariance is no distribution."""
    slepian_iia(cov, t_max=t_max, num_points=num_points).check()


def persistency_exponent(cov: Any) -> Tensor:
    """Rate theta of the exponential tail of the time between zero crossings.

    It is differentiable in whatever the covariance depends on, by the implicit function theorem.

    Args:
        cov: The covariance, in any form that `torchzoo.gp.as_stationary` takes.

    Returns:
        The root of `theta int exp(theta t) E(t) dt = 1`, a scalar in float64, per unit of time.

    Raises:
        ValueError: The approximation is no distribution, or its tail is heavier than exponential.

    Source:
        H. Bengtsson and K. Podgórski, 2024.

    Example:
        >>> round(persistency_exponent(lambda t: torch.cosh(t / 2) ** -1.0).item(), 5)
        0.18621
    """
    process = SlepianProcess(cov)
    nodes, weights = _quadrature(process)
    e = process.expected_clipped(nodes)
    at = _first_increase(e)
    if at is not None:
        raise ValueError(
            f"covariance is not monotone at t={nodes[at].item():.4g}, IIA is not a valid "
            "distribution"
        )
    with torch.no_grad():
        low, high = 0.0, 1 / float((weights * e).sum())  # at which the integral is above 1
        for _ in range(200):
            theta = (low + high) / 2
            above = theta * float((weights * e * (theta * nodes).exp()).sum()) > 1
            low, high = (low, theta) if above else (theta, high)
    grown = weights * (nodes * theta).exp()
    slope = float((grown * (1 + theta * nodes) * e.detach()).sum())
    return theta - (theta * (grown * e).sum() - 1) / slope


def _end(process: SlepianProcess) -> float:
    """A time after which E is negligible, a whole number of half widths."""
    start = half_width(process.cov)
    with torch.no_grad():
        ends = start * 2.0 ** (torch.arange(1, 57, dtype=torch.float64) / 4)
        small = (process.expected_clipped(ends).abs() < _NEGLIGIBLE).nonzero()
    if not len(small):
        raise ValueError(
            "cov: expected an exponential tail or a lighter one, got one that is still "
            f"{process.expected_clipped(ends[-1:]).item():.3g} at t={ends[-1].item():.4g}"
        )
    return float(ends[small[0, 0]])


def _quadrature(process: SlepianProcess) -> tuple[Tensor, Tensor]:
    """Nodes and weights of an integral of E over all times, panels of 16 points."""
    import numpy as np

    x, w = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(16))
    step = _end(process) / _PANELS
    starts = step * torch.arange(_PANELS, dtype=torch.float64)
    nodes = starts[:, None] + step * (x + 1) / 2
    return nodes.flatten(), (step * w / 2).repeat(_PANELS)


def _first_increase(e: Tensor) -> int | None:
    """Where E, which starts at 1, first rises by more than rounding, or falls below 0."""
    e = e.detach()
    wrong = torch.cat([e[:1] < 0, (e.diff() > 1e-9) | (e[1:] < -1e-9)]).nonzero()
    return int(wrong[0, 0]) if len(wrong) else None
