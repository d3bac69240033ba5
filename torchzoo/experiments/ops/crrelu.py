"""`crrelu` against its formula and against ReLU, eager and compiled, forward and backward.

ReLU moves the same bytes and computes next to nothing, so it says how fast memory lets an
activation be. The formula is what eager PyTorch runs without the operator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchzoo.benchmark import OURS, Bench, Case
from torchzoo.ops import crrelu

Activation = Callable[[Tensor, Tensor], Tensor]


def formula(x: Tensor, eps: Tensor) -> Tensor:
    """CRReLU as it is usually written."""
    return torch.relu(x) + eps * x * torch.exp(-x.square() / 2)


def relu(x: Tensor, parameter: Tensor) -> Tensor:
    return torch.relu(x)


def contenders(
    device: torch.device, op: Activation, formula: Activation, start: float, size: int, kind: str
) -> Mapping[str, Callable[[], Any]]:
    """One forward, or one forward and backward, of each activation on `size` numbers."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(size, generator=generator).to(device) for _ in range(2))
    x.requires_grad_()
    parameter = torch.tensor(start, device=device, requires_grad=True)

    def run(activation: Activation) -> None:
        if kind == "forward":
            with torch.no_grad():
                activation(x, parameter)
            return
        leaves = [x] if activation is named["ReLU"] else [x, parameter]
        torch.autograd.grad(activation(x, parameter), leaves, grad)

    named: dict[str, Activation] = {OURS: op, "formula": formula, "ReLU": relu}
    if kind == "compiled":
        named = {name: torch.compile(f, dynamic=False) for name, f in named.items()}
    return {name: partial(run, activation) for name, activation in named.items()}


def cases(op: Activation, formula: Activation, start: float, flops: float) -> list[Case]:
    """Small and large inputs, forward and with backward, eager and compiled."""
    found = []
    for size in (2**16, 2**20, 2**24):
        for kind, passes in (("forward", 2), ("forward and backward", 5), ("compiled", 5)):
            found.append(
                Case(
                    f"{size:,} numbers, {kind}",
                    partial(contenders, op=op, formula=formula, start=start, size=size, kind=kind),
                    flops * size,
                    4.0 * passes * size,
                    flops * size * passes,
                    1 / 1.1 if size == 2**24 else None,
                    "ReLU",
                )
            )
    return found


BENCH = Bench("crrelu", cases(crrelu, formula, 0.01, 20.0))
