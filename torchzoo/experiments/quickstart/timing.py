"""Each part of the model, and the whole, timed beside its dense counterpart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from torchzoo.attention import MultiHeadGaussianAdaptiveAttention
from torchzoo.experiments.quickstart.baseline import TransformerModel
from torchzoo.experiments.quickstart.model import ZooVisionModel
from torchzoo.experiments.quickstart.stream import StreamingClassifier
from torchzoo.experiments.quickstart.training import objective
from torchzoo.moe import MoELayer, SoftmaxGate
from torchzoo.sparsity import DeltaLinear

BATCH = 64
WIDE, CHANGED = 1024, 0.1
"""Features of the single delta layer, and the share of them that changes from frame to frame."""


@dataclass(frozen=True)
class Spread:
    """Seconds of a call: the median of several blocks and their interquartile range."""

    median: float
    iqr: float


@dataclass(frozen=True)
class Timing:
    """A part of the zoo and its dense counterpart, on the same inputs.

    Attributes:
        part: What was timed.
        counterpart: What it is compared with.
        ours: The part's seconds.
        theirs: The counterpart's seconds.
        device: `cpu` or `cuda`.
        threads: Threads of the CPU.
    """

    part: str
    counterpart: str
    ours: Spread
    theirs: Spread
    device: str
    threads: int

    @property
    def speedup(self) -> float:
        """How many times faster the part is; below 1 it is slower."""
        return self.theirs.median / self.ours.median


Case = tuple[str, str, Callable[[], Any], Callable[[], Any]]


def cases(model: ZooVisionModel, device: torch.device) -> Iterator[Case]:
    """What is timed: part, counterpart, and a call of each, for a trained model on the device."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(device)

    block: Any = model.blocks[0]
    attention: MultiHeadGaussianAdaptiveAttention = block.attention
    images = random(BATCH, 1, 12, 12)
    with torch.no_grad():
        x = block.norm1(model.embedding(images))
    dot = nn.MultiheadAttention(attention.dim, attention.num_heads, batch_first=True).to(device)
    yield (
        f"Gaussian adaptive attention, {tuple(x.shape)}",
        "dot-product attention",
        lambda: attention(x),
        lambda: dot(x, x, x, need_weights=False),
    )
    gate = block.moe.gate
    every = MoELayer(SoftmaxGate(gate.dim, gate.num_experts), block.moe.experts).to(device)
    yield (
        "experts, annealed gate",
        "every expert for every token",
        lambda: block.moe(x),
        lambda: every(x),
    )
    yield _delta_case(random, device)
    baseline = TransformerModel(model.head.out_features).to(device).eval()
    yield f"model, {BATCH} images", "transformer", lambda: model(images), lambda: baseline(images)
    stream = StreamingClassifier(model)
    frame = images[:1]
    _, state = stream.step(frame, stream.init_state(1))
    yield (
        "model, a still frame in delta form",
        "the same model, dense",
        lambda: stream.step(frame, state),
        lambda: model(frame),
    )
    labels = torch.arange(BATCH, device=device) % model.head.out_features
    yield (
        f"training step, {BATCH} images",
        "transformer",
        _training_step(ZooVisionModel(model.head.out_features).to(device), images, labels),
        _training_step(baseline, images, labels),
    )


def _delta_case(random: Callable[..., Tensor], device: torch.device) -> Case:
    layer = DeltaLinear(WIDE, WIDE).to(device)
    layer.weight = nn.Parameter(layer.weight.detach().mT.contiguous().mT)  # an input a row
    dense = nn.Linear(WIDE, WIDE, device=device)
    before = random(1, WIDE)
    after = torch.where(random(1, WIDE) < CHANGED, random(1, WIDE), before)
    with torch.no_grad():
        _, state = layer.step(before, layer.init_state((1,)))
    return (
        f"delta layer {WIDE} x {WIDE}, {CHANGED:.0%} changed",
        "linear layer",
        lambda: layer.step(after, state),
        lambda: dense(after),
    )


def _training_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step() -> None:
        with torch.enable_grad():
            optimizer.zero_grad(set_to_none=True)
            objective(model.train(), images, labels).backward()
            optimizer.step()

    return step


def measure(
    model: ZooVisionModel,
    device: torch.device,
    *,
    min_run_time: float,
    on_case: Callable[[], None] = lambda: None,
) -> list[Timing]:
    """Time every case on a device.

    Args:
        model: The trained model; it is moved to the device.
        device: Where to run.
        min_run_time: Seconds that each call is timed for at the least.
        on_case: Called after each case.
    """
    threads = torch.get_num_threads()
    rows = []
    for part, counterpart, ours, theirs in cases(model.to(device).eval(), device):
        spread, other = (_timed(call, threads, min_run_time) for call in (ours, theirs))
        rows.append(Timing(part, counterpart, spread, other, device.type, threads))
        on_case()
    return rows


@torch.no_grad()
def _timed(call: Callable[[], Any], threads: int, min_run_time: float) -> Spread:
    timer = Timer("call()", globals={"call": call}, num_threads=threads)
    found = timer.blocked_autorange(min_run_time=min_run_time)
    return Spread(found.median, found.iqr)


CASES = 6
"""How many cases there are."""
