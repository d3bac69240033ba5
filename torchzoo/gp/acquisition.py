"""Acquisition functions in closed form, of means and standard deviations alone.

With Z standard normal, phi and Phi its density and distribution, and h(z) = phi(z) + z Phi(z), the
expectation of a positive part is E[(D + s Z)^+] = s h(D / s) = D^+ + s h(-abs(D) / s). Of lines
a_i + b_i Z those that are the largest somewhere, by their slopes, with breakpoints

    c_i = (a_i - a_(i+1)) / (b_(i+1) - b_i),

give

    E[max_i (a_i + b_i Z)] = max_i a_i + sum_i (b_(i+1) - b_i) h(-abs(c_i)).

P. I. Frazier, "A tutorial on Bayesian optimization", 2018, section 4; P. Frazier, W. Powell and
S. Dayanik, "The knowledge-gradient policy for correlated normal beliefs", 2009, section 3. No
deviations. All is differentiable; the logarithms follow S. Ament, S. Daulton, D. Eriksson,
M. Balandat and E. Bakshy, "Unexpected improvements to expected improvement for Bayesian
optimization", 2023.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)
FAR = 1e3  # h(-FAR) is 0 in double precision
SERIES = -100.0  # from here on an asymptotic series is more precise than a difference


def expected_improvement(
    mean: Tensor, std: Tensor, best: Tensor | float, *, log: bool = False
) -> Tensor:
    """Expectation of the positive part of a Gaussian variable less a constant.

    Args:
        mean: Mean of the variable.
        std: Its standard deviation; at 0 the result is `max(mean - best, 0)`.
        best: The constant, what is best so far.
        log: Whether to give the logarithm, from which gradients come even where the improvement
            itself is 0 in floating point.

    Shape:
        - mean, std, best: `(...)`, broadcast together

    Source:
        P. I. Frazier, "A tutorial on Bayesian optimization", 2018, section 4.1.

    Example:
        >>> expected_improvement(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0]), 0.0)
        tensor([0.3989, 2.0000])
        >>> expected_improvement(torch.tensor(0.0), torch.tensor(1.0), 40.0, log=True)
        tensor(-808.2986)
    """
    gain = mean - best
    std = std.clamp_min(torch.finfo(std.dtype).tiny)
    if log:
        return std.log() + _log_h((gain / std).clamp(-_huge(std), _huge(std)))
    return gain.clamp_min(0) + std * _h(-(gain / std).abs().clamp_max(FAR))


def expected_max_piecewise_linear(a: Tensor, b: Tensor) -> Tensor:
    """E[max_i (a_i + b_i Z)] for a standard normal Z.

    Args:
        a: Intercepts of the lines.
        b: Their slopes.

    Shape:
        - a, b: `(..., n)`, broadcast together
        - output: `(...)`

    Raises:
        ValueError: There are no lines, or their shapes don't fit.

    Source:
        P. Frazier, W. Powell and S. Dayanik, "The knowledge-gradient policy for correlated normal
        beliefs", 2009, algorithm 1.

    Example:
        >>> expected_max_piecewise_linear(torch.zeros(2), torch.tensor([-1.0, 1.0]))  # E abs(Z)
        tensor(0.7979)
    """
    a, b = _checked(a, b)
    return a.amax(-1) + expected_rise(a, b)


def expected_rise(a: Tensor, b: Tensor, *, log: bool = False) -> Tensor:
    """E[max_i (a_i + b_i Z)] - max_i a_i, without cancellation.

    Time is that of sorting, and of rounds on lines that are still open, usually about log n.

    Args:
        a: Intercepts of the lines.
        b: Their slopes.
        log: Whether to give the logarithm.

    Shape:
        - a, b: `(..., n)`, broadcast together
        - output: `(...)`, at least 0

    Raises:
        ValueError: There are no lines, or their shapes don't fit.

    Example:
        >>> expected_rise(torch.tensor([5.0, 5.0]), torch.tensor([0.0, 2.0]))
        tensor(0.7979)
    """
    a, b = _checked(a, b)
    index = _envelope(a.detach(), b.detach())
    a, b = a.gather(-1, index), b.gather(-1, index)
    step = b.diff(dim=-1)  # 0 between copies of the last line
    real = step > 0
    c = (a.diff(dim=-1) / torch.where(real, step, 1.0)).abs()
    if not log:
        return (step * _h(-c.clamp_max(FAR))).sum(-1)
    terms = torch.where(real, step, 1.0).log() + _log_h(-c.clamp_max(_huge(c)))
    nothing = terms.new_full((*terms.shape[:-1], 1), -math.inf)
    return torch.cat([terms.masked_fill(~real, -math.inf), nothing], -1).logsumexp(-1)


def max_value_entropy(mean: Tensor, std: Tensor, maxima: Tensor) -> Tensor:
    """How much entropy a value loses, on average, by learning that it lies below the maximum.

    With g = (y* - mean) / std it is `g phi(g) / (2 Phi(g)) - log Phi(g)`, averaged over samples
    y* of the maximum of the function.

    Args:
        mean: Means of the values.
        std: Their standard deviations, above 0.
        maxima: Samples of the maximum.

    Shape:
        - mean, std: `(...)`
        - maxima: `(S,)`, or `(S, ...)`
        - output: `(...)`

    Source:
        Z. Wang and S. Jegelka, "Max-value entropy search for efficient Bayesian optimization",
        2017, equation 6.

    Example:
        >>> max_value_entropy(torch.zeros(()), torch.ones(()), torch.zeros(1))  # log 2
        tensor(0.6931)
    """
    maxima = maxima.reshape(*maxima.shape, *[1] * (mean.ndim + 1 - maxima.ndim))
    g = (maxima - mean) / std.clamp_min(torch.finfo(std.dtype).tiny)
    below = torch.special.log_ndtr(g)
    ratio = (-0.5 * g.square() - LOG_SQRT_2PI - below).exp()
    return (0.5 * g * ratio - below).mean(0)


def _checked(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    try:
        a, b = torch.broadcast_tensors(a, b)
    except RuntimeError:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"b: expected a shape that fits that of a, got {shapes}") from None
    if a.ndim == 0 or not a.shape[-1]:
        raise ValueError(f"a: expected (..., n) with n at least 1, got {tuple(a.shape)}")
    return a, b


def _envelope(a: Tensor, b: Tensor) -> Tensor:
    """Indices of the lines that are the largest somewhere, by slope; copies of the last fill up.

    Between two lines of the envelope that are neighbours so far, the line that is highest where
    they meet is one of it, too, and lines that are below them there are none.
    """
    by_height = a.argsort(dim=-1, stable=True)
    order = b.gather(-1, by_height).argsort(dim=-1, stable=True)
    index = by_height.gather(-1, order)
    slope = b.gather(-1, index)
    keep = torch.ones_like(index, dtype=torch.bool)
    keep[..., :-1] = slope[..., 1:] > slope[..., :-1]  # the highest of equal slopes
    index = index.gather(-1, _packed(keep))
    found = torch.zeros_like(index, dtype=torch.bool)
    found[..., :1] = True
    found |= b.gather(-1, index) >= b.amax(-1, keepdim=True)
    while True:
        rise = _rise_above_neighbours(a.gather(-1, index), b.gather(-1, index), found)
        above = ~found & (rise > 0)
        if not above.any():
            return index.gather(-1, _packed(found))
        gap = found.cumsum(-1)
        top = rise.new_zeros(*rise.shape[:-1], rise.shape[-1] + 1)
        top = top.scatter_reduce(-1, gap, torch.where(above, rise, 0.0), "amax")
        packed = _packed(found | above)
        found |= above & (rise == top.gather(-1, gap))
        index, found = index.gather(-1, packed), found.gather(-1, packed)


def _rise_above_neighbours(height: Tensor, slope: Tensor, found: Tensor) -> Tensor:
    """How far each line is above the found ones beside it, where these meet."""
    n = height.shape[-1]
    place = torch.arange(n, device=height.device)
    left = torch.where(found, place, 0).cummax(-1).values
    right = torch.where(found, place, n - 1).flip(-1).cummin(-1).values.flip(-1)
    run = slope.gather(-1, right) - slope.gather(-1, left)
    fall = height.gather(-1, left) - height.gather(-1, right)
    meet = fall / torch.where(run > 0, run, 1.0)
    return height - height.gather(-1, left) + (slope - slope.gather(-1, left)) * meet


def _packed(keep: Tensor) -> Tensor:
    """Places of what is kept, in front; copies of the last of them fill up."""
    count = keep.sum(-1, keepdim=True)
    width = int(count.max()) if count.numel() else 1
    order = (~keep).to(torch.uint8).argsort(dim=-1, stable=True)
    place = torch.arange(width, device=keep.device).expand(*keep.shape[:-1], width)
    return order.gather(-1, torch.minimum(place, count - 1))


def _cdf(z: Tensor) -> Tensor:
    """Phi(z); torch's own has no relative precision far below 0."""
    return 0.5 * torch.erfc(-z / math.sqrt(2))


