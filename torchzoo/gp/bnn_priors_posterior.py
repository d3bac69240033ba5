"""Posteriors over the weights of a network, sampled.

The potential is that of all N data, estimated from B of them,

    U(w) = -N / B sum log p(y_i | f(x_i; w)) - log p(w),

for several chains, and several data sets of one size, at once.

B.-H. Tran, S. Rossi, D. Milios and M. Filippone, "All you need is a good functional prior for
Bayesian deep learning", 2022, section 2.2. Deviation: chains start at draws from the prior.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from torchzoo.gp.bnn_priors import PriorNet
from torchzoo.gp.posterior import GaussianPosterior
from torchzoo.gp.sgmcmc import sghmc

Likelihood = Literal["gaussian", "categorical"]


def sample_posterior(
    net: PriorNet,
    x: Tensor,
    y: Tensor,
    *,
    likelihood: Likelihood = "gaussian",
    noise: float | Tensor = 0.1,
    num_samples: int = 30,
    discard: int = 10,
    chains: int = 4,
    batch_size: int = 32,
    burn_in: int = 2000,
    keep_every: int = 200,
    lr: float = 1e-2,
    mdecay: float = 0.05,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Sample weights given data, by stochastic gradient Hamiltonian Monte Carlo.

    Args:
        net: The network and the prior of its weights.
        x: Inputs; leading dimensions are data sets that have nothing to do with each other.
        y: Targets; or classes, whose logits the network gives.
        likelihood: `"gaussian"` or `"categorical"`.
        noise: Variance of Gaussian noise, one or one for each data set.
        num_samples: Samples to keep of each chain.
        discard: Samples before those that are dropped, once scales no longer adapt.
        chains: Independent chains for each data set.
        batch_size: Data B of a step, others for each chain; at least N means all.
        burn_in: Steps during which the scales adapt.
        keep_every: Steps from sample to sample.
        lr: Step size.
        mdecay: Friction.
        generator: Draws on the device of the network.

    Shape:
        - x: `(*sets, N, D)`
        - y: `(*sets, N, O)`, or classes `(*sets, N)`
        - noise: `()` or `(*sets)`

    Returns:
        By name, tensors `(num_samples, chains, *sets, ...)`.

    Raises:
        ValueError: Shapes that don't fit, or an option out of its range.
        RuntimeError: A chain left the finite numbers.

    Example:
        >>> from torchzoo.gp import GaussianPriorNet
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> net, generator = GaussianPriorNet([1, 10, 1]), torch.Generator().manual_seed(0)
        >>> samples = sample_posterior(
        ...     net, x, x.sin(), num_samples=5, discard=2, burn_in=50, keep_every=10,
        ...     generator=generator,
        ... )
        >>> samples["0.weight"].shape, predict(net, samples, x).mean.shape
        (torch.Size([5, 4, 10, 1]), torch.Size([20, 1]))
    """
    _check(x, y, likelihood)
    for name, count in {"chains": chains, "batch_size": batch_size}.items():
        if count < 1:
            raise ValueError(f"{name}: expected at least 1, got {count}")
    if discard < 0:
        raise ValueError(f"discard: expected at least 0, got {discard}")
    sets, rows = x.shape[:-2], x.shape[-2]
    variance = torch.as_tensor(noise, device=x.device, dtype=x.dtype)
    if not (variance > 0).all():
        raise ValueError(f"noise: expected above 0, got {noise}")
    lead = (chains, *sets)
    with torch.no_grad():
        drawn = net.sample_weights(chains * sets.numel(), generator=generator)
    start = {name: w.reshape(*lead, *w.shape[1:]) for name, w in drawn.items()}
    all_x, all_y = x.expand(chains, *x.shape), y.expand(chains, *y.shape)

    def potential(weights: Mapping[str, Tensor]) -> Tensor:
        some_x, some_y = all_x, all_y
        if batch_size < rows:
            picked = torch.randint(rows, (*lead, batch_size), generator=generator, device=x.device)
            some_x, some_y = _rows(all_x, picked), _rows(all_y, picked)
        f = net.functions(weights, some_x, paired=True)
        fit = log_likelihood(f, some_y, likelihood, variance)
        return -fit * (rows / some_x.shape[-2]) - net.log_prior(weights)

    samples = sghmc(
        potential,
        start,
        num_samples=num_samples + discard,
        burn_in=burn_in,
        keep_every=keep_every,
        lr=lr,
        mdecay=mdecay,
        generator=generator,
    )
    return {name: w[discard:] for name, w in samples.items()}


