"""Linear layers of a stream: computed whole for training, from what changed for inference.

With frames x_t, the inputs last sent x_ref and the accumulator acc, a step is
`delta_linear_step(x_t, x_ref, acc, weightᵀ)`, or `delta_conv2d_step` for a convolution, and
acc = dense(x_ref) holds at every step: the stream gives what the whole computation gives, up to
rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from torchzoo.hub import ZooModel
from torchzoo.ops.delta_conv2d import delta_conv2d_step
from torchzoo.ops.delta_linear import delta_linear_step, delta_scan, state_dtype
from torchzoo.registry import Example, register


class _DeltaLayer(ZooModel):
    """A linear map of the features of a frame, computed whole or from what changed.

    A subclass gives `_dense`, the map itself, and `_accumulate`, its delta form.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, threshold: float, quantum: float | None, resync_every: int | None):
        super().__init__()
        if not threshold >= 0:
            raise ValueError(f"threshold: expected a number ≥ 0, got {threshold}")
        if quantum is not None:
            check_positive("quantum", quantum)
        if resync_every is not None:
            check_positive("resync_every", resync_every)
        self.threshold = threshold
        self.quantum = quantum
        self.resync_every = resync_every

    def reset_parameters(self) -> None:
        """Uniform in ±1/√fan_in, as `nn.Linear` and `nn.Conv2d` start."""
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        if self.threshold or self.quantum:
            if x.ndim < 3:
                raise ValueError(f"x: expected shape (B, T, ..., features), got {tuple(x.shape)}")
            frames = rearrange(x, "b t ... c -> b ... t c")
            sent, _ = delta_scan(frames, self.threshold, self.quantum)
            x = rearrange(sent, "b ... t c -> b t ... c")
        return self._dense(x, self.weight, self.bias)

    def init_state(self, batch_shape: Sequence[int]) -> tuple[Any, ...]:
        """The state before the first frame: nothing sent, and the bias as accumulator.

        Args:
            batch_shape: Shape of a frame without its features, `x_t.shape[:-1]`.

        Returns:
            `(x_ref, acc)`, and with `resync_every` the number of steps since the last resync.
        """
        options: dict[str, Any] = {"device": self.weight.device, "dtype": state_dtype(self.weight)}
        x_ref = torch.zeros((*batch_shape, self.weight.shape[1]), **options)
        acc = torch.zeros((*self._out_shape(batch_shape), self.weight.shape[0]), **options)
        if self.bias is not None:
            acc = acc + self.bias
        return (x_ref, acc) if self.resync_every is None else (x_ref, acc, 0)

    def step(self, x_t: Tensor, state: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
        """One frame of `forward`, which reads only the weights of inputs that changed.

        Args:
            x_t: The frame itself, not its delta, without the time dimension.
            state: From `init_state` or the last step; left as it was.

        Returns:
            The frame's output, in the dtype of `x_t`, and the next state.
        """
        self._check(x_t)
        x_ref, acc, *age = state
        acc, x_ref = self._accumulate(x_t, x_ref, acc)
        if self.resync_every is not None:
            age = [(age[0] + 1) % self.resync_every]
            if age == [0]:
                acc = self.resync((x_ref, acc))[1]
        return acc.to(x_t.dtype), (x_ref, acc, *age)

    def resync(self, state: tuple[Any, ...]) -> tuple[Any, ...]:
        """The state with its accumulator computed anew, which drops rounding that piled up."""
        x_ref, acc, *_ = state
        bias = None if self.bias is None else self.bias.to(acc.dtype)
        with torch.autocast(acc.device.type, enabled=False):
            acc = self._dense(x_ref, self.weight.to(acc.dtype), bias)
        return (x_ref, acc) if self.resync_every is None else (x_ref, acc, 0)

    def _check(self, x: Tensor) -> None:
        raise NotImplementedError

    def _out_shape(self, batch_shape: Sequence[int]) -> Sequence[int]:
        return batch_shape

    def _dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _accumulate(self, x_t: Tensor, x_ref: Tensor, acc: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


@register(
    paper=157,
    example=lambda: Example(
        {"in_features": 4, "out_features": 3},
        (torch.randn(2, 5, 4),),
        bad_options={
            "in_features": 0,
            "out_features": 0,
            "threshold": -1.0,
            "quantum": 0.0,
            "resync_every": 0,
        },
    ),
)
class DeltaLinear(_DeltaLayer):
    """A linear layer with a streaming form that skips inputs which did not change.

    Weights are those of `nn.Linear`, name by name. `step` works on them as they are; a model from
    `fold_to_streaming` keeps them with an input a row, the order in which they are read.

    Args:
        in_features: Inputs I.
        out_features: Outputs O.
        bias: Whether there is a bias. Leave it out where the inputs are deltas.
        threshold: A change counts where it is strictly above this, ≥ 0; 0 is exact.
        quantum: Quantisation step of the inputs; None where they are levels already.
        resync_every: Compute the accumulator anew after so many steps, against rounding.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        x: (..., I) → (..., O); with a threshold or quantum (B, T, ..., I) with T frames.

    Returns:
        What the dense layer gives for the inputs as sent, which are `x` itself by default.

    Raises:
        ValueError: An option out of its range, or an input of other features.

    Source:
        Yousefzadeh and Sifalakis, "Training for temporal sparsity in deep neural networks,
        application in video processing", 2021 (delta inference).

    Example:
        >>> layer = DeltaLinear(4, 3)
        >>> frames = torch.randn(2, 5, 4)
        >>> state = layer.init_state((2,))
        >>> for x_t in frames.unbind(1):
        ...     y_t, state = layer.step(x_t, state)
        >>> torch.allclose(y_t, layer(frames)[:, -1], atol=1e-6)
        True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        threshold: float = 0.0,
        quantum: float | None = None,
        resync_every: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(threshold, quantum, resync_every)
        check_positive("in_features", in_features)
        check_positive("out_features", out_features)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **factory))
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.reset_parameters()

    @classmethod
    def from_module(cls, linear: nn.Linear, **options: Any) -> Self:
        """The delta layer with a copy of an `nn.Linear`'s weights."""
        weight = linear.weight
        options = {"device": weight.device, "dtype": weight.dtype, **options}
        layer = cls(
            linear.in_features, linear.out_features, bias=linear.bias is not None, **options
        )
        layer.load_state_dict(linear.state_dict())
        return layer

    def _check(self, x: Tensor) -> None:
        if x.ndim < 1 or x.shape[-1] != self.in_features:
            raise ValueError(f"x: expected shape (..., {self.in_features}), got {tuple(x.shape)}")

    def _dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def _accumulate(self, x_t: Tensor, x_ref: Tensor, acc: Tensor) -> tuple[Tensor, Tensor]:
        return delta_linear_step(
            x_t, x_ref, acc, self.weight.mT, threshold=self.threshold, quantum=self.quantum
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


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
)
class DeltaConv2d(_DeltaLayer):
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


def check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}: expected a number > 0, got {value}")
