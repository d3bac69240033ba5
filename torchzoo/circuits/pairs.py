"""Two compatible circuits evaluated together, over pairs of their units.

Both have the same region graph with one partition a region, so that for the units k of p and j of q

    <p_k, q_j> of a product = product over the parts of <p_k, q_j>
    <p_o, q_r> of sums      = sum_kj w_ok v_rj <p_k, q_j>.

Values are logarithms, `(F, K, J)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from torchzoo.circuits.folded_layers import SumLayer, Weights
from torchzoo.circuits.properties import check_compatible
from torchzoo.ops.log_einsum_exp import log_einsum_exp

if TYPE_CHECKING:
    from torchzoo.circuits.circuit import Circuit

__all__ = ["cauchy_schwarz_divergence", "inner_product", "log_inner_product", "renyi2_entropy"]


class LayerPairs(NamedTuple):
    """Values of pairs in a layer: operands of the sums, products, and the regions' own."""

    operands: tuple[Tensor, ...]
    products: Tensor
    regions: Tensor


def log_inner_product(p: Circuit, q: Circuit) -> Tensor:
    """`log sum_x p(x) q(x)` (an integral for densities), exact in `O(F K^3)` for CP sums.

    Args:
        p: A circuit.
        q: A circuit of the same structured region graph and kind of sums and leaves.

    Returns:
        A scalar, differentiable in both; `(classes of p, classes of q)` where there are several.

    Raises:
        ValueError: The circuits are not compatible.

    Source:
        Vergari, Choi, Liu, Teso and Van den Broeck, "A Compositional Atlas of Tractable Circuit
        Operations for Probabilistic Inference", 2021, theorem B.1.
    """
    check_compatible(p, q)
    found = pair_layers(p, q, p.leaf.inner(q.leaf), p.weights(), q.weights())[-1].regions[0]
    return found[0, 0] if found.numel() == 1 else found


def inner_product(p: Circuit, q: Circuit) -> Tensor:
    """`sum_x p(x) q(x)`; see `log_inner_product`."""
    return log_inner_product(p, q).exp()


def renyi2_entropy(circuit: Circuit) -> Tensor:
    """Renyi entropy of order 2, `-log sum_x p(x)^2`, in nats; see `log_inner_product`."""
    return -log_inner_product(circuit, circuit)


def cauchy_schwarz_divergence(p: Circuit, q: Circuit) -> Tensor:
    """`-log <p, q> / sqrt(<p, p> <q, q>)`, 0 where p equals q; see `log_inner_product`."""
    both = log_inner_product(p, p) + log_inner_product(q, q)
    return 0.5 * both - log_inner_product(p, q)


def pair_layers(
    p: Circuit, q: Circuit, leaf: Tensor, weights: Sequence[Weights], others: Sequence[Weights]
) -> list[LayerPairs]:
    """Evaluate all layers over pairs of units.

    Args:
        p: A circuit.
        q: A compatible one.
        leaf: `(F, K, J)`, values of pairs of leaf units.
        weights: Linear weights of p.
        others: Linear weights of q.

    Returns:
        Values of each layer.
    """
    values = list(leaf.split([len(chunk) for chunk in p.schedule.chunks]))
    found = []
    for layer, (weight, _), (other, _) in zip(p.layers, weights, others, strict=True):
        operands = tuple(operand(values) for operand in layer.operands)
        products = pair_up(operands)
        half = log_einsum_exp(products, full_weight(layer, other))
        half = log_einsum_exp(half.mT.contiguous(), full_weight(layer, weight))
        values.append(half.mT.contiguous())
        found.append(LayerPairs(operands, products, values[-1]))
    return found


def pair_up(operands: tuple[Tensor, ...]) -> Tensor:
    """`(F, K, J)`, values of pairs of products from the one or two operands of a sum."""
    if len(operands) == 1:
        return operands[0]
    left, right = operands
    both = rearrange(left, "f i j -> f i 1 j 1") + rearrange(right, "f k l -> f 1 k 1 l")
    return rearrange(both, "f i k j l -> f (i k) (j l)")


def full_weight(layer: SumLayer, weight: Tensor) -> Tensor:
    """`(F, O, K)`, weights of each fold over all its products."""
    return weight.expand(len(layer.plan.folds), *weight.shape[1:]).flatten(2).contiguous()


def supports(circuit: Circuit) -> tuple[Tensor, list[Weights]]:
    """Pairs of leaf units that share a value (log 1, else log 0), and weights above 0 as ones."""
    leaf = circuit.leaf.shared_support().log()
    weights: list[Weights] = [((weight > 0).to(weight), None) for weight, _ in circuit.weights()]
    return leaf, weights


@torch.no_grad()
def overlaps(circuit: Circuit) -> list[LayerPairs]:
    """Which pairs of units of a structured circuit share a possible sample: above -inf."""
    leaf, weights = supports(circuit)
    return pair_layers(circuit, circuit, leaf, weights, weights)
