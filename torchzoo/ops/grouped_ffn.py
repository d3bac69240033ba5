"""Feed-forward experts on the tokens that chose them, from tokens to weighted sums.

Slot `n` of expert `e`, that is `offsets[e - 1] <= n < offsets[e]`, takes token `src[n]`:

    h_n = x[src_n] w_in[e],   a_n = act(h_n),   r_n = a_n w_out[e],
    y_t = sum over n with src_n = t of weights_n r_n.

With G_n = dy[src_n] and da_n = G_n w_out[e]^T, the gradients are

    dweights_n = <da_n, a_n>,   dh_n = weights_n da_n act'(h_n),   dw_out[e] = (weights a)^T G,
    dw_in[e] = x[src]^T dh,   dx_t = sum over n with src_n = t of dh_n w_in[e]^T.

Only `h` is kept for the way back. Slots past the last end count for nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchzoo.ops.calling import (
    below_autograd,
    loop_over_batch,
    no_autocast,
    refuse_forward_mode,
    values_readable,
)
from torchzoo.ops.grouped_mm import _check_ends, _grouped_mm, _grouped_mm_dweight

ACTIVATIONS = ("swiglu", "relu")


def grouped_ffn(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    offsets: Tensor,
    src: Tensor,
    weights: Tensor,
    *,
    activation: str = "swiglu",
) -> Tensor:
    """Apply experts to the tokens of their slots, and add up what the slots of a token give.

    Equal to `grouped_mm`, the activation and `grouped_mm` on the gathered rows, weighted and
    scattered, but on the CPU no row goes through memory on the way, except `h`. Under autocast,
    inputs other than float64 are cast to its type. Differentiable any number of times in `x`,
    `w_in`, `w_out` and `weights`.

    Args:
        x: Tokens.
        w_in: First weights of the experts; for swiglu first the columns of the gate, then those of
            what it gates.
        w_out: Second weights, of the type of `x`.
        offsets: Where each expert's slots end, int32 or int64.
        src: int64, token of each slot.
        weights: Weight of each slot's output.
        activation: "swiglu", `silu(g) u`, or "relu".

    Shape:
        - x: `(T, dim)`
        - w_in: `(E, dim, hidden)`, twice as wide for swiglu
        - w_out: `(E, hidden, dim)`
        - offsets: `(E,)`
        - src, weights: `(N,)`
        - output: `(T, dim)`

    Returns:
        The sums; zeros for tokens without a slot.

    Raises:
        ValueError: Shapes, types or devices that don't fit together, an unknown activation, or, on
            the CPU, ends that decrease or leave `[0, N]` and slots of tokens that don't exist.
        NotImplementedError: An input has a forward-mode tangent.

    Example:
        >>> x, w = torch.tensor([[1.0, -2.0], [3.0, 4.0]]), torch.eye(2)[None]
        >>> src, weights = torch.tensor([0, 1, 1]), torch.tensor([1.0, 0.5, 0.25])
        >>> grouped_ffn(x, w, w, torch.tensor([3]), src, weights, activation="relu").tolist()
        [[1.0, 0.0], [2.25, 3.0]]
    """
    _check(x, w_in, w_out, offsets, src, weights, activation)
    refuse_forward_mode("grouped_ffn", x, w_in, w_out, weights)
    kind = x.device.type
    floats = [x, w_in, w_out, weights]
    if kind != "meta" and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        floats = [t if t.dtype == torch.float64 else t.to(dtype) for t in floats]
    x, w_in, w_out, weights = floats
    if not x.dtype == w_in.dtype == w_out.dtype:
        raise ValueError(
            f"w_in, w_out: expected the type of x, {x.dtype}, got {w_in.dtype} and {w_out.dtype}"
        )
    with below_autograd(*floats):
        weights = weights.to(torch.promote_types(x.dtype, torch.float32))
        return _grouped_ffn(x, w_in, w_out, offsets.to(torch.int32), src, weights)[0]


def _check(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    offsets: Tensor,
    src: Tensor,
    weights: Tensor,
    activation: str,
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"x: expected floats of shape (T, dim), got {x.dtype} {tuple(x.shape)}")
    if w_out.ndim != 3 or w_out.shape[2] != x.shape[1] or 0 in w_out.shape[1:]:
        raise ValueError(
            f"w_out: expected (E, hidden, {x.shape[1]}), none of them 0, got {tuple(w_out.shape)}"
        )
    width = w_out.shape[1] * (2 if activation == "swiglu" else 1)
    expected = (w_out.shape[0], x.shape[1], width)
    if w_in.shape != expected:
        raise ValueError(f"w_in: expected {expected}, got {tuple(w_in.shape)}")
    if offsets.shape != expected[:1] or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"offsets: expected int32 or int64 of shape {expected[:1]}, "
            f"got {offsets.dtype} {tuple(offsets.shape)}"
        )
    if src.ndim != 1 or src.dtype != torch.int64:
        raise ValueError(f"src: expected int64 of shape (N,), got {src.dtype} {tuple(src.shape)}")
    if weights.shape != src.shape or not weights.is_floating_point():
        raise ValueError(
            f"weights: expected floats of shape {tuple(src.shape)}, as src, "
            f"got {weights.dtype} {tuple(weights.shape)}"
        )
    devices = [t.device for t in (x, w_in, w_out, offsets, src, weights)]
    if len(set(devices)) > 1:
        raise ValueError(
            "x, w_in, w_out, offsets, src, weights: expected one device, got "
            + ", ".join(map(str, devices))
        )
    _check_ends(offsets, src.shape[0])
    if src.is_cpu and values_readable(src) and src.numel():
        low, high = (int(v) for v in src.aminmax())
        if low < 0 or high >= x.shape[0]:
            raise ValueError(f"src: expected rows of x in [0, {x.shape[0]}), got {low} to {high}")


def swiglu(h: Tensor) -> Tensor:
    """`silu(g) * u`, where the last dimension holds first `g`, then `u`."""
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def _act(h: Tensor, w_out: Tensor) -> Tensor:
    return torch.relu(h) if h.shape[1] == w_out.shape[1] else swiglu(h)


def _act_back(h: Tensor, w_out: Tensor, da: Tensor) -> Tensor:
    """`da act'(h)`."""
    if h.shape[1] == w_out.shape[1]:
        return da.masked_fill(h <= 0, 0)
    gate, up = h.chunk(2, dim=-1)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    return torch.cat([da * up * (sigmoid + silu * (1 - sigmoid)), da * silu], dim=-1)


def _counted(weights: Tensor, offsets: Tensor) -> Tensor:
    """The weights, 0 past the last end."""
    end = offsets[-1:] if len(offsets) else offsets.new_zeros(1)
    return weights.where(torch.arange(len(weights), device=weights.device) < end, 0)


def _add_up(rows: Tensor, src: Tensor, x: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    out = rows.new_zeros(x.shape, dtype=wide)
    return out.index_add(0, src, rows.to(wide)).to(x.dtype)


def _plain(
    x: Tensor, w_in: Tensor, w_out: Tensor, offsets: Tensor, src: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The formulas above, step by step; differentiable."""
    h = _grouped_mm(x[src], w_in, offsets)
    rows = _grouped_mm(_act(h, w_out), w_out, offsets)
    return _add_up(_counted(weights, offsets)[:, None] * rows, src, x), h


