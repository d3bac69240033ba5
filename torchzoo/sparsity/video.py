"""Networks for video out of delta layers: trained on clips, run on a stream of frames.

A frame passes convolutions and linear layers, each but the last followed by a delta activation
(Yousefzadeh and Sifalakis, "Training for temporal sparsity in deep neural networks, application in
video processing", 2021). With logits y_t of frame t and d_l the changes of layer l's activations

    loss = cross-entropy(mean_t y_t, label) + rate · Σ_l c_l · mean |d_l|,

where c_l is the share of the network's multiplications that layer l's outputs cost, so that the
second term is about what a stream has to compute. Deviations: none in the layers; the paper counts
outputs a neuron feeds, c_l also counts the neurons.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from torchzoo.hub import ZooModel
from torchzoo.registry import Example, register
from torchzoo.sparsity.delta import DeltaActivation, delta_penalty
from torchzoo.sparsity.delta_conv import DeltaConv2d
from torchzoo.sparsity.delta_layers import DeltaLinear, check_positive
from torchzoo.sparsity.streaming import StreamingModel, fold_to_streaming

_LINEAR = (nn.Conv2d, nn.Linear)
_IMAGE_LAYERS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten)


def _example() -> Example:
    options = {"num_classes": 3, "frame_size": (8, 6), "channels": (4, 5), "hidden": (6,)}
    # steps too fine to be seen, as finite differences can't see a straight-through gradient
    return Example(
        {"in_channels": 2, "step_init": 1e-10, "train_step": False, **options},
        (torch.randn(2, 3, 8, 6, 2),),
        bad_options={
            "in_channels": 0,
            "num_classes": 0,
            "frame_size": (0, 4),
            "channels": (),
            "hidden": (0,),
            "kernel_size": 2,
            "stride": 0,
            "rate": -1.0,
            "step_init": 0.0,
            "threshold": -1.0,
        },
    )


@register(
    paper=157,
    example=_example,
    exempt={"fixed-rank": "the second dimension of the input is time"},
    compare="its gain needs frames that follow each other: `torchzoo reproduce 157` measures it",
)
class VideoNet(ZooModel):
    """A classifier of video, convolutions and then linear layers, whose stream skips what stays.

    Train it on clips with `loss`; `to_stream` gives the network that takes a frame at a time.

    Args:
        in_channels: Channels C of a frame.
        num_classes: Classes K.
        frame_size: Height and width of a frame.
        channels: Output channels of each convolution.
        hidden: Outputs of each linear layer before the last.
        kernel_size: Height and width of the kernels, odd.
        stride: Step of each convolution's output grid.
        rate: Weight of the penalty on changes, ≥ 0.
        step_init: First quantisation step of the activations, > 0.
        train_step: Whether the steps learn.
        threshold: A change of a pixel counts where it is strictly above this, ≥ 0: about three
            times the sensor's noise spares the first convolution most of its work.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        x: (B, T, H, W, C) with T frames → (B, T, K).

    Returns:
        The logits of each frame, which depend on frames before it through `threshold` alone.

    Raises:
        ValueError: An option out of its range, or an input of another shape.

    Source:
        Yousefzadeh and Sifalakis, "Training for temporal sparsity in deep neural networks,
        application in video processing", 2021.

    Example:
        >>> model = VideoNet(3, 5, frame_size=(16, 16))
        >>> clips, labels = torch.rand(2, 4, 16, 16, 3), torch.tensor([0, 3])
        >>> model.loss(clips, labels).backward()
        >>> stream = model.to_stream()
        >>> state = stream.init_state((2, 16, 16))
        >>> for frame in clips.unbind(1):
        ...     logits, state = stream.step(frame, state)
        >>> torch.allclose(logits, model(clips)[:, -1], atol=1e-5)
        True
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        frame_size: tuple[int, int],
        channels: Sequence[int] = (16, 32),
        hidden: Sequence[int] = (128,),
        kernel_size: int = 3,
        stride: int = 2,
        rate: float = 1.0,
        step_init: float = 0.1,
        train_step: bool = True,
        threshold: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, sizes in (
            ("in_channels", (in_channels,)),
            ("num_classes", (num_classes,)),
            ("frame_size", frame_size),
            ("channels", channels),
            ("hidden", hidden),
        ):
            if not all(size > 0 for size in sizes) or (not sizes and name != "hidden"):
                raise ValueError(f"{name}: expected numbers > 0, got {sizes}")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {kernel_size}")
        self.frame_shape = (*frame_size, in_channels)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        active: dict[str, Any] = {"rate": rate, "step_init": step_init, "train_step": train_step}
        grid: dict[str, Any] = {"stride": stride, "padding": kernel_size // 2, **factory}
        layers: list[nn.Module] = []
        height, width = frame_size
        for index, (before, after) in enumerate(pairwise((in_channels, *channels))):
            noise: dict[str, Any] = {} if index else {"threshold": threshold}
            layers += [DeltaConv2d(before, after, kernel_size, **grid, **noise)]
            layers += [DeltaActivation(after, **active, **factory)]
            height, width = ((side - 1) // stride + 1 for side in (height, width))
        layers += [_PerFrame(nn.Flatten())]
        for before, after in pairwise((height * width * channels[-1], *hidden)):
            layers += [
                DeltaLinear(before, after, **factory),
                DeltaActivation(after, **active, **factory),
            ]
        last = hidden[-1] if hidden else height * width * channels[-1]
        self.layers = nn.Sequential(*layers, DeltaLinear(last, num_classes, **factory))
        weigh_penalties(self.layers, self.frame_shape)

    def reset_parameters(self) -> None:
        """Draw every layer anew."""
        for layer in self.layers:
            if isinstance(layer, (DeltaConv2d, DeltaLinear, DeltaActivation)):
                layer.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 5 or x.shape[2:] != self.frame_shape:
            raise ValueError(f"x: expected (B, T, *{self.frame_shape}), got {tuple(x.shape)}")
        return self.layers(x)

    def loss(self, clips: Tensor, labels: Tensor) -> Tensor:
        """What to train on: cross-entropy of a clip's mean logits, and the penalty on changes.

        Args:
            clips: `(B, T, H, W, C)` with T ≥ 2.
            labels: Classes `(B,)`.
        """
        return F.cross_entropy(self(clips).mean(1), labels) + delta_penalty(self)

    def to_stream(self) -> StreamingModel:
        """A copy that takes a frame at a time, see `fold_to_streaming`."""
        return fold_to_streaming(self.layers)


def to_video_layers(
    model: nn.Sequential,
    *,
    frame_shape: tuple[int, int, int],
    rate: float = 1.0,
    step_init: float = 0.1,
    threshold: float = 0.0,
) -> nn.Sequential:
    """The layers of a trained image network as delta layers, to refine on clips and to stream.

    Convolutions and linear layers keep their weights, with batch normalisation folded in; each ReLU
    becomes a `DeltaActivation`; pooling and flattening run on each frame. With a fine `step_init`
    the result gives what the network gives for each frame.

    Args:
        model: Nested or not: `nn.Conv2d`, `nn.Linear`, each with a batch normalisation behind it or
            not, `nn.ReLU`, pooling, `nn.Flatten`, `nn.Dropout` and `nn.Identity`. It is left as it
            is.
        frame_shape: Height, width and channels of a frame.
        rate: Weight of the penalty on changes, ≥ 0.
        step_init: First quantisation step of the activations, > 0.
        threshold: Of the first layer, see `VideoNet`.

    Shape:
        Of what it returns: x (B, T, H, W, C) → (B, T, K).

    Returns:
        Layers for `delta_penalty` and `fold_to_streaming`, in evaluation mode.

    Raises:
        ValueError: A layer that has no counterpart, is named.

    Source:
        Yousefzadeh and Sifalakis, "Training for temporal sparsity in deep neural networks,
        application in video processing", 2021 (refinement of a trained network).

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        >>> layers = to_video_layers(net, frame_shape=(8, 8, 3), step_init=1e-6)
        >>> clip = torch.rand(1, 5, 8, 8, 3)
        >>> torch.allclose(layers(clip)[0], net(clip[0].permute(0, 3, 1, 2)), atol=1e-4)
        True
    """
    check_positive("step_init", step_init)
    found: list[nn.Module] = []
    noise = {"threshold": threshold}
    for name, layer in _leaves(copy.deepcopy(model).eval(), "model"):
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            last = found[-1] if found else None
            if not isinstance(last, _LINEAR):
                raise ValueError(f"{name}: expected a convolution or linear layer in front of it")
            fuse: Any = fuse_conv_bn_eval if isinstance(last, nn.Conv2d) else fuse_linear_bn_eval
            found[-1] = fuse(last, layer)
        elif isinstance(layer, nn.ReLU):
            source = next((m for m in reversed(found) if isinstance(m, _LINEAR)), None)
            if source is None:
                raise ValueError(f"{name}: expected a convolution or linear layer before it")
            weight = source.weight
            options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
            found.append(DeltaActivation(len(weight), rate=rate, step_init=step_init, **options))
        elif isinstance(layer, _IMAGE_LAYERS):
            found.append(_PerFrame(layer))
        elif isinstance(layer, (*_LINEAR, nn.Dropout, nn.Identity)):
            found.append(layer)
        else:
            raise ValueError(f"{name}: {type(layer).__name__} has no counterpart for video")
    for index, layer in enumerate(found):
        if isinstance(layer, _LINEAR):
            delta = DeltaConv2d if isinstance(layer, nn.Conv2d) else DeltaLinear
            found[index] = delta.from_module(layer, **noise)  # type: ignore[arg-type]
            noise = {}
    layers = nn.Sequential(*found).eval()
    weigh_penalties(layers, frame_shape)
    return layers


def weigh_penalties(layers: nn.Sequential, frame_shape: tuple[int, ...]) -> None:
    """Set each activation's `fan_out` to the share of all multiplications that its outputs cost.

    Args:
        layers: Delta layers and framewise ones.
        frame_shape: Of the first layer's frames, without batch and time.

    Example:
        >>> layers = nn.Sequential(DeltaLinear(2, 3), DeltaActivation(3), DeltaLinear(3, 6))
        >>> weigh_penalties(layers, (2,))
        >>> layers[1].fan_out
        0.75
    """
    weight = next(layers.parameters())
    frame = torch.zeros(1, 1, *frame_shape, device=weight.device, dtype=weight.dtype)
    macs, cost = 0, {}
    source: DeltaActivation | None = None
    with torch.no_grad():
        for layer in layers:
            frame = layer(frame)
            if isinstance(layer, DeltaActivation):
                source = layer
                cost[layer] = 0
            elif isinstance(layer, (DeltaLinear, DeltaConv2d)):
                work = frame.numel() * layer.weight[0].numel()
                macs += work
                if source is not None:
                    cost[source] += work
                    source = None
    for activation, work in cost.items():
        activation.fan_out = work / macs


class _PerFrame(nn.Module):
    """An image layer, channels first, on each of the frames `(..., H, W, C)`."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 4:  # behind a flattening there are no images any more
            return x
        y = self.layer(rearrange(x, "... h w c -> (...) c h w"))
        if y.ndim == 4:
            y = rearrange(y, "n c h w -> n h w c")
        return y.unflatten(0, x.shape[:-3])

    def init_state(self, batch_shape: Sequence[int]) -> tuple[()]:
        return ()

    def step(self, x_t: Tensor, state: tuple[()]) -> tuple[Tensor, tuple[()]]:
        return self(x_t), state


def _leaves(model: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    if isinstance(model, nn.Sequential):
        nested = (_leaves(child, f"{name}.{key}") for key, child in model.named_children())
        return [leaf for leaves in nested for leaf in leaves]
    return [(name, model)]
