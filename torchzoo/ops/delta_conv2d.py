"""Stateful temporal accumulation for convolutions: only weights of changed inputs are read.

With levels Q(x) = quantum · round(x / quantum) and m = |Q(x) − x_ref| > threshold, one step is

    Δ = m · (Q(x) − x_ref),   x_ref' = x_ref + Δ,
    acc'[o, y, z] = acc[o, y, z] + Σ_{c, k, l: Δ ≠ 0} weight[o, c, k, l] Δ[c, i, j]

with i = y s − p + k d, j = z s − p + l d for stride s, padding p and dilation d. A stream starts at
x_ref = 0, acc = bias, and then acc = conv2d(x_ref, weight) + bias holds at every step up to
rounding. Gradients are those of `torchzoo.ops.delta_linear`: straight through Q, with m constant,
m = 1 where the threshold is 0.

Memory is channels last: a pixel's channels, and all that one input channel's weights are, lie side
by side. Tensors in torch's order of dimensions with that order in memory are used as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from torchzoo.ops.calling import below_autograd
from torchzoo.ops.delta_linear import (
    as_quantum,
    check_floats,
    check_options,
    check_state,
    delta_scan,
    encode,
    is_half,
    state_dtype,
)
from torchzoo.ops.delta_linear import reference as linear_reference

Pair = int | tuple[int, int]


def delta_conv2d_step(
    x: Tensor,
    x_ref: Tensor,
    acc: Tensor,
    weight: Tensor,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    threshold: float = 0.0,
    quantum: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add to a running convolution what the changed inputs contribute.

    The state is float32 at least: bfloat16 and float16 inputs are widened, under autocast too.
    Weights may stay in half precision; only those that are read are widened. Gradients reach
    everything but `quantum`. Nothing is copied on the way in where frames are stored channels last
    and the weights as (C, k, l, O), `weight.permute(1, 2, 3, 0)` contiguous.

    Args:
        x: Frame of this step, `(..., C, H, W)`.
        x_ref: Frame last sent, `(..., C, H, W)`.
        acc: Running pre-activation, `(..., O, H', W')`.
        weight: Kernels as `torch.nn.functional.conv2d` takes them, `(O, C, k, l)`. The weights of
            an input channel are read for its changed pixels alone.
        stride: Step of the output grid, rows and columns.
        padding: Zeros around the frame.
        dilation: Distance between the kernel's points.
        threshold: A change counts where its size is strictly above this, ≥ 0. At 0 the step is
            exact: acc' is what a dense convolution gives for Q(x).
        quantum: Step of the quantisation Q, one for all inputs or `(C,)`; None: Q(x) = x.

    Shape:
        C input channels, O output channels, H × W inputs, H' × W' outputs, k × l taps; the leading
        dimensions of `x`, `x_ref` and `acc` are the same.

    Returns:
        The new `acc` and the new `x_ref`, stored channels last; the arguments are left as they
        were.

    Raises:
        ValueError: Shapes or devices that don't fit, a frame smaller than the kernel, or an option
            out of its range.
        NotImplementedError: An input has a forward-mode tangent.

    Source:
        Yousefzadeh and Sifalakis, "Training for temporal sparsity in deep neural networks,
        application in video processing", 2021 (delta inference).

    Example:
        >>> weight = torch.tensor([1.0, torch.nan]).view(1, 2, 1, 1).expand(1, 2, 3, 3)
        >>> x = x_ref = torch.zeros(2, 4, 4)
        >>> x = x_ref.clone()
        >>> x[0, 0, 1] = 2.0
        >>> acc, x_ref = delta_conv2d_step(x, x_ref, torch.zeros(1, 2, 2), weight)
        >>> acc
        tensor([[[2., 2.],
                 [0., 0.]]])
    """
    pairs = _check(x, weight, stride, padding, dilation, threshold, quantum)
    tensors = {"x": x, "x_ref": x_ref, "acc": acc, "weight": weight}
    grid = _grid(x.shape[-2:], weight.shape[2:], pairs)
    check_state("delta_conv2d_step", tensors, (*x.shape[:-3], weight.shape[0], *grid))
    dtype = state_dtype(*tensors.values())
    rows = weight.permute(1, 2, 3, 0)
    state = (tensor.to(dtype).movedim(-3, -1) for tensor in (x, x_ref, acc))
    with below_autograd(*tensors.values()):
        result = torch.ops.torchzoo.delta_conv2d_step.default(
            *state,
            rows if is_half(rows) else rows.to(dtype),
            as_quantum(quantum, x, dtype),
            float(threshold),
            *pairs,
        )
    new_acc, new_ref = (tensor.movedim(-1, -3) for tensor in result)
    return new_acc, new_ref


