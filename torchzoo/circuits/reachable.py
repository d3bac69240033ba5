"""What corrected probabilities can reach while the detectors' probabilities move in a box.

With `Z_1` and `Z_0` the sums over assignments where concept j holds and where it doesn't, its own
leaf left out, `logit pi^rs_j = logit pi_j + log Z_1 - log Z_0`. Both are linear in each other
`pi_i`, so that the ratio is monotone in each and has its extremes at vertices of the box. One pass
up the circuit evaluates all of them: values of a sum have an axis for the ends of each leaf below
it, and the leaf of j has the values 0 and 1 for ends, which gives `Z_0` and `Z_1`.

Where that is too much, each sum takes its largest (smallest) value over the ends of its own leaf
at once, which bounds `Z_0` and `Z_1` by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from torchzoo.circuits.elimination import Bucket

if TYPE_CHECKING:
    from torchzoo.circuits.knowledge import KnowledgeCircuit

__all__ = ["probability_range"]

MAX_FREE = 16
"""Vertices of more free leaves are too many."""
PIECE = 2**18
"""Numbers that the sums of a bucket may take at a time; few enough for the cache."""
SMALLEST, LARGEST = 1e-280, 1e280
"""Plain numbers outside may have lost what matters; logarithms never do."""

Reduce = Callable[..., Tensor]


class Arithmetic(NamedTuple):
    """How values are held: what logarithms become, products and sums."""

    enter: Callable[[Tensor], Tensor]
    times: Callable[[Tensor, Tensor], Tensor]
    plus: Callable[[Tensor, Tensor], Tensor]


PLAIN = Arithmetic(torch.exp, torch.mul, torch.add)
LOGARITHMS = Arithmetic(torch.clone, torch.add, torch.logaddexp)


class Message(NamedTuple):
    """Log-values `(S, B, 2^n)` of a bucket's sums, and the n variables of the last axis."""

    values: Tensor
    variables: tuple[int, ...]


def probability_range(
    circuit: KnowledgeCircuit, lo: Tensor, hi: Tensor, concepts: Sequence[int], *, exact: bool
) -> tuple[Tensor, Tensor]:
    """The least and the largest corrected probability over a box.

    Args:
        circuit: The circuit.
        lo: `(B, L)` float64, lower ends of the box.
        hi: `(B, L)`, upper ends.
        concepts: The concepts asked for.
        exact: Go through vertices, where they are few enough.

    Returns:
        Two tensors `(B, len(concepts))`.
    """
    ends = _log_ends(lo, hi)
    free = (lo < hi).any(0).tolist()
    own = _logit(ends)
    found = []
    for concept in concepts:
        group = circuit.group(concept)
        vertices = sum(free[j] for j in group if j != concept)
        ratio = _exact if exact and vertices <= MAX_FREE else _by_sum
        step = max(1, PIECE >> (vertices + 1)) if ratio is _exact else len(lo) + 1
        parts = [
            ratio(circuit, part, concept, [j for j in group if free[j]])
            for part in ends.split(step, 1)
        ]
        found.append(torch.cat(parts) if parts else ends.new_zeros(0, 2))
    ratios = torch.stack(found, 1) if found else ends.new_zeros(len(lo), 0, 2)
    low, high = (own[:, list(concepts)] + ratios).sigmoid().unbind(-1)
    return low, high


def _log_ends(lo: Tensor, hi: Tensor) -> Tensor:
    """`(L, B, 2, 2)`, log-probabilities of the values 0 and 1 at both ends of every leaf."""
    ends = torch.stack([lo, hi], -1)
    both = torch.stack([1 - ends, ends], 2)
    return both.clamp_min(torch.finfo(lo.dtype).tiny).log().transpose(0, 1)


def _logit(ends: Tensor) -> Tensor:
    """`(B, L, 2)`, log-odds at both ends."""
    return (ends[:, :, 1] - ends[:, :, 0]).transpose(0, 1)


def _exact(circuit: KnowledgeCircuit, ends: Tensor, concept: int, free: list[int]) -> Tensor:
    """`(B, 2)`, extremes of `log Z_1 - log Z_0` over vertices of the free leaves."""
    values, variables = _evaluate(circuit, ends, concept, free)
    axis = variables.index(concept)
    zeros, ones = values[0].unflatten(1, (2**axis, 2, -1)).unbind(2)
    return torch.stack((ones - zeros).flatten(1).aminmax(dim=1), -1)


def _by_sum(circuit: KnowledgeCircuit, ends: Tensor, concept: int, free: list[int]) -> Tensor:
    """`(B, 2)`, bounds of `log Z_1 - log Z_0` from those of its parts."""
    least, most = (
        _evaluate(circuit, ends, concept, free, reduce).values[0]
        for reduce in (torch.amin, torch.amax)
    )
    return torch.stack([least[:, 1] - most[:, 0], most[:, 1] - least[:, 0]], -1)


def _evaluate(
    circuit: KnowledgeCircuit,
    ends: Tensor,
    concept: int,
    free: list[int],
    reduce: Reduce | None = None,
) -> Message:
    """The root's log-values `(1, B, 2^n)`; with `reduce` only the concept's own axis is kept."""
    found = _climb(circuit, ends, concept, free, reduce, PLAIN)
    if not ((found.values > SMALLEST) & (found.values < LARGEST)).all():
        return _climb(circuit, ends, concept, free, reduce, LOGARITHMS)
    return Message(found.values.log(), found.variables)


def _climb(
    circuit: KnowledgeCircuit,
    ends: Tensor,
    concept: int,
    free: list[int],
    reduce: Reduce | None,
    how: Arithmetic,
) -> Message:
    """The root's values `(1, B, 2^n)`, as they are held."""
    weights, leaves = how.enter(circuit.edge_weights(ends.dtype)), how.enter(ends)
    group = circuit.group(concept)
    messages: dict[int, Message] = {}
    for i, bucket in enumerate(circuit.buckets):
        if bucket.variable not in group:
            continue
        first, variable = circuit.start[i], bucket.variable
        weight = weights[first : first + len(bucket.child), :, None, None]
        values, variables = _products(bucket, messages, weight, how)
        leaf = leaves[variable].transpose(0, 1)  # (2, B, ends)
        if variable == concept:
            leaf = how.enter(torch.eye(2, dtype=ends.dtype, device=ends.device).log())[:, None]
        elif variable not in free:
            leaf = leaf[..., :1]
        terms = (how.times(values[:, b, ..., None], leaf[b, :, None]) for b in range(2))
        values = how.plus(*terms)  # (S, B, 2^n, ends)
        if variable == concept or (variable in free and reduce is None):
            variables = (*variables, variable)
        elif variable in free:
            assert reduce is not None
            values = reduce(values, dim=-1, keepdim=True)
        messages[i] = Message(values.flatten(2), variables)
    ((values, variables),) = messages.values()
    return Message(values.expand(-1, ends.shape[1], -1), variables)


def _products(
    bucket: Bucket, messages: dict[int, Message], weight: Tensor, how: Arithmetic
) -> Message:
    """`(S, 2, B, 2^n)`, for both values the weight times the children, over all their vertices."""
    values, variables = Message(weight, ())
    for column, place in enumerate(bucket.children):
        child = messages.pop(place)
        which = torch.as_tensor(bucket.child[:, :, column], device=weight.device)
        factor = child.values[which][..., None, :]
        values = how.times(values[..., None], factor).flatten(3)
        variables = (*variables, *child.variables)
    return Message(values, variables)
