"""Sums of simple poles: the generating functions of state spaces with a low-rank correction.

    y_l = sum_n v_n / (z_l - w_n).

With p-th powers of the denominators, y^(p)_l = sum_n v_n (z_l - w_n)^(-p), all gradients are sums
of the same kind, in which nodes and poles change places:

    dv_n = sum_l dy_l conj(z_l - w_n)^(-p),
    dw_n = p conj(v_n) sum_l dy_l conj(z_l - w_n)^(-p-1),   dz_l = -p dy_l conj(y^(p+1)_l).
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from torchzoo.ops.calling import below_autograd, loop_over_batch, refuse_forward_mode
from torchzoo.ops.vandermonde import broadcast

CHUNK = 2**20
"""Terms that the reference holds at once."""


def cauchy(v: Tensor, z: Tensor, w: Tensor, *, conj: bool = True) -> Tensor:
    """Sum poles over the states, at `L` nodes.

    Neither the forward nor the backward pass holds the `(..., N, L)` terms. Differentiable any
    number of times.

    Args:
        v: Residues, complex.
        z: Nodes, complex.
        w: Poles, complex. The leading dimensions of all three broadcast.
        conj: Whether `v` and `w` hold one of each conjugate pair: the terms
            `conj(v_n) / (z_l - conj(w_n))` are added.

    Shape:
        - v: `(..., N)`
        - z: `(..., L)`
        - w: `(..., N)`
        - output: `(..., L)`, complex

    Returns:
        The sums, in the wider of the inputs' types.

    Raises:
        ValueError: An input is not complex, or shapes or devices don't fit together.
        NotImplementedError: An input has a forward-mode tangent.

    Example:
        >>> v, w = torch.tensor([1 + 0j]), torch.tensor([-1 + 1j])
        >>> cauchy(v, torch.tensor([0j, 1 + 0j]), w)  # 2 (z + 1) / ((z + 1)^2 + 1)
        tensor([1.0000+0.j, 0.8000+0.j])
    """
    _check(v, z, w)
    refuse_forward_mode("cauchy", v, z, w)
    dtype = torch.promote_types(torch.promote_types(v.dtype, z.dtype), w.dtype)
    v, z, w = (t.to(dtype) for t in (v, z, w))
    if conj:
        v, w = torch.cat([v, v.conj()], -1), torch.cat([w, w.conj()], -1)
    batch = broadcast("v, z, w", v.shape[:-1], z.shape[:-1], w.shape[:-1])
    rows = [
        torch.view_as_real(t.expand(*batch, t.shape[-1]).resolve_conj()).reshape(
            prod(batch), t.shape[-1], 2
        )
        for t in (v, z, w)
    ]
    with below_autograd(*rows):
        y = _cauchy(*rows, 1)
    return torch.view_as_complex(y).reshape(*batch, z.shape[-1])


def _check(v: Tensor, z: Tensor, w: Tensor) -> None:
    for name, value in (("v", v), ("z", z), ("w", w)):
        if not value.is_complex() or value.ndim < 1:
            raise ValueError(
                f"{name}: expected complex numbers of at least 1 dimension, "
                f"got {value.dtype} {tuple(value.shape)}"
            )
        if value.device != v.device:
            raise ValueError(f"{name}: expected it on {v.device}, as v is, got {value.device}")
    if v.shape[-1] != w.shape[-1]:
        raise ValueError(f"w: expected (..., {v.shape[-1]}), as v, got {tuple(w.shape)}")


@torch.library.custom_op("torchzoo::cauchy", mutates_args=())
def _cauchy(v: Tensor, z: Tensor, w: Tensor, power: int) -> Tensor:
    """From v `(B, N, 2)`, z `(B, L, 2)`, w `(B, N, 2)` to `(B, L, 2)`, some nodes at a time."""
    residues, nodes, poles = (torch.view_as_complex(t.contiguous()) for t in (v, z, w))
    step = max(1, CHUNK // max(1, poles.numel()))
    pieces = [
        ((piece.unsqueeze(-1) - poles.unsqueeze(-2)) ** -power @ residues.unsqueeze(-1)).squeeze(-1)
        for piece in nodes.split(step, -1)
    ]
    return torch.view_as_real(torch.cat(pieces, -1))


@_cauchy.register_fake
def _(v: Tensor, z: Tensor, w: Tensor, power: int) -> Tensor:
    return z.new_empty(z.shape)


def _conj(a: Tensor) -> Tensor:
    return torch.stack([a[..., 0], -a[..., 1]], -1)


def _times(a: Tensor, b: Tensor) -> Tensor:
    a, b = torch.view_as_complex(a.contiguous()), torch.view_as_complex(b.contiguous())
    return torch.view_as_real(a * b)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.power = inputs[3]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    v, z, w = ctx.saved_tensors
    power, sign = ctx.power, (-1) ** ctx.power
    nodes, poles = _conj(z), _conj(w)  # (z - w)^-p is (-1)^p (w - z)^-p
    dv = dz = dw = None
    if ctx.needs_input_grad[0]:
        dv = sign * _cauchy(grad, poles, nodes, power)
    if ctx.needs_input_grad[1]:
        dz = -power * _times(grad, _conj(_cauchy(v, z, w, power + 1)))
    if ctx.needs_input_grad[2]:
        dw = -sign * power * _times(_conj(v), _cauchy(grad, poles, nodes, power + 1))
    return dv, dz, dw, None


_cauchy.register_autograd(_backward, setup_context=_setup)
_cauchy.register_vmap(loop_over_batch(_cauchy))
