"""Streaming: a trained sequence model, turned into one that takes a frame at a time.

In the chain delta → linear → sigma the linear layer sees changes and the next layer sums them up.
Folded, the sum moves into the linear layer's accumulator, y_t = y_{t−1} + W d_t, and the layer
reads only the weights of inputs that changed. Layers that put out levels fold in the same way.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchzoo.hub import ZooModel
from torchzoo.registry import Example, register
from torchzoo.sparsity.delta import DeltaActivation, L1Activation
from torchzoo.sparsity.delta_conv import DeltaConv2d
from torchzoo.sparsity.delta_layers import DeltaLinear

FRAMEWISE = (
    L1Activation,
    nn.Identity,
    nn.Dropout,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.GELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Tanh,
)
"""Layers without a state whose output at a time depends on the input at that time alone."""


class StreamState(NamedTuple):
    """The state of a `StreamingModel`: tensors in a tuple for each layer, nothing hidden.

    Attributes:
        layers: The layers' states, None for layers without one; all None before the first frame,
            which tells their sizes.
        batch_shape: Shape of a frame without its features.
    """

    layers: tuple[Any, ...] | None
    batch_shape: tuple[int, ...]


def _example() -> Example:
    layers = [DeltaLinear(4, 6), DeltaActivation(6, step_init=1e-10, train_step=False)]
    return Example({"layers": layers}, (torch.randn(2, 3, 4),), bad_options={"layers": []})


@register(
    paper=157,
    example=_example,
    exempt={"fixed-rank": "the second dimension of the input is time"},
    compare="its gain needs frames that follow each other: `torchzoo reproduce 157` measures it",
)
class StreamingModel(ZooModel):
    """Layers run a frame at a time, with their state in the caller's hands.

    Args:
        layers: What runs, in order: layers with `init_state` and `step`, and framewise ones.

    Shape:
        x: (B, T, ..., C) in `forward`, (B, ..., C) in `step`.

    Returns:
        The last layer's outputs, for all frames in `forward`.

    Raises:
        ValueError: No layers, or one that can't be streamed.

    Source:
        Yousefzadeh and Sifalakis, "Training for temporal sparsity in deep neural networks,
        application in video processing", 2021 (delta inference).

    Example:
        >>> stream = StreamingModel([DeltaLinear(4, 3), DeltaActivation(3)])
        >>> state = stream.init_state((2,))
        >>> for frame in torch.randn(5, 2, 4):
        ...     y, state = stream.step(frame, state)
        >>> y.shape
        torch.Size([2, 3])
    """

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        if not layers:
            raise ValueError(f"layers: expected at least one, got {layers}")
        for layer in layers:
            if not (isinstance(layer, FRAMEWISE) or _has_step(layer)):
                raise ValueError(
                    f"layers: {type(layer).__name__} can't be streamed; expected a layer with "
                    "init_state and step, or one of torchzoo.sparsity.streaming.FRAMEWISE"
                )
        self.layers = nn.ModuleList(layers)

    def init_state(self, batch_shape: Sequence[int]) -> StreamState:
        """The state before the first frame.

        Args:
            batch_shape: Shape of a frame without its features, `x_t.shape[:-1]`.
        """
        return StreamState(None, tuple(batch_shape))

    def step(self, x_t: Tensor, state: StreamState) -> tuple[Tensor, StreamState]:
        """One frame: its output and the next state; the given state is left as it was."""
        if x_t.shape[:-1] != state.batch_shape:
            raise ValueError(
                f"x_t: expected leading dimensions {state.batch_shape}, as the state has, "
                f"got shape {tuple(x_t.shape)}"
            )
        states = []
        for index, layer in enumerate(self.layers):
            old = None if state.layers is None else state.layers[index]
            x_t, new = _step(layer, x_t, old)
            states.append(new)
        return x_t, StreamState(tuple(states), state.batch_shape)

    def reset(self, state: StreamState) -> StreamState:
        """The state before the first frame, for a stream of the same shape."""
        return self.init_state(state.batch_shape)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 3 or x.shape[1] == 0:
            raise ValueError(f"x: expected shape (B, T, ..., C) with T ≥ 1, got {tuple(x.shape)}")
        state = self.init_state((x.shape[0], *x.shape[2:-1]))
        outputs = []
        for x_t in x.unbind(1):
            y_t, state = self.step(x_t, state)
            outputs.append(y_t)
        return torch.stack(outputs, dim=1)


def fold_to_streaming(model: nn.Module) -> StreamingModel:
    """Turn a trained sequence model into a streaming one; the model itself is left as it is.

    Args:
        model: One layer or an `nn.Sequential` of layers, nested or not: those of this family, which
            is what a model trained with `DeltaActivation` has, `nn.Linear`, framewise layers, and
            any module of your own with `init_state` and `step`.

    Returns:
        A copy in evaluation mode. Its linear weights are stored an input a row, so that a step
        reads contiguous memory; values, names and shapes are those of the model.

    Raises:
        ValueError: A layer can't be streamed; deltas pass a layer with a bias or one that is not
            linear, or are never summed up; or a layer leaves the background out, which needs the
            next frame.

    Source:
        Yousefzadeh and Sifalakis, "Training for temporal sparsity in deep neural networks,
        application in video processing", 2021 (delta inference).

    Example:
        >>> model = nn.Sequential(
        ...     DeltaActivation(4, delta="full"),
        ...     nn.Linear(4, 3, bias=False),
        ...     DeltaActivation(3, sigma=True, bias=True),
        ... )
        >>> frames = torch.randn(2, 5, 4)
        >>> stream = fold_to_streaming(model)
        >>> torch.allclose(stream(frames), model(frames), atol=1e-6)
        True
    """
    names = [name for name, _ in _flatten(model)]
    layers = [_pack(copy.deepcopy(layer)) for _, layer in _flatten(model)]
    source: DeltaActivation | None = None  # the layer whose deltas are on their way
    for name, layer in zip(names, layers, strict=True):
        if isinstance(layer, DeltaActivation):
            if layer.delta == "no_background":
                raise ValueError(f"{name}: delta='no_background' needs the next frame; use 'full'")
            if source is not None and layer.sigma:
                source.delta = layer.sigma = False
                source = None
        if source is not None:
            linear = isinstance(layer, (DeltaLinear, DeltaConv2d))
            if not linear or layer.bias is not None:
                raise ValueError(
                    f"{name}: deltas reach this {type(layer).__name__}; between delta='full' and "
                    "sigma=True only linear layers without a bias may stand"
                )
        elif isinstance(layer, DeltaActivation) and layer.delta:
            source = layer
    if source is not None and source is not layers[-1]:
        raise ValueError(f"{names[-1]}: deltas are never summed up; end with sigma=True")
    return StreamingModel(layers).eval()


def _flatten(model: nn.Module, name: str = "model") -> Iterator[tuple[str, nn.Module]]:
    if isinstance(model, nn.Sequential):
        for child, layer in model.named_children():
            yield from _flatten(layer, f"{name}.{child}")
    else:
        yield name, model


def _pack(layer: nn.Module) -> nn.Module:
    """Store linear weights column by column, same shape and values: the transpose is contiguous."""
    if type(layer) is nn.Linear:
        layer = DeltaLinear.from_module(layer)
    if isinstance(layer, (DeltaLinear, DeltaConv2d)):
        weight = layer.weight.detach()
        columns = weight.flatten(1).mT.contiguous().mT.unflatten(1, weight.shape[1:])
        layer.weight = nn.Parameter(columns, requires_grad=layer.weight.requires_grad)
    return layer


def _has_step(layer: nn.Module) -> bool:
    return hasattr(layer, "step") and hasattr(layer, "init_state")


def _step(layer: Any, x_t: Tensor, state: Any) -> tuple[Tensor, Any]:
    if not _has_step(layer):
        return layer(x_t), None
    return layer.step(x_t, layer.init_state(x_t.shape[:-1]) if state is None else state)
