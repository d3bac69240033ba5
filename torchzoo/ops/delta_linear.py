"""Stateful temporal accumulation: a linear layer that reads only the rows of changed inputs.

With levels Q(x) = quantum · round(x / quantum) and m = |Q(x) − x_ref| > threshold, one step is

    Δ = m · (Q(x) − x_ref),   x_ref' = x_ref + Δ,   acc' = acc + Σ_{j: Δ_j ≠ 0} Δ_j weight_t[j].

A stream starts at x_ref = 0, acc = bias, and then acc = x_ref · weight_t + bias holds at every step
up to rounding. The gradient passes Q unchanged (straight through) and holds m constant, m = 1 where
the threshold is 0, so that an input which did not change still gets its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchzoo.ops.calling import (
    below_autograd,
    forward_mode,
    loop_over_batch,
    refuse_forward_mode,
)


def delta_linear_step(
    x: Tensor,
    x_ref: Tensor,
    acc: Tensor,
    weight_t: Tensor,
    *,
    threshold: float = 0.0,
    quantum: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add to a running pre-activation what the changed inputs contribute.

    The state is float32 at least: bfloat16 and float16 inputs are widened, under autocast too,
    since rounding would pile up over a stream. Weights may stay in half precision; only the rows
    that are read are widened. Gradients reach everything but `quantum`.

    Args:
        x: Inputs of this step, `(..., I)`.
        x_ref: Inputs last sent, `(..., I)`.
        acc: Running pre-activation, `(..., O)`.
        weight_t: Weights, one input a row, `(I, O)`. Rows whose Δ is zero are not read.
        threshold: A change counts where its size is strictly above this, ≥ 0. At 0 the step is
            exact: acc' is what a dense layer gives for Q(x).
        quantum: Step of the quantisation Q, one for all inputs or `(I,)`; None: Q(x) = x.

    Shape:
        I inputs, O outputs; the leading dimensions of `x`, `x_ref` and `acc` are the same.

    Returns:
        The new `acc` and the new `x_ref`; the arguments are left as they were.

    Raises:
        ValueError: Shapes or devices that don't fit, or a negative threshold or quantum that is not
            positive.
        NotImplementedError: An input has a forward-mode tangent.

    Source:
        Yousefzadeh and Sifalakis, "Training for temporal sparsity in deep neural networks,
        application in video processing", 2021 (delta inference).

    Example:
        >>> weight_t = torch.tensor([[1.0, 2.0], [torch.nan, torch.nan]])
        >>> x_ref, acc = torch.tensor([0.0, 5.0]), torch.zeros(2)
        >>> acc, x_ref = delta_linear_step(torch.tensor([3.0, 5.0]), x_ref, acc, weight_t)
        >>> acc, x_ref
        (tensor([3., 6.]), tensor([3., 5.]))
    """
    # Between two frames other work has pushed all that is needed here out of the caches, and then
    # what is asked of the tensors, and the way through autograd, take longer than adding the rows
    # of a sparse step. So the kernel goes first where there are values alone.
    learns = x.requires_grad or x_ref.requires_grad or acc.requires_grad or weight_t.requires_grad
    if (
        quantum is None
        and not (learns and torch.is_grad_enabled())
        and not _is_compiling()
        and not _modes()
        and _transforms() is None
        and not forward_mode()
    ):
        try:
            return _plain_op(x, x_ref, acc, weight_t, None, threshold)
        except RuntimeError:  # there is no kernel, or something to convert, or to refuse below
            pass
    _check(x, weight_t, threshold, quantum)
    tensors = {"x": x, "x_ref": x_ref, "acc": acc, "weight_t": weight_t}
    check_state("delta_linear_step", tensors, (*x.shape[:-1], weight_t.shape[1]))
    dtype = state_dtype(*tensors.values())
    x, x_ref, acc = (t.to(dtype) for t in (x, x_ref, acc))
    if weight_t.dtype != dtype and not is_half(weight_t):
        weight_t = weight_t.to(dtype)
    with below_autograd(x, x_ref, acc, weight_t):
        found: tuple[Tensor, Tensor] = _step(
            x, x_ref, acc, weight_t, as_quantum(quantum, x, dtype), float(threshold)
        )
        return found


