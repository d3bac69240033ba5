"""Stochastic gradient Hamiltonian Monte Carlo whose scales are found during burn-in.

A step of size e and friction c along the gradient g of a potential U, of which exp(-U) is the
density to be sampled, is elementwise

    burn-in only:   r = 1 / (tau + 1),   tau <- tau - tau gbar^2 / vhat + 1,
                    gbar <- gbar + r (g - gbar),   vhat <- vhat + r (g^2 - vhat),   all from 1,
    every step:     m = vhat^(-1/2),
                    v <- v - e^2 m g - c v + N(0, 2 e^2 c m - b e^4),   theta <- theta + v,

so that vhat stands still once samples are taken. For a quadratic U a coordinate of curvature h
ends with the variance `(1 + a / (4 - 2 c - a)) / h`, where `a = e^2 m h`; as vhat follows the last
few gradients where they agree, m is large in chains that were near a mode, so e has to be small.

J. T. Springenberg, A. Klein, S. Falkner and F. Hutter, "Bayesian optimization with robust Bayesian
neural networks", 2016, section 3.2; T. Chen, E. B. Fox and C. Guestrin, "Stochastic gradient
Hamiltonian Monte Carlo", 2014. Deviation: b, an estimate of the noise in g that the first paper
fixes at 1, is 0 by default, as with b = 1 there is no noise at all where `m < e^2 / (2 c)`, which
gradients above a thousand reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Position = TypeVar("Position", Tensor, Mapping[str, Tensor])


class AdaptiveSGHMC(torch.optim.Optimizer):
    """Optimizer whose parameters wander through a distribution instead of settling.

    All is elementwise: chains are leading dimensions of the parameters, whose potentials are added.

    Args:
        params: Parameters, or groups of them.
        lr: Step size e.
        mdecay: Friction c, within (0, 1].
        burn_in: Steps during which the scales adapt.
        noise_estimate: b, how much of the noise is taken to be in the gradients already.
        generator: Draws, on the device of the parameters.

    Raises:
        ValueError: An option out of its range.

    Source:
        J. T. Springenberg and others, "Bayesian optimization with robust Bayesian neural networks",
        2016, section 3.2.

    Example:
        >>> x = torch.zeros(1000, requires_grad=True)
        >>> sampler = AdaptiveSGHMC([x], lr=0.1, burn_in=100, generator=torch.manual_seed(0))
        >>> for _ in range(300):
        ...     sampler.zero_grad()
        ...     ((x - 3) ** 2 / 2).sum().backward()
        ...     sampler.step()
        >>> round(x.mean().item()), round(x.std().item())
        (3, 1)
    """

    generator: torch.Generator | None = None

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        mdecay: float = 0.05,
        burn_in: int = 2000,
        *,
        noise_estimate: float = 0.0,
        generator: torch.Generator | None = None,
    ):
        if not lr > 0:
            raise ValueError(f"lr: expected above 0, got {lr}")
        if not 0 < mdecay <= 1:
            raise ValueError(f"mdecay: expected within (0, 1], got {mdecay}")
        if burn_in < 0:
            raise ValueError(f"burn_in: expected at least 0, got {burn_in}")
        if not noise_estimate >= 0:
            raise ValueError(f"noise_estimate: expected at least 0, got {noise_estimate}")
        options = {"lr": lr, "mdecay": mdecay, "burn_in": burn_in, "noise_estimate": noise_estimate}
        super().__init__(params, options)
        self.generator = generator

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move all parameters that have a gradient.

        Args:
            closure: Computes the potential and its gradients afresh.

        Returns:
            What the closure gives.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(self._momentum(p.grad, self.state[p], group))
        return loss

    def _momentum(self, g: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> Tensor:
        if not state:
            state["step"] = 0
            state["momentum"] = torch.zeros_like(g)
            for name in ("tau", "mean_grad", "mean_square"):
                state[name] = torch.ones_like(g)
        if state["step"] < group["burn_in"]:
            _adapt(g, state["tau"], state["mean_grad"], state["mean_square"])
        state["step"] += 1
        e2, c = group["lr"] ** 2, group["mdecay"]
        m = state["mean_square"].clamp_min(1e-16).rsqrt()
        variance = (2 * e2 * c * m - group["noise_estimate"] * e2**2).clamp_min_(1e-16)
        noise = torch.empty_like(g).normal_(generator=self.generator)
        momentum: Tensor = state["momentum"]
        return momentum.mul_(1 - c).addcmul_(m, g, value=-e2).addcmul_(variance.sqrt_(), noise)


def _adapt(g: Tensor, tau: Tensor, mean_grad: Tensor, mean_square: Tensor) -> None:
    """Move the averages in place; their rate comes from tau before it moves."""
    rate = 1 / (tau + 1)
    tau.mul_(1 - mean_grad.square() / mean_square.clamp_min(1e-16)).add_(1)
    mean_grad.add_(rate * (g - mean_grad))
    mean_square.add_(rate * (g.square() - mean_square))


def sghmc(
    potential: Callable[[Position], Tensor],
    start: Position,
    *,
    num_samples: int,
    burn_in: int = 2000,
    keep_every: int = 200,
    lr: float = 1e-2,
    mdecay: float = 0.05,
    noise_estimate: float = 0.0,
    generator: torch.Generator | None = None,
) -> Position:
    """Sample from the density `exp(-potential)` by `AdaptiveSGHMC`.

    Args:
        potential: Minus the log density up to a constant, of a position like `start`. May be noisy,
            from a fresh minibatch at each call, its likelihood scaled to all data. Chains that are
            leading dimensions of the position give a value each, or their sum.
        start: Where the chains start: a tensor, or tensors by name; left as they are.
        num_samples: Positions to keep.
        burn_in: Steps before, during which the scales adapt.
        keep_every: Steps after which the position is kept.
        lr: Step size.
        mdecay: Friction.
        noise_estimate: See `AdaptiveSGHMC`.
        generator: Draws, on the device of the positions.

    Shape:
        - start: `(...)`, leading dimensions for chains
        - output: `(num_samples, ...)`

    Returns:
        Positions, of the type of `start`.

    Raises:
        ValueError: An option out of its range.
        RuntimeError: A chain left the finite numbers.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> draws = sghmc(
        ...     lambda x: (x**2).sum(-1) / 2, torch.randn(100, 2), num_samples=50, lr=0.02,
        ...     mdecay=0.02, burn_in=100, keep_every=20, generator=generator,
        ... )
        >>> draws.shape, round(draws.var().item())
        (torch.Size([50, 100, 2]), 1)
    """
    if num_samples < 1:
        raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
    if keep_every < 1:
        raise ValueError(f"keep_every: expected at least 1, got {keep_every}")
    alone = isinstance(start, Tensor)
    named: Iterable[tuple[str, Tensor]] = (
        [("", start)] if isinstance(start, Tensor) else start.items()
    )
    leaves = {name: x.detach().clone().requires_grad_() for name, x in named}
    position = cast(Position, leaves[""] if alone else leaves)
    sampler = AdaptiveSGHMC(
        leaves.values(), lr, mdecay, burn_in, noise_estimate=noise_estimate, generator=generator
    )
    kept: dict[str, list[Tensor]] = {name: [] for name in leaves}
    for index in range(1, burn_in + num_samples * keep_every + 1):
        with torch.enable_grad():
            value = potential(position).sum()
        slopes = torch.autograd.grad(value, list(leaves.values()))
        for leaf, slope in zip(leaves.values(), slopes, strict=True):
            leaf.grad = slope
        sampler.step()
        if index > burn_in and (index - burn_in) % keep_every == 0:
            for name, leaf in leaves.items():
                kept[name].append(leaf.detach().clone())
    samples = {name: torch.stack(draws) for name, draws in kept.items()}
    if not all(draws[-1].isfinite().all() for draws in samples.values()):
        raise RuntimeError(f"a chain left the finite numbers; lr {lr:g} may be too large")
    return cast(Position, samples[""] if alone else samples)
