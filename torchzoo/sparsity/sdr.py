"""How often a few synapses on a sparse binary pattern fire by mistake, and how often they miss.

Ahmad and Hawkins, "How do neurons operate on sparse distributed representations? A mathematical
theory of sparsity, neurons and active dendrites", 2016. Of n binary cells a are active. A segment
has s synapses onto active cells of a pattern, and fires when at least theta of them are active:

    P(b)   = C(s, b) C(n - s, a - b) / C(n, a)          overlap with a random input
    P_fp   = sum over b >= theta of P(b)                fires for an input that it does not know
    P_fn   = P(lost > s - theta)                        misses its pattern under noise
    P_fp,U = P_fp with s_U = n (1 - (1 - s / n)^M)      M patterns in one segment

Where P_fp counts more than one segment or input, `repeated_error` gives the chance of at least one
error. Thresholds and capacities that follow are in `sdr_design`.

Deviations: none. The distribution of the size of a union, which the paper replaces by its mean, is
available too (`exact=True`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchzoo.sparsity.sdr_logs import (
    Integers,
    Noise,
    Reals,
    at_most,
    check_segment,
    check_theta,
    false_negative,
    integers,
    log_pmf,
    log_tail,
    noise_share,
    union_size,
)


def sdr_log_pmf(b: Integers, n: Integers, a: Integers, s: Integers) -> Tensor:
    """Log-probability that a random pattern hits b of s given cells.

    Args:
        b: Overlap.
        n: Cells.
        a: Active cells of the random pattern, at most n.
        s: Given cells, at most n.

    Shape:
        - all: integers that broadcast to `(...)`
        - output: `(...)`, float64

    Returns:
        log P(b), -inf where b can't occur.

    Raises:
        ValueError: An argument that is not integer or negative, or `a` or `s` above n.

    Source:
        Ahmad and Hawkins, "How do neurons operate on sparse distributed representations?", 2016,
        the overlap distribution.

    Example:
        >>> sdr_log_pmf(torch.arange(3), 4, 2, 2).exp()
        tensor([0.1667, 0.6667, 0.1667], dtype=torch.float64)
    """
    b, n, a, s = integers(b=b, n=n, a=a, s=s)
    at_most("a", a, "n", n)
    at_most("s", s, "n", n)
    return log_pmf(b, n, a, s)


def sdr_false_positive(
    n: Integers, a: Integers, s: Integers, theta: Integers, *, log: bool = False
) -> Tensor:
    """Probability that a segment fires for a random input.

    Args:
        n: Cells.
        a: Active cells of an input.
        s: Synapses of the segment.
        theta: Overlap from which it fires, 1 to s.
        log: Give the logarithm, which does not underflow.

    Shape:
        - all: integers that broadcast to `(...)`
        - output: `(...)`, float64

    Returns:
        P_fp, or its logarithm.

    Raises:
        ValueError: An argument that is not integer or negative, `a` or `s` above n, or theta not in
            1..s.

    Source:
        Ahmad and Hawkins, "How do neurons operate on sparse distributed representations?", 2016,
        false positives.

    Example:
        >>> sdr_false_positive(200, 20, 10, 4)
        tensor(0.0105, dtype=torch.float64)
    """
    n, a, s, theta = integers(n=n, a=a, s=s, theta=theta)
    check_segment(n, a, s, theta)
    tail = log_tail(n, a, s, theta)
    return tail if log else tail.exp()


def sdr_false_negative(
    a: Integers, s: Integers, theta: Integers, noise: Reals, *, model: Noise = "replace"
) -> Tensor:
    """Probability that a segment misses its own pattern under noise.

    Args:
        a: Active cells of the pattern.
        s: Synapses of the segment, all onto the pattern.
        theta: Overlap from which it fires, 1 to s.
        noise: Share of the pattern that is lost, 0 to 1.
        model: `"replace"`: round(noise a) cells, chosen at random, are replaced by cells outside
            the pattern; `"drop"`: each cell is lost with probability `noise`, by itself.

    Shape:
        - a, s, theta: integers, noise: floats, that broadcast to `(...)`
        - output: `(...)`, float64

    Returns:
        P_fn.

    Raises:
        ValueError: An argument that is not integer or negative, s above a, theta not in 1..s, noise
            not in [0, 1], or another model.

    Source:
        Ahmad and Hawkins, "How do neurons operate on sparse distributed representations?", 2016,
        false negatives.

    Example:
        >>> sdr_false_negative(20, 10, 8, 0.2)
        tensor(0.2910, dtype=torch.float64)
    """
    a, s, theta = integers(a=a, s=s, theta=theta)
    share = noise_share(noise, model)
    at_most("s", s, "a", a)
    check_theta(theta, s)
    one, two, three, four = torch.broadcast_tensors(a, s, theta, share)
    return false_negative(one, two, three, four, model)


def sdr_union_false_positive(
    n: Integers,
    a: Integers,
    s: Integers,
    theta: Integers,
    num_patterns: Integers,
    *,
    exact: bool = False,
    log: bool = False,
) -> Tensor:
    """Probability that a segment with synapses onto several patterns fires for a random input.

    Args:
        n: Cells.
        a: Active cells of an input.
        s: Synapses onto each pattern.
        theta: Overlap from which the segment fires, 1 to s.
        num_patterns: Patterns M in the segment, at least 1.
        exact: Average over the number of distinct synapses instead of taking its rounded mean.
        log: Give the logarithm.

    Shape:
        - all: integers that broadcast to `(...)`
        - output: `(...)`, float64

    Returns:
        P_fp of the union, or its logarithm.

    Raises:
        ValueError: As for `sdr_false_positive`, or `num_patterns` below 1.

    Source:
        Ahmad and Hawkins, "How do neurons operate on sparse distributed representations?", 2016,
        the union property.

    Example:
        >>> sdr_union_false_positive(2000, 40, 10, 6, torch.tensor([5, 20]))
        tensor([0.0004, 0.1763], dtype=torch.float64)
    """
    n, a, s, theta, count = integers(n=n, a=a, s=s, theta=theta, num_patterns=num_patterns)
    check_segment(n, a, s, theta)
    if (count < 1).any():
        raise ValueError(f"num_patterns: expected at least 1, got {int(count.min())}")
    if exact:
        arguments = torch.broadcast_tensors(n, a, s, theta, count)
        rows = [_exact_union(*row) for row in torch.stack(arguments, -1).reshape(-1, 5).tolist()]
        tail = torch.tensor(rows, dtype=torch.float64).reshape(arguments[0].shape)
    else:
        tail = log_tail(n, a, union_size(n, s, count), theta)
    return tail if log else tail.exp()


def repeated_error(p: Tensor, count: Integers) -> Tensor:
    """Probability of at least one error in `count` independent tries: 1 - (1 - p)^count.

    The tries are the segments of a neuron, or the inputs of a sequence.

    Args:
        p: Probability of an error in one.
        count: Number of tries.

    Shape:
        - p, count: broadcast to `(...)`
        - output: `(...)`

    Source:
        Ahmad and Hawkins, "How do neurons operate on sparse distributed representations?", 2016.

    Example:
        >>> repeated_error(torch.tensor([0.5, 1e-20], dtype=torch.float64), 2)
        tensor([7.5000e-01, 2.0000e-20], dtype=torch.float64)
    """
    return -torch.expm1(count * torch.log1p(-p))


def _exact_union(n: int, a: int, s: int, theta: int, count: int) -> float:
    """Log of P_fp averaged over the number of distinct synapses of `count` patterns."""
    sizes = torch.arange(min(count * s, n) + 1)
    numbers = torch.tensor(n), torch.tensor(a), torch.tensor(s)
    old = torch.arange(s + 1)  # synapses of the next pattern that the segment has already
    step = log_pmf(old, numbers[0], sizes.unsqueeze(-1), numbers[2]).exp()
    target = (sizes.unsqueeze(-1) + s - old).clamp_max(len(sizes) - 1)
    weights = torch.zeros(len(sizes), dtype=torch.float64)
    weights[0] = 1.0
    for _ in range(count):
        moved = (weights.unsqueeze(-1) * step).flatten()
        weights = torch.zeros_like(weights).index_add(0, target.flatten(), moved)
    tails = log_tail(numbers[0], numbers[1], sizes, torch.tensor(theta))
    return float(torch.logsumexp(weights.log() + tails, 0))