def delta_linear(
    x: Tensor,
    weight_t: Tensor,
    bias: Tensor | None = None,
    *,
    threshold: float = 0.0,
    quantum: float | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The stream of `delta_linear_step` over a whole sequence at once, dense, for training.

    Args:
        x: Inputs, `(..., T, I)`.
        weight_t: Weights, one input a row, `(I, O)`.
        bias: Where the accumulator starts, `(O,)`; None: 0.
        threshold: See `delta_linear_step`.
        quantum: See `delta_linear_step`.

    Shape:
        T steps, I inputs, O outputs.

    Returns:
        y `(..., T, O)`, the accumulator after each step; x_ref `(..., T, I)`, the inputs as sent;
        Δ `(..., T, I)`, whose zeros are what a stream would skip.

    Raises:
        ValueError: Shapes that don't fit, or a negative threshold or quantum that is not positive.

    Source:
        Yousefzadeh and Sifalakis, "Training for temporal sparsity in deep neural networks,
        application in video processing", 2021 (delta inference).

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [1.0, 2.1], [1.5, 2.1]])
        >>> y, x_ref, delta = delta_linear(x, torch.eye(2), threshold=0.2)
        >>> delta
        tensor([[1.0000, 2.0000],
                [0.0000, 0.0000],
                [0.5000, 0.0000]])
    """
    _check(x, weight_t, threshold, quantum)
    if bias is not None and bias.shape != weight_t.shape[1:]:
        raise ValueError(
            f"bias: expected shape {tuple(weight_t.shape[1:])}, got {tuple(bias.shape)}"
        )
    x_ref, delta = delta_scan(x, threshold, quantum)
    return F.linear(x_ref, weight_t.mT, bias), x_ref, delta


def delta_scan(
    x: Tensor, threshold: float = 0.0, quantum: float | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What a stream sends of a sequence: x_ref_t = m_t Q(x_t) + (1 − m_t) x_ref_{t−1}.

    Args:
        x: Inputs, `(..., T, I)`.
        threshold: See `delta_linear_step`.
        quantum: See `delta_linear_step`.

    Shape:
        T steps, I inputs.

    Returns:
        x_ref and Δ_t = x_ref_t − x_ref_{t−1} with x_ref_{−1} = 0, both `(..., T, I)`.

    Raises:
        ValueError: `x` without a time dimension, or a negative threshold or quantum that is not
            positive.

    Example:
        >>> x_ref, delta = delta_scan(torch.tensor([[0.9], [1.2], [1.7]]), 0.5)
        >>> x_ref.squeeze(-1)
        tensor([0.9000, 0.9000, 1.7000])
    """
    if x.ndim < 2:
        raise ValueError(f"x: expected at least 2 dimensions (..., T, I), got {tuple(x.shape)}")
    check_options(x.shape[-1], threshold, quantum)
    step = as_quantum(quantum, x, x.dtype)
    start = x.new_zeros((*x.shape[:-2], 1, x.shape[-1]))
    if threshold == 0:
        x_ref, _ = encode(x, torch.zeros_like(x), step, 0.0)
    else:
        refs = [start.squeeze(-2)]
        for x_t in x.unbind(-2):
            refs.append(encode(x_t, refs[-1], step, threshold)[0])
        x_ref = torch.stack(refs, dim=-2)[..., 1:, :]
    return x_ref, x_ref.diff(dim=-2, prepend=start)


def encode(
    x: Tensor, x_ref: Tensor, quantum: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor]:
    """The elementwise part of a step: the new x_ref and Δ, with the gradient rules above.

    x_ref' is Q(x) itself rather than x_ref + Δ, which rounding could leave beside it, so that a
    constant input gives Δ = 0 exactly from its second step on.
    """
    sent = x
    if quantum is not None:
        level = (quantum * torch.round(x / quantum)).detach()
        sent = level + (x - x.detach())
    delta = sent - x_ref
    if threshold == 0:
        return sent, delta
    changed = delta.abs() > threshold
    return torch.where(changed, sent, x_ref), torch.where(changed, delta, 0.0)


def check_state(op: str, tensors: Mapping[str, Tensor], expected: tuple[int, ...]) -> None:
    """Raise for a state, of a step's `tensors` by name, that does not fit its frame.

    `expected` is the shape of `acc`.
    """
    x, x_ref, acc = (tensors[name] for name in ("x", "x_ref", "acc"))
    if x_ref.shape != x.shape:
        raise ValueError(
            f"x_ref: expected the shape of x, {tuple(x.shape)}, got {tuple(x_ref.shape)}"
        )
    if acc.shape != expected:
        raise ValueError(f"acc: expected shape {tuple(expected)}, got {tuple(acc.shape)}")
    if any(tensor.device != x.device for tensor in tensors.values()):
        devices = ", ".join(str(tensor.device) for tensor in tensors.values())
        raise ValueError(f"{', '.join(tensors)}: expected one device, got {devices}")
    refuse_forward_mode(op, *tensors.values())


def state_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of a stream's state: what the tensors promote to, never half precision."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor.dtype != dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def is_half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16)


