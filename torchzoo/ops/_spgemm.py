"""The operators under `spgemm`: references in PyTorch, shapes for tracing, and derivatives.

A pattern is the list of the row starts and columns of A `(M, K)`, of B `(K, N)` and, for the
operators on a known result, of C. With g_ij given on the pattern of C, all derivatives come from

    T(a, b, g) = Σ a_ik b_kj g_ij   over the stored (i, k) of A and (k, j) of B,

as C = ∂T/∂g, dA = ∂T/∂a and dB = ∂T/∂b. Each of the three is linear in the two others, so three
operators are closed under differentiation of any order. The references go through the terms in
chunks of rows, so their memory does not grow with the number of terms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional as F

from torchzoo.ops.calling import loop_over_batch

CHUNK = 2**20


def terms_of_rows(pattern: Sequence[Tensor]) -> Tensor:
    """How many terms a_ik b_kj each row of C has, `(M,)` int64."""
    a_crow, a_col, b_crow, _ = pattern[:4]
    total = F.pad(b_crow.long().diff()[a_col.long()].cumsum(0), (1, 0))
    return total[a_crow[1:].long()] - total[a_crow[:-1].long()]


def _chunks(terms: Tensor) -> Iterator[tuple[int, int]]:
    """Runs of rows with about CHUNK terms."""
    token = (terms.cumsum(0) - terms) // CHUNK
    sizes = token.unique_consecutive(return_counts=True)[1]
    start = 0
    for size in sizes.tolist():
        yield start, start + size
        start += size


def _keyed_terms(
    pattern: Sequence[Tensor], columns: int
) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor]]:
    """For runs of rows: its ends, each term's entries p of A and q of B, and row · N + column."""
    a_crow, a_col, b_crow, b_col = (t.long() for t in pattern[:4])
    lengths = b_crow.diff()[a_col]
    row_of = torch.repeat_interleave(a_crow.diff())
    for start, end in _chunks(terms_of_rows(pattern)):
        entries = torch.arange(int(a_crow[start]), int(a_crow[end]), device=a_col.device)
        count = lengths[entries]
        p = entries.repeat_interleave(count)
        first = b_crow[a_col[entries]] - (count.cumsum(0) - count)
        q = first.repeat_interleave(count) + torch.arange(p.numel(), device=p.device)
        yield start, end, p, q, (row_of[p] - start) * columns + b_col[q]


