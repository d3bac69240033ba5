"""A matrix product in float64 that has the same bits on every machine.

    y_to = ((x_t0 w_0o) + x_t1 w_1o) + ...,   each product and each sum rounded by itself

A product from a linear algebra library depends in its last bits on the processor, on the number of
threads and on how many rows there are. What is decided by such bits, as the tables of an entropy
coder are, would not decode elsewhere.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def ordered_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply matrices, summing in the order of the inner index. Not differentiable.

    Args:
        x: Rows, float64 on the CPU.
        weight: A matrix, the same.

    Shape:
        - x: `(T, K)`
        - weight: `(K, O)`
        - output: `(T, O)`

    Returns:
        The product; a row's bits depend on that row and `weight` alone.

    Raises:
        ValueError: Shapes, types or devices that don't fit.

    Example:
        >>> x = torch.tensor([[1e16, 1.0, -1e16]], dtype=torch.float64)
        >>> ordered_matmul(x, torch.ones(3, 1, dtype=torch.float64)).item()
        0.0
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[0]:
        raise ValueError(
            f"x, weight: expected (T, K) and (K, O), got {tuple(x.shape)}, {tuple(weight.shape)}"
        )
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.dtype != torch.float64 or tensor.device.type not in ("cpu", "meta"):
            raise ValueError(
                f"{name}: expected float64 on the CPU, got {tensor.dtype} on {tensor.device}"
            )
    return _ordered_matmul(x.detach().contiguous(), weight.detach().contiguous())


@torch.library.custom_op("torchzoo::ordered_matmul", mutates_args=())
def _ordered_matmul(x: Tensor, weight: Tensor) -> Tensor:
    rows, w = x.numpy(), weight.numpy()
    out = np.zeros((x.shape[0], weight.shape[1]))
    with np.errstate(all="ignore"):
        for k in range(x.shape[1]):
            out += rows[:, k, None] * w[k]
    return torch.from_numpy(out)


@_ordered_matmul.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])
