"""What the fused elementwise operators share: the parameter's shape, and the results' layout.

Such an operator computes y = f(x, p) for a trained p, which is one number or has the trailing shape
of x. It reads x once and writes y once; its backward reads x again and computes what it needs of f
anew, so that nothing but x and p is kept for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchzoo.ops.calling import forward_mode, loop_over_batch
from torchzoo.ops.rows import wide


def as_parameter(name: str, value: Tensor | float, x: Tensor) -> Tensor:
    """The parameter of an operator on `x`: 0-d, or of the trailing shape of x; float32 at least.

    Raises:
        ValueError: `x` is not floating-point, or `value` does not fit it.
    """
    if not x.is_floating_point():
        raise ValueError(f"x: expected a floating-point tensor, got {x.dtype}")
    dtype = wide(x.dtype)
    if not isinstance(value, Tensor):
        return torch.as_tensor(value, dtype=dtype, device=x.device)
    if value.device != x.device:
        raise ValueError(f"{name}: expected it on {x.device}, as x is, got {value.device}")
    value = value if value.dtype == dtype else value.to(dtype)
    if value.numel() == 1:
        return value.reshape(())
    trailing = x.shape[max(x.ndim - value.ndim, 0) :]
    fits = len(trailing) == value.ndim and all(
        have in (1, want) for have, want in zip(value.shape, trailing, strict=True)
    )
    if not fits:
        raise ValueError(
            f"x: expected one whose last dimensions {name} of shape {tuple(value.shape)} fits, "
            f"got {tuple(x.shape)}"
        )
    return value.expand(trailing).contiguous()


LARGE = 2**20
"""Numbers that no cache of a core holds."""


def differentiate_formula(x: Tensor | None = None) -> bool:
    """Whether to leave an operator, on x, out.

    Compilers fuse the formula; forward mode and the gradients of `torch.func` need it. On a CPU,
    though, new memory for a large result is dearer than the pass that fusing saves, and the
    operator keeps it from one call to the next, which a compiler doesn't.
    """
    if torch.compiler.is_compiling():
        small = x is None or x.device.type != "cpu" or x.numel() < LARGE
        return small or torch.compiler.is_exporting()
    if forward_mode():
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None


def empty_result(x: Tensor, parameter: Tensor) -> Tensor:
    """A result in the memory format of x, or contiguous where the parameter has features."""
    return torch.empty_like(x) if parameter.ndim == 0 else x.new_empty(x.shape)


def as_result(value: Tensor, x: Tensor, parameter: Tensor) -> Tensor:
    """`value` in the layout of `empty_result`."""
    result = empty_result(x, parameter)
    return value if value.stride() == result.stride() else result.copy_(value)


def sum_leading(value: Tensor, parameter: Tensor) -> Tensor:
    """The sum over the dimensions that the parameter does not have."""
    leading = tuple(range(value.ndim - parameter.ndim))
    return value.sum(leading) if leading else value


def values_vmap(op: Any) -> Any:
    """The vmap rule of `op(x, parameter, ...)`: a batch is one more leading dimension of x."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        if in_dims[1] is None:
            return op(args[0].movedim(in_dims[0], 0), *args[1:]), 0
        return loop_over_batch(op)(info, in_dims, *args)

    return rule


def slopes_vmap(op: Any) -> Any:
    """The vmap rule of `op(grad, x, parameter, ...)`, element by element: each has its own sum."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, tuple[int, int]]:
        columns = [
            [arg] * info.batch_size if dim is None else arg.unbind(dim)
            for arg, dim in zip(args, in_dims, strict=True)
        ]
        pairs = [op(*row) for row in zip(*columns, strict=True)]
        dx, dparameter = (torch.stack(column) for column in zip(*pairs, strict=True))
        return (dx, dparameter), (0, 0)

    return rule
