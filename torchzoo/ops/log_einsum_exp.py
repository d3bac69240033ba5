"""Sums of a probabilistic circuit in log space: products with weights, without overflow.

With `m_b = max_k a_bk` and `p_bk = exp(a_bk - m_b)`, fold by fold,

    out_bo = log sum_k w_ok exp(a_bk) = m_b + log s_bo,   s = p w^T.

With `h = grad exp(m - out)`, that is grad / s, the gradients are `da = p (h w)` and `dw = h^T p`.
Only inputs and output are kept for the way back, and nothing ever has `F B O K` numbers.

`m` is over all k. Where the largest values meet weights of zero, s underflows although the true sum
does not: such an element is computed as `logsumexp_k(a_bk + log w_ok)`, and its gradients from
`exp(a_bk - out_bo)` itself.

A second operand b, for Tucker layers, makes that `out_bo = log sum_ij w_oij exp(a_bi + b_bj)`; the
outer product of a and b is never held.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchzoo.ops.calling import below_autograd, no_autocast, refuse_forward_mode

SMALLEST = 1e-30
"""Where s is below this, times the largest weight if that is above 1, s has lost what matters."""
STEEPEST = {torch.float32: 85.0, torch.float64: 700.0}
"""Logarithm of the largest slope that is reported; that by a weight of zero may overflow."""
PIECE = 2**20
"""How many numbers the elements that need care take at a time."""


def log_einsum_exp(a: Tensor, w: Tensor, *, deterministic: bool = False) -> Tensor:
    """Multiply exponentials of log-values with weights, and take the logarithm.

    Half-precision inputs are computed in float32, inside autocast too. Differentiable any number of
    times in `a` and `w`; derivatives beyond the first hold `F B O K` numbers. At a weight of zero
    the derivative may be larger than a float: it is cut where it stays finite.

    The kernels add up in an order that depends on `K` only, so that the result of a sample has the
    same bits in whatever batch, at whatever place in it and with any number of threads. The PyTorch
    reference does so with `deterministic=True`, which is slower; the kernels don't need it.

    Args:
        a: Log-values, finite or minus infinity.
        w: Weights, not their logarithms, not below 0 (this is not checked).
        deterministic: Fix the order of additions where there is no kernel, too.

    Shape:
        - a: `(F, B, K)`
        - w: `(F, O, K)`
        - output: `(F, B, O)`

    Returns:
        The log-values of the sums; minus infinity, with gradients of zero, where nothing is summed.

    Raises:
        ValueError: Shapes, types or devices that don't fit together.
        NotImplementedError: An input has a forward-mode tangent.

    Example:
        >>> a = torch.tensor([[[0.0, -200.0], [-torch.inf, -torch.inf]]])
        >>> log_einsum_exp(a, torch.tensor([[[0.5, 0.5], [0.0, 1.0]]]))
        tensor([[[  -0.6931, -200.0000],
                 [     -inf,      -inf]]])
    """
    _check_values("a", a)
    if w.ndim != 3 or w.shape[::2] != a.shape[::2]:
        raise ValueError(f"w: expected ({a.shape[0]}, O, {a.shape[2]}), got {tuple(w.shape)}")
    _check_types("log_einsum_exp", a=a, w=w)
    kept = torch.promote_types(a.dtype, w.dtype)
    wide = torch.promote_types(kept, torch.float32)
    a, w = a.to(wide), w.to(wide).unsqueeze(2)
    with below_autograd(a, w):
        return _log_einsum_exp(None, a, w, deterministic).to(kept)


def log_einsum_exp2(a: Tensor, b: Tensor, w: Tensor, *, deterministic: bool = False) -> Tensor:
    """Multiply the exponentials of all pairs of log-values with weights, and take the logarithm.

    The outer product of the two is never held, forward or backward: memory is that of inputs and
    output. All else is as in `log_einsum_exp`.

    Args:
        a: First log-values, finite or minus infinity.
        b: Second log-values.
        w: Weights, not their logarithms, not below 0 (this is not checked).
        deterministic: Fix the order of additions where there is no kernel, too.

    Shape:
        - a: `(F, B, K1)`
        - b: `(F, B, K2)`
        - w: `(F, O, K1, K2)`
        - output: `(F, B, O)`

    Returns:
        `log sum_ij w_oij exp(a_i + b_j)`; minus infinity, with gradients of zero, where nothing is
        summed.

    Raises:
        ValueError: Shapes, types or devices that don't fit together.
        NotImplementedError: An input has a forward-mode tangent.

    Example:
        >>> a, b = torch.zeros(1, 1, 2), torch.zeros(1, 1, 3)
        >>> log_einsum_exp2(a, b, torch.full((1, 1, 2, 3), 0.5)).exp()
        tensor([[[3.]]])
    """
    _check_values("a", a)
    _check_values("b", b)
    if b.shape[:2] != a.shape[:2]:
        raise ValueError(f"b: expected ({a.shape[0]}, {a.shape[1]}, K2), got {tuple(b.shape)}")
    if w.ndim != 4 or (w.shape[0], *w.shape[2:]) != (a.shape[0], a.shape[2], b.shape[2]):
        expected = f"({a.shape[0]}, O, {a.shape[2]}, {b.shape[2]})"
        raise ValueError(f"w: expected {expected}, got {tuple(w.shape)}")
    _check_types("log_einsum_exp2", a=a, b=b, w=w)
    kept = torch.promote_types(torch.promote_types(a.dtype, b.dtype), w.dtype)
    wide = torch.promote_types(kept, torch.float32)
    a, b, w = a.to(wide), b.to(wide), w.to(wide)
    with below_autograd(a, b, w):
        return _log_einsum_exp(a, b, w, deterministic).to(kept)


def _check_values(name: str, value: Tensor) -> None:
    if value.ndim != 3 or not value.is_floating_point():
        raise ValueError(
            f"{name}: expected floats of shape (F, B, K), got {value.dtype} {tuple(value.shape)}"
        )


def _check_types(op: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: expected floats, got {tensor.dtype}")
    if len({tensor.device for tensor in tensors.values()}) > 1:
        devices = ", ".join(str(tensor.device) for tensor in tensors.values())
        raise ValueError(f"{', '.join(tensors)}: expected one device, got {devices}")
    refuse_forward_mode(op, *tensors.values())


# The reference. `left` is a, or None for a single log 1; `right` is b, or the only operand.


def _scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value of each row, 0 if that is minus infinity, and exp of the values less it."""
    largest = x.amax(-1, keepdim=True)
    largest = largest.masked_fill(largest == -torch.inf, 0)
    return largest, (x - largest).exp()


