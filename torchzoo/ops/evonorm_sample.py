"""EvoNorm on samples: a gated value over the spread of its group of channels, fused.

y = x σ(v x) r γ + β,   r = 1 / sqrt(mean((x − m)²) + eps),

over each group of channels of each sample, m its mean or 0. For a gradient g of y, M values in a
group and f = x σ(v x),

dx = g γ r (σ(v x) + v x σ(v x) σ(−v x)) − (x − m) r³ / M Σ g γ f,
dγ = Σ g r f,   dβ = Σ g,   dv = Σ g γ r x² σ(v x) σ(−v x).

Where a compiler is at work the formula takes the operator's place, as it can be fused with others,
but not for large inputs on a CPU (`torchzoo.ops._elementwise.differentiate_formula`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchzoo.ops._elementwise import differentiate_formula
from torchzoo.ops._evonorm import check_channels, column
from torchzoo.ops.calling import below_autograd, loop_over_batch, no_autocast
from torchzoo.ops.rows import wide


def evonorm_sample(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    v: Tensor,
    *,
    groups: int = 32,
    eps: float = 1e-5,
    centred: bool = True,
) -> Tensor:
    """The layers of EvoNorm's S series as a function of their tensors.

    Half-precision inputs are computed in float32. Backward keeps `x`, `weight` and `v` only.

    Args:
        x: Input, `(N, C, *spatial)`. A contiguous one goes through the fused operator.
        weight: Scales gamma, `(C,)`.
        bias: Shifts beta, `(C,)`.
        v: Slopes of the sigmoid's argument, `(C,)`; 1 in S1 and S2.
        groups: Number of groups, a divisor of C.
        eps: Added to the variances.
        centred: Whether groups are divided by their deviation, as in S0 and S1; else by their root
            mean square, as in S2.

    Shape:
        - x, output: `(N, C, *spatial)`

    Returns:
        The output, in the dtype of `x`.

    Raises:
        ValueError: `x` is not floating-point or has no channels, a vector does not fit them, or
            `groups` does not divide their number.

    Source:
        Liu, Brock, Simonyan and Le, "Evolving Normalization-Activation Layers", 2020, S0 to S2.

    Example:
        >>> x = torch.tensor([[[[-2.0, 2.0]]]])
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> evonorm_sample(x, one, zero, zero, groups=1, eps=0.0).flatten().tolist()
        [-0.5, 0.5]
    """
    check_channels(x, {"weight": weight, "bias": bias, "v": v})
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups: expected a divisor of {channels} channels, got {groups}")
    weight, bias, v = (vector.to(wide(x.dtype)) for vector in (weight, bias, v))
    if differentiate_formula(x) or not x.is_contiguous():
        return formula(x, weight, bias, v, groups, float(eps), centred)
    weight, bias, v = weight.contiguous(), bias.contiguous(), v.contiguous()
    with below_autograd(x, weight, bias, v):
        op = torch.ops.torchzoo.evonorm_sample.default
        result: Tensor = op(x, weight, bias, v, groups, float(eps), centred)
        return result


def _split(x: Tensor, groups: int) -> tuple[Tensor, list[int]]:
    """Channels as groups and members, and the axes that a group's statistics are taken over."""
    split = x.unflatten(1, (groups, x.shape[1] // groups))
    return split, list(range(2, split.ndim))


def formula(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    v: Tensor,
    groups: int,
    eps: float,
    centred: bool,
) -> Tensor:
    """The function in differentiable operations, in the type of `weight`."""
    wide_x = x.to(weight.dtype)
    split, axes = _split(wide_x, groups)
    if centred:
        moment = split.var(axes, correction=0, keepdim=True)
    else:
        moment = split.square().mean(axes, keepdim=True)
    active = wide_x * (column(v, x) * wide_x).sigmoid()
    y = (_split(active, groups)[0] / (moment + eps).sqrt()).flatten(1, 2)
    return (y * column(weight, x) + column(bias, x)).to(x.dtype)


def slopes(
    grad: Tensor, x: Tensor, weight: Tensor, v: Tensor, groups: int, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients by `x`, `weight`, `bias` and `v`, in differentiable operations."""
    wide_x, wide_grad = x.to(weight.dtype), grad.to(weight.dtype)
    offset, axes = _split(wide_x, groups)
    if centred:
        offset = offset - offset.mean(axes, keepdim=True)
    rstd = (offset.square().mean(axes, keepdim=True) + eps).rsqrt()
    space = [0, *range(2, x.ndim)]

    t = column(v, x) * wide_x
    gate = t.sigmoid()
    slope = gate * (-t).sigmoid()
    raw = wide_grad * (wide_x * gate)
    scale = (_split(column(weight, x).expand(x.shape), groups)[0] * rstd).flatten(1, 2)
    dweight = (_split(raw, groups)[0] * rstd).flatten(1, 2).sum(space)
    dv = (scale * (wide_grad * wide_x * slope * wide_x)).sum(space)

    to_rstd = _split(raw * column(weight, x), groups)[0].sum(axes, keepdim=True)
    count = x.shape[1:].numel() // groups
    pull = (offset * (rstd.pow(3) * to_rstd / count)).flatten(1, 2)
    dx = wide_grad * scale * (gate + t * slope) - pull
    return dx.to(x.dtype), dweight, wide_grad.sum(space), dv


@torch.library.custom_op("torchzoo::evonorm_sample", mutates_args=())
def evonorm_sample_op(
    x: Tensor, weight: Tensor, bias: Tensor, v: Tensor, groups: int, eps: float, centred: bool
) -> Tensor:
    with no_autocast(x):
        return formula(x, weight, bias, v, groups, eps, centred).contiguous()


@torch.library.custom_op("torchzoo::evonorm_sample_backward", mutates_args=())
def evonorm_sample_backward(
    grad: Tensor, x: Tensor, weight: Tensor, v: Tensor, groups: int, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with no_autocast(x):
        dx, dweight, dbias, dv = slopes(grad, x, weight, v, groups, eps, centred)
        return dx.contiguous(), dweight, dbias, dv


@evonorm_sample_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, v: Tensor, groups: int, eps: float, centred: bool
) -> Tensor:
    return torch.empty_like(x)


@evonorm_sample_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, v: Tensor, groups: int, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dweight, dbias, dv = (torch.empty_like(weight) for _ in range(3))
    return torch.empty_like(x), dweight, dbias, dv


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, v, *ctx.options = inputs
    ctx.save_for_backward(x, weight, v)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # with gradients recorded in backward a second derivative is wanted
    op = torch.ops.torchzoo.evonorm_sample_backward.default
    run = slopes if torch.is_grad_enabled() else op
    return *run(grad, *ctx.saved_tensors, *ctx.options), None, None, None


evonorm_sample_op.register_autograd(_backward, setup_context=_setup)


evonorm_sample_op.register_vmap(loop_over_batch(evonorm_sample_op))
evonorm_sample_backward.register_vmap(loop_over_batch(evonorm_sample_backward))
