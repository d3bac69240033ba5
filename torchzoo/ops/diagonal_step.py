"""One step of diagonal state spaces, a linear system a feature, with their outputs.

x'_dp = a_dp x_dp + b_dp u_d,   y_cd = sum_p Re(r_cdp) Re(x'_dp) + Im(r_cdp) Im(x'_dp).
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from torchzoo.ops.calling import below_autograd, forward_mode, loop_over_batch


def diagonal_step(
    u: Tensor, state: Tensor, a_bar: Tensor, b_bar: Tensor, readout: Tensor
) -> tuple[Tensor, Tensor]:
    """Run one time step; the kernel reads and writes each state once.

    The kernel serves steps that no derivative is asked of; the others, and compiled ones, are
    made of tensor operations.

    Args:
        u: Inputs of this step, real.
        state: The state before it, complex.
        a_bar: The discrete transition, as pairs of real and imaginary parts.
        b_bar: The discrete input vector, likewise.
        readout: Weights of the state's parts in the outputs; `2 (Re C, -Im C)` gives `2 Re(C x)`.

    Shape:
        - u: `(..., D)`
        - state: `(..., D, P)`
        - a_bar, b_bar: `(D, P, 2)`
        - readout: `(C, D, P, 2)`

    Returns:
        The outputs `(..., C, D)` and the next state.

    Raises:
        ValueError: Shapes, types or devices that don't fit together.

    Example:
        >>> a, b, readout = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 2.0]]).view(3, 1, 1, 2)
        >>> y, x = diagonal_step(torch.ones(1), torch.ones(1, 1) + 0j, a, b, readout[None])
        >>> y.item(), x.item()
        (3.0, (1+1j))
    """
    _check(u, state, a_bar, b_bar, readout)
    inputs = (u, torch.view_as_real(state), a_bar, b_bar, readout)
    if _differentiable(*inputs):
        y, after = _plain(*inputs)
        return y, torch.view_as_complex(after)
    if u.ndim != 2:  # a step is short: what it needn't do counts
        rows = prod(u.shape[:-1])
        flat = (inputs[1].reshape(rows, *a_bar.shape), *inputs[2:])
        inputs = (u.reshape(rows, u.shape[-1]), *flat)
    with below_autograd():
        y, after = _diagonal_step(*inputs)
    if u.ndim != 2:
        y, after = y.view(*u.shape[:-1], *y.shape[1:]), after.view(*state.shape, 2)
    return y, torch.view_as_complex(after)


def _check(u: Tensor, state: Tensor, a_bar: Tensor, b_bar: Tensor, readout: Tensor) -> None:
    if not state.is_complex() or state.shape[:-1] != u.shape or u.ndim < 1:
        raise ValueError(
            f"state: expected complex numbers of shape {(*u.shape, 'P')} beside u "
            f"{tuple(u.shape)}, got {state.dtype} {tuple(state.shape)}"
        )
    sizes = (*state.shape[-2:], 2)
    for name, part in (("a_bar", a_bar), ("b_bar", b_bar), ("readout", readout)):
        shape = part.shape[1:] if part is readout else part.shape
        if shape != sizes or part.dtype != u.dtype or part.device != u.device:
            lead = "C, " if part is readout else ""
            raise ValueError(
                f"{name}: expected {u.dtype} of shape ({lead}{', '.join(map(str, sizes))}) on "
                f"{u.device}, got {part.dtype} {tuple(part.shape)} on {part.device}"
            )


def _differentiable(*inputs: Tensor) -> bool:
    if torch.compiler.is_compiling() or forward_mode():
        return True
    return torch.is_grad_enabled() and any(t.requires_grad for t in inputs)


def _plain(
    u: Tensor, state: Tensor, a_bar: Tensor, b_bar: Tensor, readout: Tensor
) -> tuple[Tensor, Tensor]:
    turned = torch.view_as_real(torch.view_as_complex(a_bar) * torch.view_as_complex(state))
    after = torch.addcmul(turned, b_bar, u[..., None, None])  # real from here on: it is faster
    return (readout * after[..., None, :, :, :]).sum((-2, -1)), after


@torch.library.custom_op("torchzoo::diagonal_step", mutates_args=())
def _diagonal_step(
    u: Tensor, state: Tensor, a_bar: Tensor, b_bar: Tensor, readout: Tensor
) -> tuple[Tensor, Tensor]:
    """For u `(B, D)` and state `(B, D, P, 2)`."""
    return _plain(u, state, a_bar.contiguous(), b_bar, readout)


@_diagonal_step.register_fake
def _(
    u: Tensor, state: Tensor, a_bar: Tensor, b_bar: Tensor, readout: Tensor
) -> tuple[Tensor, Tensor]:
    y = u.new_empty(u.shape[0], readout.shape[0], u.shape[1])
    return y, state.new_empty(state.shape)


_diagonal_step.register_vmap(loop_over_batch(_diagonal_step))