def _h(z: Tensor) -> Tensor:
    """phi(z) + z Phi(z)."""
    density = (-0.5 * z.square() - LOG_SQRT_2PI).exp()
    return (density + z * _cdf(z)).clamp_min(0)


def _log_h(z: Tensor) -> Tensor:
    """Its logarithm: below -1 by a scaled error function, far below by a series."""
    near = z.clamp_min(-1)
    middle = z.clamp(SERIES, -1)
    far = z.clamp_max(SERIES)
    # h(z) = phi(z) (1 + z Phi(z) / phi(z))
    ratio = math.sqrt(math.pi / 2) * torch.special.erfcx(-middle / math.sqrt(2))
    inverse = far.square().reciprocal()
    series = inverse.log() + torch.log1p(inverse * (-3 + inverse * (15 - 105 * inverse)))
    log_density = -0.5 * z.clamp_max(-1).square() - LOG_SQRT_2PI
    tail = log_density + torch.where(z > SERIES, torch.log1p(middle * ratio), series)
    density = (-0.5 * near.square() - LOG_SQRT_2PI).exp()
    return torch.where(z > -1, (density + near * _cdf(near)).log(), tail)


def _huge(x: Tensor) -> float:
    """The largest number whose square is finite, with some room."""
    return 1e-3 * math.sqrt(torch.finfo(x.dtype).max)
