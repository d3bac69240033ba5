"""How often a few synapses on a sparse binary pattern fire by mistake, and how often they miss.

Ahmad and Hawkins, "How do neurons operate on sparse distributed representations? A mathematical
theory of sparsity, neurons and active dendrites", 2016. Of n binary cells a are active. A segment
has s synapses onto active cells of a pattern, and fires when at least theta of them are active:

    P(b)   = C(s, b) C(n - s, a - b) / C(n, a)          overlap with a random input
    P_fp   = sum over b >= theta of P(b)                fires for an input that it does not know
    P_fn   = P(lost > s - theta)                        misses its pattern under noise
    P_fp,U = P_fp with s_U = n (1 - (1 - s / n)^M)      M patterns in one segment

All are evaluated as logarithms, through falling factorials of at most min(a, s) factors: a
difference of log-gammas would lose as many digits as log n! has. Where P_fp counts more than one
segment or input, `repeated_error` gives the chance of at least one error.

Deviations: none. The distribution of the size of a union, which the paper replaces by its mean, is
available too (`exact=True`).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Integers = Tensor | int
Reals = Tensor | float
Noise = Literal["replace", "drop"]


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
    b, n, a, s = _integers(b=b, n=n, a=a, s=s)
    _at_most("a", a, "n", n)
    _at_most("s", s, "n", n)
    return _log_pmf(b, n, a, s)


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
    n, a, s, theta = _integers(n=n, a=a, s=s, theta=theta)
    _check_segment(n, a, s, theta)
    tail = _log_tail(n, a, s, theta)
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
    a, s, theta = _integers(a=a, s=s, theta=theta)
    share = _noise(noise, model)
    _at_most("s", s, "a", a)
    _check_theta(theta, s)
    one, two, three, four = torch.broadcast_tensors(a, s, theta, share)
    return _false_negative(one, two, three, four, model)


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
    n, a, s, theta, count = _integers(n=n, a=a, s=s, theta=theta, num_patterns=num_patterns)
    _check_segment(n, a, s, theta)
    if (count < 1).any():
        raise ValueError(f"num_patterns: expected at least 1, got {int(count.min())}")
    if exact:
        arguments = torch.broadcast_tensors(n, a, s, theta, count)
        rows = [_exact_union(*row) for row in torch.stack(arguments, -1).reshape(-1, 5).tolist()]
        tail = torch.tensor(rows, dtype=torch.float64).reshape(arguments[0].shape)
    else:
        tail = _log_tail(n, a, _union_size(n, s, count), theta)
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
    n, a, s, count = _integers(n=n, a=a, s=s, num_patterns=num_patterns)
    share = _noise(noise, model)
    if not cost >= 0:
        raise ValueError(f"cost: expected a number ≥ 0, got {cost}")
    if (count < 1).any():
        raise ValueError(f"num_patterns: expected at least 1, got {int(count.min())}")
    _at_most("a", a, "n", n)
    _at_most("s", s, "a", a)
    if (s < 1).any():
        raise ValueError(f"s: expected at least 1, got {int(s.min())}")
    n, a, s, count, share = (x.unsqueeze(-1) for x in (n, a, s, count, share))
    theta = torch.arange(1, int(s.max()) + 1)
    p_fp = _log_tail(n, a, _union_size(n, s, count), theta).exp()
    p_fn = _false_negative(a, s, theta, share, model)
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
    n, a, s, theta = _integers(n=n, a=a, s=s, theta=theta)
    _check_segment(n, a, s, theta)
    _at_most("theta", theta, "a", a)
    error = torch.as_tensor(max_error, dtype=torch.float64)
    if not ((error > 0) & (error < 1)).all():
        raise ValueError(f"max_error: expected numbers in (0, 1), got {max_error}")

    def fits(count: Tensor) -> Tensor:
        return _log_tail(n, a, _union_size(n, s, count), theta) <= error.log()

    shape = torch.broadcast_shapes(n.shape, a.shape, s.shape, theta.shape, error.shape)
    low, high = torch.zeros(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.int64)
    while (more := fits(high)).any():  # ends, as a union of all cells fires for every input
        low, high = torch.where(more, high, low), torch.where(more, 2 * high, high)
    while (high - low > 1).any():
        middle = (low + high) // 2
        inside = (middle == low) | fits(middle.clamp_min(1))
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return low


def _log_pmf(b: Tensor, n: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """Log of C(s, b) [a]_b [n - a]_(s - b) / [n]_s, with [n]_k = n (n - 1) ... (n - k + 1)."""
    s, a = torch.minimum(a, s), torch.maximum(a, s)  # the formula is symmetric in them
    inside = b.clamp_min(0).minimum(s)
    ways = _log_falling(s, inside) - _log_falling(inside, inside)
    hits = _log_falling(a, inside) + _log_falling(n - a, s - inside)
    return (ways + hits - _log_falling(n, s)).masked_fill(b != inside, -torch.inf)


def _log_falling(n: Tensor, k: Tensor) -> Tensor:
    """Log of [n]_k for k >= 0, -inf for k > n."""
    steps = torch.arange(int(k.max()) if k.numel() else 0)
    logs = (n.unsqueeze(-1) - steps).clamp_min(0).double().log()
    return logs.masked_fill(steps >= k.unsqueeze(-1), 0.0).sum(-1)


def _log_tail(n: Tensor, a: Tensor, s: Tensor, theta: Tensor) -> Tensor:
    """Log of the sum of P(b) over b >= theta."""
    n, a, s, theta = (x.unsqueeze(-1) for x in (n, a, s, theta))
    most = torch.minimum(a, s)
    steps = torch.arange(int((most - theta).max().clamp_min(0)) + 1 if most.numel() else 1)
    b = theta + steps
    return torch.logsumexp(_log_pmf(b, n, a, s), -1)


def _false_negative(a: Tensor, s: Tensor, theta: Tensor, noise: Tensor, model: Noise) -> Tensor:
    too_many = (s - theta + 1).clamp_min(0)  # synapses that have to be lost
    if model == "replace":
        lost = (noise * a).round().long()
        return _log_tail(a, lost, s, too_many).exp()
    losses = torch.arange(int(s.max()) + 1 if s.numel() else 1)
    count, rate = s.unsqueeze(-1), noise.unsqueeze(-1)
    ways = _log_falling(count, losses) - _log_falling(losses, losses)
    kept = torch.xlogy(losses, rate) + torch.xlogy((count - losses).clamp_min(0), 1 - rate)
    chosen = (losses >= too_many.unsqueeze(-1)) & (losses <= count)
    return torch.where(chosen, (ways + kept).exp(), 0.0).sum(-1)


def _union_size(n: Tensor, s: Tensor, count: Tensor) -> Tensor:
    """The mean number of distinct cells in `count` random sets of s, rounded."""
    missed = torch.xlogy(count, 1 - s.double() / n)
    return (-n * torch.expm1(missed)).round().long()


def _exact_union(n: int, a: int, s: int, theta: int, count: int) -> float:
    """Log of P_fp averaged over the number of distinct synapses of `count` patterns."""
    sizes = torch.arange(min(count * s, n) + 1)
    numbers = torch.tensor(n), torch.tensor(a), torch.tensor(s)
    old = torch.arange(s + 1)  # synapses of the next pattern that the segment has already
    step = _log_pmf(old, numbers[0], sizes.unsqueeze(-1), numbers[2]).exp()
    target = (sizes.unsqueeze(-1) + s - old).clamp_max(len(sizes) - 1)
    weights = torch.zeros(len(sizes), dtype=torch.float64)
    weights[0] = 1.0
    for _ in range(count):
        moved = (weights.unsqueeze(-1) * step).flatten()
        weights = torch.zeros_like(weights).index_add(0, target.flatten(), moved)
    tails = _log_tail(numbers[0], numbers[1], sizes, torch.tensor(theta))
    return float(torch.logsumexp(weights.log() + tails, 0))


def _integers(**values: Integers) -> tuple[Tensor, ...]:
    """The arguments as int64 tensors on the CPU."""
    found = []
    for name, value in values.items():
        tensor = torch.as_tensor(value, device="cpu")
        if tensor.is_floating_point() or tensor.dtype == torch.bool:
            raise ValueError(f"{name}: expected integers, got {value!r}")
        if name != "b" and (tensor < 0).any():
            raise ValueError(f"{name}: expected integers ≥ 0, got {value!r}")
        found.append(tensor.long())
    return tuple(found)


def _noise(noise: Reals, model: str) -> Tensor:
    if model not in ("replace", "drop"):
        raise ValueError(f"model: expected 'replace' or 'drop', got {model!r}")
    share = torch.as_tensor(noise, dtype=torch.float64, device="cpu")
    if not ((share >= 0) & (share <= 1)).all():
        raise ValueError(f"noise: expected numbers in [0, 1], got {noise}")
    return share


def _check_segment(n: Tensor, a: Tensor, s: Tensor, theta: Tensor) -> None:
    _at_most("a", a, "n", n)
    _at_most("s", s, "n", n)
    _check_theta(theta, s)


def _check_theta(theta: Tensor, s: Tensor) -> None:
    _at_most("theta", theta, "s", s)
    if (theta < 1).any():
        raise ValueError(f"theta: expected 1 to s, got {int(theta.min())}")


def _at_most(name: str, value: Tensor, other: str, limit: Tensor) -> None:
    if (value > limit).any():
        raise ValueError(
            f"{name}: expected at most {other} = {limit.tolist()}, got {value.tolist()}"
        )
