"""`grouped_mm` against a Python loop over the groups and torch's own grouped product.

The peers of the backward pass are the loop under autograd, which makes a gradient of the whole
weight for every group, and torch's own where it has one. One dense product of the same number of
operations is shown as what the processor can do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchzoo.benchmark import OURS, Bench, Case
from torchzoo.ops import grouped_mm


def loop(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """The plain formulation: a product a group."""
    ends = [0, *offsets.tolist()]
    groups = zip(ends, ends[1:], range(len(weight)), strict=False)
    return torch.cat([x[start:end] @ weight[group] for start, end, group in groups])


def contenders(
    device: torch.device, rows: list[int], k: int, n: int, backward: bool
) -> Mapping[str, Callable[[], Any]]:
    """Calls that compute the same product, or its gradients."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(rows), k, generator=generator).to(device)
    weight = (torch.randn(len(rows), k, n, generator=generator) / k**0.5).to(device)
    offsets = torch.tensor(rows).cumsum(0).to(device, torch.int32)
    calls = {OURS: grouped_mm, "loop": loop}
    if hasattr(F, "grouped_mm"):
        calls["torch"] = lambda x, weight, offsets: F.grouped_mm(x, weight, offs=offsets)
    if not backward:
        return {name: partial(call, x, weight, offsets) for name, call in calls.items()}
    x.requires_grad_()
    weight.requires_grad_()
    upstream = torch.randn(sum(rows), n, generator=generator).to(device)
    return {
        name: partial(_gradients, call(x, weight, offsets), x, weight, upstream)
        for name, call in calls.items()
    }


def _gradients(y: Tensor, x: Tensor, weight: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, (x, weight), upstream, retain_graph=True)


def _case(
    name: str, rows: list[int], k: int, n: int, bar: float | None, backward: bool = False
) -> Case:
    flops = 2.0 * sum(rows) * k * n * (2 if backward else 1)
    touched = 4.0 * (len(rows) * k * n + sum(rows) * (k + n)) * (2 if backward else 1)
    make = partial(contenders, rows=rows, k=k, n=n, backward=backward)
    against = "loop" if backward else None
    return Case(
        f"{'backward ' if backward else ''}{name}", make, flops, touched, flops, bar, against
    )


_SKEWED = [64 if group % 8 == 0 else 8 for group in range(64)]

_SIZES = (
    ("8 x 256 rows, 1024 x 1024", [256] * 8, 1024, 1024, 1.0),
    ("64 x 32 rows, 1024 x 1024", [32] * 64, 1024, 1024, 1.25),
    ("64 x 8 rows, 512 x 512", [8] * 64, 512, 512, 1.7),
    ("64 groups of 64 or 8 rows, 512 x 512", _SKEWED, 512, 512, 1.7),
)

BENCH = Bench(
    "grouped_mm",
    [
        *(_case(*size) for size in _SIZES),
        *(_case(*size[:-1], 2.0, backward=True) for size in _SIZES),
    ],
)
