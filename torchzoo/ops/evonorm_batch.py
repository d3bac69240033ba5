"""EvoNorm on batches: a value over the larger of two deviations, fused.

y = x / d γ + β,   d = max(b, v x + s),   b = sqrt(var + eps),   s = sqrt(mean((x − m)²) + eps),

var over the batch and space of a channel, or given; mean over the space of a channel of one sample,
m that mean or 0; without a v, s takes its place. For a gradient g of y, e = g γ x / d² and e' the
part of e where v x + s is the larger, half of it where both are equal,

dx = g γ / d − v e' − (x − m) / (s n) Σ e' − (x − μ) / (b k) Σ (e − e'),
dγ = Σ g x / d,   dβ = Σ g,   dv = −Σ e' x,   dvar = −Σ (e − e') / 2b,

the first sum over the n values of a channel of one sample, with (1 + x) e' where s is also v, the
second over all k of a channel, of mean μ, and left out where var was given.

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


def evonorm_batch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    v: Tensor | None = None,
    var: Tensor | None = None,
    *,
    eps: float = 1e-5,
    centred: bool = True,
) -> tuple[Tensor, Tensor]:
    """The layers of EvoNorm's B series as a function of their tensors.

    Half-precision inputs are computed in float32. Backward keeps `x`, the vectors and the
    statistics. An input that is not contiguous is copied first, and so is what it gives.

    Args:
        x: Input, `(N, C, *spatial)`.
        weight: Scales gamma, `(C,)`.
        bias: Shifts beta, `(C,)`.
        v: Slopes of the branch of the instance, `(C,)`; -1 in B2. None for the instance's own
            deviation, as in B1.
        var: The variance of each channel, `(C,)`; None for the biased one of `x`.
        eps: Added to the variances.
        centred: Whether an instance has its deviation, as in B0; else its root mean square, as in
            B1 and B2.

    Shape:
        - x, output: `(N, C, *spatial)`

    Returns:
        The output, in the dtype and memory format of `x`, and the variance `(C,)` of each channel
        that it was divided by, in float32 at least and without a gradient.

    Raises:
        ValueError: `x` is not floating-point or has no axis of space, or a vector does not fit it.

    Source:
        Liu, Brock, Simonyan and Le, "Evolving Normalization-Activation Layers", 2020, B0 to B2.

    Example:
        >>> x = torch.tensor([[[[-2.0, 2.0]]]])
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> y, var = evonorm_batch(x, one, zero, one, eps=0.0)
        >>> y.flatten().tolist(), var.item()
        ([-1.0, 0.5], 4.0)
    """
    given = {"weight": weight, "bias": bias, "v": v, "var": var}
    check_channels(x, {name: t for name, t in given.items() if t is not None}, spatial=1)
    dtype = wide(x.dtype)
    weight, bias = weight.to(dtype).contiguous(), bias.to(dtype).contiguous()
    v = None if v is None else v.to(dtype).contiguous()
    var = None if var is None else var.to(dtype).contiguous()
    # a compiler fuses what the copies of other layouts cost the operator
    if differentiate_formula(x if x.is_contiguous() else None):
        return formula(x, weight, bias, v, var, float(eps), centred)
    dense = x.contiguous()
    with below_autograd(dense, weight, bias, v, var):
        op = torch.ops.torchzoo.evonorm_batch.default
        y, batch, _ = op(dense, weight, bias, v, var, float(eps), centred)
        return y if x.is_contiguous() else torch.empty_like(x).copy_(y), batch[1]


def _moments(x: Tensor, axes: list[int], centred: bool = True) -> Tensor:
    """Means and variances over some axes, or 0 and mean squares: one more axis in front."""
    if centred:
        var, mean = torch.var_mean(x, axes, correction=0)
        return torch.stack([mean, var])
    square = x.square().mean(axes)
    return torch.stack([torch.zeros_like(square), square])


def statistics(x: Tensor, var: Tensor | None, centred: bool) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel, `(2, C)`, and those of each instance, `(2, N, C)`."""
    space = list(range(2, x.ndim))
    given = None if var is None else torch.stack([torch.zeros_like(var), var])
    batch = _moments(x, [0, *space]) if given is None else given
    return batch, _moments(x, space, centred)


