"""EAFO: how to change an activation for a given input density, so that its output's entropy falls.

H. Sun, Z. Wu, B. Xia, P. Chang, Z. Dong, Y. Yuan, Y. Chang and X. Wang, "A Method on Searching
Better Activation Functions", 2024. An input of density p through a monotone f has the output
density q = p / f', whose entropy, as a functional of the inverse x(y), is

    H = −∫ p(x) x' ln(p(x) x') dy,   δH = ∫ (p'(x) x' + p(x) x''/x') η dy = ∫ (dq/dx) η dy,

so that x(y) + t η(x(y)) with η = −dq/dx lowers it at the rate −∫ (dq/dx)² f' dx. To first order
that changes f into f − t f' η. Nothing changes where q is constant, so for f = lo + (hi − lo) CDF
of p, whose output is uniform: the entropy's maximum, the worst activation between these bounds.

Deviations: none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.func import jvp

Elementwise = Callable[[Tensor], Tensor]
Density = Distribution | Elementwise


def entropy_correction(
    f: Elementwise, density: Density, x: Tensor, *, df: Elementwise | None = None
) -> Tensor:
    """The direction η in which to move the inverse of an activation for its entropy to fall.

    Args:
        f: The activation, elementwise and increasing, in operations that torch differentiates.
        density: Density p of the input: a distribution, or a function of x.
        x: Where to evaluate, any shape; float64 is advised.
        df: The derivative of f, where it is known in closed form.

    Shape:
        - x: `(...)`
        - output: `(...)`

    Returns:
        η(x) = −d/dx (p(x) / f'(x)), differentiable.

    Raises:
        ValueError: f' is not above 0 everywhere on x.

    Source:
        H. Sun et al., "A Method on Searching Better Activation Functions", 2024: the first
        variation of the entropy, here in terms of x.

    Example:
        >>> x = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
        >>> entropy_correction(lambda x: x, torch.distributions.Normal(0.0, 1.0), x)
        tensor([0.0000, 0.2420, 0.1080], dtype=torch.float64)
    """
    slope = _derivative(f, x) if df is None else df(x)
    falling = ~(slope.detach() > 0)
    if falling.any():
        where, value = x.detach()[falling][0].item(), slope.detach()[falling][0].item()
        raise ValueError(f"f: expected a derivative above 0 on x, got {value:g} at x = {where:g}")
    return _direction(f, density, x, df)


def corrected(f: Elementwise, density: Density, eps: float) -> nn.Module:
    """An activation moved by `eps` along its entropy correction.

    Args:
        f: As for `entropy_correction`; it may be flat in places, which stay as they are.
        density: Density p of the input.
        eps: How far; positive lowers the entropy of the output, to first order.

    Returns:
        A module that computes f(x) − eps f'(x) η(x).

    Source:
        H. Sun et al., "A Method on Searching Better Activation Functions", 2024.

    Example:
        >>> act = corrected(torch.relu, torch.distributions.Normal(0.0, 1.0), -1.0)
        >>> act(torch.tensor([-1.0, 1.0]))  # 1 + exp(-1/2) / sqrt(2 pi)
        tensor([0.0000, 1.2420])
    """
    return _Corrected(f, density, eps)


class _Corrected(nn.Module):
    def __init__(self, f: Elementwise, density: Density, eps: float):
        super().__init__()
        self.f, self.density, self.eps = f, density, eps

    def forward(self, x: Tensor) -> Tensor:
        slope = _derivative(self.f, x)
        moved = slope * _direction(self.f, self.density, x, None)
        return self.f(x) - self.eps * torch.where(slope > 0, moved, 0.0)

    def extra_repr(self) -> str:
        return f"eps={self.eps:g}"


def worst_activation(density: Distribution, lo: float = 0.0, hi: float = 1.0) -> Elementwise:
    """The activation between two bounds whose output has the largest entropy.

    Args:
        density: Distribution of the input, one that has a `cdf`.
        lo: Lower bound.
        hi: Upper bound, above `lo`.

    Returns:
        The function lo + (hi − lo) CDF(x); its entropy correction is 0.

    Raises:
        ValueError: `hi` is not above `lo`.

    Source:
        H. Sun et al., "A Method on Searching Better Activation Functions", 2024: the worst
        activation function with boundary conditions (WAFBC).

    Example:
        >>> worst_activation(torch.distributions.Normal(0.0, 1.0), -1.0, 1.0)(torch.tensor(0.0))
        tensor(0.)
    """
    if not lo < hi:
        raise ValueError(f"hi: expected a number above lo = {lo}, got {hi}")
    return lambda x: lo + (hi - lo) * density.cdf(x)


def output_entropy(f: Elementwise, samples: Tensor, *, method: str = "vasicek") -> float:
    """Estimate the differential entropy of an activation's output, in nats.

    Args:
        f: The activation; its output must not take single values with positive probability, as
            ReLU's takes 0: its entropy is minus infinity.
        samples: Draws of the input, any shape.
        method: An estimator of `scipy.stats.differential_entropy`: `"vasicek"`, `"van es"`,
            `"ebrahimi"` or `"correa"`.

    Returns:
        The estimate.

    Raises:
        ValueError: `method` is unknown, or there are fewer than 4 samples.

    Source:
        O. Vasicek, "A Test for Normality Based on Sample Entropy", 1976.

    Example:
        >>> samples = torch.rand(10000, generator=torch.Generator().manual_seed(0))
        >>> round(output_entropy(lambda x: 2 * x, samples), 1)  # ln 2
        0.7
    """
    from scipy.stats import differential_entropy

    if method not in (known := ("vasicek", "van es", "ebrahimi", "correa")):
        raise ValueError(f"method: expected one of {', '.join(known)}, got {method!r}")
    if samples.numel() < 4:
        raise ValueError(f"samples: expected at least 4, got {samples.numel()}")
    with torch.no_grad():
        values = f(samples.flatten()).double().cpu().numpy()
    return float(differential_entropy(values, method=method))


def _derivative(f: Elementwise, x: Tensor) -> Tensor:
    """f'(x) of an elementwise f, in forward mode, so that it nests and can be differentiated."""
    return jvp(f, (x,), (torch.ones_like(x),))[1]


def _direction(f: Elementwise, density: Density, x: Tensor, df: Elementwise | None) -> Tensor:
    def output_density(x: Tensor) -> Tensor:
        p = density.log_prob(x).exp() if isinstance(density, Distribution) else density(x)
        return p / (_derivative(f, x) if df is None else df(x))

    return -_derivative(output_density, x)
