"""`plas_sort` against its tensor formulation: whole sorts, and single passes over large grids.

Vectors are random, of seven numbers, such as a place, a colour and an opacity. A case "sort" goes
from the first target to the last. A case "passes" is one call of the operator below, with the eight
draws of groups that a round tries at a time: in one block, as in the first round, or in blocks of
16 x 16, as in the last. The peer `reference` is that operator as its tensor formulation, which
scores the 24 orders of all groups by products of matrices; all else in a sort is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch.utils._python_dispatch import TorchDispatchMode

from torchzoo.benchmark import OURS, Bench, Case
from torchzoo.experiments.ops.rasterize import formulation
from torchzoo.ops.plas_sort import DRAWS, _plas_passes, plas_sort

FEATURES = 7


class Plainly(TorchDispatchMode):
    """Runs the operator as its tensor formulation, whatever kernels there are."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.torchzoo.plas_passes.default:
            func = formulation(_plas_passes)
        return func(*args, **(kwargs or {}))


def sorting(device: torch.device, side: int) -> Mapping[str, Callable[[], Any]]:
    """The order of a whole grid."""
    features = torch.rand(side**2, FEATURES, generator=torch.manual_seed(0)).to(device)

    def ours() -> Any:
        return plas_sort(features, generator=torch.Generator().manual_seed(0))

    def reference() -> Any:
        with Plainly():
            return ours()

    return {OURS: ours, "reference": reference}


def passing(device: torch.device, side: int, block: int) -> Mapping[str, Callable[[], Any]]:
    """The order after some passes, and what they did."""
    random = torch.Generator().manual_seed(0)
    items, target = (
        torch.randint(-(2**19), 2**19, (side**2, FEATURES), generator=random).int()
        for _ in range(2)
    )
    order = torch.randperm(side**2, generator=random)
    places = torch.arange(side**2).view(side, side)
    cells = rearrange(places, "(a y) (b x) -> (a b) (y x)", y=block, x=block)
    draws = torch.stack([torch.randperm(block**2, generator=random) for _ in range(DRAWS)])
    inputs = [x.to(device) for x in (items, target, order, cells, draws)]
    return {
        OURS: partial(_plas_passes, *inputs, 0.0),
        "reference": partial(formulation(_plas_passes), *inputs, 0.0),
    }


def case(kind: str, side: int, block: int, passes: int, rounds: int | None = None) -> Case:
    """So many passes over a grid."""
    groups = passes * side**2 / 4
    flops = groups * (32.0 * FEATURES + 96)  # likenesses, and sums of four for each order
    moved = groups * 4 * (8.0 * FEATURES + 16)  # items, targets, and places out and in
    name = f"{kind}, {side} x {side}"
    make: Callable[..., Mapping[str, Callable[[], Any]]] = partial(sorting, side=side)
    if kind == "passes":
        name += f", blocks of {block} x {block}"
        make = partial(passing, side=side, block=block)
    return Case(name, make, flops, moved, flops, 1.0, "reference", rounds)


BENCH = Bench(
    "plas_sort",
    [
        case("sort", 32, 16, 3_700, rounds=5),
        case("passes", 256, 256, DRAWS),
        case("passes", 512, 16, DRAWS, rounds=5),
    ],
)
