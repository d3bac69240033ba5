"""The threshold that a segment should have, and how many patterns it can hold.

Ahmad and Hawkins, "How do neurons operate on sparse distributed representations? A mathematical
theory of sparsity, neurons and active dendrites", 2016. With the errors P_fp and P_fn of
`torchzoo.sparsity.sdr`,

    theta* = argmin_theta P_fp(theta) + cost P_fn(theta)
    M*     = the largest M whose union has P_fp,U <= max_error
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchzoo.sparsity.sdr_logs import (
    Integers,
    Noise,
    Reals,
    at_most,
    check_segment,
    false_negative,
    integers,
    log_tail,
    noise_share,
    union_size,
)


class ThresholdChoice(NamedTuple):
    """The best threshold of a segment, with its two errors."""

    theta: Tensor
    p_fp: Tensor
    p_fn: Tensor


def optimal_threshold(
    n: Integers,
    a: Integers,
    s: Integers,
    noise: Reals,
    *,
    model: Noise = "replace",
    cost: float = 1.0,
    num_patterns: Integers = 1,
) -> ThresholdChoice:
    """The threshold with the least P_fp + cost P_fn, the lowest one on ties.

    Args:
        n: Cells.
        a: Active cells of a pattern.
        s: Synapses, at most a and at least 1.
        noise: Share of a pattern that is lost.
        model: How it is lost, as for `sdr_false_negative`.
        cost: What a miss costs relative to a false alarm, times how much more often patterns come.
        num_patterns: Patterns in the segment.

    Shape:
        - n, a, s, num_patterns: integers, noise: floats, that broadcast to `(...)`
        - output: `(...)` each

    Returns:
        `(theta, p_fp, p_fn)`; theta is int64, the errors float64.

    Raises:
        ValueError: As for `sdr_false_negative` and `sdr_union_false_positive`, or a cost below 0.

    Source:
        Ahmad and Hawkins, "How do neurons operate on sparse distributed representations?", 2016,
        the predicted thresholds.

    Example:
        >>> optimal_threshold(10000, 200, 24, 0.5).theta
        tensor(5)
    """
    n, a, s, count = integers(n=n, a=a, s=s, num_patterns=num_patterns)
    share = noise_share(noise, model)
    if not cost >= 0:
        raise ValueError(f"cost: expected a number ≥ 0, got {cost}")
    if (count < 1).any():
        raise ValueError(f"num_patterns: expected at least 1, got {int(count.min())}")
    at_most("a", a, "n", n)
    at_most("s", s, "a", a)
    if (s < 1).any():
        raise ValueError(f"s: expected at least 1, got {int(s.min())}")
    n, a, s, count, share = (x.unsqueeze(-1) for x in (n, a, s, count, share))
    theta = torch.arange(1, int(s.max()) + 1)
    p_fp = log_tail(n, a, union_size(n, s, count), theta).exp()
    p_fn = false_negative(a, s, theta, share, model)
    total = (p_fp + cost * p_fn).masked_fill(theta > s, torch.inf)
    best = total.argmin(-1, keepdim=True)
    found = (x.expand(total.shape).gather(-1, best).squeeze(-1) for x in (theta, p_fp, p_fn))
    return ThresholdChoice(*found)


def capacity(n: Integers, a: Integers, s: Integers, theta: Integers, max_error: Reals) -> Tensor:
    """The most patterns in one segment whose union has P_fp at most `max_error`.

    Args:
        n: Cells.
        a: Active cells of an input, at least theta.
        s: Synapses onto each pattern.
        theta: Overlap from which the segment fires, 1 to s.
        max_error: The error allowed, in (0, 1).

    Shape:
        - n, a, s, theta: integers, max_error: floats, that broadcast to `(...)`
        - output: `(...)`, int64

    Returns:
        The number of patterns, by the mean size of their union; 0 where one is too many.

    Raises:
        ValueError: As for `sdr_false_positive`, theta above a, or `max_error` not in (0, 1).

    Source:
        Ahmad and Hawkins, "How do neurons operate on sparse distributed representations?", 2016,
        the union property.

    Example:
        >>> capacity(2000, 40, 10, 6, 0.01)
        tensor(9)
    """
    n, a, s, theta = integers(n=n, a=a, s=s, theta=theta)
    check_segment(n, a, s, theta)
    at_most("theta", theta, "a", a)
    error = torch.as_tensor(max_error, dtype=torch.float64)
    if not ((error > 0) & (error < 1)).all():
        raise ValueError(f"max_error: expected numbers in (0, 1), got {max_error}")

    def fits(count: Tensor) -> Tensor:
        return log_tail(n, a, union_size(n, s, count), theta) <= error.log()

    shape = torch.broadcast_shapes(n.shape, a.shape, s.shape, theta.shape, error.shape)
    low, high = torch.zeros(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.int64)
    while (more := fits(high)).any():  # ends, as a union of all cells fires for every input
        low, high = torch.where(more, high, low), torch.where(more, 2 * high, high)
    while (high - low > 1).any():
        middle = (low + high) // 2
        inside = (middle == low) | fits(middle.clamp_min(1))
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return low
