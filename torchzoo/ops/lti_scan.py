"""The scan of a diagonal linear time-invariant system: all states that an input sequence drives.

    x_l = a x_(l-1) + bu_l,   l = 0 .. L - 1,   x_(-1) = x0.

Backward is the same scan from the end, G_l = dx_l + conj(a) G_(l+1), and then

    dbu = G,   da = sum_l G_l conj(x_(l-1)),   dx0 = conj(a) G_0.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from torchzoo.ops.calling import below_autograd, loop_over_batch, refuse_forward_mode


def lti_scan(a_bar: Tensor, bu: Tensor, x0: Tensor | None = None) -> Tensor:
    """Run a diagonal linear recurrence over a sequence and return every state.

    The kernels read the sequence once and write the states once; backward keeps the states and
    `a_bar`. Differentiable any number of times.

    Args:
        a_bar: The discrete transition, complex.
        bu: What is added to the state at each step, complex.
        x0: The state before the first step; zeros if None.

    Shape:
        - a_bar: `(H, N)`
        - bu: `(..., L, H, N)`
        - x0: `(..., H, N)`
        - output: `(..., L, H, N)`

    Returns:
        The state after each step, in the wider of the inputs' types.

    Raises:
        ValueError: An input is not complex, or shapes or devices don't fit together.
        NotImplementedError: An input has a forward-mode tangent.

    Example:
        >>> lti_scan(torch.tensor([[0.5j]]), torch.ones(1, 3, 1, 1, dtype=torch.cfloat)).flatten()
        tensor([1.0000+0.0000j, 1.0000+0.5000j, 0.7500+0.5000j])
    """
    _check(a_bar, bu, x0)
    refuse_forward_mode("lti_scan", a_bar, bu, x0)
    lead, length, states = bu.shape[:-3], bu.shape[-3], prod(a_bar.shape)
    if x0 is None:
        x0 = bu.new_zeros(*lead, *a_bar.shape)
    dtype = torch.promote_types(torch.promote_types(a_bar.dtype, bu.dtype), x0.dtype)
    a, rows, start = (t.to(dtype).resolve_conj() for t in (a_bar, bu, x0))
    a = torch.view_as_real(a).reshape(states, 2)
    rows = torch.view_as_real(rows).reshape(prod(lead), length, states, 2)
    start = torch.view_as_real(start).reshape(prod(lead), states, 2)
    with below_autograd(a, rows, start):
        x = _lti_scan(a, rows, start)
    return torch.view_as_complex(x).reshape(bu.shape)


def _check(a_bar: Tensor, bu: Tensor, x0: Tensor | None) -> None:
    if not a_bar.is_complex() or a_bar.ndim != 2:
        raise ValueError(
            f"a_bar: expected complex numbers of shape (H, N), "
            f"got {a_bar.dtype} {tuple(a_bar.shape)}"
        )
    sizes = tuple(a_bar.shape)
    if not bu.is_complex() or bu.ndim < 3 or bu.shape[-2:] != sizes:
        raise ValueError(
            f"bu: expected complex numbers of shape (..., L, {sizes[0]}, {sizes[1]}), "
            f"got {bu.dtype} {tuple(bu.shape)}"
        )
    if x0 is not None and (not x0.is_complex() or x0.shape != (*bu.shape[:-3], *sizes)):
        raise ValueError(
            f"x0: expected complex numbers of shape {(*bu.shape[:-3], *sizes)}, "
            f"got {x0.dtype} {tuple(x0.shape)}"
        )
    for name, value in (("bu", bu), ("x0", x0)):
        if value is not None and value.device != a_bar.device:
            raise ValueError(
                f"{name}: expected it on {a_bar.device}, as a_bar is, got {value.device}"
            )


@torch.library.custom_op("torchzoo::lti_scan", mutates_args=())
def _lti_scan(a: Tensor, bu: Tensor, x0: Tensor) -> Tensor:
    """For a `(M, 2)`, bu `(B, L, M, 2)`, x0 `(B, M, 2)`: doubles the steps that a state sums up."""
    first, rest = bu[:, :1], bu[:, 1:]
    x = torch.view_as_complex(torch.cat([first + _times(a, x0)[:, None], rest], 1).contiguous())
    power, reach = torch.view_as_complex(a.double().contiguous()), 1
    while reach < x.shape[1]:  # x_l has the inputs of the last `reach` steps
        x = torch.cat([x[:, :reach], x[:, reach:] + power.to(x.dtype) * x[:, :-reach]], 1)
        power, reach = power * power, 2 * reach
    return torch.view_as_real(x)


def _times(a: Tensor, b: Tensor) -> Tensor:
    a, b = torch.view_as_complex(a.contiguous()), torch.view_as_complex(b.contiguous())
    return torch.view_as_real(a * b)


def _conj(a: Tensor) -> Tensor:
    return torch.stack([a[..., 0], -a[..., 1]], -1)


def _gradients(grad: Tensor, a: Tensor, x: Tensor, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dbu, da and dx0 in differentiable operations."""
    backwards = _lti_scan(_conj(a), grad.flip(1), torch.zeros_like(x0))
    dbu = backwards.flip(1)
    before = torch.cat([x0[:, None], x], 1)[:, :-1]
    dx0 = _times(_conj(a), dbu[:, 0]) if grad.shape[1] else torch.zeros_like(x0)
    return dbu, _times(dbu, _conj(before)).sum((0, 1)), dx0


@torch.library.custom_op("torchzoo::lti_scan_backward", mutates_args=())
def _lti_scan_backward(
    grad: Tensor, a: Tensor, x: Tensor, x0: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(grad, a, x, x0)


@_lti_scan.register_fake
def _(a: Tensor, bu: Tensor, x0: Tensor) -> Tensor:
    return bu.new_empty(bu.shape)


@_lti_scan_backward.register_fake
def _(grad: Tensor, a: Tensor, x: Tensor, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return grad.new_empty(grad.shape), a.new_empty(a.shape), x0.new_empty(x0.shape)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    a, _, x0 = inputs
    ctx.save_for_backward(a, output, x0)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # with gradients recorded in backward a second derivative is wanted
    run = _gradients if torch.is_grad_enabled() else _lti_scan_backward
    dbu, da, dx0 = run(grad, *ctx.saved_tensors)
    return da, dbu, dx0


_lti_scan.register_autograd(_backward, setup_context=_setup)


_lti_scan.register_vmap(loop_over_batch(_lti_scan))
_lti_scan_backward.register_vmap(loop_over_batch(_lti_scan_backward))
