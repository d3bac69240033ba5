"""Exact queries of a circuit; functions that `Circuit` has as methods.

Marginals are one pass up. What concerns every variable at once comes from the flows, the
derivatives of the root's log-value in the leaves' log-values: the flow of a unit is the probability
that it is the one that made its variable, given the evidence. They take one pass up and one down.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchzoo.circuits.finite_leaf import FiniteLeaf
from torchzoo.ops.log_einsum_exp import log_einsum_exp

if TYPE_CHECKING:
    from torchzoo.circuits.circuit import Circuit


def log_prob(circuit: Circuit, x: Tensor) -> Tensor:
    """Log-probability (density) of complete samples.

    Args:
        circuit: The circuit.
        x: `(..., D)`, values.

    Returns:
        `(...)`, or `(..., num_classes)` where there are several.

    Raises:
        ValueError: See `Circuit.forward`.
    """
    return _drop_class(circuit, circuit(x))


def log_marginal(circuit: Circuit, x: Tensor, mask: Tensor) -> Tensor:
    """Log-probability of the observed values, all others summed out.

    Args:
        circuit: The circuit.
        x: `(..., D)`, values.
        mask: `(..., D)` bool, True where observed.

    Returns:
        `(...)`, or `(..., num_classes)` where there are several.

    Raises:
        ValueError: See `Circuit.forward`.
    """
    return _drop_class(circuit, circuit(x, mask))


def log_conditional(
    circuit: Circuit, x: Tensor, query_mask: Tensor, evidence_mask: Tensor
) -> Tensor:
    """`log p(x_query | x_evidence)`.

    Args:
        circuit: The circuit.
        x: `(..., D)`, values.
        query_mask: `(..., D)` bool, True for variables asked for.
        evidence_mask: `(..., D)` bool, True for variables given.

    Returns:
        `(...)`, or `(..., num_classes)` where there are several; NaN where the evidence is
        impossible.

    Raises:
        ValueError: See `Circuit.forward`.
    """
    given = log_marginal(circuit, x, evidence_mask)
    return log_marginal(circuit, x, query_mask | evidence_mask) - given


def posterior_marginals(
    circuit: Circuit,
    x: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    log_w: Tensor | None = None,
) -> Tensor:
    """`p(x_i = c | evidence)` of all variables at once: one pass up, one pass down.

    Args:
        circuit: The circuit, of one class, with leaves of finitely many values.
        x: `(..., D)`, values.
        mask: `(..., D)` bool, True where observed.
        log_w: `(..., D, C)`, soft evidence elsewhere; see `Circuit.forward`.

    Returns:
        `(..., D, C)` probabilities, detached; `(D, C)` where there is no evidence. NaN where the
        evidence is impossible.

    Raises:
        ValueError: See `Circuit.forward`; also several classes, or continuous leaves.
    """
    if not isinstance(circuit.leaf, FiniteLeaf):
        raise ValueError(f"leaf: got {circuit.leaf!r}, expected leaves of finitely many values")
    values, flow, batch = _flows(circuit, x, mask, log_w)
    with torch.no_grad():
        # a unit's share of c is p_k(c) w(c) / exp(v_k); nowhere is anything divided by w
        share = torch.where(flow > 0, flow.log() - values, -torch.inf)
        found = log_einsum_exp(share, circuit.leaf.full_table().exp())  # (F, B, C)
        if log_w is not None:
            soft = log_w.reshape(-1, *log_w.shape[-2:]).transpose(0, 1)
            found = found + soft.index_select(0, circuit.scope).to(found)
        found = _by_variable(circuit, found.exp())
        found = found / found.sum(-1, keepdim=True)
        if x is not None:
            observed = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
            observed, x = (t.reshape(-1, circuit.num_variables) for t in (observed, x))
            values_of = torch.arange(found.shape[-1], device=x.device)
            point = (x[..., None] == values_of).to(found)
            found = torch.where(observed[..., None], point, found)
    return found.view(*batch, *found.shape[1:])


def mean(circuit: Circuit, x: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Expected value of every variable given the evidence.

    Args:
        circuit: The circuit, of one class.
        x: `(..., D)`, values; None is no evidence.
        mask: `(..., D)` bool, True where observed; the mean there is the value itself.

    Returns:
        `(..., D)`, detached; `(D,)` where there is no evidence.

    Raises:
        ValueError: See `Circuit.forward`; also several classes.
    """
    _, flow, batch = _flows(circuit, x, mask)
    found = _by_variable(circuit, (flow * circuit.leaf.mean().detach()[:, None]).sum(-1))
    found = found.reshape(*batch, circuit.num_variables)
    if x is None:
        return found
    known = x.to(found)
    return known if mask is None else torch.where(mask, known, found)


