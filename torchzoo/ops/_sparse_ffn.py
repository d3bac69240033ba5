"""The operator behind `sparse_ffn`: its reference, its derivative, and its dense counterpart."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchzoo.ops.calling import no_autocast
from torchzoo.ops.rows import (
    loop_over_batch,
    rows_dot,
    rows_outer,
    rows_sum,
    wide,
)


class Call(NamedTuple):
    """The arguments of the operator: tokens `(N, D)` and what `sparse_ffn` says of the others."""

    x: Tensor
    w_up: Tensor
    w_down_t: Tensor
    w_gate: Tensor | None
    b_up: Tensor | None
    b_gate: Tensor | None
    b_down: Tensor | None
    thresholds: Tensor | None
    mask: Tensor | None
    threshold: float
    activation: str
    shift: float
    on_product: bool
    dense_above: float

    @property
    def first(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of what the activation is applied to."""
        return (self.w_up, self.b_up) if self.w_gate is None else (self.w_gate, self.b_gate)


def _activate(activation: str, z: Tensor, shift: float) -> Tensor:
    if activation == "silu":
        return F.silu(z)
    positive = F.relu(z - shift if activation == "shifted_relu" else z)
    return positive * positive if activation == "relu2" else positive


def _slope(activation: str, z: Tensor, shift: float) -> Tensor:
    """The derivative of `_activate` by z, differentiable."""
    if activation == "silu":
        sigmoid = torch.sigmoid(z)
        return sigmoid * (1 + z * (1 - sigmoid))
    if activation == "relu2":
        return 2 * F.relu(z)
    return (z > shift).to(z.dtype)


