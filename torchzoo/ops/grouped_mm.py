"""Matrix products of row groups, each group with a weight of its own.

Rows `offsets[e - 1] <= t < offsets[e]` of `x (T, K)` are multiplied with `weight[e] (K, N)`:

    y_t = x_t weight[e],   dx = grouped_mm(dy, weight^T, offsets),   dweight[e] = x[e]^T dy[e].

Rows past the last end are zeros and are not read; neither is the weight of an empty group.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from torchzoo.ops.calling import (
    below_autograd,
    loop_over_batch,
    no_autocast,
    refuse_forward_mode,
    values_readable,
)


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply each group of rows with the weight of its group.

    Products of half-precision numbers are accumulated in float32. Under autocast, inputs other
    than float64 are cast to its type. Differentiable any number of times in `x` and `weight`.

    Args:
        x: Rows, sorted by group.
        weight: A matrix a group, of the type of `x`.
        offsets: Where each group ends (exclusive row index, so also the running sum of the group
            sizes), int32 or int64. Groups may be empty. That they don't decrease and stay within
            `T` is checked on the CPU only, where this does not wait for a device.

    Shape:
        - x: `(T, K)`
        - weight: `(E, K, N)`
        - offsets: `(E,)`
        - output: `(T, N)`

    Returns:
        The products; zeros in rows past the last end.

    Raises:
        ValueError: Shapes, types or devices that don't fit together, or ends that decrease or
            leave `[0, T]`.
        NotImplementedError: An input has a forward-mode tangent.

    Example:
        >>> x = torch.ones(3, 2)
        >>> weight = torch.stack([torch.eye(2), 5 * torch.eye(2)])
        >>> grouped_mm(x, weight, torch.tensor([1, 2], dtype=torch.int32)).tolist()
        [[1.0, 1.0], [5.0, 5.0], [0.0, 0.0]]
    """
    _check(x, weight, offsets)
    refuse_forward_mode("grouped_mm", x, weight)
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight = (t if t.dtype == torch.float64 else t.to(dtype) for t in (x, weight))
    if x.dtype != weight.dtype:
        raise ValueError(f"weight: expected the type of x, {x.dtype}, got {weight.dtype}")
    with below_autograd(x, weight):
        return _grouped_mm(x, weight, offsets.to(torch.int32))


def _check(x: Tensor, weight: Tensor, offsets: Tensor) -> None:
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"x: expected floats of shape (T, K), got {x.dtype} {tuple(x.shape)}")
    if weight.ndim != 3 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight: expected (E, {x.shape[1]}, N), got {tuple(weight.shape)}")
    if offsets.shape != weight.shape[:1] or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"offsets: expected int32 or int64 of shape ({weight.shape[0]},), "
            f"got {offsets.dtype} {tuple(offsets.shape)}"
        )
    if not x.device == weight.device == offsets.device:
        raise ValueError(
            f"x, weight, offsets: expected one device, got {x.device}, {weight.device} "
            f"and {offsets.device}"
        )
    _check_ends(offsets, x.shape[0])


def _check_ends(offsets: Tensor, rows: int) -> None:
    if offsets.is_cpu and values_readable(offsets):
        ends = [0, *offsets.tolist(), rows]
        if ends != sorted(ends):
            raise ValueError(
                f"offsets: expected ends that don't decrease within [0, {rows}], got {ends[1:-1]}"
            )


def _slices(offsets: Tensor) -> list[tuple[int, slice]]:
    """The groups that are not empty, each with its rows."""
    groups = enumerate(pairwise([0, *offsets.tolist()]))
    return [(group, slice(start, end)) for group, (start, end) in groups if end > start]


@torch.library.custom_op("torchzoo::grouped_mm", mutates_args=())
def _grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    accumulate = torch.promote_types(x.dtype, torch.float32)
    out = x.new_zeros(x.shape[0], weight.shape[2])
    with no_autocast(x):
        for group, rows in _slices(offsets):
            out[rows] = x[rows].to(accumulate) @ weight[group].to(accumulate)
    return out


@torch.library.custom_op("torchzoo::grouped_mm_dweight", mutates_args=())
def _grouped_mm_dweight(x: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    accumulate = torch.promote_types(x.dtype, torch.float32)
    out = x.new_zeros(offsets.shape[0], x.shape[1], grad.shape[1])
    with no_autocast(x):
        for group, rows in _slices(offsets):
            out[group] = x[rows].to(accumulate).T @ grad[rows].to(accumulate)
    return out


@_grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@_grouped_mm_dweight.register_fake
def _(x: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0], x.shape[1], grad.shape[1])


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, offsets = ctx.saved_tensors
    dx = _grouped_mm(grad, weight.mT, offsets) if ctx.needs_input_grad[0] else None
    dweight = _grouped_mm_dweight(x, grad, offsets) if ctx.needs_input_grad[1] else None
    return dx, dweight, None


def _dweight_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    """From `<U, dweight> = sum_e <U[e], x[e]^T dy[e]>`: dx = dy U^T and ddy = x U, by group."""
    x, grad, offsets = ctx.saved_tensors
    dx = _grouped_mm(grad, upstream.mT, offsets) if ctx.needs_input_grad[0] else None
    dgrad = _grouped_mm(x, upstream, offsets) if ctx.needs_input_grad[1] else None
    return dx, dgrad, None


_grouped_mm.register_autograd(_backward, setup_context=_setup)
_grouped_mm_dweight.register_autograd(_dweight_backward, setup_context=_setup)


_grouped_mm.register_vmap(loop_over_batch(_grouped_mm))
_grouped_mm_dweight.register_vmap(loop_over_batch(_grouped_mm_dweight))
