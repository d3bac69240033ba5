"""Probabilities of overlaps of sparse binary patterns, as logarithms, and checks of arguments.

All go through falling factorials of at most min(a, s) factors: a difference of log-gammas would
lose as many digits as log n! has. `torchzoo.sparsity.sdr` says what they are of.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Integers = Tensor | int
Reals = Tensor | float
Noise = Literal["replace", "drop"]


def log_pmf(b: Tensor, n: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """Log of C(s, b) [a]_b [n - a]_(s - b) / [n]_s, with [n]_k = n (n - 1) ... (n - k + 1)."""
    s, a = torch.minimum(a, s), torch.maximum(a, s)  # the formula is symmetric in them
    inside = b.clamp_min(0).minimum(s)
    ways = log_falling(s, inside) - log_falling(inside, inside)
    hits = log_falling(a, inside) + log_falling(n - a, s - inside)
    return (ways + hits - log_falling(n, s)).masked_fill(b != inside, -torch.inf)


def log_falling(n: Tensor, k: Tensor) -> Tensor:
    """Log of [n]_k for k >= 0, -inf for k > n."""
    steps = torch.arange(int(k.max()) if k.numel() else 0)
    logs = (n.unsqueeze(-1) - steps).clamp_min(0).double().log()
    return logs.masked_fill(steps >= k.unsqueeze(-1), 0.0).sum(-1)


def log_tail(n: Tensor, a: Tensor, s: Tensor, theta: Tensor) -> Tensor:
    """Log of the sum of P(b) over b >= theta."""
    n, a, s, theta = (x.unsqueeze(-1) for x in (n, a, s, theta))
    most = torch.minimum(a, s)
    steps = torch.arange(int((most - theta).max().clamp_min(0)) + 1 if most.numel() else 1)
    b = theta + steps
    return torch.logsumexp(log_pmf(b, n, a, s), -1)


def false_negative(a: Tensor, s: Tensor, theta: Tensor, noise: Tensor, model: Noise) -> Tensor:
    """Probability that more than s - theta synapses are lost."""
    too_many = (s - theta + 1).clamp_min(0)  # synapses that have to be lost
    if model == "replace":
        lost = (noise * a).round().long()
        return log_tail(a, lost, s, too_many).exp()
    losses = torch.arange(int(s.max()) + 1 if s.numel() else 1)
    count, rate = s.unsqueeze(-1), noise.unsqueeze(-1)
    ways = log_falling(count, losses) - log_falling(losses, losses)
    kept = torch.xlogy(losses, rate) + torch.xlogy((count - losses).clamp_min(0), 1 - rate)
    chosen = (losses >= too_many.unsqueeze(-1)) & (losses <= count)
    return torch.where(chosen, (ways + kept).exp(), 0.0).sum(-1)


def union_size(n: Tensor, s: Tensor, count: Tensor) -> Tensor:
    """The mean number of distinct cells in `count` random sets of s, rounded."""
    missed = torch.xlogy(count, 1 - s.double() / n)
    return (-n * torch.expm1(missed)).round().long()


def integers(**values: Integers) -> tuple[Tensor, ...]:
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


def noise_share(noise: Reals, model: str) -> Tensor:
    """The noise as a float64 tensor on the CPU, after checking it and its model."""
    if model not in ("replace", "drop"):
        raise ValueError(f"model: expected 'replace' or 'drop', got {model!r}")
    share = torch.as_tensor(noise, dtype=torch.float64, device="cpu")
    if not ((share >= 0) & (share <= 1)).all():
        raise ValueError(f"noise: expected numbers in [0, 1], got {noise}")
    return share


def check_segment(n: Tensor, a: Tensor, s: Tensor, theta: Tensor) -> None:
    """Raise a ValueError unless a and s are at most n, and theta is in 1..s."""
    at_most("a", a, "n", n)
    at_most("s", s, "n", n)
    check_theta(theta, s)


def check_theta(theta: Tensor, s: Tensor) -> None:
    """Raise a ValueError unless theta is in 1..s."""
    at_most("theta", theta, "s", s)
    if (theta < 1).any():
        raise ValueError(f"theta: expected 1 to s, got {int(theta.min())}")


def at_most(name: str, value: Tensor, other: str, limit: Tensor) -> None:
    """Raise a ValueError where a value exceeds its limit."""
    if (value > limit).any():
        raise ValueError(
            f"{name}: expected at most {other} = {limit.tolist()}, got {value.tolist()}"
        )