def _result(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    v: Tensor | None,
    batch: Tensor,
    instance: Tensor,
    eps: float,
) -> Tensor:
    wide_x = x.to(weight.dtype)
    deviation = column((instance[1] + eps).sqrt(), x)
    other = (deviation if v is None else column(v, x)) * wide_x + deviation
    divisor = torch.maximum(column((batch[1] + eps).sqrt(), x), other)
    return (wide_x / divisor * column(weight, x) + column(bias, x)).to(x.dtype)


def formula(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    v: Tensor | None,
    var: Tensor | None,
    eps: float,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    """The function in differentiable operations, in the type of `weight`."""
    batch, instance = statistics(x.to(weight.dtype), var, centred)
    return _result(x, weight, bias, v, batch, instance, eps), batch[1].detach()


def slopes(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    v: Tensor | None,
    batch: Tensor,
    instance: Tensor,
    eps: float,
    measured: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients by `x`, `weight`, `bias`, `v` and the variance."""
    wide_x, wide_grad = x.to(weight.dtype), grad.to(weight.dtype)
    batch_deviation = (batch[1] + eps).sqrt()
    b, s = column(batch_deviation, x), column((instance[1] + eps).sqrt(), x)
    space = list(range(2, x.ndim))
    slope = s if v is None else column(v, x)

    other = slope * wide_x + s
    divisor = torch.maximum(b, other)
    share = torch.where(other > b, 1.0, torch.where(other == b, 0.5, 0.0)).to(weight.dtype)
    down = wide_grad / divisor
    scaled = down * column(weight, x)
    all_down = scaled * wide_x / divisor
    to_other = share * all_down
    to_batch = (all_down - to_other).sum([0, *space])
    to_instance = (to_other * (1 + wide_x) if v is None else to_other).sum(space, keepdim=True)

    pull = (wide_x - column(instance[0], x)) * to_instance / (s * x.shape[2:].numel())
    if measured:
        values = x.numel() // x.shape[1]
        pull = pull + (wide_x - column(batch[0], x)) * column(to_batch, x) / (b * values)
    dx = scaled - slope * to_other - pull
    dweight, dbias = (down * wide_x).sum([0, *space]), wide_grad.sum([0, *space])
    dv = -(to_other * wide_x).sum([0, *space])
    return dx.to(x.dtype), dweight, dbias, dv, -to_batch / (2 * batch_deviation)


@torch.library.custom_op("torchzoo::evonorm_batch", mutates_args=())
def evonorm_batch_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    v: Tensor | None,
    var: Tensor | None,
    eps: float,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    with no_autocast(x):
        batch, instance = statistics(x.to(weight.dtype), var, centred)
        y = _result(x, weight, bias, v, batch, instance, eps)
        return y.contiguous(), batch, instance


@torch.library.custom_op("torchzoo::evonorm_batch_backward", mutates_args=())
def evonorm_batch_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    v: Tensor | None,
    batch: Tensor,
    instance: Tensor,
    eps: float,
    measured: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with no_autocast(x):
        dx, *rest = slopes(grad, x, weight, v, batch, instance, eps, measured)
        return dx.contiguous(), *rest  # type: ignore[return-value]


@evonorm_batch_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    v: Tensor | None,
    var: Tensor | None,
    eps: float,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    samples, channels = x.shape[:2]
    batch = weight.new_empty(2, channels)
    return torch.empty_like(x), batch, weight.new_empty(2, samples, channels)


@evonorm_batch_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    v: Tensor | None,
    batch: Tensor,
    instance: Tensor,
    eps: float,
    measured: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dweight, dbias, dv, dvar = (torch.empty_like(weight) for _ in range(4))
    return torch.empty_like(x), dweight, dbias, dv, dvar


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps, ctx.centred = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    x, weight, bias, v, var, batch, instance = ctx.saved_tensors
    needed = ctx.needs_input_grad[:5]
    if torch.is_grad_enabled():  # a second derivative is wanted: go through what has one
        y = formula(x, weight, bias, v, var, ctx.eps, ctx.centred)[0]
        wanted = [t for t, on in zip((x, weight, bias, v, var), needed, strict=True) if on]
        found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    else:
        op = torch.ops.torchzoo.evonorm_batch_backward.default
        grads = op(grad, x, weight, v, batch, instance, ctx.eps, var is None)
        found = iter([g for g, on in zip(grads, needed, strict=True) if on])
    return *(next(found) if on else None for on in needed), None, None


evonorm_batch_op.register_autograd(_backward, setup_context=_setup)


evonorm_batch_op.register_vmap(loop_over_batch(evonorm_batch_op))
evonorm_batch_backward.register_vmap(loop_over_batch(evonorm_batch_backward))