def _operands(left: Tensor | None, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`m (F, B, 1)`, `p (F, B, K1)` and `q (F, B, K2)`."""
    largest, q = _scaled(right)
    if left is None:
        return largest, torch.ones_like(largest), q
    largest_left, p = _scaled(left)
    return largest_left + largest, p, q


def _products(x: Tensor, w: Tensor, deterministic: bool) -> Tensor:
    """`x w^T` of `(F, B, K)` and `(F, O, K)`; in order of k where that is asked for."""
    if not deterministic:
        return x @ w.mT
    total = x[..., :1] * w[:, None, :, 0]
    for k in range(1, x.shape[2]):
        total = total + x[..., k : k + 1] * w[:, None, :, k]
    return total


def _threshold(w: Tensor) -> Tensor:
    """`(F, 1, O)`: below it, s is not to be relied on."""
    return SMALLEST * w.flatten(2).amax(-1).clamp(min=1)[:, None]


def _pairs(left: Tensor | None, right: Tensor, fold: Tensor, row: Tensor) -> Tensor:
    """`(n, K1 K2)`: a_i + b_j of some rows of some folds."""
    pairs = right[fold, row]
    if left is not None:
        pairs = (left[fold, row][:, :, None] + pairs[:, None]).flatten(1)
    return pairs


def _pieces(which: Tensor, size: int) -> list[tuple[Tensor, ...]]:
    """Indices of what is true, in pieces that take little memory with `size` numbers for each."""
    found = which.nonzero()
    return [piece.unbind(1) for piece in found.split(max(1, PIECE // size))] if len(found) else []


@torch.library.custom_op("torchzoo::log_einsum_exp", mutates_args=())
def _log_einsum_exp(left: Tensor | None, right: Tensor, w: Tensor, deterministic: bool) -> Tensor:
    out = right.new_full((*right.shape[:2], w.shape[1]), -torch.inf)
    if not w.numel() or not out.numel():
        return out
    with no_autocast(right):
        m, p, q = _operands(left, right)
        s = torch.zeros_like(out)
        for i in range(w.shape[2]):
            s += p[..., i : i + 1] * _products(q, w[:, :, i], deterministic)
    out = m + s.log()
    for f, b, o in _pieces(s < _threshold(w), w[0, 0].numel()):
        largest, terms = _scaled(_pairs(left, right, f, b) + w[f, o].flatten(1).log())
        ones = terms.new_ones(1, 1, terms.shape[1])
        out[f, b, o] = (largest + _products(terms[None], ones, deterministic)[0].log())[:, 0]
    return out


@torch.library.custom_op("torchzoo::log_einsum_exp_backward", mutates_args=())
def _log_einsum_exp_backward(
    grad: Tensor,
    left: Tensor | None,
    right: Tensor,
    w: Tensor,
    out: Tensor,
    for_left: bool,
    for_right: bool,
    for_w: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    first = torch.zeros_like(right if left is None else left)
    second, dw = torch.zeros_like(right), torch.zeros_like(w)
    if w.numel() and out.numel():
        with no_autocast(right):
            _add_slopes(grad, left, right, w, out, first, second, dw)
    wanted = ((first, for_left), (second, for_right), (dw, for_w))
    return tuple(t if on else t[:0].clone() for t, on in wanted)  # type: ignore[return-value]


def _add_slopes(
    grad: Tensor,
    left: Tensor | None,
    right: Tensor,
    w: Tensor,
    out: Tensor,
    first: Tensor,
    second: Tensor,
    dw: Tensor,
) -> None:
    m, p, q = _operands(left, right)
    alive = out != -torch.inf
    careful = ((out - m).exp() < _threshold(w)) & alive
    h = (grad * (m - out).exp()).masked_fill(careful | ~alive, 0)
    for i in range(w.shape[2]):
        weights, scale = w[:, :, i], p[..., i : i + 1]
        back = h @ weights
        second += scale * back
        if left is not None:
            first[..., i] = (back * q).sum(-1)
        dw[:, :, i] = (scale * h).mT @ q
    first *= p if left is not None else 1
    second *= q
    for f, b, o in _pieces(careful, w[0, 0].numel()):
        above = grad[f, b, o][:, None]
        terms = _pairs(left, right, f, b) - out[f, b, o][:, None]
        slopes = above * terms.clamp(max=STEEPEST[w.dtype]).exp()
        dw.index_put_((f, o), slopes.unflatten(1, w.shape[2:]), accumulate=True)
        flows = (above * (terms + w[f, o].flatten(1).log()).exp()).unflatten(1, w.shape[2:])
        second.index_put_((f, b), flows.sum(1), accumulate=True)
        if left is not None:
            first.index_put_((f, b), flows.sum(2), accumulate=True)


def _plain_slopes(
    grad: Tensor, left: Tensor | None, right: Tensor, w: Tensor, out: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The gradients from `exp(a_i + b_j - out_o)`, all held, in differentiable operations."""
    pairs = right[:, :, None] if left is None else left[..., None] + right[:, :, None]
    below = out.masked_fill(out == -torch.inf, torch.inf)  # nothing flows there
    terms = pairs[:, :, None] - below[..., None, None]
    slopes = grad[..., None, None] * terms.clamp(max=STEEPEST[w.dtype]).exp()
    flows = w[:, None] * slopes
    first = None if left is None else flows.sum((2, 4))
    return first, flows.sum((2, 3)), slopes.sum(1)


@_log_einsum_exp.register_fake
def _(left: Tensor | None, right: Tensor, w: Tensor, deterministic: bool) -> Tensor:
    return right.new_empty(*right.shape[:2], w.shape[1])


@_log_einsum_exp_backward.register_fake
def _(
    grad: Tensor,
    left: Tensor | None,
    right: Tensor,
    w: Tensor,
    out: Tensor,
    for_left: bool,
    for_right: bool,
    for_w: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = ((right if left is None else left, for_left), (right, for_right), (w, for_w))
    first, second, dw = (t.new_empty((t.shape[0] if on else 0, *t.shape[1:])) for t, on in wanted)
    return first, second, dw


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3], output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    left, right, w, out = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled():  # a second derivative is wanted
        found = _plain_slopes(grad, left, right, w, out)
    else:
        found = _log_einsum_exp_backward(grad, left, right, w, out, *wanted)
    return (*(t if on else None for t, on in zip(found, wanted, strict=True)), None)


_log_einsum_exp.register_autograd(_backward, setup_context=_setup)


def batch_into_folds(op: Any) -> Any:
    """The vmap rule of an operator whose tensors all begin with folds: there are more of them."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        folded = []
        for arg, dim in zip(args, in_dims, strict=True):
            if isinstance(arg, Tensor):
                arg = arg.expand(size, *arg.shape) if dim is None else arg.movedim(dim, 0)
                arg = arg.flatten(0, 1)
            folded.append(arg)
        results = op(*folded)
        if isinstance(results, Tensor):
            return results.unflatten(0, (size, results.shape[0] // size)), 0
        split = tuple(t.unflatten(0, (size, t.shape[0] // size)) for t in results)
        return split, (0,) * len(split)

    return rule


_log_einsum_exp.register_vmap(batch_into_folds(_log_einsum_exp))
_log_einsum_exp_backward.register_vmap(batch_into_folds(_log_einsum_exp_backward))
