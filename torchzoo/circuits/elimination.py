"""Rules compiled by eliminating one variable after another.

A rule is a clause, a disjunction of literals, and violating it multiplies a weight `exp(-w)`. The
weights of all assignments are summed variable by variable. Summing out `v` leaves a function of the
variables that still hang together with it, its separator: a table with a sum for each assignment,

    sum over b of [v = b] exp(-weights of v's clauses violated) prod over children c of c's sum,

where children are earlier tables that mention `v`. Each sum decides one variable (deterministic),
over the same variables for both values (smooth), and multiplies parts over different variables
(decomposable). Assignments with the same continuation share a sum, as in a reduced decision
diagram. The number of sums is at most `2^width` a variable, with the width of the elimination
order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Bucket", "Clause", "compile_clauses", "parse_rules"]

MAX_WIDTH = 20
"""Tables are made whole before equal sums are merged, so that wider rules would not fit."""


class Clause(NamedTuple):
    """A disjunction; the literal `j` says that concept `j` holds and `~j` that it doesn't."""

    literals: tuple[int, ...]
    weight: float

    @property
    def hard(self) -> bool:
        """Whether it must not be violated."""
        return math.isinf(self.weight)

    @property
    def concepts(self) -> set[int]:
        """Concepts that are mentioned."""
        return {concept_of(literal) for literal in self.literals}

    @property
    def always_true(self) -> bool:
        """Whether it has a literal and its negative."""
        return len(self.concepts) < len(self.literals)


class Bucket(NamedTuple):
    """All sums that decide one variable.

    Attributes:
        variable: The variable.
        separator: The variables that its sums depend on.
        children: Earlier buckets that are multiplied in.
        child: `(S, 2, C)`, for each sum, value and child the sum of that child.
        violated: `(S, 2, H)`, which soft clauses a value violates.
        clauses: The soft clauses, by their place among all soft ones.
        blocked: `(S, 2)`, whether hard clauses rule a value out.
        table: `(2^k,)`, the sum of each assignment of the separator, whose first bit is lowest.
        possible: `(S,)`, whether a sum is above 0.
        height: Length of the longest path down.
    """

    variable: int
    separator: tuple[int, ...]
    children: tuple[int, ...]
    child: NDArray[np.int64]
    violated: NDArray[np.bool_]
    clauses: tuple[int, ...]
    blocked: NDArray[np.bool_]
    table: NDArray[np.int64]
    possible: NDArray[np.bool_]
    height: int


def concept_of(literal: int) -> int:
    """The concept of a literal."""
    return ~literal if literal < 0 else literal


def parse_rules(rules: Sequence[Any], num_concepts: int) -> list[Clause]:
    """Clauses of rules `(u, v, w)`, u implies v, and of clauses `(literals, w)`.

    Raises:
        ValueError: A rule of another form, a literal of no concept, or a weight below 0.
    """
    clauses = []
    for rule in rules:
        match rule:
            case (int(u), int(v), float() | int() as weight):
                literals: tuple[int, ...] = (~u, v)
            case ([*items], float() | int() as weight) if items:
                literals = tuple(items)
            case _:
                raise ValueError(f"rules: got {rule!r}, expected (u, v, weight) or (literals, w)")
        for literal in literals:
            if not isinstance(literal, int) or not 0 <= concept_of(literal) < num_concepts:
                raise ValueError(
                    f"rules: got literal {literal!r} in {rule!r}, expected j or ~j for a concept "
                    f"j in 0 to {num_concepts - 1}"
                )
        if not weight >= 0:
            raise ValueError(f"rules: got weight {weight} in {rule!r}, expected at least 0")
        clauses.append(Clause(tuple(sorted(set(literals))), float(weight)))
    return clauses


def compile_clauses(clauses: Sequence[Clause], num_concepts: int) -> list[Bucket]:
    """One bucket for each concept, children before parents.

    Raises:
        ValueError: Hard clauses that exclude each other, or rules of too large a width.
    """
    soft = iter(range(len(clauses)))
    numbered = [(clause, -1 if clause.hard else next(soft)) for clause in clauses]
    active = [(clause, index) for clause, index in numbered if not clause.always_true]
    order, separators = elimination_order([clause for clause, _ in active], num_concepts)
    position = {variable: place for place, variable in enumerate(order)}
    own: list[list[tuple[Clause, int]]] = [[] for _ in order]
    for clause, index in active:
        own[min(position[c] for c in clause.concepts)].append((clause, index))
    children: list[list[int]] = [[] for _ in order]
    buckets: list[Bucket] = []
    for place, (variable, separator) in enumerate(zip(order, separators, strict=True)):
        buckets.append(_eliminate(variable, separator, children[place], buckets, own[place]))
        if separator:
            children[min(position[v] for v in separator)].append(place)
        elif not buckets[-1].possible.all():
            raise ValueError("rules: got hard rules that no assignment satisfies, expected some")
    return buckets


