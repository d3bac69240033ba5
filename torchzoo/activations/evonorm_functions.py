"""EvoNorm as functions: B0, S0, and what layers and graphs share."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchzoo.ops import evonorm_batch, evonorm_sample


def evonorm_b0(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    v: Tensor,
    batch_var: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """EvoNorm-B0 as a function of its tensors.

    Args:
        x: Input, `(N, C, *spatial)`.
        weight: Scales gamma, `(C,)`.
        bias: Shifts beta, `(C,)`.
        v: Slopes of the instance branch, `(C,)`.
        batch_var: Variance of each channel, `(C,)`; by default the biased one of `x`.
        eps: Added to the variances.

    Shape:
        - x, output: `(N, C, *spatial)`

    Returns:
        The output, in the dtype of `x`.

    Source:
        Liu, Brock, Simonyan and Le, "Evolving Normalization-Activation Layers", 2020, B0.

    Example:
        >>> x = torch.tensor([[[[-2.0, 2.0]]]])
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> evonorm_b0(x, one, zero, one, eps=0.0).flatten().tolist()
        [-1.0, 0.5]
    """
    return evonorm_batch(x, weight, bias, v, batch_var, eps=eps)[0]


def evonorm_s0(
    x: Tensor, weight: Tensor, bias: Tensor, v: Tensor, *, groups: int = 32, eps: float = 1e-5
) -> Tensor:
    """EvoNorm-S0 as a function of its tensors.

    Args:
        x: Input, `(N, C, *spatial)`.
        weight: Scales gamma, `(C,)`.
        bias: Shifts beta, `(C,)`.
        v: Slopes of the sigmoid's argument, `(C,)`.
        groups: Number of groups, a divisor of C.
        eps: Added to the variances.

    Shape:
        - x, output: `(N, C, *spatial)`

    Returns:
        The output, in the dtype of `x`.

    Source:
        Liu, Brock, Simonyan and Le, "Evolving Normalization-Activation Layers", 2020, S0.

    Example:
        >>> x = torch.tensor([[[[-2.0, 2.0]]]])
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> evonorm_s0(x, one, zero, zero, groups=1, eps=0.0).flatten().tolist()
        [-0.5, 0.5]
    """
    return evonorm_sample(x, weight, bias, v, groups=groups, eps=eps)


def widened(x: Tensor) -> Tensor:
    """`x` in float32 at least: statistics of half precision would lose the paper's eps."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def column(vector: Tensor, x: Tensor) -> Tensor:
    """A vector over channels, shaped and typed to act on `x`."""
    return vector.to(x.dtype).view(-1, *[1] * (x.ndim - 2))


def affine(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`y gamma + beta`, per channel."""
    return y * column(weight, y) + column(bias, y)


class _SumOverRanks(torch.autograd.Function):
    """The sum over the ranks of a group; its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def variances_over_ranks(x: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Biased and unbiased variance `(C,)` of all ranks' values; a rank may have none."""
    axes = [0, *range(2, x.ndim)]
    sums = _SumOverRanks.apply(torch.cat([x.sum(axes), x.new_tensor([_values(x)])]), group)
    count = sums[-1].detach().clamp_min(1)
    centred = x - column(sums[:-1] / count, x)
    squares = _SumOverRanks.apply(centred.square().sum(axes), group)
    return squares / count, squares.detach() / (count - 1).clamp_min(1)


def _values(x: Tensor) -> int:
    """How many values a channel has."""
    return x.numel() // x.shape[1]