def _terms(pattern: Sequence[Tensor], columns: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """In chunks, the entries p of A, q of B and t of C of each term, in the order of A's rows."""
    c_crow, c_col = (t.long() for t in pattern[4:])
    row_of = torch.repeat_interleave(c_crow.diff())
    for start, end, p, q, key in _keyed_terms(pattern, columns):
        entries = slice(int(c_crow[start]), int(c_crow[end]))
        known, order = ((row_of[entries] - start) * columns + c_col[entries]).sort()
        yield p, q, entries.start + order[torch.searchsorted(known, key)]


@custom_op("torchzoo::spgemm_pattern", mutates_args=())
def pattern_of(pattern: Sequence[Tensor], columns: int) -> tuple[Tensor, Tensor]:
    """Row starts and sorted columns of C."""
    crow, col = pattern[0], pattern[1]
    sizes, found = [crow.new_zeros(1, dtype=torch.long)], [col.new_empty(0)]
    for start, end, _, _, key in _keyed_terms(pattern, columns):
        unique = key.unique()
        step = max(columns, 1)
        sizes.append(torch.bincount(unique // step, minlength=end - start))
        found.append((unique % step).to(col.dtype))
    starts = torch.cat(sizes).cumsum(0)
    if int(starts[-1]) > torch.iinfo(crow.dtype).max:
        raise RuntimeError(
            f"the result has {int(starts[-1])} entries, more than int32 indices can count: "
            "use int64 indices"
        )
    return starts.to(crow.dtype), torch.cat(found)


@custom_op("torchzoo::spgemm_values", mutates_args=())
def values_of(pattern: Sequence[Tensor], a: Tensor, b: Tensor, columns: int) -> Tensor:
    """∂T/∂g: the values of C on its known pattern."""
    out = a.new_zeros(pattern[5].shape)
    for p, q, t in _terms(pattern, columns):
        out.index_add_(0, t, a[p] * b[q])
    return out


@custom_op("torchzoo::spgemm_grad_a", mutates_args=())
def grad_a(pattern: Sequence[Tensor], b: Tensor, grad: Tensor, columns: int) -> Tensor:
    """∂T/∂a on the pattern of A."""
    out = b.new_zeros(pattern[1].shape)
    for p, q, t in _terms(pattern, columns):
        out.index_add_(0, p, b[q] * grad[t])
    return out


@custom_op("torchzoo::spgemm_grad_b", mutates_args=())
def grad_b(pattern: Sequence[Tensor], a: Tensor, grad: Tensor, columns: int) -> Tensor:
    """∂T/∂b on the pattern of B."""
    out = a.new_zeros(pattern[3].shape)
    for p, q, t in _terms(pattern, columns):
        out.index_add_(0, q, a[p] * grad[t])
    return out


@custom_op("torchzoo::spgemm", mutates_args=())
def product(
    pattern: Sequence[Tensor],
    a: Tensor,
    b: Tensor,
    columns: int,
    table: bool,
    high: bool,
    sort: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row starts, columns and values of C; the options only say how a kernel does it."""
    crow, col = pattern_of(pattern, columns)
    return crow, col, values_of([*pattern, crow, col], a, b, columns)


@custom_op("torchzoo::spgemm_dataflow", mutates_args=())
def dataflow(
    pattern: Sequence[Tensor], a: Tensor, b: Tensor, columns: int, method: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The product by another dataflow, and the bytes of its intermediates; a kernel only."""
    raise NotImplementedError(f"spgemm: {method!r} needs the CPU kernels; run `torchzoo build`")


@custom_op("torchzoo::spgemm_select", mutates_args=())
def select(
    pattern: Sequence[Tensor], a: Tensor, b: Tensor, columns: int, product: bool
) -> tuple[Tensor, Tensor]:
    """For each entry of C the term (p, q) with the least a_p + b_q or greatest a_p b_q.

    NaN comes before all else, then the term of the lowest inner index, then the first one.
    """
    inner, size = pattern[1].long(), pattern[5].numel()
    from_a = inner.new_zeros(size)
    from_b = inner.new_zeros(size)
    for p, q, t in _terms(pattern, columns):
        value = -(a[p] * b[q]) if product else a[p] + b[q]
        best = value.new_full((size,), torch.inf).scatter_reduce_(0, t, value, "amin")
        tied = ((value == best[t]) | value.isnan()).nonzero().squeeze(1)
        far = torch.iinfo(torch.long).max
        k, t = inner[p[tied]], t[tied]
        lowest = k.new_full((size,), far).scatter_reduce_(0, t, k, "amin")
        first = (k == lowest[t]).nonzero().squeeze(1)
        t = t[first]
        winner = k.new_full((size,), far).scatter_reduce_(0, t, tied[first], "amin")[t]
        from_a[t], from_b[t] = p[winner], q[winner]
    return from_a, from_b


@pattern_of.register_fake
def _(pattern: Sequence[Tensor], columns: int) -> tuple[Tensor, Tensor]:
    nnz = torch.library.get_ctx().new_dynamic_size()
    return torch.empty_like(pattern[0]), pattern[1].new_empty(nnz)


@values_of.register_fake
def _(pattern: Sequence[Tensor], a: Tensor, b: Tensor, columns: int) -> Tensor:
    return a.new_empty(pattern[5].shape)


@grad_a.register_fake
def _(pattern: Sequence[Tensor], b: Tensor, grad: Tensor, columns: int) -> Tensor:
    return b.new_empty(pattern[1].shape)


@grad_b.register_fake
def _(pattern: Sequence[Tensor], a: Tensor, grad: Tensor, columns: int) -> Tensor:
    return a.new_empty(pattern[3].shape)


@product.register_fake
def _(
    pattern: Sequence[Tensor],
    a: Tensor,
    b: Tensor,
    columns: int,
    table: bool,
    high: bool,
    sort: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    nnz = torch.library.get_ctx().new_dynamic_size()
    return torch.empty_like(pattern[0]), pattern[1].new_empty(nnz), a.new_empty(nnz)


@select.register_fake
def _(
    pattern: Sequence[Tensor], a: Tensor, b: Tensor, columns: int, product: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(pattern[5], dtype=torch.long), torch.empty_like(
        pattern[5], dtype=torch.long
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pattern, first, second, columns, *options = inputs
    ctx.no_pattern = [None] * len(pattern)
    if options:  # the product, which brings the pattern of C itself
        crow, col, _ = output
        ctx.mark_non_differentiable(crow, col)
        ctx.set_materialize_grads(False)  # else the pattern would get some, of zeros
        pattern = [*pattern, crow, col]
    ctx.save_for_backward(first, second, *pattern)
    ctx.columns = columns


def _product_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    a, b, *pattern = ctx.saved_tensors
    needs, grad = ctx.needs_input_grad, grads[-1]
    if grad is None:
        return (ctx.no_pattern,) + (None,) * (len(needs) - 1)
    da = grad_a(pattern, b, grad, ctx.columns) if needs[1] else None
    db = grad_b(pattern, a, grad, ctx.columns) if needs[2] else None
    return (ctx.no_pattern, da, db, None) + (None,) * (len(needs) - 4)


def _grad_a_backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    """From T(u, b, g)."""
    b, grad, *pattern = ctx.saved_tensors
    needs = ctx.needs_input_grad
    db = grad_b(pattern, upstream, grad, ctx.columns) if needs[1] else None
    dg = values_of(pattern, upstream, b, ctx.columns) if needs[2] else None
    return ctx.no_pattern, db, dg, None


def _grad_b_backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    """From T(a, u, g)."""
    a, grad, *pattern = ctx.saved_tensors
    needs = ctx.needs_input_grad
    da = grad_a(pattern, upstream, grad, ctx.columns) if needs[1] else None
    dg = values_of(pattern, a, upstream, ctx.columns) if needs[2] else None
    return ctx.no_pattern, da, dg, None


product.register_autograd(_product_backward, setup_context=_save)
values_of.register_autograd(_product_backward, setup_context=_save)
grad_a.register_autograd(_grad_a_backward, setup_context=_save)
grad_b.register_autograd(_grad_b_backward, setup_context=_save)


for _op in (values_of, grad_a, grad_b):
    _op.register_vmap(loop_over_batch(_op))
