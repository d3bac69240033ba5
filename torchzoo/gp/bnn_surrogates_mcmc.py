"""Surrogates whose weights are drawn by Markov chain Monte Carlo.

Y. L. Li, T. G. J. Rudner and A. G. Wilson, "A study of Bayesian neural network surrogates for
Bayesian optimization", 2024. Deviations: by default a proposal takes 20 leapfrog steps, where the
authors' path of 0.008 at a step of 0.02 is one; stochastic gradients see all data, which are few,
and their noise is given instead of learned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from torchzoo.common.samplers import Chain, hmc
from torchzoo.gp.bnn_surrogates_nets import NetworkSurrogate, descend, potential
from torchzoo.gp.bnn_surrogates_posterior import FunctionSamples
from torchzoo.gp.sgmcmc import sghmc

Weights = Mapping[str, Tensor]


class HMCSamples(NamedTuple):
    """Samples of named parameters.

    Attributes:
        samples: `(chains, num_samples, *shape)` by name.
        accept_rate: Share of accepted proposals, `(chains,)`.
        rhat: Split R-hat by name, of the parameters' shapes.
        ess: Effective numbers of samples by name, of the parameters' shapes.
        step_size: Step sizes after burn-in, `(chains,)`.
    """

    samples: dict[str, Tensor]
    accept_rate: Tensor
    rhat: dict[str, Tensor]
    ess: dict[str, Tensor]
    step_size: Tensor


class HMCSampler:
    """Hamiltonian Monte Carlo over the parameters of any function, chains vectorised.

    Args:
        log_density: Log density of one set of parameters, a scalar; it must work under
            `torch.func.vmap`, as `torch.func.functional_call` does.
        params: Where the chains start: tensors by name.
        num_samples: Samples to keep of each chain.
        burn_in: Iterations before, in which step sizes adapt.
        step_size: Step size at the start.
        path_length: Length of a trajectory, in place of the number of its steps.
        num_leapfrog: Steps of a trajectory.
        target_accept: Acceptance rate to adapt to.
        mass: Diagonal of the mass matrix by name; None: ones.
        num_chains: Chains.
        adapt: Whether step sizes adapt.

    Raises:
        ValueError: An option out of its range.

    Source:
        R. M. Neal, "MCMC using Hamiltonian dynamics", 2011.

    Example:
        >>> net, x = torch.nn.Linear(2, 1), torch.randn(20, 2)
        >>> def log_density(params):
        ...     f = torch.func.functional_call(net, params, x)
        ...     prior = sum(p.square().sum() for p in params.values())
        ...     return -((f - x[:, :1]).square().sum() / 0.1 + prior) / 2
        >>> sampler = HMCSampler(
        ...     log_density, dict(net.named_parameters()), num_samples=50, burn_in=50,
        ...     step_size=0.01, num_leapfrog=10, num_chains=3,
        ... )
        >>> sampler.run().samples["weight"].shape
        torch.Size([3, 50, 1, 2])
    """

    def __init__(
        self,
        log_density: Callable[[dict[str, Tensor]], Tensor],
        params: Weights,
        *,
        num_samples: int,
        burn_in: int,
        step_size: float,
        path_length: float | None = None,
        num_leapfrog: int | None = None,
        target_accept: float = 0.8,
        mass: Weights | None = None,
        num_chains: int = 1,
        adapt: bool = True,
    ):
        if not params:
            raise ValueError("params: expected at least one tensor, got none")
        if num_chains < 1:
            raise ValueError(f"num_chains: expected at least 1, got {num_chains}")
        if mass is not None and mass.keys() != params.keys():
            raise ValueError(f"mass: expected {sorted(params)}, got {sorted(mass)}")
        self.log_density, self.num_chains = log_density, num_chains
        self.params = {name: value.detach() for name, value in params.items()}
        self.options: dict[str, Any] = {
            "num_samples": num_samples,
            "burn_in": burn_in,
            "step_size": step_size,
            "path_length": path_length,
            "num_leapfrog": num_leapfrog,
            "target_accept": target_accept,
            "mass": None if mass is None else self._joined(mass),
            "adapt": adapt,
        }

    def run(self, generator: torch.Generator | None = None) -> HMCSamples:
        """Sample.

        Args:
            generator: Draws, on the device of the parameters.
        """
        start = self._joined(self.params).expand(self.num_chains, -1).clone()
        density = torch.func.vmap(lambda flat: self.log_density(self._named(flat)))
        chain = hmc(density, start, generator=generator, **self.options)
        return HMCSamples(
            self._named(chain.samples),
            chain.accept_rate,
            self._named(chain.rhat),
            self._named(chain.ess),
            chain.step_size,
        )

    def _joined(self, values: Weights) -> Tensor:
        return torch.cat([values[name].detach().flatten() for name in self.params])

    def _named(self, flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split([value.numel() for value in self.params.values()], -1)
        pairs = zip(self.params.items(), parts, strict=True)
        return {name: part.reshape(part.shape[:-1] + value.shape) for (name, value), part in pairs}


class HMCSurrogate(NetworkSurrogate):
    """Networks drawn by Hamiltonian Monte Carlo, after a descent to a mode.

    After `fit`, `chain` has acceptance rates, R-hat and effective sample sizes of the weights.

    Args:
        hidden: Widths of the hidden layers.
        prior_var: Variance of the prior of every weight.
        noise_var: Variance of the noise of standardised outputs.
        num_samples: Samples to keep of each chain.
        burn_in: Iterations before, in which step sizes adapt.
        step_size: Step size at the start.
        num_leapfrog: Leapfrog steps of a proposal.
        path_length: In place of their number, steps times step size; the authors' is 0.008.
        num_chains: Chains.
        target_accept: Acceptance rate to adapt to.
        pretrain_steps: Steps of Adam from a random start.
        lr: Their rate.
        warm_start: Whether another fit to a problem of the same shape goes on where the chains
            ended, with their step sizes and no descent.
        grid: Pairs of `prior_var` and `noise_var` to choose from, for each problem, by the density
            of a fifth of the data after a fit to the rest; None: the two above.
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
        >>> surrogate = HMCSurrogate(hidden=(16,), num_samples=40, burn_in=40, pretrain_steps=200)
        >>> posterior = surrogate.fit(x, (6 * x).sin()).posterior(x)
        >>> posterior.mean.shape, posterior.rsample((5,)).shape
        (torch.Size([8, 1]), torch.Size([5, 8, 1]))
    """

    chain: Chain

    def __init__(
        self,
        *,
        hidden: Sequence[int] = (128, 128, 128),
        prior_var: float = 10.0,
        noise_var: float = 0.1,
        num_samples: int = 500,
        burn_in: int = 500,
        step_size: float = 0.02,
        num_leapfrog: int = 20,
        path_length: float | None = None,
        num_chains: int = 1,
        target_accept: float = 0.8,
        pretrain_steps: int = 1000,
        lr: float = 1e-3,
        warm_start: bool = False,
        grid: Sequence[tuple[float, float]] | None = None,
        **kwargs: Any,
    ):
        if num_chains < 1:
            raise ValueError(f"num_chains: expected at least 1, got {num_chains}")
        if pretrain_steps < 0:
            raise ValueError(f"pretrain_steps: expected at least 0, got {pretrain_steps}")
        if grid is not None and not all(p > 0 and s > 0 for p, s in grid):
            raise ValueError(f"grid: expected pairs of numbers above 0, got {grid}")
        super().__init__(hidden=hidden, prior_var=prior_var, noise_var=noise_var, **kwargs)
        self.num_chains, self.step_size, self.grid = num_chains, step_size, grid
        self.pretrain_steps, self.lr, self.warm_start = pretrain_steps, lr, warm_start
        self.options: dict[str, Any] = {
            "num_samples": num_samples,
            "burn_in": burn_in,
            "num_leapfrog": num_leapfrog if path_length is None else None,
            "path_length": path_length,
            "target_accept": target_accept,
        }
        self._last: tuple[Tensor, Tensor] | None = None  # positions and step sizes

    def _sample(self, x: Tensor, z: Tensor) -> Tensor:
        prior = x.new_full(x.shape[:-2], self.prior_var)
        if self.grid:
            prior, self.noise = self._chosen(x, z)
        last = self._last if self.warm_start else None
        shape = (*x.shape[:-2], self.num_chains, self.net.size)
        if last is not None and last[0].shape != shape:
            last = None
        theta, self.chain = self._run(x, z, prior, self.noise, last)
        self._last = self.chain.samples[..., -1, :], self.chain.step_size
        return theta

    def _run(
        self,
        x: Tensor,
        z: Tensor,
        prior: Tensor,
        noise: Tensor,
        last: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Chain]:
        generator = self._draws(x.device)
        shape = (self.num_chains, *x.shape[:-2])

        def energy(theta: Tensor) -> Tensor:  # chains in front
            return potential(self.net, theta, x, z, prior_var=prior, noise_var=noise)

        if last is None:
            start = self.net.initial(shape, x, generator)
            start = descend(energy, start, steps=self.pretrain_steps, lr=self.lr).movedim(0, -2)
            step: Tensor | float = self.step_size
        else:
            start, step = last
        chain = hmc(
            lambda theta: -energy(theta.movedim(-2, 0)).movedim(0, -1),
            start,
            step_size=step,
            generator=generator,
            **self.options,
        )
        return rearrange(chain.samples, "... c s p -> (c s) ... p"), chain

    def _chosen(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """For each problem the pair of the grid that predicts held-out rows best."""
        pairs = torch.tensor(self.grid, dtype=x.dtype, device=x.device)
        shape = (len(pairs), *x.shape[:-2])
        prior, noise = (column.reshape(-1, *[1] * (x.ndim - 2)).expand(shape) for column in pairs.T)
        n = x.shape[-2]
        order = torch.randperm(n, generator=self.generator).to(x.device)
        known, held = order[: math.ceil(0.8 * n)], order[math.ceil(0.8 * n) :]
        rows = x[..., known, :].expand(*shape, -1, -1), z[..., known, :].expand(*shape, -1, -1)
        theta, _ = self._run(*rows, prior, noise, None)
        found = FunctionSamples(self._values(theta, x[..., held, :]), noise[..., None, None])
        best = found.log_prob(z[..., held, :]).sum((-2, -1)).argmax(0)
        return pairs[best][..., 0], pairs[best][..., 1]

    def _state(self) -> dict[str, Tensor]:
        assert self._last is not None
        return super()._state() | {"position": self._last[0], "step_size": self._last[1]}

    def _load(self, state: Mapping[str, Tensor]) -> None:
        super()._load(state)
        self._last = state["position"], state["step_size"]


class SGHMCSurrogate(NetworkSurrogate):
    """Networks drawn by stochastic gradient Hamiltonian Monte Carlo, see `torchzoo.gp.sghmc`.

    Args:
        hidden: Widths of the hidden layers.
        prior_var: Variance of the prior of every weight.
        noise_var: Variance of the noise of standardised outputs.
        num_steps: Steps in all.
        burn_in: How many of them adapt scales.
        keep_every: Steps after which weights are kept.
        lr: Step size.
        mdecay: Friction.
        num_chains: Chains.
        **kwargs: `bounds` and `generator`.

    Shape:
        - X: `(*b, n, d)`
        - Y: `(*b, n, m)`

    Raises:
        ValueError: An option out of its range.

    Source:
        Y. L. Li and others, "A study of Bayesian neural network surrogates for Bayesian
        optimization", 2024; J. T. Springenberg and others, "Bayesian optimization with robust
        Bayesian neural networks", 2016.

    Example:
        >>> x = torch.linspace(0, 1, 8, dtype=torch.float64)[:, None]
        >>> surrogate = SGHMCSurrogate(hidden=(16,), num_steps=300, burn_in=200)
        >>> surrogate.fit(x, (6 * x).sin()).posterior(x).values.shape
        torch.Size([20, 8, 1])
    """

    def __init__(
        self,
        *,
        hidden: Sequence[int] = (128, 128, 128),
        prior_var: float = 10.0,
        noise_var: float = 0.1,
        num_steps: int = 2000,
        burn_in: int = 1000,
        keep_every: int = 5,
        lr: float = 1e-2,
        mdecay: float = 0.05,
        num_chains: int = 1,
        **kwargs: Any,
    ):
        if num_chains < 1:
            raise ValueError(f"num_chains: expected at least 1, got {num_chains}")
        if not 0 <= burn_in <= num_steps - keep_every:
            raise ValueError(
                f"burn_in: expected within [0, {num_steps - keep_every}], got {burn_in}"
            )
        super().__init__(hidden=hidden, prior_var=prior_var, noise_var=noise_var, **kwargs)
        self.num_chains = num_chains
        self.options: dict[str, Any] = {
            "num_samples": (num_steps - burn_in) // keep_every,
            "burn_in": burn_in,
            "keep_every": keep_every,
            "lr": lr,
            "mdecay": mdecay,
        }

    def _sample(self, x: Tensor, z: Tensor) -> Tensor:
        generator = self._draws(x.device)
        start = self.net.initial((self.num_chains, *x.shape[:-2]), x, generator)

        def energy(theta: Tensor) -> Tensor:
            return potential(
                self.net, theta, x, z, prior_var=self.prior_var, noise_var=self.noise_var
            )

        draws = sghmc(energy, start, generator=generator, **self.options)
        return rearrange(draws, "s c ... p -> (c s) ... p")