@torch.library.custom_op("torchzoo::grouped_ffn", mutates_args=())
def _grouped_ffn(
    x: Tensor, w_in: Tensor, w_out: Tensor, offsets: Tensor, src: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    with no_autocast(x):
        return _plain(x, w_in, w_out, offsets, src, weights)


@torch.library.custom_op("torchzoo::grouped_ffn_backward", mutates_args=())
def _grouped_ffn_backward(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    offsets: Tensor,
    src: Tensor,
    weights: Tensor,
    for_x: bool,
    for_in: bool,
    for_out: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    counted = _counted(weights, offsets)[:, None]
    with no_autocast(x):
        upstream = grad[src]
        da = _grouped_mm(upstream, w_out.mT, offsets)
        act = _act(h, w_out)
        dweights = (da * act).sum(-1, dtype=weights.dtype)
        dh = _act_back(h, w_out, (da * counted).to(h.dtype))
        dx = _add_up(_grouped_mm(dh, w_in.mT, offsets), src, x) if for_x else x[:0].clone()
        dw_in = _grouped_mm_dweight(x[src], dh, offsets) if for_in else w_in[:0].clone()
        dw_out = (
            _grouped_mm_dweight((act * counted).to(h.dtype), upstream, offsets)
            if for_out
            else w_out[:0].clone()
        )
    return dx, dw_in, dw_out, dweights


@_grouped_ffn.register_fake
def _(
    x: Tensor, w_in: Tensor, w_out: Tensor, offsets: Tensor, src: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(src.shape[0], w_in.shape[2])


@_grouped_ffn_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    offsets: Tensor,
    src: Tensor,
    weights: Tensor,
    for_x: bool,
    for_in: bool,
    for_out: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wanted = ((x, for_x), (w_in, for_in), (w_out, for_out))
    dx, dw_in, dw_out = (t.new_empty((t.shape[0] if on else 0, *t.shape[1:])) for t, on in wanted)
    return dx, dw_in, dw_out, torch.empty_like(weights)


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else `h` would get one, of zeros
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx: Any, grad: Tensor | None, _grad_h: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    *inputs, h = ctx.saved_tensors
    x, w_in, w_out, offsets, src, weights = inputs
    for_x, for_in, for_out, _, _, for_weights = ctx.needs_input_grad
    if torch.is_grad_enabled():  # asked for with create_graph: go through what is differentiable
        wanted = [t for t, on in zip(inputs, ctx.needs_input_grad, strict=True) if on]
        found = iter(torch.autograd.grad(_plain(*inputs)[0], wanted, grad, create_graph=True))
        return tuple(next(found) if on else None for on in ctx.needs_input_grad)
    dx, dw_in, dw_out, dweights = _grouped_ffn_backward(
        grad, x, h, w_in, w_out, offsets, src, weights, for_x, for_in, for_out
    )
    return (
        dx if for_x else None,
        dw_in if for_in else None,
        dw_out if for_out else None,
        None,
        None,
        dweights if for_weights else None,
    )


_grouped_ffn.register_autograd(_backward, setup_context=_setup)


_grouped_ffn.register_vmap(loop_over_batch(_grouped_ffn))
_grouped_ffn_backward.register_vmap(loop_over_batch(_grouped_ffn_backward))
