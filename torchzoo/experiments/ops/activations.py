"""The activations of the zoo against ReLU, on an input that no cache holds, eager and compiled.

ReLU moves the bytes that any activation has to move and computes next to nothing, so it says how
fast memory lets an activation be; SiLU, beside it, is what one exponential costs, which CRReLU and
HyReLU have too. Where torch gets its results from the system each time, as it does with this size,
most of its time on a CPU are faults at the first writes; our kernels keep the memory.

Three are more than an activation, and are held to what they take the place of. EvoNorm-B0 and S0
measure the statistics of their input before they can begin, which is another pass over memory that
ReLU alone has not: their peers are BatchNorm with ReLU and GroupNorm with SiLU, in training mode.
The SDM activation is a softmax, and shown against ReLU too.

Top-k activations, and KAN layers, whose functions are mixed by a matrix, are no elementwise
activations and not here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchzoo.activations import (
    ClipAct,
    CRReLU,
    EvoNormB0,
    EvoNormS0,
    FitAct,
    HybridClippedReLU,
    Ranger,
    sdm_softmax,
)
from torchzoo.benchmark import OURS, Bench, Case
from torchzoo.sparsity import FATReLU

SIZE = 2**23  # numbers, 32 MiB
SHAPES = {"rows": (8192, 1024), "images": (32, 256, 32, 32)}
CHANNELS, GROUPS = 256, 32
KINDS = {  # how many times memory is passed over at the least
    "forward": 2,
    "forward and backward": 5,
    "compiled forward": 2,
    "compiled forward and backward": 5,
}
Make = Callable[[], nn.Module]


class SDM(nn.Module):
    """The SDM activation of rows that are all as similar and as near as each other."""

    def __init__(self) -> None:
        super().__init__()
        rows = SHAPES["rows"][:1]
        self.register_buffer("q", torch.full(rows, 7.0))
        self.register_buffer("d", torch.full(rows, 0.5))

    def forward(self, z: Tensor) -> Tensor:
        return sdm_softmax(z, self.get_buffer("q"), self.get_buffer("d"))


RELU: dict[str, Make] = {"ReLU": nn.ReLU}
EXPONENTIAL: dict[str, Make] = {"ReLU": nn.ReLU, "SiLU": nn.SiLU}
BATCH: dict[str, Make] = {
    "BatchNorm, ReLU": lambda: nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.ReLU())
}
SAMPLE: dict[str, Make] = {
    "GroupNorm, SiLU": lambda: nn.Sequential(nn.GroupNorm(GROUPS, CHANNELS), nn.SiLU())
}
ACTIVATIONS: dict[str, tuple[Make, dict[str, Make], str]] = {
    "CRReLU": (CRReLU, EXPONENTIAL, "rows"),
    "HyReLU": (lambda: HybridClippedReLU(1.3), EXPONENTIAL, "rows"),
    "FitAct": (lambda: FitAct([1.3] * SHAPES["rows"][1]), EXPONENTIAL, "rows"),
    "Ranger": (lambda: Ranger(1.3), RELU, "rows"),
    "ClipAct": (lambda: ClipAct(1.3), RELU, "rows"),
    "FATReLU": (lambda: FATReLU(0.01), RELU, "rows"),
    "EvoNorm-B0": (lambda: EvoNormB0(CHANNELS), BATCH, "images"),
    "EvoNorm-S0": (lambda: EvoNormS0(CHANNELS, GROUPS), SAMPLE, "images"),
    "SDM": (SDM, {"softmax": lambda: nn.Softmax(-1), **RELU}, "rows"),
}


def contenders(device: torch.device, name: str, kind: str) -> Mapping[str, Callable[[], Any]]:
    """One forward, or one forward and backward, of an activation and of its peers."""
    ours, peers, shape = ACTIVATIONS[name]
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(SHAPES[shape], generator=generator).to(device) for _ in range(2))
    x.requires_grad_()

    def run(module: nn.Module, leaves: list[Tensor]) -> None:
        if kind.endswith("backward"):
            torch.autograd.grad(module(x), leaves, grad)
            return
        with torch.no_grad():
            module(x)

    calls = {}
    if kind.startswith("compiled"):
        torch.compiler.reset()  # else there is a limit to what is compiled of one class
    for who, make in {OURS: ours, **peers}.items():
        module = make().to(device)
        leaves = [x, *module.parameters()]
        if kind.startswith("compiled"):
            module = torch.compile(module, dynamic=False)  # type: ignore[assignment]
        calls[who] = partial(run, module, leaves)
    return calls


def cases() -> list[Case]:
    """Every activation in every way of running it; the bar is 1.1 times its peer's time."""
    return [
        Case(
            f"{name}, {kind}",
            partial(contenders, name=name, kind=kind),
            float(passes * SIZE),
            4.0 * passes * SIZE,
            float(place),
            1 / 1.1 if kind.startswith("compiled") else None,
            next(iter(peers)),
            rounds=9,
        )
        for place, (name, (_, peers, _)) in enumerate(ACTIVATIONS.items(), start=1)
        for kind, passes in KINDS.items()
    ]


BENCH = Bench("activations", cases())
