"""A convolution of a stream: computed whole for training, from what changed for inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from torchzoo.ops.delta_conv2d import delta_conv2d_step
from torchzoo.registry import Example, register
from torchzoo.sparsity.delta_layers import DeltaLayer, check_positive


@register(
    paper=157,
    example=lambda: Example(
        {"in_channels": 2, "out_channels": 3, "kernel_size": 3, "padding": 1},
        (torch.randn(2, 3, 5, 4, 2),),
        bad_options={
            "in_channels": 0,
            "out_channels": 0,
            "kernel_size": 0,
            "stride": 0,
            "padding": -1,
            "dilation": 0,
            "threshold": -1.0,
            "quantum": 0.0,
            "resync_every": 0,
        },
    ),
    compare="its gain needs frames that follow each other: `torchzoo reproduce 157` measures it",
)
class DeltaConv2d(DeltaLayer):
    """A 2-D convolution, channels last, with a streaming form that skips unchanged inputs.

    The step is `delta_conv2d_step`: a changed input costs as many multiplications as it has
    outputs in reach. Weights are those of `nn.Conv2d`, name by name; a model from
    `fold_to_streaming` keeps those of an input channel side by side, as they are read.

    Args:
        in_channels: Input channels C.
        out_channels: Output channels O.
        kernel_size: Height and width of the kernel, or one number for both.
        stride: Step of the output grid.
        padding: Zeros around the frame.
        dilation: Distance between the kernel's points.
        bias: Whether there is a bias. Leave it out where the inputs are deltas.
        threshold: A change counts where it is strictly above this, ≥ 0; 0 is exact.
        quantum: Quantisation step of the inputs; None where they are levels already.
        resync_every: Compute the accumulator anew after so many steps, against rounding.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        x: (B, ..., H, W, C) → (B, ..., H', W', O); with a threshold or quantum (B, T, H, W, C).

    Returns:
        What the dense layer gives for the inputs as sent, which are `x` itself by default.

    Raises:
        ValueError: An option out of its range, or an input of fewer than 4 dimensions or other
            channels.

    Source:
        Yousefzadeh and Sifalakis, "Training for temporal sparsity in deep neural networks,
        application in video processing", 2021 (delta inference).

    Example:
        >>> layer = DeltaConv2d(1, 8, 5, padding=2)
        >>> frame = torch.randn(2, 16, 16, 1)
        >>> y_t, state = layer.step(frame, layer.init_state((2, 16, 16)))
        >>> y_t.shape, torch.allclose(y_t, layer(frame), atol=1e-5)
        (torch.Size([2, 16, 16, 8]), True)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        threshold: float = 0.0,
        quantum: float | None = None,
        resync_every: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(threshold, quantum, resync_every)
        check_positive("in_channels", in_channels)
        check_positive("out_channels", out_channels)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _pair("kernel_size", kernel_size, 1)
        self.stride = _pair("stride", stride, 1)
        self.padding = _pair("padding", padding, 0)
        self.dilation = _pair("dilation", dilation, 1)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels, *self.kernel_size, **factory)
        )
        self.bias = nn.Parameter(torch.empty(out_channels, **factory)) if bias else None
        self.reset_parameters()

    @classmethod
    def from_module(cls, conv: nn.Conv2d, **options: Any) -> Self:
        """The delta layer with a copy of an `nn.Conv2d`'s weights.

        Raises:
            ValueError: The convolution is grouped, or pads by a name or with something but zeros.
        """
        if conv.groups != 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise ValueError(
                f"conv: expected one group and a number of zeros as padding, got {conv}"
            )
        weight = conv.weight
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            _two(conv.kernel_size),
            stride=_two(conv.stride),
            padding=_two(conv.padding),
            dilation=_two(conv.dilation),
            bias=conv.bias is not None,
            **{"device": weight.device, "dtype": weight.dtype, **options},
        )
        layer.load_state_dict(conv.state_dict())
        return layer

    def _check(self, x: Tensor) -> None:
        if x.ndim < 4 or x.shape[-1] != self.in_channels:
            raise ValueError(
                f"x: expected shape (B, ..., H, W, {self.in_channels}), got {tuple(x.shape)}"
            )

    def _out_shape(self, batch_shape: Sequence[int]) -> Sequence[int]:
        options = zip(
            batch_shape[-2:],
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            strict=True,
        )
        grid = [
            (size + 2 * pad - hop * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, pad, hop in options
        ]
        return (*batch_shape[:-2], *grid)

    def _dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        frames = rearrange(x, "... h w c -> (...) c h w")
        y = F.conv2d(frames, weight, bias, self.stride, self.padding, self.dilation)
        return rearrange(y, "n c h w -> n h w c").unflatten(0, x.shape[:-3])

    def _accumulate(self, x_t: Tensor, x_ref: Tensor, acc: Tensor) -> tuple[Tensor, Tensor]:
        result = delta_conv2d_step(
            x_t.movedim(-1, -3),
            x_ref.movedim(-1, -3),
            acc.movedim(-1, -3),
            self.weight,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            threshold=self.threshold,
            quantum=self.quantum,
        )
        acc, x_ref = (tensor.movedim(-3, -1) for tensor in result)
        return acc, x_ref

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"bias={self.bias is not None}"
        )


def _two(values: Sequence[int]) -> tuple[int, int]:
    return values[0], values[1]


def _pair(name: str, value: int | tuple[int, int], least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < least:
        raise ValueError(f"{name}: expected one or two numbers ≥ {least}, got {value}")
    return _two(pair)
