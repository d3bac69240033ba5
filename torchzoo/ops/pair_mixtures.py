"""Weighted sums of pairs of SiLUs, and the least and the largest of the pairs; fused.

phi_k(x) = (p n)²,   p = silu(x − l_k),   n = silu(u_k − x),
mixed_nmd = Σ_k w_mk phi_k(x_nd),   ends_n = min and max over d and k of phi_k(x_nd).

With silu′(t) = σ(t) (1 + t σ(−t)) and a = Σ_m w_mk dmixed_nmd, to which is added what goes to the
ends, at the first input that each is at,

dl_k = −2 Σ a p n² p′,   du_k = 2 Σ a p² n n′,   dx = −Σ_k (what goes to l_k and u_k),
dw_mk = Σ dmixed_nmd phi_k(x_nd).

On a CPU the kernel computes one exponential an input, as σ(x − l) = 1 / (1 + e^−x e^l). The
backward pass computes all again: nothing with K functions of every input is ever held.

Where a compiler is at work the formula takes the operator's place, as it can be fused with others.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchzoo.ops._elementwise import differentiate_formula
from torchzoo.ops._splat_checks import common_dtype, expect
from torchzoo.ops.calling import below_autograd, loop_over_batch, no_autocast


def pair_mixtures(x: Tensor, low: Tensor, high: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mix the pair functions of each input, and find the least and the largest of each sample.

    Backward keeps the inputs, and where the ends are. What goes to an end goes to the first input
    that has it, in equal parts to the functions that have it there.

    Args:
        x: Inputs, one sample a row.
        low: Shifts l of the rising SiLUs.
        high: Shifts u of the falling ones.
        weight: What the functions are multiplied by in each mixture.

    Shape:
        - x: `(n, D)`, D above 0
        - low, high: `(K,)`, K above 0
        - weight: `(M, K)`, M above 0
        - mixed: `(n, M, D)`
        - ends: `(n, 2)`

    Returns:
        The mixtures, and of each sample the least and the largest function of any input, both NaN
        where one of them is. In the widest dtype of the inputs, float32 at least.

    Raises:
        ValueError: Shapes, dtypes or devices that don't fit.

    Source:
        H.-T. Ta and A. Tran, "AF-KAN: Activation Function-Based Kolmogorov-Arnold Networks for
        Efficient Representation Learning", 2025, the basis with SiLU and its first combination.

    Example:
        >>> zero, two = torch.zeros(1), torch.full((1,), 2.0)
        >>> mixed, ends = pair_mixtures(torch.tensor([[1.0, 2.0]]), zero, two, torch.ones(1, 1))
        >>> mixed, ends  # silu(1)⁴ and 0
        (tensor([[[0.2856, 0.0000]]]), tensor([[0.0000, 0.2856]]))
    """
    for name, value in (("x", x), ("weight", weight)):
        if value.ndim != 2 or 0 in value.shape[1:]:
            shape = "(n, D) with D above 0" if name == "x" else "(M, K) with K above 0"
            raise ValueError(f"{name}: got {tuple(value.shape)}, expected {shape}")
    if not len(weight):
        raise ValueError("weight: got no mixture, expected at least one")
    functions = weight.shape[1]
    expect("low", low, (functions,), f"({functions},), as weight has {functions} columns")
    expect("high", high, (functions,), f"({functions},), as weight has {functions} columns")
    given = {"x": x, "low": low, "high": high, "weight": weight}
    for name, value in given.items():
        if not value.is_floating_point() or value.device != x.device:
            raise ValueError(
                f"{name}: got {value.dtype} on {value.device}, "
                f"expected floating point on {x.device}"
            )
    dtype = common_dtype(*given.values())
    inputs = [value.to(dtype) for value in given.values()]
    if differentiate_formula():
        mixed, ends, _ = formula(*inputs)
        return mixed, ends
    with below_autograd(*inputs):
        mixed, ends, _ = torch.ops.torchzoo.pair_mixtures.default(*inputs)
        return mixed, ends


