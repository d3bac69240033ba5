"""`delta_linear_step` against the dense layer it stands for: for one frame, and on a short stream.

One frame comes right after the dense product, which leaves nothing of the step in any cache. In the
stream each frame changes other inputs, so that the weights which a step reads are rarely there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchzoo.benchmark import OURS, Bench, Case
from torchzoo.ops import delta_linear_step

STREAM = 8


def contenders(
    device: torch.device, size: int, changed: float, count: int = 1
) -> Mapping[str, Callable[[], Any]]:
    """A stream in which a share of the inputs changes at each frame, and the dense products."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(size, size, generator=generator) / size**0.5).to(device)
    weight_t = weight.mT.contiguous()
    first = torch.randn(size, generator=generator).to(device)
    frames = [first]
    for _ in range(count):
        where = torch.randperm(size, generator=generator)[: round(changed * size)].to(device)
        frames.append(frames[-1].index_add(0, where, torch.ones_like(where, dtype=first.dtype)))
    start = F.linear(first, weight)

    def steps() -> Tensor:
        x_ref, acc = first, start
        for frame in frames[1:]:
            acc, x_ref = delta_linear_step(frame, x_ref, acc, weight_t)
        return acc

    def dense() -> Tensor:
        for frame in frames[1:]:
            y = F.linear(frame, weight)
        return y

    return {OURS: steps, "dense": dense}


def _case(changed: float, bar: float | None = None, count: int = 1, size: int = 4096) -> Case:
    rows = round(changed * size)
    one, many = f"{changed:.0%} changed", f"{count} frames of {changed:.0%}"
    return Case(
        f"{size} x {size}, {one if count == 1 else many}",
        partial(contenders, size=size, changed=changed, count=count),
        2.0 * count * rows * size,
        4.0 * count * (rows * size + 6 * size),
        2.0 * count * rows * size,
        bar,
    )


BENCH = Bench(
    "delta_linear_step",
    [
        *(_case(*case) for case in ((0.01, 20.0), (0.1, 5.0), (0.5,), (1.0,))),
        *(_case(changed, count=STREAM) for changed in (0.01, 0.1)),
    ],
)
