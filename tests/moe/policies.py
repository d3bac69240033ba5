"""Mixture policies of fixed parts, torch's own distribution of them, and values of actions."""

import torch
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    Normal,
    TanhTransform,
    TransformedDistribution,
)

from torchzoo.moe import SquashedGaussianMixture

F64 = torch.float64


def draw(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def parts(*batch, k=3, a=2, seed=0, dtype=F64, grad=False):
    """Logits, means and log-deviations of a mixture whose primitives overlap."""
    values = (
        draw(*batch, k, seed=seed),
        0.7 * draw(*batch, k, a, seed=seed + 1),
        0.3 * draw(*batch, k, a, seed=seed + 2) - 0.7,
    )
    return tuple(value.to(dtype).requires_grad_(grad) for value in values)


def reference(logits, loc, log_std, squash=True):
    """The same distribution, made of torch's."""
    mixture = MixtureSameFamily(
        Categorical(logits=logits), Independent(Normal(loc, log_std.exp()), 1)
    )
    return TransformedDistribution(mixture, TanhTransform()) if squash else mixture


def bowl(s, a):
    """A value with its top at 0.3, not symmetric in the coordinates."""
    return -((a - 0.3).square() * torch.arange(1, a.shape[-1] + 1, dtype=a.dtype)).sum(-1)


def wavy(s, a):
    """A value that no primitive matches exactly."""
    return (3 * a + s.sum(-1, keepdim=True)).sin().sum(-1) + 0.5 * a.square().sum(-1)


def fixed(*values, **options):
    """A policy of fixed parts, whatever the state."""
    return lambda s: SquashedGaussianMixture(*values, **options)