def pair(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The pair function with these shifts at x; all three broadcast."""
    return (F.silu(x - low) * F.silu(high - x)).square()


def formula(x: Tensor, low: Tensor, high: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mixtures, ends and the inputs `(n, 2)` that these are at, in differentiable operations.

    One function after the other, as all at once would take K times the memory of x.
    """
    mixed = torch.zeros_like(x).unsqueeze(-2)
    least = torch.full_like(x, torch.inf)
    most = -least
    for l, u, w in zip(low, high, weight.mT, strict=True):
        phi = pair(x, l, u)
        mixed = mixed + w.unsqueeze(-1) * phi.unsqueeze(-2)
        least, most = torch.minimum(least, phi.detach()), torch.maximum(most, phi.detach())
    places = torch.stack([least.argmin(-1), most.argmax(-1)], -1)
    at = pair(x.gather(-1, places).unsqueeze(-2), low.unsqueeze(-1), high.unsqueeze(-1))
    return mixed, torch.stack([at[..., 0].amin(-1), at[..., 1].amax(-1)], -1), places


def pair_slopes(x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A pair function and its derivatives by l and by u; that by x is minus their sum."""
    s, t = x - low, high - x
    p, n = F.silu(s), F.silu(t)
    slope_p, slope_n = (v.sigmoid() * (1 + v * (-v).sigmoid()) for v in (s, t))
    root = p * n
    return root.square(), -2 * root * n * slope_p, 2 * root * p * slope_n


def slopes(
    grad: Tensor,
    grad_ends: Tensor,
    x: Tensor,
    low: Tensor,
    high: Tensor,
    weight: Tensor,
    places: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients by `x`, `low`, `high` and `weight`, in differentiable operations."""
    columns = low.unsqueeze(-1), high.unsqueeze(-1)
    phi, by_low, by_high = pair_slopes(x.gather(-1, places).unsqueeze(-2), *columns)  # (n, K, 2)
    ends = torch.stack([phi[..., 0].amin(-1), phi[..., 1].amax(-1)], -1).unsqueeze(-2)
    tied = phi == ends
    above = grad_ends.unsqueeze(-2) * tied / tied.sum(-2, keepdim=True)
    to_low, to_high = above * by_low, above * by_high
    dlow, dhigh = list(to_low.sum((0, 2))), list(to_high.sum((0, 2)))
    dx = torch.zeros_like(x).scatter_add(-1, places, -(to_low + to_high).sum(-2))
    dweight = []
    for k, (l, u, w) in enumerate(zip(low, high, weight.mT, strict=True)):
        phi, by_low, by_high = pair_slopes(x, l, u)
        above = (w.unsqueeze(-1) * grad).sum(-2)
        to_low, to_high = above * by_low, above * by_high
        dx = dx - (to_low + to_high)
        dlow[k], dhigh[k] = dlow[k] + to_low.sum(), dhigh[k] + to_high.sum()
        dweight.append((grad * phi.unsqueeze(-2)).sum((0, 2)))
    return dx, torch.stack(dlow), torch.stack(dhigh), torch.stack(dweight, -1)


@torch.library.custom_op("torchzoo::pair_mixtures", mutates_args=())
def pair_mixtures_op(
    x: Tensor, low: Tensor, high: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    with no_autocast(x):
        return formula(x, low, high, weight)


@torch.library.custom_op("torchzoo::pair_mixtures_backward", mutates_args=())
def pair_mixtures_backward(
    grad: Tensor,
    grad_ends: Tensor,
    x: Tensor,
    low: Tensor,
    high: Tensor,
    weight: Tensor,
    places: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with no_autocast(x):
        dx, dlow, dhigh, dweight = slopes(grad, grad_ends, x, low, high, weight, places)
        return dx.contiguous(), dlow, dhigh, dweight.contiguous()


@pair_mixtures_op.register_fake
def _(x: Tensor, low: Tensor, high: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, inputs = x.shape
    mixed = x.new_empty(rows, weight.shape[0], inputs)
    return mixed, x.new_empty(rows, 2), x.new_empty(rows, 2, dtype=torch.int64)


@pair_mixtures_backward.register_fake
def _(
    grad: Tensor,
    grad_ends: Tensor,
    x: Tensor,
    low: Tensor,
    high: Tensor,
    weight: Tensor,
    places: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dlow, dhigh, dweight = (t.new_empty(t.shape) for t in (x, low, high, weight))
    return dx, dlow, dhigh, dweight


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    places = output[2]
    ctx.mark_non_differentiable(places)
    ctx.save_for_backward(*inputs, places)


def _backward(ctx: Any, grad: Tensor, grad_ends: Tensor, _: Any) -> tuple[Tensor, ...]:
    # with gradients recorded in backward a second derivative is wanted
    op = torch.ops.torchzoo.pair_mixtures_backward.default
    run = slopes if torch.is_grad_enabled() else op
    return tuple(run(grad, grad_ends, *ctx.saved_tensors))


pair_mixtures_op.register_autograd(_backward, setup_context=_setup)


pair_mixtures_op.register_vmap(loop_over_batch(pair_mixtures_op))
pair_mixtures_backward.register_vmap(loop_over_batch(pair_mixtures_backward))
