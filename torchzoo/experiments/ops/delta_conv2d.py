"""`delta_conv2d_step` for one frame against the dense convolution that it stands for.

Frames have 64 channels of 56 x 56 pixels, and kernels 3 x 3 weights, as in the first stage of a
ResNet. The pixels that changed are a square, as where one thing moves, or lie anywhere, as noise
does, which leaves few tiles without any. Both orders of the dense contender's memory are tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchzoo.benchmark import OURS, Bench, Case
from torchzoo.ops.delta_conv2d import delta_conv2d_step

CHANNELS, SIDE, KERNEL = 64, 56, 3


def changed_pixels(share: float, square: bool, generator: torch.Generator) -> Tensor:
    """A mask `(SIDE, SIDE)` with about that share of true pixels."""
    if square:
        mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
        mask[5:, 5:][: round(share**0.5 * SIDE), : round(share**0.5 * SIDE)] = True
        return mask
    order = torch.randperm(SIDE * SIDE, generator=generator)
    return (order < share * SIDE * SIDE).view(SIDE, SIDE)


def contenders(device: torch.device, share: float, square: bool) -> Mapping[str, Callable[[], Any]]:
    """One frame, of which a share of the pixels changed in all channels."""
    generator = torch.Generator().manual_seed(0)
    shape = (CHANNELS, CHANNELS, KERNEL, KERNEL)
    weight = (torch.randn(shape, generator=generator) / (CHANNELS * KERNEL**2) ** 0.5).to(device)
    x_ref = torch.randn(1, CHANNELS, SIDE, SIDE, generator=generator)
    moved = x_ref + changed_pixels(share, square, generator)
    x_ref, x = (t.to(device, memory_format=torch.channels_last) for t in (x_ref, moved))
    acc = F.conv2d(x_ref, weight, padding=1).contiguous(memory_format=torch.channels_last)
    rows = weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    last = weight.contiguous(memory_format=torch.channels_last)
    return {
        OURS: partial(delta_conv2d_step, x, x_ref, acc, rows, padding=1),
        "conv2d": partial(F.conv2d, x.contiguous(), weight, padding=1),
        "conv2d, channels last": partial(F.conv2d, x, last, padding=1),
    }


def _case(share: float, square: bool) -> Case:
    work = 2.0 * share * SIDE**2 * (KERNEL * CHANNELS) ** 2
    weights, frame = (KERNEL * CHANNELS) ** 2, CHANNELS * SIDE**2
    return Case(
        f"{CHANNELS} channels, {SIDE} x {SIDE}, {share:.0%} changed, "
        + ("a square" if square else "anywhere"),
        partial(contenders, share=share, square=square),
        work,
        4.0 * (weights + 5 * frame),
        work,
    )


BENCH = Bench(
    "delta_conv2d", [_case(share, square) for square in (True, False) for share in (0.01, 0.1)]
)
