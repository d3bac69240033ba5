"""One training step of a hidden Chow-Liu tree against the plain formulation of its layers.

The peer computes the same tree as Einsum networks do (Peharz et al., 2020): the parts of a level
put together, then `max`, `exp`, `torch.einsum` and `log`, under autograd. It has folds first, which
is faster than having the batch first, and its leaves read rows of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchzoo.benchmark import OURS, Bench, Case
from torchzoo.circuits import CategoricalLeaf, Circuit, hclt
from torchzoo.circuits.chow_liu import maximum_spanning_tree


def grid_tree(side: int, seed: int = 0) -> Tensor:
    """A random spanning tree of a grid's neighbours, as the Chow-Liu trees of images look."""
    generator = torch.Generator().manual_seed(seed)
    at = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    near = (at[:, None] - at).abs().sum(-1) == 1
    weight = torch.rand(near.shape, generator=generator, dtype=torch.float64)
    return maximum_spanning_tree(torch.where(near, weight + weight.T, -1.0))


def plain(circuit: Circuit, x: Tensor) -> Tensor:
    """The circuit's log-probabilities by operations of PyTorch, level by level."""
    chunks = [len(chunk) for chunk in circuit.schedule.chunks]
    table = circuit.leaf.logits.log_softmax(1)
    first = torch.arange(len(table), device=x.device) * table.shape[1]
    rows = x[:, circuit.scope].T + first[:, None]
    values = list(F.embedding(rows, table.flatten(0, 1)).split(chunks))
    for layer in circuit.layers:
        (operand,) = layer.operands
        parts, folds = [], []
        for slot, children, parents in operand.reads():
            parts.append(values[slot][children])
            folds.append(parents)
        both = torch.cat(parts)
        products = both.new_zeros(operand.num_folds, *both.shape[1:])
        products = products.index_add(0, torch.cat(folds), both)
        largest = products.amax(-1, keepdim=True).detach()
        weight = layer.log_weight.softmax(-1)
        sums = torch.einsum("fbk,fok->fbo", (products - largest).exp(), weight)
        values.append(sums.log() + largest)
    return values[-1][0]


def contenders(
    device: torch.device, side: int, units: int, categories: int, batch: int
) -> Mapping[str, Callable[[], Any]]:
    """Forward and backward of the mean log-likelihood, by both formulations."""
    torch.manual_seed(0)
    circuit = Circuit(
        hclt(grid_tree(side)), CategoricalLeaf(categories), num_units=units, device=device
    )
    x = torch.randint(categories, (batch, side**2), device=device)

    def step(log_prob: Callable[[Tensor], Tensor]) -> None:
        loss = -log_prob(x).mean()
        torch.autograd.grad(loss, list(circuit.parameters()))

    return {
        OURS: partial(step, circuit),
        "plain formulation": partial(step, partial(plain, circuit)),
    }


def case(side: int, units: int, categories: int, batch: int, bar: float | None) -> Case:
    """One size. A step has three products for each edge, and reads and writes each value often."""
    edges = side**2 * units**2
    values = side**2 * batch * units
    return Case(
        f"{side**2} variables, {units} latents, {categories} values, batch {batch}",
        partial(contenders, side=side, units=units, categories=categories, batch=batch),
        6.0 * edges * batch,
        4.0 * (8 * values + 6 * side**2 * categories * units),
        6.0 * edges * batch,
        bar,
    )


BENCH = Bench(
    "circuit_step",
    [
        case(8, 16, 17, 256, None),
        case(16, 32, 256, 256, None),
        case(28, 32, 2, 512, 2.0),
        case(28, 32, 256, 512, 2.0),
    ],
)
