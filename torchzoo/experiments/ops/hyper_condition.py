"""`hyper_condition` against its tensor formulation, batched solves, and the covariance form.

A latent that all items share is conditioned on, as when a face is posed. The peers are

- `reference`: the same solves, an unknown at a time for all items, in PyTorch;
- `triangular`: `torch.linalg.solve_triangular` on a batch of small matrices;
- `covariance`: the same means from the covariances of attribute and latent, `mu_o + S_oi S_ii^-1
  (z - mu_i)`, with a Cholesky factor of d x d numbers for each item. Its gradients are those of
  these covariances.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchzoo.benchmark import OURS, Bench, Case
from torchzoo.ops.hyper_condition import condition, hyper_condition, unpack


def reference(z: Tensor, *given: Tensor) -> Tensor:
    """The operator's tensor formulation."""
    return condition(z[None], *given)[0]


def lower(raw_l11: Tensor, m: int) -> Tensor:
    """L11, `(N, m, m)`."""
    logs = unpack(raw_l11, m).movedim(-1, 0)
    return logs.tril(-1) + logs.diagonal(dim1=1, dim2=2).exp().diag_embed()


def triangular(
    z: Tensor, mean_out: Tensor, mean_latent: Tensor, raw_l11: Tensor, l21: Tensor
) -> Tensor:
    """The means by a routine for batches of triangles."""
    t = l21.mT @ (z - mean_latent)[..., None]
    l11 = lower(raw_l11, mean_out.shape[1])
    return mean_out - torch.linalg.solve_triangular(l11.mT, t, upper=True)[..., 0]


def covariance(
    z: Tensor, mean_out: Tensor, mean_latent: Tensor, across: Tensor, among: Tensor
) -> Tensor:
    """The mean given `S_oi (N, m, d)` and `S_ii (N, d, d)`."""
    offset = (z - mean_latent)[..., None]
    return mean_out + (across @ torch.cholesky_solve(offset, torch.linalg.cholesky(among)))[..., 0]


def contenders(
    device: torch.device, count: int, d: int, m: int, backward: bool
) -> Mapping[str, Callable[[], Any]]:
    """The means, or the gradients of the latent, the means of both, and what is special to each."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    z, mean_out, mean_latent = draw(1, d), draw(count, m), draw(count, d)
    raw_l11, l21 = 0.3 * draw(count, m * (m + 1) // 2), draw(count, d, m)
    slope = -torch.linalg.solve_triangular(lower(raw_l11, m).mT, l21.mT, upper=True)
    root = draw(count, d, d) / d**0.5
    among = root @ root.mT + torch.eye(d)
    given = (z, mean_out, mean_latent, raw_l11, l21)
    other = (z, mean_out, mean_latent, slope @ among, among)
    grad = draw(count, m).to(device)
    named: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        OURS: (hyper_condition, given),
        "reference": (reference, given),
        "triangular": (triangular, given),
        "covariance": (covariance, other),
    }

    def run(op: Callable[..., Tensor], leaves: list[Tensor]) -> Any:
        if not backward:
            with torch.no_grad():
                return op(*leaves)
        return torch.autograd.grad(op(*leaves), leaves, grad)

    return {
        name: partial(run, op, [x.to(device).requires_grad_() for x in inputs])
        for name, (op, inputs) in named.items()
    }


def case(count: int, d: int, m: int, backward: bool, bar: float, against: str) -> Case:
    """Means of so many items, or a training step."""
    passes = 3 if backward else 1
    numbers = count * (m + d + m * (m + 1) // 2 + d * m)
    flops = 1.0 * passes * count * (d + 2 * d * m + m * m)
    return Case(
        f"{count:,} items, d={d}, m={m}, {'forward and backward' if backward else 'forward'}",
        partial(contenders, count=count, d=d, m=m, backward=backward),
        flops,
        4.0 * passes * numbers,
        flops,
        bar,
        against,
    )


BENCH = Bench(
    "hyper_condition",
    [
        case(20_000, 8, 3, False, 1.0, "reference"),
        case(20_000, 8, 3, True, 1.0, "reference"),
        case(20_000, 32, 3, True, 5.0, "covariance"),
        case(100_000, 8, 4, True, 1.0, "reference"),
    ],
)