def variance(circuit: Circuit, x: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Variance of every variable given the evidence; 0 where observed. See `mean`."""
    centre = mean(circuit, x, mask)
    _, flow, _ = _flows(circuit, x, mask)
    about = centre.reshape(-1, circuit.num_variables).index_select(1, circuit.scope).T
    units = circuit.leaf
    spread = units.variance()[:, None] + (units.mean()[:, None] - about[..., None]).square()
    found = _by_variable(circuit, (flow * spread.detach()).sum(-1)).reshape(centre.shape)
    if x is None:
        return found
    return torch.zeros_like(found) if mask is None else found.masked_fill(mask, 0)


def expect(
    circuit: Circuit, f_table: Tensor, x: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Expected value, given the evidence, of a function of each variable.

    Args:
        circuit: The circuit, of one class, with leaves of finitely many values.
        f_table: `(D, C)`, the functions' values.
        x: `(..., D)`, values; None is no evidence.
        mask: `(..., D)` bool, True where observed.

    Returns:
        `(..., D)`, detached; their sum is the expected value of the sum of the functions.

    Raises:
        ValueError: A table of another shape; see `posterior_marginals`.
    """
    wanted = (circuit.num_variables, circuit.leaf.num_categories)
    if tuple(f_table.shape) != wanted:
        raise ValueError(f"f_table: got shape {tuple(f_table.shape)}, expected {wanted}")
    probs = posterior_marginals(circuit, x, mask)
    return (probs * f_table.to(probs)).sum(-1)


def evidence_values(
    circuit: Circuit, x: Tensor | None, mask: Tensor | None, log_w: Tensor | None = None
) -> tuple[Tensor, torch.Size]:
    """Leaf values `(F, B, K)` and batch shape, where no evidence at all is allowed too."""
    if x is None and log_w is None:
        if mask is not None:
            raise ValueError("mask: got a mask without x, expected x")
        size = (len(circuit.scope), 1, circuit.num_leaf_units)
        return circuit.layers[0].log_weight.new_zeros(size), torch.Size()
    batch = x.shape[:-1] if x is not None else log_w.shape[:-2]  # type: ignore[union-attr]
    return circuit.leaf_values(x, mask, log_w), batch


def root_unit(circuit: Circuit, class_index: int | None) -> int:
    """The class asked for; only circuits of one class have a default."""
    if class_index is None and circuit.num_classes == 1:
        return 0
    if class_index is None or not 0 <= class_index < circuit.num_classes:
        raise ValueError(
            f"class_index: got {class_index}, expected 0 to {circuit.num_classes - 1} for a "
            f"circuit of num_classes={circuit.num_classes}"
        )
    return class_index


def _flows(
    circuit: Circuit, x: Tensor | None, mask: Tensor | None, log_w: Tensor | None = None
) -> tuple[Tensor, Tensor, torch.Size]:
    """Leaf values and flows `(F, B, K)`, and the batch shape."""
    if circuit.num_classes != 1:
        raise ValueError(f"num_classes: got {circuit.num_classes}, expected 1 for this query")
    with torch.no_grad():
        values, batch = evidence_values(circuit, x, mask, log_w)
        weights = circuit.weights()
    with torch.enable_grad():
        values = values.detach().requires_grad_()
        root = circuit.propagate(values, weights)[-1]
        (flow,) = torch.autograd.grad(root.sum(), values)
    return values.detach(), flow, batch


def _by_variable(circuit: Circuit, folds: Tensor) -> Tensor:
    """`(B, D, ...)`, sums over the folds of each variable of `(F, B, ...)`."""
    size = (circuit.num_variables, *folds.shape[1:])
    return folds.new_zeros(size).index_add_(0, circuit.scope, folds).transpose(0, 1)


def _drop_class(circuit: Circuit, found: Tensor) -> Tensor:
    return found.squeeze(-1) if circuit.num_classes == 1 else found