def delta_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    threshold: float = 0.0,
    quantum: float | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The stream of `delta_conv2d_step` over a whole sequence at once, dense, for training.

    Args:
        x: Frames, `(..., T, C, H, W)`.
        weight: Kernels, `(O, C, k, l)`.
        bias: Where the accumulator starts, `(O,)`; None: 0.
        stride: See `delta_conv2d_step`.
        padding: See `delta_conv2d_step`.
        dilation: See `delta_conv2d_step`.
        threshold: See `delta_conv2d_step`.
        quantum: See `delta_conv2d_step`.

    Shape:
        T steps; the other letters as in `delta_conv2d_step`.

    Returns:
        y `(..., T, O, H', W')`, the accumulator after each step; x_ref `(..., T, C, H, W)`, the
        frames as sent; Δ `(..., T, C, H, W)`, whose zeros are what a stream would skip.

    Raises:
        ValueError: Shapes that don't fit, a frame smaller than the kernel, or an option out of its
            range.

    Source:
        Yousefzadeh and Sifalakis, "Training for temporal sparsity in deep neural networks,
        application in video processing", 2021 (delta inference).

    Example:
        >>> x = torch.ones(5, 1, 4, 4)
        >>> y, x_ref, delta = delta_conv2d(x, torch.ones(2, 1, 3, 3))
        >>> y[4, 0], delta[1:].count_nonzero()
        (tensor([[9., 9.],
                [9., 9.]]), tensor(0))
    """
    pairs = _check(x, weight, stride, padding, dilation, threshold, quantum)
    if x.ndim < 4:
        raise ValueError(f"x: expected shape (..., T, C, H, W), got {tuple(x.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    sent = delta_scan(rearrange(x, "... t c h w -> ... h w t c"), threshold, quantum)
    x_ref, delta = (rearrange(t, "... h w t c -> ... t c h w") for t in sent)
    y = F.conv2d(x_ref.reshape(-1, *x.shape[-3:]), weight, bias, *pairs)
    return y.view(*x.shape[:-3], *y.shape[1:]), x_ref, delta


def reach(size: int, kernel: int, stride: int, padding: int, dilation: int) -> Tensor:
    """For each place of an axis, how many (output, tap) pairs see it, `(size,)` of int64."""
    (outputs,) = _grid((size,), (kernel,), ((stride,), (padding,), (dilation,)))
    starts = torch.arange(outputs) * stride - padding
    seen = (starts[:, None] + torch.arange(kernel) * dilation).flatten()
    return torch.bincount(seen[(seen >= 0) & (seen < size)], minlength=size)


def _grid(
    size: Sequence[int], kernel: Sequence[int], pairs: Sequence[Sequence[int]]
) -> tuple[int, ...]:
    """The number of outputs along each axis, below 1 where the kernel does not fit."""
    axes = zip(size, kernel, *pairs, strict=True)
    return tuple((n + 2 * pad - gap * (k - 1) - 1) // hop + 1 for n, k, hop, pad, gap in axes)


def _check(
    x: Tensor,
    weight: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    threshold: float,
    quantum: float | Tensor | None,
) -> tuple[list[int], list[int], list[int]]:
    """Raise for what does not fit; stride, padding and dilation as pairs."""
    if weight.ndim != 4 or 0 in weight.shape:
        raise ValueError(
            f"weight: expected shape (O, C, k, l) without a 0, got {tuple(weight.shape)}"
        )
    if x.ndim < 3 or x.shape[-3] != weight.shape[1]:
        raise ValueError(
            f"x: expected shape (..., {weight.shape[1]}, H, W), with the channels of weight, "
            f"got {tuple(x.shape)}"
        )
    check_floats(x=x, weight=weight)
    pairs = (
        _pair("stride", stride, 1),
        _pair("padding", padding, 0),
        _pair("dilation", dilation, 1),
    )
    if min(*x.shape[-2:], *_grid(x.shape[-2:], weight.shape[2:], pairs)) < 1:
        raise ValueError(
            f"x: expected a frame in which kernels of {tuple(weight.shape[2:])} with padding "
            f"{padding} and dilation {dilation} fit, got shape {tuple(x.shape)}"
        )
    check_options(weight.shape[1], threshold, quantum)
    return pairs


def _pair(name: str, value: Pair, least: int) -> list[int]:
    pair = [value, value] if isinstance(value, int) else list(value)
    if len(pair) != 2 or min(pair) < least:
        raise ValueError(f"{name}: expected one or two numbers ≥ {least}, got {value}")
    return pair


def reference(
    x: Tensor,
    x_ref: Tensor,
    acc: Tensor,
    weight_t: Tensor,
    quantum: Tensor | None,
    threshold: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> tuple[Tensor, Tensor]:
    """The linear step on what each output sees of Δ: x (..., H, W, C), weight_t (C, k, l, O)."""
    new_ref, delta = encode(x, x_ref, quantum, threshold)
    frames = delta.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])
    patches = F.unfold(
        rearrange(frames, "n h w c -> n c h w"),
        weight_t.shape[1:3],
        tuple(dilation),
        tuple(padding),
        tuple(stride),
    )
    seen = rearrange(patches, "n rows outputs -> (n outputs) rows")
    new_acc, _ = linear_reference(
        seen,
        torch.zeros_like(seen),
        acc.reshape(len(seen), weight_t.shape[3]),
        weight_t.flatten(0, 2),
        None,
        0.0,
    )
    return new_acc.view(acc.shape), new_ref.clone(memory_format=torch.contiguous_format)


_step = torch.library.custom_op(
    "torchzoo::delta_conv2d_step",
    reference,
    mutates_args=(),
    schema="(Tensor x, Tensor x_ref, Tensor acc, Tensor weight_t, Tensor? quantum, "
    "float threshold, int[2] stride, int[2] padding, int[2] dilation) -> (Tensor, Tensor)",
)


@_step.register_fake
def _(
    x: Tensor,
    x_ref: Tensor,
    acc: Tensor,
    weight_t: Tensor,
    quantum: Tensor | None,
    threshold: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> tuple[Tensor, Tensor]:
    return acc.new_empty(acc.shape), x_ref.new_empty(x_ref.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, x_ref, _, weight_t, quantum, *options = inputs
    ctx.save_for_backward(x, x_ref, weight_t, quantum)
    ctx.threshold, *ctx.pairs = options


def _backward(ctx: Any, grad_acc: Tensor, grad_ref: Tensor) -> tuple[Tensor | None, ...]:
    """G = ∂acc' ∗ weight + ∂x_ref'; dx = mG, dx_ref = ∂x_ref' − mG, dweight = Δ ⋆ ∂acc'.

    Here ∗ and ⋆ are the convolution's derivatives by its input and by its weights, which torch can
    differentiate again.
    """
    x, x_ref, weight_t, quantum = ctx.saved_tensors
    delta = encode(x, x_ref, quantum, ctx.threshold)[1]
    wants_x = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
    frames = rearrange(delta, "... h w c -> (...) c h w")
    weight = rearrange(weight_t, "c k l o -> o c k l").to(grad_acc.dtype)
    through, grad_weight, _ = torch.ops.aten.convolution_backward(
        rearrange(grad_acc, "... h w o -> (...) o h w"),
        frames,
        weight,
        None,
        *ctx.pairs,
        False,
        [0, 0],
        1,
        [wants_x, ctx.needs_input_grad[3], False],
    )
    grad_x = grad_xref = None
    if wants_x:
        grad_x = rearrange(through, "n c h w -> n h w c").reshape(x.shape) + grad_ref
        if ctx.threshold > 0:
            grad_x = grad_x * (delta != 0)
        grad_xref = grad_ref - grad_x
    if grad_weight is not None:
        grad_weight = rearrange(grad_weight, "o c k l -> c k l o").to(weight_t.dtype)
    return grad_x, grad_xref, grad_acc, grad_weight, None, None, None, None, None


_step.register_autograd(_backward, setup_context=_setup)


@_step.register_vmap
def _(
    info: Any, in_dims: tuple[Any, ...], *args: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Batched streams are streams; with weights or quanta of its own each goes by itself."""
    size, tensors, options = info.batch_size, args[:5], args[5:]
    if in_dims[3] is None and in_dims[4] is None:
        streams = (
            tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip(tensors[:3], in_dims, strict=False)
        )
        return _step(*streams, *tensors[3:], *options), (0, 0)
    columns = (
        [tensor] * size if dim is None else tensor.unbind(dim)
        for tensor, dim in zip(tensors, in_dims, strict=False)
    )
    results = [_step(*row, *options) for row in zip(*columns, strict=True)]
    new_acc, new_ref = (torch.stack(column) for column in zip(*results, strict=True))
    return (new_acc, new_ref), (0, 0)