def _eliminate(
    variable: int,
    separator: tuple[int, ...],
    children: list[int],
    buckets: list[Bucket],
    clauses: list[tuple[Clause, int]],
) -> Bucket:
    """The bucket of a variable, equal sums merged."""
    below = [buckets[c] for c in children]
    bits = _assignments(variable, separator)
    parts = [bucket.table[_row(bits, bucket.separator)] for bucket in below]
    blocked = np.zeros(bits[variable].shape, bool)
    for bucket, part in zip(below, parts, strict=True):
        blocked |= ~bucket.possible[part]
    for clause, _ in clauses:
        blocked |= _violations(clause, bits) & clause.hard
    soft = [(clause, index) for clause, index in clauses if not clause.hard]
    child = _stack(parts, blocked.shape)
    violated = _stack([_violations(clause, bits) for clause, _ in soft], blocked.shape)
    child[blocked] = violated[blocked] = 0
    signature = np.concatenate([child, violated, blocked[..., None]], 2)
    signature = signature.reshape(len(blocked), -1)
    _, kept, table = np.unique(signature, axis=0, return_index=True, return_inverse=True)
    return Bucket(
        variable=variable,
        separator=separator,
        children=tuple(children),
        child=child[kept],
        violated=violated[kept] > 0,
        clauses=tuple(index for _, index in soft),
        blocked=blocked[kept],
        table=table.reshape(-1),
        possible=~np.logical_and.reduce(blocked[kept], axis=1),
        height=1 + max((bucket.height for bucket in below), default=-1),
    )


def elimination_order(
    clauses: Sequence[Clause], num_concepts: int
) -> tuple[list[int], list[tuple[int, ...]]]:
    """An order by the fewest new pairs (min-fill), and the separator of each variable in it.

    Raises:
        ValueError: A separator of more than `MAX_WIDTH` variables.
    """
    near: dict[int, set[int]] = {j: set() for j in range(num_concepts)}
    for clause in clauses:
        for u, v in combinations(clause.concepts, 2):
            near[u].add(v)
            near[v].add(u)
    height = dict.fromkeys(near, 0)

    def cost(v: int) -> tuple[int, int, int, int]:
        pairs = combinations(near[v], 2)
        return sum(b not in near[a] for a, b in pairs), len(near[v]), height[v], v

    order, separators = [], []
    while near:
        variable = min(near, key=cost)
        separator = near.pop(variable)
        if len(separator) > MAX_WIDTH:
            raise ValueError(
                f"rules: got rules of width {len(separator)}, expected at most {MAX_WIDTH}: too "
                "many concepts hang together"
            )
        for v in separator:
            near[v] |= separator
            near[v] -= {v, variable}
            height[v] = max(height[v], height[variable] + 1)
        order.append(variable)
        separators.append(tuple(sorted(separator)))
    return order, separators


def _assignments(variable: int, separator: tuple[int, ...]) -> dict[int, NDArray[np.int64]]:
    """`(2^k, 2)`, values of each variable, for all assignments of a separator of k and of one."""
    rows, ones = np.arange(1 << len(separator))[:, None], np.ones((1, 2), np.int64)
    bits = {v: (rows >> i & 1) * ones for i, v in enumerate(separator)}
    return {**bits, variable: np.arange(2) + 0 * rows}


def _row(bits: dict[int, NDArray[np.int64]], separator: tuple[int, ...]) -> NDArray[np.int64]:
    """The row of an earlier table that each assignment reads."""
    shifted = [bits[v] << i for i, v in enumerate(separator)]
    return np.sum(shifted, axis=0)


def _violations(clause: Clause, bits: dict[int, NDArray[np.int64]]) -> NDArray[np.bool_]:
    false = [bits[concept_of(literal)] == (literal < 0) for literal in clause.literals]
    return np.logical_and.reduce(false)


def _stack(parts: list[NDArray[Any]], shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Parts `(2^k, 2)` along a new last axis, which may be empty."""
    return np.stack(parts, 2).astype(np.int64) if parts else np.zeros((*shape, 0), np.int64)


def connected(buckets: Sequence[Bucket]) -> list[frozenset[int]]:
    """The concepts that hang together by clauses, group by group."""
    members: list[frozenset[int]] = []
    groups = []
    for bucket in buckets:
        below = (members[child] for child in bucket.children)
        members.append(frozenset({bucket.variable}).union(*below))
        if not bucket.separator:
            groups.append(members[-1])
    return groups