def _chosen(call: Call, value: Tensor, a: Tensor, top_k: int | None) -> Tensor:
    """Which pairs count by `value`; NaN does, so that it is seen."""
    limit = call.threshold if call.thresholds is None else call.thresholds
    active = ~(value.abs() <= limit)
    if call.mask is not None:
        active = active & call.mask
    if top_k is None:
        return active
    order = torch.where(active, a, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    return active & torch.zeros_like(active).scatter(-1, order[:, :top_k], True)


def _projected(call: Call, weight: Tensor, bias: Tensor | None, active: Tensor | None) -> Tensor:
    """The projection x · weightᵀ + bias where active, 0 elsewhere."""
    out = rows_dot(call.x, weight, active, call.dense_above)
    out = out if bias is None else out + bias
    return out if active is None else torch.where(active, out, 0.0)


def compose(call: Call, top_k: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The layer from the three products, step by step: y, z, u (empty if no gate), active."""
    z = _projected(call, *call.first, call.mask)
    a = h = _activate(call.activation, z, call.shift)
    u = z.new_empty(0)
    active = _chosen(call, a, a, top_k) if call.w_gate is None or not call.on_product else None
    if call.w_gate is not None:
        u = _projected(call, call.w_up, call.b_up, call.mask if active is None else active)
        h = a * u
    active = _chosen(call, h, a, top_k) if active is None else active
    y = rows_sum(h, call.w_down_t, active, call.dense_above)
    y = y if call.b_down is None else y + call.b_down
    return y.to(call.x.dtype), z, u, active


def dense(call: Call, top_k: int | None = None) -> tuple[Tensor, Tensor]:
    """The layer as matrix products over all rows: y, active."""
    with no_autocast(call.x):
        a = h = _activate(call.activation, F.linear(call.x, *call.first), call.shift)
        if call.w_gate is not None:
            h = a * F.linear(call.x, call.w_up, call.b_up)
        active = _chosen(call, h if call.on_product else a, a, top_k)
        y = F.linear(torch.where(active, h, 0.0), call.w_down_t.mT, call.b_down)
    return y, active


@torch.library.custom_op("torchzoo::sparse_ffn", mutates_args=())
def sparse_ffn_op(
    x: Tensor,
    w_up: Tensor,
    w_down_t: Tensor,
    w_gate: Tensor | None,
    b_up: Tensor | None,
    b_gate: Tensor | None,
    b_down: Tensor | None,
    thresholds: Tensor | None,
    mask: Tensor | None,
    threshold: float,
    activation: str,
    shift: float,
    on_product: bool,
    dense_above: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = Call(
        *(x, w_up, w_down_t, w_gate, b_up, b_gate, b_down, thresholds, mask),
        *(threshold, activation, shift, on_product, dense_above),
    )
    with no_autocast(x):
        return compose(call)


@sparse_ffn_op.register_fake
def _(x: Tensor, w_up: Tensor, w_down_t: Tensor, w_gate: Tensor | None, *_: Any) -> Any:
    dtype, shape = wide(w_up.dtype), (x.shape[0], w_up.shape[0])
    u = x.new_empty(0 if w_gate is None else shape, dtype=dtype)
    active = x.new_empty(shape, dtype=torch.bool)
    return x.new_empty(x.shape), x.new_empty(shape, dtype=dtype), u, active


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w_up, w_down_t, w_gate = inputs[:4]
    _, z, u, active = output
    ctx.activation, ctx.shift, _, ctx.dense_above = inputs[10:14]
    ctx.save_for_backward(x, w_up, w_down_t, w_gate, z, u, active)
    ctx.mark_non_differentiable(active)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad: Tensor | None, grad_z: Tensor | None, grad_u: Tensor | None, _: Any
) -> tuple[Tensor | None, ...]:
    """The formulas of `torchzoo.ops.sparse_ffn`; ∂z and ∂u are there for second derivatives."""
    x, w_up, w_down_t, w_gate, z, u, active = ctx.saved_tensors
    gated, share, needed = w_gate is not None, ctx.dense_above, ctx.needs_input_grad
    if grad is None:
        grad = torch.zeros_like(x)
    grad = grad.contiguous()
    a = _activate(ctx.activation, z, ctx.shift)
    s = rows_dot(grad, w_down_t, active, share)
    dz = s * _slope(ctx.activation, z, ctx.shift)
    du = None
    if gated:
        dz, du = dz * u, s * a
        du = du if grad_u is None else du + grad_u
    dz = dz if grad_z is None else dz + grad_z
    first, up = (w_gate, du) if gated else (w_up, dz)
    dx = rows_sum(dz, first, active, share) if needed[0] else None
    if dx is not None:
        dx = (dx if du is None else dx + rows_sum(du, w_up, active, share)).to(x.dtype)
    rows = {1: (up, x), 2: (a * u if gated else a, grad), 3: (dz, x)}
    weights = [rows_outer(*rows[i], active, share) if needed[i] else None for i in (1, 2, 3)]
    sums = {4: up, 5: dz, 6: grad}
    biases = [sums[i].sum(0).to(x.dtype) if needed[i] else None for i in (4, 5, 6)]
    return dx, *weights, *biases, *(None,) * 7


sparse_ffn_op.register_autograd(_backward, setup_context=_setup)


@sparse_ffn_op.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    """Batched tokens and masks are tokens; with weights of its own each element goes by itself."""
    alone = [dim for i, dim in enumerate(in_dims) if i not in (0, 8)]
    if any(dim is not None for dim in alone):
        return loop_over_batch(sparse_ffn_op)(info, in_dims, *args)
    size, folded = info.batch_size, list(args)
    for i in (0, 8):
        if args[i] is not None:
            tensor = args[i] if in_dims[i] is None else args[i].movedim(in_dims[i], 0)
            tensor = tensor.expand(size, *tensor.shape) if in_dims[i] is None else tensor
            folded[i] = tensor.flatten(0, 1)
    y, z, u, active = sparse_ffn_op(*folded)
    shaped = (
        t.unflatten(0, (size, -1)) if t.ndim > 1 else t.expand(size, 0) for t in (y, z, u, active)
    )
    return tuple(shaped), (0, 0, 0, 0)