def predict(
    net: PriorNet,
    samples: Mapping[str, Tensor],
    x: Tensor,
    *,
    likelihood: Likelihood = "gaussian",
    noise: float | Tensor = 0.1,
) -> GaussianPosterior | Tensor:
    """Average over sampled weights.

    Args:
        net: The network.
        samples: Of `sample_posterior`.
        x: Inputs, for each of its data sets.
        likelihood: `"gaussian"` or `"categorical"`.
        noise: Variance of Gaussian noise.

    Shape:
        - x: `(*sets, N, D)`
        - output: mean and variance `(*sets, N, O)`, or probabilities

    Returns:
        Mean and variance of the functions, the noise beside; or probabilities of classes.

    Raises:
        ValueError: Shapes that don't fit, or an unknown likelihood.
    """
    if likelihood not in ("gaussian", "categorical"):
        raise ValueError(f"likelihood: expected 'gaussian' or 'categorical', got {likelihood!r}")
    lead = net.lead(samples)
    with torch.no_grad():
        f = net.functions(samples, x.expand(*lead[:2], *x.shape), paired=True)
    if likelihood == "categorical":
        return f.softmax(-1).mean((0, 1))
    mean, variance = f.mean((0, 1)), f.var((0, 1), correction=0)
    spread = torch.as_tensor(noise, device=f.device, dtype=f.dtype)
    return GaussianPosterior(mean, variance, spread[..., None, None].expand_as(mean))


def log_likelihood(
    f: Tensor, y: Tensor, likelihood: Likelihood = "gaussian", noise: float | Tensor = 0.1
) -> Tensor:
    """Log likelihood of data, summed over rows and outputs.

    Args:
        f: What the network gives.
        y: Targets, or classes.
        likelihood: `"gaussian"` or `"categorical"`.
        noise: Variance of Gaussian noise.

    Shape:
        - f: `(..., N, O)`
        - y: `(..., N, O)`, or classes `(..., N)`
        - noise: broadcasts with `(...)`
        - output: `(...)`
    """
    if likelihood == "categorical":
        return F.log_softmax(f, -1).gather(-1, y[..., None]).sum((-2, -1))
    variance = torch.as_tensor(noise, device=f.device, dtype=f.dtype)[..., None, None]
    density = torch.distributions.Normal(f, variance.sqrt(), validate_args=False)
    return density.log_prob(y).sum((-2, -1))


def _rows(values: Tensor, picked: Tensor) -> Tensor:
    """Rows of `(*lead, N, ...)` by `(*lead, B)` indices."""
    depth = picked.ndim - 1
    index = picked.reshape(*picked.shape, *[1] * (values.ndim - depth - 1))
    return values.gather(depth, index.expand(*picked.shape, *values.shape[depth + 1 :]))


def _check(x: Tensor, y: Tensor, likelihood: Likelihood) -> None:
    if likelihood not in ("gaussian", "categorical"):
        raise ValueError(f"likelihood: expected 'gaussian' or 'categorical', got {likelihood!r}")
    if x.ndim < 2 or not x.shape[-2]:
        raise ValueError(f"x: expected (*sets, N, D), got {tuple(x.shape)}")
    rows = y.shape if likelihood == "categorical" else y.shape[:-1]
    if rows != x.shape[:-1]:
        last = "" if likelihood == "categorical" else ", O"
        expected = ", ".join(map(str, x.shape[:-1]))
        raise ValueError(f"y: expected ({expected}{last}), got {tuple(y.shape)}")
