"""Sums of damped complex exponentials: the convolution kernels of diagonal state-space models.

    y_l = sum_n v_n x_n^l,   x_n = exp(log_x_n),   l = 0 .. L - 1.

With l = 64 i + j this is a matrix product, of v_n x_n^(64 i) with x_n^j, so that of the `L` powers
of each x_n only 64 + L / 64 are ever held. They are multiplied up in float64 from exp(log_x): the
phase of x^l is then right to some 1e-16 l, where l * Im(log_x) in float32 would be off by radians.

The gradients are sums over l of the same powers,

    dv_n = sum_l dy_l conj(x_n^l),   dlog_x_n = conj(v_n) sum_l l dy_l conj(x_n^l),

which is the transposed product of dy and of l * dy; its own gradients are the product again.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from torchzoo.ops.calling import below_autograd, loop_over_batch, refuse_forward_mode

BLOCK = 64


def vandermonde(v: Tensor, log_x: Tensor, L: int, *, conj: bool = True) -> Tensor:
    """Sum complex exponentials over the states, at `L` lags.

    Neither the forward nor the backward pass holds the `(..., N, L)` powers. Differentiable any
    number of times.

    Args:
        v: Coefficients, complex.
        log_x: Logarithms of the bases, complex: `dt * A` of a diagonal state space. Its leading
            dimensions and those of `v` broadcast.
        L: Number of lags, at least 1.
        conj: Whether `v` and `log_x` hold one of each conjugate pair: twice the real part of the
            sum is returned, which is the sum over the pairs.

    Shape:
        - v: `(..., N)`
        - log_x: `(..., N)`
        - output: `(..., L)`, real with `conj`, else complex

    Returns:
        The sums, in the precision of the inputs; the powers are computed in float64.

    Raises:
        ValueError: An input is not complex, shapes or devices don't fit together, or `L < 1`.
        NotImplementedError: An input has a forward-mode tangent.

    Example:
        >>> v, log_x = torch.tensor([1 + 0j]), torch.tensor([0.5 + 0j]).log()
        >>> vandermonde(v, log_x, 4)
        tensor([2.0000, 1.0000, 0.5000, 0.2500])
    """
    _check(v, log_x, L)
    refuse_forward_mode("vandermonde", v, log_x)
    dtype = torch.promote_types(v.dtype, log_x.dtype)
    v, log_x, batch = _aligned(v.to(dtype), log_x.to(dtype))
    with below_autograd(v, log_x):
        y = _vandermonde(torch.view_as_real(v), torch.view_as_real(log_x), L, conj)
    return (y if conj else torch.view_as_complex(y)).reshape(*batch, L)


def _check(v: Tensor, log_x: Tensor, L: int) -> None:
    for name, value in (("v", v), ("log_x", log_x)):
        if not value.is_complex() or value.ndim < 1:
            raise ValueError(
                f"{name}: expected complex numbers of shape (..., N), "
                f"got {value.dtype} {tuple(value.shape)}"
            )
    if v.shape[-1] != log_x.shape[-1]:
        raise ValueError(f"log_x: expected (..., {v.shape[-1]}), as v, got {tuple(log_x.shape)}")
    if v.device != log_x.device:
        raise ValueError(f"log_x: expected it on {v.device}, as v is, got {log_x.device}")
    if L < 1:
        raise ValueError(f"L: expected at least 1, got {L}")


def broadcast(names: str, *shapes: Sequence[int]) -> torch.Size:
    """The shape that all broadcast to.

    Raises:
        ValueError: There is none.
    """
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError:
        given = " and ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(
            f"{names}: expected leading dimensions that broadcast, got {given}"
        ) from None


def _aligned(v: Tensor, log_x: Tensor) -> tuple[Tensor, Tensor, torch.Size]:
    """`v (C, H, N)`, `log_x (H, N)` and the batch shape C * H, with H as small as can be."""
    batch = broadcast("v, log_x", v.shape[:-1], log_x.shape[:-1])
    own = log_x.shape[:-1]
    while own and own[0] == 1:
        own = own[1:]
    if own != batch[len(batch) - len(own) :]:
        own = batch
    states = v.shape[-1]
    rows, channels = prod(own), prod(batch[: len(batch) - len(own)])
    log_x = log_x.expand(*own, states) if own == batch else log_x
    v = v.expand(*batch, states).reshape(channels, rows, states)
    return v.resolve_conj(), log_x.reshape(rows, states).resolve_conj(), batch


def _powers(x: Tensor, count: int) -> Tensor:
    """x^0 .. x^(count - 1) along a new last dimension."""
    powers, x = torch.ones_like(x).unsqueeze(-1), x.unsqueeze(-1)
    while powers.shape[-1] < count:
        powers, x = torch.cat([powers, powers * x], -1), x * x  # x is x^len(powers)
    return powers[..., :count]


def _factors(log_x: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """x^j and x^(64 i) in complex128: `(H, N, 64)` and `(H, N, ceil(length / 64))`."""
    x = torch.view_as_complex(log_x.double()).exp()
    low = _powers(x, BLOCK)
    return low, _powers(low[..., -1] * x, -(-length // BLOCK))


@torch.library.custom_op("torchzoo::vandermonde", mutates_args=())
def _vandermonde(v: Tensor, log_x: Tensor, length: int, conj: bool) -> Tensor:
    coefficients = torch.view_as_complex(v.contiguous())
    low, high = _factors(log_x.contiguous(), length)
    left = (coefficients.unsqueeze(-1) * high).to(coefficients.dtype)
    y = torch.einsum("chni,hnj->chij", left, low.to(coefficients.dtype))
    y = y.flatten(-2)[..., :length]
    return (2 * y.real if conj else torch.view_as_real(y)).contiguous()


@torch.library.custom_op("torchzoo::vandermonde_transposed", mutates_args=())
def _transposed(grad: Tensor, log_x: Tensor, conj: bool) -> Tensor:
    """Sum c grad_l conj(x_n^l) over l, c = 2 with `conj`; `grad (C, H, L)`, else `(C, H, L, 2)`."""
    rows = grad.to(_complex(grad)) if conj else torch.view_as_complex(grad.contiguous())
    length = rows.shape[-1]
    low, high = (  # a lazy conj would be lost where a compiled graph calls this
        power.conj_physical().to(rows.dtype) for power in _factors(log_x.contiguous(), length)
    )
    rows = torch.nn.functional.pad(rows, (0, -length % BLOCK)).unflatten(-1, (-1, BLOCK))
    sums = torch.einsum("chij,hnj->chni", rows, low)
    return torch.view_as_real((2 if conj else 1) * (sums * high).sum(-1)).contiguous()


def _complex(real: Tensor) -> torch.dtype:
    return torch.complex128 if real.dtype == torch.float64 else torch.complex64


@_vandermonde.register_fake
def _(v: Tensor, log_x: Tensor, length: int, conj: bool) -> Tensor:
    return v.new_empty(*v.shape[:2], length, *([] if conj else [2]))


@_transposed.register_fake
def _(grad: Tensor, log_x: Tensor, conj: bool) -> Tensor:
    return grad.new_empty(*grad.shape[:2], *log_x.shape[1:])


def _moments(grad: Tensor, log_x: Tensor, conj: bool, by_lag: bool) -> tuple[Tensor, Tensor | None]:
    """The transposed product of `grad`, and of l * grad, by one walk over the powers."""
    if not by_lag:
        return _transposed(grad, log_x, conj), None
    lags = torch.arange(grad.shape[2], dtype=grad.dtype, device=grad.device)
    weighted = grad * (lags if conj else lags.unsqueeze(-1))
    both = _transposed(torch.cat([grad, weighted]), log_x, conj)
    return both[: grad.shape[0]], both[grad.shape[0] :]


def _times_conj(a: Tensor, b: Tensor) -> Tensor:
    """The sum over channels of a conj(b)."""
    product = torch.view_as_complex(a.contiguous()) * torch.view_as_complex(b.contiguous()).conj()
    return torch.view_as_real(product.sum(0))


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, int, bool], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.conj = inputs[3]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    v, log_x = ctx.saved_tensors
    dv, by_lag = _moments(grad, log_x, ctx.conj, ctx.needs_input_grad[1])
    dlog_x = None if by_lag is None else _times_conj(by_lag, v)
    return dv if ctx.needs_input_grad[0] else None, dlog_x, None, None


def _transposed_setup(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.conj = inputs[2]


def _transposed_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    """By `<U, sums> = Re sum_l conj(dy_l) sum_n U_n x_n^l`: the product of U in place of v."""
    grad, log_x = ctx.saved_tensors
    dgrad = dlog_x = None
    if ctx.needs_input_grad[0]:
        dgrad = _vandermonde(upstream, log_x, grad.shape[2], ctx.conj)
    if ctx.needs_input_grad[1]:
        by_lag = _moments(grad, log_x, ctx.conj, True)[1]
        assert by_lag is not None
        dlog_x = _times_conj(by_lag, upstream)
    return dgrad, dlog_x, None


_vandermonde.register_autograd(_backward, setup_context=_setup)
_transposed.register_autograd(_transposed_backward, setup_context=_transposed_setup)


_vandermonde.register_vmap(loop_over_batch(_vandermonde))
_transposed.register_vmap(loop_over_batch(_transposed))
