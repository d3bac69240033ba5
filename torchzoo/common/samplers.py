"""Markov chain Monte Carlo on plain functions, with diagnostics.

Hamiltonian Monte Carlo moves (x, p), p ~ N(0, M), along the dynamics of

    H(x, p) = -log pi(x) + p^T M^-1 p / 2

by leapfrog steps p += e/2 grad log pi, x += e M^-1 p, p += e/2 grad log pi, and accepts the end
with probability min(1, exp(H_start - H_end)); without that test the samples follow another density.
In burn-in each chain finds its step e by dual averaging of its acceptance rate.

R. M. Neal, "MCMC using Hamiltonian dynamics", 2011; M. D. Hoffman and A. Gelman, "The No-U-Turn
sampler", 2014, section 3.2; A. Gelman and others, "Bayesian data analysis", 3rd edition, 2013,
sections 11.4 and 11.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

MAX_LEAPFROG = 200
LogDensity = Callable[[Tensor], Tensor]


class Chain(NamedTuple):
    """What a sampler drew.

    Attributes:
        samples: Positions after burn-in, `(..., chains, num_samples, d)`.
        log_density: Their log densities, `(..., chains, num_samples)`.
        accept_rate: Share of accepted proposals after burn-in, `(..., chains)`.
        rhat: Split R-hat of each coordinate, `(..., d)`; about 1 where chains agree.
        ess: Effective number of samples of each coordinate, all chains together, `(..., d)`.
        step_size: Step size after burn-in, `(..., chains)`.
    """

    samples: Tensor
    log_density: Tensor
    accept_rate: Tensor
    rhat: Tensor
    ess: Tensor
    step_size: Tensor


class Position(NamedTuple):
    """A position with its log density and the gradient of that.

    Attributes:
        x: The position, `(..., d)`.
        log_density: `(...)`.
        gradient: `(..., d)`.
    """

    x: Tensor
    log_density: Tensor
    gradient: Tensor


def position(log_density: LogDensity, x: Tensor) -> Position:
    """Evaluate a log density, whose rows are independent, and its gradient.

    Example:
        >>> position(lambda x: -x.square().sum(-1) / 2, torch.tensor([[1.0, 2.0]])).gradient
        tensor([[-1., -2.]])
    """
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        value = log_density(leaf)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return Position(leaf.detach(), value.detach(), gradient)


def leapfrog(
    log_density: LogDensity,
    start: Position,
    momentum: Tensor,
    *,
    step_size: Tensor | float,
    num_steps: int | Tensor,
    mass: Tensor | float = 1.0,
) -> tuple[Position, Tensor]:
    """Follow Hamiltonian dynamics; from the end with the momentum reversed it leads back.

    Args:
        log_density: Log density of independent rows.
        start: Where to start, with its gradient.
        momentum: The momentum there.
        step_size: Length of a step, for all rows or each.
        num_steps: Steps, for all rows or each.
        mass: Diagonal of the mass matrix.

    Shape:
        - momentum: `(..., d)`
        - step_size, num_steps: a number, or `(...)`
        - mass: a number, or `(d,)`

    Returns:
        The end and the momentum there.

    Source:
        R. M. Neal, "MCMC using Hamiltonian dynamics", 2011, equations 2.28 to 2.30.

    Example:
        >>> well = lambda x: -x.square().sum(-1) / 2
        >>> start = position(well, torch.tensor([[1.0]]))
        >>> end, p = leapfrog(well, start, torch.zeros(1, 1), step_size=0.01, num_steps=157)
        >>> abs(end.x.item()) < 0.01, round(p.item(), 3)  # a quarter of the period
        (True, -1.0)
    """
    counts = torch.as_tensor(num_steps, device=momentum.device)
    step = torch.as_tensor(step_size, device=momentum.device, dtype=momentum.dtype)
    at = start
    for index in range(int(counts.max())):
        move = (step * (index < counts))[..., None]  # 0 for rows that have arrived
        momentum = momentum + move / 2 * at.gradient
        at = position(log_density, at.x + move * momentum / mass)
        momentum = momentum + move / 2 * at.gradient
    return at, momentum


class _StepSize:
    """Step sizes by dual averaging towards an acceptance rate, one a chain."""

    gamma, t0, kappa = 0.05, 10.0, 0.75

    def __init__(self, start: Tensor, target: float):
        self.now, self.target = start, target
        self.mu = (10 * start).log()
        self.error = torch.zeros_like(start)
        self.log_mean = torch.zeros_like(start)
        self.t = 0

    def update(self, accept: Tensor) -> None:
        self.t += 1
        rate, weight = 1 / (self.t + self.t0), self.t**-self.kappa
        self.error = (1 - rate) * self.error + rate * (self.target - accept)
        log_now = self.mu - math.sqrt(self.t) / self.gamma * self.error
        self.log_mean = weight * log_now + (1 - weight) * self.log_mean
        self.now = log_now.exp()

    def settle(self) -> None:
        if self.t:
            self.now = self.log_mean.exp()


@torch.no_grad()
def hmc(
    log_density: LogDensity,
    x0: Tensor,
    *,
    num_samples: int,
    burn_in: int,
    step_size: float | Tensor,
    num_leapfrog: int | None = None,
    path_length: float | None = None,
    target_accept: float = 0.8,
    mass: Tensor | None = None,
    adapt: bool = True,
    generator: torch.Generator | None = None,
) -> Chain:
    """Sample by Hamiltonian Monte Carlo, all chains at once.

    Args:
        log_density: Log density up to a constant of positions, a value a chain; differentiable.
        x0: Where the chains start; dimensions before the chains are separate problems.
        num_samples: Samples to keep of each chain.
        burn_in: Iterations before, in which step sizes adapt.
        step_size: Size of a leapfrog step at the start, for all chains or each.
        num_leapfrog: Leapfrog steps of a proposal.
        path_length: In place of their number: steps times step size. Halved where it would take
            more than 200 steps.
        target_accept: Acceptance rate to adapt to.
        mass: Diagonal of the mass matrix; None: ones.
        adapt: Whether step sizes adapt in burn-in.
        generator: Draws, on the device of x0.

    Shape:
        - x0: `(..., chains, d)`
        - log_density: `(..., chains, d)` to `(..., chains)`
        - mass: `(d,)`

    Returns:
        A `Chain`.

    Raises:
        ValueError: An option out of its range, or a start without a finite log density.

    Source:
        R. M. Neal, "MCMC using Hamiltonian dynamics", 2011; step sizes: M. D. Hoffman and
        A. Gelman, "The No-U-Turn sampler", 2014, algorithm 5.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> chain = hmc(
        ...     lambda x: -(x - 3).square().sum(-1) / 2, torch.zeros(4, 2), num_samples=200,
        ...     burn_in=100, step_size=0.1, num_leapfrog=8, generator=generator,
        ... )
        >>> chain.samples.shape, round(chain.samples.mean().item(), 1)
        (torch.Size([4, 200, 2]), 3.0)
    """
    _check(x0, num_samples, burn_in, num_leapfrog, path_length, target_accept)
    steps = torch.as_tensor(step_size, dtype=x0.dtype, device=x0.device).expand(x0.shape[:-1])
    if not (steps > 0).all():
        raise ValueError(f"step_size: expected above 0, got {step_size}")
    if mass is not None and (mass.shape != x0.shape[-1:] or not (mass > 0).all()):
        raise ValueError(f"mass: expected ({x0.shape[-1]},) numbers above 0, got {mass}")
    weight = torch.ones_like(x0[..., :1]) if mass is None else mass
    at = position(log_density, x0)
    if at.log_density.shape != x0.shape[:-1] or not at.log_density.isfinite().all():
        raise ValueError(f"x0: expected finite log densities, a chain each, got {at.log_density}")
    size = _StepSize(steps, target_accept)
    path = None if path_length is None else torch.full_like(steps, path_length)
    samples, densities, accepted = [], [], torch.zeros_like(steps)
    for index in range(burn_in + num_samples):
        if index == burn_in:
            size.settle()
        counts: int | Tensor = num_leapfrog or 0
        if path is not None:
            path = torch.where(path / size.now > MAX_LEAPFROG, path / 2, path)
            counts = (path / size.now).ceil().clamp(1, MAX_LEAPFROG)
        momentum = _normal(x0, generator) * weight.sqrt()
        end, last = leapfrog(
            log_density, at, momentum, step_size=size.now, num_steps=counts, mass=weight
        )
        kinetic = ((momentum.square() - last.square()) / weight).sum(-1) / 2
        gain = (end.log_density - at.log_density + kinetic).nan_to_num(-math.inf, math.inf)
        coin = torch.empty_like(gain).uniform_(generator=generator)
        accept = coin.log() < gain
        at = Position(*(_where(accept, new, old) for new, old in zip(end, at, strict=True)))
        if index < burn_in and adapt:
            size.update(gain.clamp_max(0).exp())
        elif index >= burn_in:
            accepted += accept
            samples.append(at.x)
            densities.append(at.log_density)
    found = torch.stack(samples, -2)
    return Chain(
        found,
        torch.stack(densities, -1),
        accepted / num_samples,
        split_rhat(found),
        effective_sample_size(found),
        size.now,
    )


def split_rhat(samples: Tensor) -> Tensor:
    """Potential scale reduction with every chain split in halves; NaN for fewer than 4 samples.

    Shape:
        - samples: `(..., chains, n, d)`
        - output: `(..., d)`

    Source:
        A. Gelman and others, "Bayesian data analysis", 3rd edition, 2013, equations 11.3 and 11.4.

    Example:
        >>> draws = torch.randn(4, 1000, 1, generator=torch.Generator().manual_seed(0))
        >>> apart = draws + torch.arange(4.0)[:, None, None]
        >>> round(split_rhat(draws).item(), 2), split_rhat(apart).item() > 1.5
        (1.0, True)
    """
    half = samples.shape[-2] // 2
    if half < 2:
        return samples.new_full((*samples.shape[:-3], samples.shape[-1]), math.nan)
    halves = torch.cat([samples[..., :half, :], samples[..., -half:, :]], -3)
    within, pooled = _variances(halves)
    return (pooled / within).sqrt()


def effective_sample_size(samples: Tensor) -> Tensor:
    """How many independent samples would give the mean as well, from all chains together.

    Autocorrelations are summed in pairs while these are positive, and made to fall.

    Shape:
        - samples: `(..., chains, n, d)`
        - output: `(..., d)`

    Source:
        A. Gelman and others, "Bayesian data analysis", 3rd edition, 2013, section 11.5; C. J.
        Geyer, "Practical Markov chain Monte Carlo", 1992, section 3.3.

    Example:
        >>> draws = torch.randn(4, 1000, 1, generator=torch.Generator().manual_seed(0))
        >>> bool(abs(effective_sample_size(draws) / 4000 - 1) < 0.1)
        True
    """
    chains, n = samples.shape[-3:-1]
    if n < 4:
        return samples.new_full((*samples.shape[:-3], samples.shape[-1]), math.nan)
    centred = samples - samples.mean(-2, keepdim=True)
    spectrum = torch.fft.rfft(centred, 2 * n, dim=-2)
    lagged = torch.fft.irfft(spectrum.abs().square(), 2 * n, dim=-2)[..., :n, :] / n
    within, pooled = _variances(samples)
    rho = 1 - (within[..., None, :] - lagged.mean(-3)) / pooled[..., None, :]
    even = n - n % 2
    pairs = rho[..., 0:even:2, :] + rho[..., 1:even:2, :]
    positive = (pairs > 0).cumprod(-2)
    tau = 2 * (pairs.cummin(-2).values * positive).sum(-2) - 1
    total = chains * n
    return total / tau.clamp_min(1 / math.log10(total))


def _variances(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Mean variance within chains, and the pooled estimate of the variance."""
    chains, n = samples.shape[-3:-1]
    within = samples.var(-2).mean(-2)
    between = samples.mean(-2).var(-2) if chains > 1 else torch.zeros_like(within)
    return within, (n - 1) / n * within + between


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.empty_like(like).normal_(generator=generator)


def _where(accept: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(accept[..., None] if new.ndim > accept.ndim else accept, new, old)


def _check(
    x0: Tensor,
    num_samples: int,
    burn_in: int,
    num_leapfrog: int | None,
    path_length: float | None,
    target_accept: float,
) -> None:
    if x0.ndim < 2 or not x0.is_floating_point():
        raise ValueError(f"x0: expected floats (..., chains, d), got {x0.dtype} {tuple(x0.shape)}")
    if num_samples < 1:
        raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
    if burn_in < 0:
        raise ValueError(f"burn_in: expected at least 0, got {burn_in}")
    if (num_leapfrog is None) == (path_length is None):
        raise ValueError(
            "num_leapfrog: expected it or path_length, and not both, got "
            f"{num_leapfrog} and {path_length}"
        )
    if num_leapfrog is not None and num_leapfrog < 1:
        raise ValueError(f"num_leapfrog: expected at least 1, got {num_leapfrog}")
    if path_length is not None and not path_length > 0:
        raise ValueError(f"path_length: expected above 0, got {path_length}")
    if not 0 < target_accept < 1:
        raise ValueError(f"target_accept: expected within (0, 1), got {target_accept}")
