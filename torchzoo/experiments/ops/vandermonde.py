"""`vandermonde` against PyTorch with all powers in memory, forward and with backward.

The peer is what diagonal state spaces are usually written as: exp(l log_x) for every state and lag,
then a sum over the states. Its phases are float32, so that it is also wrong by far more at late
lags. The official extension and KeOps compile themselves on first use and are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchzoo.benchmark import OURS, Bench, Case
from torchzoo.ops import vandermonde


def materialised(v: Tensor, log_x: Tensor, L: int) -> Tensor:
    """The sum with all `(H, N, L)` powers."""
    powers = torch.exp(log_x.unsqueeze(-1) * torch.arange(L, device=v.device))
    return 2 * torch.einsum("hn,hnl->hl", v, powers).real


def contenders(
    device: torch.device, width: int, states: int, length: int, backward: bool
) -> Mapping[str, Callable[[], Any]]:
    """A kernel with linearly spaced frequencies, and its gradients."""
    generator = torch.Generator().manual_seed(0)
    dt = torch.exp(torch.empty(width, 1).uniform_(-6.9, -2.3, generator=generator))
    A = torch.complex(torch.tensor(-0.5), torch.pi * torch.arange(states))
    v = torch.randn(width, states, dtype=torch.cfloat, generator=generator).to(device)
    log_x = (dt * A).to(device)
    grad = torch.randn(width, length, generator=generator).to(device)
    leaves = [v.requires_grad_(), log_x.requires_grad_()]

    def run(kernel: Callable[..., Tensor]) -> Any:
        if not backward:
            with torch.no_grad():
                return kernel(v, log_x, length)
        return torch.autograd.grad(kernel(v, log_x, length), leaves, grad)

    return {OURS: partial(run, vandermonde), "materialised": partial(run, materialised)}


def case(width: int, states: int, length: int, backward: bool, bar: float | None = None) -> Case:
    terms = width * states * length
    passes = 3 if backward else 1
    return Case(
        f"H={width}, N={states}, L={length}, {'forward and backward' if backward else 'forward'}",
        partial(contenders, width=width, states=states, length=length, backward=backward),
        4.0 * terms * passes,
        passes * (4.0 * width * length + 16.0 * width * states),
        4.0 * terms * passes,
        bar,
        "materialised",
    )


BENCH = Bench(
    "vandermonde",
    [
        case(64, 32, 1024, True),
        case(256, 64, 4096, False),
        case(256, 64, 4096, True, 3.0),
    ],
)
