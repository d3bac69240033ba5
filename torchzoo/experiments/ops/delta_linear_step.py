"""`delta_linear_step` for one frame against the dense layer it stands for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from torchzoo.benchmark import OURS, Bench, Case
from torchzoo.ops import delta_linear_step


def contenders(device: torch.device, size: int, changed: float) -> Mapping[str, Callable[[], Any]]:
    """One frame in which a share of the inputs changed, and the dense product."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(size, size, generator=generator) / size**0.5).to(device)
    weight_t = weight.mT.contiguous()
    x_ref = torch.randn(size, generator=generator).to(device)
    where = torch.randperm(size, generator=generator)[: round(changed * size)].to(device)
    x = x_ref.clone()
    x[where] += 1.0
    acc = F.linear(x_ref, weight)
    return {
        OURS: partial(delta_linear_step, x, x_ref, acc, weight_t),
        "dense": partial(F.linear, x, weight),
    }


def _case(changed: float, bar: float | None, size: int = 4096) -> Case:
    rows = round(changed * size)
    return Case(
        f"{size} x {size}, {changed:.0%} changed",
        partial(contenders, size=size, changed=changed),
        2.0 * rows * size,
        4.0 * (rows * size + 6 * size),
        2.0 * rows * size,
        bar,
    )


BENCH = Bench(
    "delta_linear_step", [_case(0.01, 20.0), _case(0.1, 5.0), _case(0.5, None), _case(1.0, None)]
)
