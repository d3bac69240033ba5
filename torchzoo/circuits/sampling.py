"""Top-down passes of a circuit: exact samples, and the max-product decode.

Going down, each sample carries for every region the unit that made it, or -1 where the region has
no part in the sample. A layer chooses for all regions and samples at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from torchzoo.circuits.folded_layers import Contract, Mixing, SumLayer, Weights
from torchzoo.circuits.leaf import draw
from torchzoo.circuits.properties import is_deterministic
from torchzoo.circuits.queries import evidence_values, root_unit
from torchzoo.ops.log_einsum_exp import log_einsum_exp
from torchzoo.ops.log_max_sum import log_max_sum

if TYPE_CHECKING:
    from torchzoo.circuits.circuit import Circuit

__all__ = ["Decoded", "max_product_decode", "sample"]

Choose = Callable[[Tensor], Tensor]
"""From log-weights `(..., K)` to an index `(...)`."""


class Decoded(NamedTuple):
    """Completed values `(..., D)`, and whether they are the most probable completion."""

    values: Tensor
    exact: bool


@torch.no_grad()
def sample(
    circuit: Circuit,
    n: int,
    x: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
    class_index: int | None = None,
) -> Tensor:
    """Draw exact samples, unconditional or given observed values.

    Args:
        circuit: The circuit.
        n: Number of samples, for each row of `x`.
        x: `(..., D)`, values; None is no evidence.
        mask: `(..., D)` bool, True where observed; these values are kept as they are.
        generator: Source of randomness.
        class_index: The class to sample from, where there are several.

    Returns:
        `(n, ..., D)`; `(n, D)` where there is no evidence.

    Raises:
        ValueError: `n` below 0, impossible evidence, or see `Circuit.forward`.
    """
    if n < 0:
        raise ValueError(f"n: got {n}, expected at least 0")
    unit = root_unit(circuit, class_index)
    leaf_values, batch = evidence_values(circuit, x, mask)
    weights = circuit.weights()
    values = circuit.propagate(leaf_values, weights)
    if (values[-1][0, :, unit] == -torch.inf).any():
        raise ValueError("x: got evidence of probability 0, expected possible values")
    rows = torch.arange(leaf_values.shape[1], device=leaf_values.device).repeat(n)

    def choose(log_weights: Tensor) -> Tensor:
        return draw(log_weights.softmax(-1).nan_to_num(0.0), generator)

    units = descend(circuit, values, weights, rows, unit, choose, log_einsum_exp)
    drawn = circuit.leaf.sample(units.clamp_min(0), generator)
    return _complete(circuit, drawn, units, x, mask).view(n, *batch, circuit.num_variables)


@torch.no_grad()
def max_product_decode(
    circuit: Circuit,
    x: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    class_index: int | None = None,
) -> Decoded:
    """Complete the evidence by the single choice of units and values that is most probable.

    Where the circuit is deterministic that is the most probable completion. Else it is a guess: the
    probabilities of several choices of units that make the same values are not added up.

    Args:
        circuit: The circuit.
        x: `(..., D)`, values; None is no evidence.
        mask: `(..., D)` bool, True where observed; these values are kept as they are.
        class_index: The class, where there are several.

    Returns:
        The values `(..., D)`, and whether they are exact.

    Raises:
        ValueError: See `Circuit.forward`.
    """
    unit = root_unit(circuit, class_index)
    leaf_values, batch = evidence_values(circuit, x, mask)
    best = circuit.leaf.max_log_prob()[:, None].expand_as(leaf_values)
    if x is None:
        leaf_values = best
    elif mask is not None:
        leaf_values = torch.where(circuit.by_fold(mask)[..., None], leaf_values, best)
    weights = circuit.weights()

    def largest(a: Tensor, w: Tensor) -> Tensor:
        return log_max_sum(a, w)[0]

    values = circuit.propagate(leaf_values.contiguous(), weights, largest)
    rows = torch.arange(leaf_values.shape[1], device=leaf_values.device)
    units = descend(circuit, values, weights, rows, unit, lambda w: w.argmax(-1), largest)
    modes = circuit.leaf.mode().gather(1, units.clamp_min(0))
    found = _complete(circuit, modes, units, x, mask).view(*batch, circuit.num_variables)
    return Decoded(found, is_deterministic(circuit))


def descend(
    circuit: Circuit,
    values: Sequence[Tensor],
    weights: Sequence[Weights],
    rows: Tensor,
    unit: int,
    choose: Choose,
    contract: Contract,
) -> Tensor:
    """Choose units from the root down to the leaves.

    Args:
        circuit: The circuit.
        values: Values of all slots, from `Circuit.propagate` with the same weights and contraction.
        weights: Linear weights.
        rows: `(N,)`, for each choice the row of the batch of evidence that it completes.
        unit: The root's unit.
        choose: How to choose.
        contract: How sums are taken.

    Returns:
        `(F, N)`, the unit of each fold of the leaf layer, -1 where it has no part.
    """
    state = [rows.new_full((len(value), len(rows)), -1) for value in values]
    state[-1][0] = unit
    first = len(circuit.schedule.chunks)
    for index in reversed(range(len(circuit.layers))):
        layer, (weight, mix) = circuit.layers[index], weights[index]
        weight = weight.expand(len(layer.plan.folds), *weight.shape[1:]).flatten(2)
        products = layer.products(values)
        units = state[first + index]
        if layer.mixing is not None and mix is not None:
            folds = contract(products, weight)
            units = _choose_partitions(layer.mixing, folds, mix, units, rows, choose)
        fold = torch.arange(len(units), device=rows.device)[:, None]
        scores = products.index_select(1, rows) + weight.log()[fold, units.clamp_min(0)]
        chosen = choose(scores)
        for operand, own in zip(layer.operands, _split(layer, chosen), strict=True):
            own = own.masked_fill(units < 0, -1)
            for slot, children, parents in operand.reads():
                index_ = children[:, None].expand(-1, len(rows))
                state[slot].scatter_reduce_(0, index_, own[parents], "amax")
    return torch.cat(state[:first])


def _split(layer: SumLayer, chosen: Tensor) -> tuple[Tensor, ...]:
    """Units of each operand: for pairs, numbered row-major, those of both parts."""
    if layer.num_operands == 1:
        return (chosen,)
    size = layer.log_weight.shape[-1]
    return chosen // size, chosen % size


def _choose_partitions(
    mixing: Mixing, folds: Tensor, mix: Tensor, units: Tensor, rows: Tensor, choose: Choose
) -> Tensor:
    """`(F, N)`, the unit of each partition, -1 where it is not chosen, from those of regions."""
    region = torch.arange(len(units), device=rows.device)[:, None]
    at = units.clamp_min(0)
    scores = mixing.choices(folds)[region, rows, at] + mix.log()[region, at]
    taken = mixing.index.gather(1, choose(scores))
    found = units.new_full((len(folds), len(rows)), -1)
    return found.scatter_(0, taken, units)


def _complete(
    circuit: Circuit, drawn: Tensor, units: Tensor, x: Tensor | None, mask: Tensor | None
) -> Tensor:
    """`(N, D)`: values `(F, N)` of the folds that have a part, put over what is observed."""
    size = (circuit.num_variables, drawn.shape[1])
    own = drawn.masked_fill(units < 0, 0)
    found = drawn.new_zeros(size).index_add_(0, circuit.scope, own).T
    if x is None:
        return found
    known = x.reshape(-1, circuit.num_variables).to(found)
    if not len(known):
        return found
    times = len(found) // len(known)
    observed = torch.ones_like(known, dtype=torch.bool) if mask is None else mask
    observed = observed.reshape(-1, circuit.num_variables)
    return torch.where(observed.repeat(times, 1), known.repeat(times, 1), found)
