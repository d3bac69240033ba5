"""Products and powers of circuits, which are circuits again; entropies of deterministic ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from einops import rearrange
from torch import Tensor

from torchzoo.circuits.finite_leaf import FiniteLeaf
from torchzoo.circuits.inputs import CategoricalLeaf
from torchzoo.circuits.pairs import full_weight, pair_layers, pair_up
from torchzoo.circuits.properties import check_compatible, check_deterministic
from torchzoo.ops.log_einsum_exp import log_einsum_exp

if TYPE_CHECKING:
    from torchzoo.circuits.circuit import Circuit

__all__ = ["Normalised", "cross_entropy", "entropy", "entropy_mc", "kl", "power", "product"]


class Normalised(NamedTuple):
    """A circuit, and the logarithm of the factor that makes it the function it stands for."""

    circuit: Circuit
    log_z: Tensor


@torch.no_grad()
def product(p: Circuit, q: Circuit) -> Normalised:
    """The circuit in proportion to `p(x) q(x)`, whose units are the pairs of units.

    Args:
        p: A circuit of one class.
        q: A compatible circuit of one class.

    Returns:
        The normalised product, and `log sum_x p(x) q(x)`.

    Raises:
        ValueError: The circuits are not compatible, or have several classes.

    Example:
        >>> from torchzoo.circuits import CategoricalLeaf, Circuit, balanced
        >>> p, q = (Circuit(balanced(4), CategoricalLeaf(3), num_units=2) for _ in range(2))
        >>> product(p, q).circuit.num_units
        4
    """
    check_compatible(p, q)
    if (p.num_classes, q.num_classes) != (1, 1):
        raise ValueError(f"p: got {p.num_classes} and {q.num_classes} classes, expected 1 each")
    weights, others = p.weights(), q.weights()
    pairs = pair_layers(p, q, p.leaf.inner(q.leaf), weights, others)
    leaf = p.leaf.product(q.leaf)
    found = type(p)(
        p.region_graph,
        leaf,
        num_units=p.num_units * q.num_units,
        num_leaf_units=leaf.num_units,
        sum=p.sum,
    ).to(p.layers[0].log_weight)
    found.leaf.load_state_dict(leaf.state_dict())
    rows = zip(found.layers, weights, others, pairs, strict=True)
    for layer, (weight, _), (other, _), layer_pairs in rows:
        both = torch.einsum(
            "fok,frj->forkj",
            full_weight(layer, weight).to(torch.float64),
            full_weight(layer, other).to(torch.float64),
        ).log()
        both = both + layer_pairs.products[:, None, None]
        if layer.num_operands == 2:
            size, size2 = weight.shape[-1], other.shape[-1]
            pattern = "f o r (i k) (j l) -> f (o r) (i j) (k l)"
            both = rearrange(both, pattern, k=size, l=size2)
        else:
            both = rearrange(both, "f o r k j -> f (o r) (k j)")
        both = both.masked_fill(_dead(both), 0)
        layer.log_weight.copy_(both)
    return Normalised(found, pairs[-1].regions[0, 0, 0])


@torch.no_grad()
def power(circuit: Circuit, exponent: float) -> Normalised:
    """The circuit in proportion to `p(x)^exponent`.

    Args:
        circuit: A structured circuit of one class; for exponents that are not whole numbers, a
            deterministic one with leaves of finitely many values.
        exponent: Above 0.

    Returns:
        The normalised power, and `log sum_x p(x)^exponent`.

    Raises:
        ValueError: The power has no exact circuit.
    """
    if exponent <= 0:
        raise ValueError(f"exponent: got {exponent}, expected a number above 0")
    if exponent == int(exponent) and circuit.num_units ** int(exponent) <= 4096:
        found = Normalised(circuit, torch.zeros_like(circuit.layers[0].log_weight[0, 0].sum()))
        for _ in range(int(exponent) - 1):
            more = product(found.circuit, circuit)
            found = Normalised(more.circuit, more.log_z + found.log_z)
        return found
    check_deterministic(circuit, f"the power {exponent}")
    return _power_of_deterministic(circuit, exponent)


def _power_of_deterministic(circuit: Circuit, exponent: float) -> Normalised:
    """One input of each sum is above 0, so that the power goes through sums to the leaves."""
    if not isinstance(circuit.leaf, FiniteLeaf):
        raise ValueError(f"leaf: got {circuit.leaf!r}, expected leaves of finitely many values")
    table = exponent * circuit.leaf.full_table()
    found = type(circuit)(
        circuit.region_graph,
        CategoricalLeaf(circuit.leaf.num_categories),
        num_units=circuit.num_units,
        num_leaf_units=circuit.num_leaf_units,
        sum=circuit.sum,
    ).to(table)
    cast(CategoricalLeaf, found.leaf).set_probs(table.softmax(1))
    sizes = [len(chunk) for chunk in circuit.schedule.chunks]
    values = list(table.logsumexp(1)[:, None].split(sizes))
    for layer, mine in zip(circuit.layers, found.layers, strict=True):
        weight = full_weight(layer, layer.weight()).pow(exponent)
        products = layer.products(values)
        values.append(log_einsum_exp(products, weight))
        log_weight = (weight.log() + products).view_as(mine.log_weight)
        mine.log_weight.copy_(log_weight.masked_fill(_dead(log_weight), 0))
    return Normalised(found, values[-1][0, 0, 0])


@torch.no_grad()
def cross_entropy(p: Circuit, q: Circuit) -> Tensor:
    """`-sum_x p(x) log q(x)` in nats, exact where q is deterministic; inf where q misses p's mass.

    Over pairs of units it takes the chance `m` that a sample of p's unit is one that q's unit can
    make, and `e`, the expected log-probability by q of those samples:

        product: m = prod m_c,  e = m sum e_c / m_c
        sum:     m = sum_kj w_ok [v_rj > 0] m_kj,  e = sum_kj w_ok [v_rj > 0] (m_kj log v_rj + e_kj)

    Args:
        p: A circuit of one class, with leaves of finitely many values.
        q: A compatible deterministic circuit of one class.

    Returns:
        A scalar, detached.

    Raises:
        ValueError: The circuits are not compatible, q is not deterministic, or there are several
            classes or continuous leaves.
    """
    check_compatible(p, q)
    if (p.num_classes, q.num_classes) != (1, 1):
        raise ValueError(f"p: got {p.num_classes} and {q.num_classes} classes, expected 1 each")
    check_deterministic(q, "a cross-entropy")
    if not isinstance(p.leaf, FiniteLeaf) or not isinstance(q.leaf, FiniteLeaf):
        raise ValueError(f"leaf: got {p.leaf!r}, expected leaves of finitely many values")
    probs, table = p.leaf.full_table().exp(), q.leaf.full_table()
    possible = table > -torch.inf
    mass = torch.einsum("fck,fcj->fkj", probs, possible.to(probs))
    score = torch.einsum("fck,fcj->fkj", probs, table.masked_fill(~possible, 0))
    sizes = [len(chunk) for chunk in p.schedule.chunks]
    masses, ratios = list(mass.log().split(sizes)), list(_ratio(score, mass).split(sizes))
    for layer, other in zip(p.layers, q.layers, strict=True):
        mass = pair_up(tuple(operand(masses) for operand in layer.operands)).exp()
        score = pair_up(tuple(operand(ratios) for operand in layer.operands)) * mass
        w, v = full_weight(layer, layer.weight()), full_weight(other, other.weight())
        used = (v > 0).to(v)
        total = torch.einsum("fok,frj,fkj->for", w, used, mass)
        score = torch.einsum("fok,frj,fkj->for", w, used, score)
        score += torch.einsum("fok,frj,fkj->for", w, torch.xlogy(used, v), mass)
        masses.append(total.log())
        ratios.append(_ratio(score, total))
    found = -score[0, 0, 0]
    return found if total[0, 0, 0] > 1 - 1e-5 else torch.full_like(found, torch.inf)


def entropy(circuit: Circuit) -> Tensor:
    """Entropy in nats of a deterministic circuit; see `cross_entropy`, and `entropy_mc` for others.

    Raises:
        ValueError: The circuit is not deterministic, not structured, has several classes, or
            continuous leaves.
    """
    check_deterministic(circuit, "an entropy")
    return cross_entropy(circuit, circuit)


def kl(p: Circuit, q: Circuit) -> Tensor:
    """`sum_x p(x) log(p(x) / q(x))` in nats of compatible deterministic circuits.

    Raises:
        ValueError: See `cross_entropy`; p must be deterministic too.
    """
    check_deterministic(p, "a Kullback-Leibler divergence")
    return cross_entropy(p, q) - cross_entropy(p, p)


@torch.no_grad()
def entropy_mc(
    circuit: Circuit, n: int, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Entropy in nats of any circuit, estimated from samples.

    Args:
        circuit: The circuit, of one class.
        n: Number of samples.
        generator: Source of randomness.

    Returns:
        The estimate and its standard error.

    Raises:
        ValueError: `n` below 2.
    """
    if n < 2:
        raise ValueError(f"n: got {n}, expected at least 2")
    surprise = -circuit.log_prob(circuit.sample(n, generator=generator))
    return surprise.mean(), surprise.std() / n**0.5


def _dead(log_weight: Tensor) -> Tensor:
    """Rows without any weight: no sample has both units, so that any weights will do."""
    largest = log_weight.flatten(2).amax(2)
    return (largest == -torch.inf).view(*largest.shape, *[1] * (log_weight.dim() - 2))


def _ratio(score: Tensor, mass: Tensor) -> Tensor:
    return torch.where(mass > 0, score / mass, 0.0)