def as_quantum(quantum: float | Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor | None:
    if quantum is None:
        return None
    return torch.as_tensor(quantum, dtype=dtype, device=like.device)


def _check(x: Tensor, weight_t: Tensor, threshold: float, quantum: float | Tensor | None) -> None:
    if weight_t.ndim != 2:
        raise ValueError(f"weight_t: expected shape (I, O), got {tuple(weight_t.shape)}")
    if x.ndim < 1 or x.shape[-1] != weight_t.shape[0]:
        raise ValueError(
            f"x: expected last dimension {weight_t.shape[0]}, as weight_t has rows, "
            f"got shape {tuple(x.shape)}"
        )
    check_floats(x=x, weight_t=weight_t)
    check_options(x.shape[-1], threshold, quantum)


def check_floats(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")


def check_options(features: int, threshold: float, quantum: float | Tensor | None) -> None:
    if not threshold >= 0:
        raise ValueError(f"threshold: expected a number ≥ 0, got {threshold}")
    if isinstance(quantum, Tensor):
        if quantum.shape not in (torch.Size([]), torch.Size([features])):
            raise ValueError(
                f"quantum: expected a scalar or shape ({features},), got {tuple(quantum.shape)}"
            )
    elif quantum is not None and not quantum > 0:
        raise ValueError(f"quantum: expected a number > 0, got {quantum}")


def reference(
    x: Tensor,
    x_ref: Tensor,
    acc: Tensor,
    weight_t: Tensor,
    quantum: Tensor | None,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    """For each stream a bag of the rows whose Δ is not zero, and their weighted sum."""
    new_ref, delta = encode(x, x_ref, quantum, threshold)
    inputs, outputs = weight_t.shape
    streams = delta.reshape(math.prod(x.shape[:-1]), inputs)
    changed = streams != 0
    row = changed.nonzero()[:, 1]
    new_acc = acc.clone(memory_format=torch.contiguous_format)
    if row.numel() and outputs:
        rows = weight_t
        if weight_t.dtype != acc.dtype:
            used, row = row.unique(return_inverse=True)
            rows = weight_t[used].to(acc.dtype)
        count = changed.sum(1)
        bags = F.embedding_bag(
            row, rows, count.cumsum(0) - count, mode="sum", per_sample_weights=streams[changed]
        )
        new_acc += bags.view_as(new_acc)
    return new_acc, new_ref.clone(memory_format=torch.contiguous_format)


_step = torch.library.custom_op("torchzoo::delta_linear_step", reference, mutates_args=())


@_step.register_fake
def _(
    x: Tensor,
    x_ref: Tensor,
    acc: Tensor,
    weight_t: Tensor,
    quantum: Tensor | None,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    return acc.new_empty(acc.shape), x_ref.new_empty(x_ref.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, x_ref, _, weight_t, quantum, threshold = inputs
    ctx.save_for_backward(x, x_ref, weight_t, quantum)
    ctx.threshold = threshold


def _backward(ctx: Any, grad_acc: Tensor, grad_ref: Tensor) -> tuple[Tensor | None, ...]:
    """G = ∂acc' Wᵀ + ∂x_ref'; dx = mG, dx_ref = ∂x_ref' − mG, dacc = ∂acc', dweight_t = Δᵀ ∂acc'.

    Written in differentiable operations of the saved tensors, so a second derivative follows.
    """
    x, x_ref, weight_t, quantum = ctx.saved_tensors
    grad_x = grad_xref = grad_weight = None
    delta = encode(x, x_ref, quantum, ctx.threshold)[1]
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        grad_x = grad_acc @ weight_t.to(grad_acc.dtype).mT + grad_ref
        if ctx.threshold > 0:
            grad_x = grad_x * (delta != 0)
        grad_xref = grad_ref - grad_x
    if ctx.needs_input_grad[3]:
        streams = math.prod(x.shape[:-1])
        rows = delta.reshape(streams, weight_t.shape[0]).mT
        grad_weight = (rows @ grad_acc.reshape(streams, weight_t.shape[1])).to(weight_t.dtype)
    return grad_x, grad_xref, grad_acc, grad_weight, None, None


# The same kernel out of autograd's sight. It refuses what it would have to convert.
torch.library.define(
    "torchzoo::delta_linear_step_plain",
    "(Tensor x, Tensor x_ref, Tensor acc, Tensor weight_t, Tensor? quantum, float threshold)"
    " -> (Tensor, Tensor)",
)
# each look-up of a name, and each call in Python, is a few more misses
_plain_op = torch.ops.torchzoo.delta_linear_step_plain.default._op
_is_compiling = torch.compiler.is_compiling
_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.peek_interpreter_stack


_step.register_autograd(_backward, setup_context=_setup)


@_step.register_vmap
def _(
    info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Batched streams are streams; with weights or quanta of its own each goes by itself."""
    size, tensors, threshold = info.batch_size, args[:-1], args[-1]
    if in_dims[3] is None and in_dims[4] is None:
        streams = (
            tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip(tensors[:3], in_dims, strict=False)
        )
        return _step(*streams, *tensors[3:], threshold), (0, 0)
    return loop_over_batch(_step)(info, in_dims, *args)
