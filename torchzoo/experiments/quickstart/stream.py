"""The classifier on a film: linear layers in delta form, which skip inputs that did not change.

A film's neighbouring frames are nearly the same, so each linear layer keeps what it was last sent,
x_ref, and its running result acc, and adds only what changed since (`DeltaLinear.step`):

    delta = Q(x) - x_ref,   acc' = acc + sum over delta_j != 0 of delta_j w_j,   x_ref' = Q(x)

with Q(x) = q round(x / q), q a fraction of the root mean square of the layer's inputs. Without Q
the film gives what the dense model gives, up to rounding. An expert that a token doesn't use is
sent nothing: its state waits, and catches up when the token comes back. Norms, attention gates and
the choice of experts are elementwise and run densely; they have no multiply-accumulates to skip.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torchzoo.experiments.quickstart.model import ZooBlock, ZooVisionModel
from torchzoo.sparsity import DeltaLinear, DeltaMeter

State = dict[str, tuple[Tensor, Tensor]]
"""For each linear layer the inputs it was last sent and its running result."""


class StreamingClassifier:
    """A `ZooVisionModel` that takes a frame at a time, with its state in the caller's hands.

    Args:
        model: The trained model; its weights are copied.

    Shape:
        - frame: `(N, 1, S, S)`, a frame of each of N films
        - output of `step`: `(N, K)`

    Attributes:
        linears: The model's linear layers in delta form, by name. Their `quantum` is what trades
            exactness for skipped work; None, as built, is exact.
        dense_macs: Multiply-accumulates of the dense model for the last frame, over all films.
    """

    def __init__(self, model: ZooVisionModel) -> None:
        self.model = model.eval()
        self.linears: dict[str, DeltaLinear] = {
            "embed": DeltaLinear.from_module(model.embedding.project)
        }
        for index, block in enumerate(_blocks(model)):
            self.linears[f"gate{index}"] = _delta_linear(block.moe.gate.weight, None)
            experts = block.moe.experts
            for e in range(experts.num_experts):
                for part, weight, bias in (
                    ("in", experts.w_in, experts.b_in),
                    ("out", experts.w_out, experts.b_out),
                ):
                    self.linears[f"{part}{index}_{e}"] = _delta_linear(weight[e].mT, bias[e])
        self.linears["head"] = DeltaLinear.from_module(model.head)
        self.dense_macs = 0

    def init_state(self, films: int) -> State:
        """The state before the first frame of so many films."""
        tokens = (films, self.model.embedding.tokens)
        return {
            name: layer.init_state((films,) if name == "head" else tokens)
            for name, layer in self.linears.items()
        }

    @torch.no_grad()
    def step(self, frame: Tensor, state: State) -> tuple[Tensor, State]:
        """One frame: the logits and the next state; the given state is left as it was."""
        self.dense_macs, state = 0, dict(state)

        def linear(name: str, x: Tensor, rows: Tensor | None = None) -> Tensor:
            """Layer `name` on `x`; tokens outside `rows` send nothing."""
            layer = self.linears[name]
            if rows is None:
                sent = x[..., 0].numel()
            else:
                sent = int(rows.sum())
                x = torch.where(rows[..., None], x, state[name][0])
            self.dense_macs += sent * layer.in_features * layer.out_features
            y, state[name] = layer.step(x, state[name])
            return y

        embedding = self.model.embedding
        x = linear("embed", embedding.patches(frame)) + embedding.position
        for index, block in enumerate(_blocks(self.model)):
            x = x + block.attention(block.norm1(x))
            x = x + _experts(block, index, block.norm2(x), linear)
        return linear("head", self.model.norm(x).flatten(1)), state

    @torch.no_grad()
    def calibrate(self, films: Tensor) -> dict[str, float]:
        """Root mean square of each layer's inputs over `(N, T, 1, S, S)` films, run exactly.

        Layers that were sent nothing but zeros are left out.
        """
        self.quantise(None, {})
        state = self.init_state(len(films))
        squares: dict[str, list[Tensor]] = {name: [] for name in self.linears}
        for frame in films.unbind(1):
            _, state = self.step(frame, state)
            for name, (x_ref, _) in state.items():
                squares[name].append(x_ref[x_ref.any(-1)].square().mean())
        means = {name: float(torch.stack(each).nanmean().sqrt()) for name, each in squares.items()}
        return {name: mean for name, mean in means.items() if mean > 0}  # NaN: never sent anything

    def quantise(self, step: float | None, scales: dict[str, float]) -> None:
        """Give each layer the quantum `step` times its scale; None makes all exact.

        A layer without a scale, such as an expert that no token used, stays exact.
        """
        for name, layer in self.linears.items():
            scale = scales.get(name)
            layer.quantum = None if step is None or scale is None else step * scale


def _blocks(model: ZooVisionModel) -> list[ZooBlock]:
    return [block for block in model.blocks if isinstance(block, ZooBlock)]


def _delta_linear(weight: Tensor, bias: Tensor | None) -> DeltaLinear:
    outputs, inputs = weight.shape
    layer = DeltaLinear(inputs, outputs, bias=bias is not None).to(weight)
    values = {"weight": weight.detach()} | ({} if bias is None else {"bias": bias.detach()})
    layer.load_state_dict(values)
    return layer


def _experts(block: ZooBlock, index: int, x: Tensor, linear: Callable[..., Tensor]) -> Tensor:
    """The mixture of experts of tokens `(N, L, D)`, its linear layers replaced by `linear`."""
    gate = block.moe.gate
    routing = gate.route(x.flatten(0, 1), linear(f"gate{index}", x).flatten(0, 1))
    weights, used = (part.view(*x.shape[:2], -1) for part in (routing.weights, routing.mask))
    y = torch.zeros_like(x)
    for e in range(gate.num_experts):
        rows = used[..., e]
        hidden = linear(f"in{index}_{e}", x, rows).relu()
        y = y + weights[..., e, None] * linear(f"out{index}_{e}", hidden, rows)
    return y


class Streamed(NamedTuple):
    """What a film cost and gave.

    Attributes:
        logits: `(N, T, K)`.
        macs: Multiply-accumulates done for each frame, over all films.
        dense_macs: What the dense model does for each frame.
    """

    logits: Tensor
    macs: list[int]
    dense_macs: list[int]

    @property
    def skipped(self) -> float:
        """Share of the multiply-accumulates that were skipped, first frames included."""
        return 1 - sum(self.macs) / sum(self.dense_macs)

    @property
    def skipped_by_frame(self) -> list[float]:
        """The same for each frame."""
        return [1 - done / dense for done, dense in zip(self.macs, self.dense_macs, strict=True)]


def run_stream(
    stream: StreamingClassifier, films: Tensor, on_frame: Callable[[], None] = lambda: None
) -> Streamed:
    """Run films `(N, T, 1, S, S)` frame by frame and count the multiply-accumulates."""
    state = stream.init_state(len(films))
    logits, macs, dense = [], [], []
    for frame in films.unbind(1):
        with DeltaMeter() as meter:
            out, state = stream.step(frame, state)
        logits.append(out)
        macs.append(meter.macs)
        dense.append(stream.dense_macs)
        on_frame()
    return Streamed(torch.stack(logits, 1), macs, dense)
