"""`log_einsum_exp` against the formulation with `torch.einsum`, eager and compiled.

Sizes are those of a level of a hidden Chow-Liu tree over the pixels of small images: a batch of
512, 32 states a variable. The plain formulation takes the maximum, the exponential, the contraction
and the logarithm one after the other, and keeps what autograd asks it to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchzoo.benchmark import OURS, Bench, Case
from torchzoo.ops import log_einsum_exp, log_einsum_exp2

BATCH = 512
Sum = Callable[..., Tensor]


def plain(a: Tensor, w: Tensor) -> Tensor:
    """The sum as it is usually written."""
    m = a.detach().amax(-1, keepdim=True)
    return m + torch.einsum("fbk,fok->fbo", (a - m).exp(), w).log()


def plain2(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    """The Tucker sum as it is usually written."""
    m, n = (x.detach().amax(-1, keepdim=True) for x in (a, b))
    return m + n + torch.einsum("fbi,fbj,foij->fbo", (a - m).exp(), (b - n).exp(), w).log()


def contenders(
    device: torch.device, folds: int, units: int, tucker: bool, kind: str
) -> Mapping[str, Callable[[], Any]]:
    """One forward, one backward, or both, of each formulation."""
    generator = torch.Generator().manual_seed(0)

    def leaf(draw: Callable[..., Tensor], *shape: int) -> Tensor:
        return draw(*shape, generator=generator).to(device).requires_grad_()

    inputs = [leaf(torch.randn, folds, BATCH, units) for _ in range(2 if tucker else 1)]
    w = leaf(torch.rand, folds, units, *[units] * len(inputs))
    inputs.append(w)
    grad = torch.ones(folds, BATCH, units, device=device)
    eager: Sum = plain2 if tucker else plain
    named: dict[str, Sum] = {OURS: log_einsum_exp2 if tucker else log_einsum_exp, "eager": eager}
    if kind == "step":
        named["compiled"] = torch.compile(eager, dynamic=False)

    def forward(op: Sum) -> None:
        with torch.no_grad():
            op(*inputs)

    def step(op: Sum) -> None:
        torch.autograd.grad(op(*inputs), inputs, grad)

    if kind == "backward":
        outputs = {name: op(*inputs) for name, op in named.items()}
        return {
            name: partial(torch.autograd.grad, out, inputs, grad, retain_graph=True)
            for name, out in outputs.items()
        }
    return {name: partial(forward if kind == "forward" else step, op) for name, op in named.items()}


def _case(kind: str, folds: int, units: int, tucker: bool, bar: float | None) -> Case:
    terms = units**2 if tucker else units
    products = {"forward": 1, "backward": 2, "step": 3}[kind]
    passes = {"forward": 2, "backward": 4, "step": 6}[kind]
    flops = 2.0 * products * folds * BATCH * units * terms
    name = f"{'Tucker ' if tucker else ''}level of {folds} folds, {units} units, {kind}"
    make = partial(contenders, folds=folds, units=units, tucker=tucker, kind=kind)
    return Case(name, make, flops, 4.0 * passes * folds * BATCH * units, flops, bar, "eager")


BENCH = Bench(
    "log_einsum_exp",
    [
        _case("forward", 100, 32, False, 2.0),
        _case("backward", 100, 32, False, 2.0),
        _case("step", 100, 32, False, 2.0),
        _case("step", 16, 32, False, None),
        _case("step", 30, 128, False, None),
        _case("step", 20, 16, True, 2.0),
    ],
)
