"""The conditionals of a circuit along an order of its variables, all of them in one tour.

In depth-first order of the vtree, larger child first, the conditionals of all variables given those
before follow from one walk around the tree that goes along each edge twice. Down goes a message
alpha_v[k] = Pr(prefix before v, unit k of v), with all that lies to the right marginalised to 1; up
come the inside values p_v. At a region of weights W over products of its children c_1, c_2, ...

    t <- alpha_v W;   for each child: alpha_c = t, then t <- t * p_c;   p_v = W (p_c1 * p_c2 * ...)

and at a leaf Pr(prefix, x = c) = sum_k alpha[k] leaf_k(c), for every c at once. The work is O(|p|).

Source: Liu, Mandt and Van den Broeck, Lossless Compression with Probabilistic Circuits, 2022. The
order is theirs; their schedule, which evaluates the path above each leaf again and takes
O(log(D) |p|), is `schedule="paper"`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchzoo.circuits.circuit import Circuit
from torchzoo.circuits.paths import path_evaluation
from torchzoo.circuits.region_graph import RegionGraph
from torchzoo.circuits.vtree import Choose, Factors, Matmul, Vtree, factors_of, rescaled, summed


def variable_order(region_graph: RegionGraph) -> Tensor:
    """The order in which a codec goes through the variables: depth first, larger child first.

    Args:
        region_graph: A structured region graph.

    Shape:
        - output: `(D,)`, int64

    Returns:
        The variables; of equally large children the one named first comes first.

    Raises:
        ValueError: A region has more than one partition.

    Example:
        >>> from torchzoo.circuits import linear
        >>> variable_order(linear(4)).tolist()
        [2, 3, 1, 0]
    """
    return torch.tensor(Vtree.of(region_graph).order)


def prefix_conditionals(circuit: Circuit, x: Tensor, *, schedule: str = "tour") -> Tensor:
    """All conditionals p(x_i = c | the variables before i) of samples, in `variable_order`.

    Differentiable in the circuit's parameters: the mean of their logarithms at the values of `x` is
    the log-likelihood, and a circuit is an autoregressive model in any case.

    Args:
        circuit: A structured circuit of one class with leaves over finitely many values.
        x: Samples; the value of a variable decides about those after it only.
        schedule: `"tour"`, or `"paper"` for the schedule of the paper.

    Shape:
        - x: `(..., D)`, integers
        - output: `(..., D, C)`, in the order of turns

    Returns:
        Probabilities; rows sum to 1. Rows after values of probability 0 are uniform.

    Raises:
        ValueError: A circuit without such an order, samples that don't fit, or another schedule.

    Source:
        A. Liu, S. Mandt and G. Van den Broeck, Lossless Compression with Probabilistic Circuits,
        2022, section 3; the tour in place of algorithm 1.

    Example:
        >>> from torchzoo.circuits import CategoricalLeaf, Circuit, hclt
        >>> circuit = Circuit(hclt([-1, 0, 0]), CategoricalLeaf(4), num_units=2)
        >>> prefix_conditionals(circuit, torch.tensor([[3, 0, 2]])).shape
        torch.Size([1, 3, 4])
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {list(SCHEDULES)}, got {schedule!r}")
    factors = factors_of(circuit)
    size = len(factors.leaves)
    if x.ndim < 1 or x.shape[-1] != size or x.is_floating_point():
        raise ValueError(f"x: expected integers (*, {size}), got {x.dtype} {tuple(x.shape)}")
    rows, found = x.reshape(-1, size).long(), []
    categories = len(next(iter(factors.leaves.values())))
    if not x.is_meta and ((rows < 0) | (rows >= categories)).any():
        raise ValueError(f"x: expected values in 0 to {categories - 1}, got others")

    def choose(variable: int, pmf: Tensor) -> Tensor:
        total = pmf.sum(-1, keepdim=True)
        proper = pmf / torch.where(total > 0, total, 1)
        found.append(torch.where(total > 0, proper, 1 / categories))
        return rows[:, variable]

    SCHEDULES[schedule](factors, len(rows), choose)
    return torch.stack(found, 1).view(*x.shape, categories)


class _Products:
    """An inner region during the tour, its units being sums of Hadamard products."""

    def __init__(self, weight: Tensor, alpha: Tensor, matmul: Matmul):
        self.weight, self.matmul = weight, matmul
        self.message = matmul(alpha, weight)
        self.inside: Tensor | None = None

    def absorb(self, value: Tensor, last: bool) -> None:
        if not last:
            self.message = rescaled(self.message * value)
        self.inside = value if self.inside is None else rescaled(self.inside * value)

    def close(self) -> Tensor:
        assert self.inside is not None
        return self.matmul(self.inside, self.weight.T)


class _Pairs:
    """An inner region during the tour, its units being sums over pairs of units of two children."""

    def __init__(self, weight: Tensor, alpha: Tensor, matmul: Matmul):
        self.weight, self.matmul, self.alpha = weight, matmul, alpha
        self.message = matmul(alpha, summed(weight, 2))
        self.insides: list[Tensor] = []

    def absorb(self, value: Tensor, last: bool) -> None:
        self.insides.append(value)
        if not last:
            pairs = (self.alpha[:, :, None] * value[:, None]).flatten(1)
            self.message = rescaled(self.matmul(pairs, self.weight.flatten(0, 1)))

    def close(self) -> Tensor:
        first, second = self.insides
        pairs = (first[:, :, None] * second[:, None]).flatten(1)
        return rescaled(self.matmul(pairs, self.weight.flatten(1).T))


def tour(factors: Factors, rows: int, choose: Choose, matmul: Matmul = torch.matmul) -> None:
    """Walk around the tree once, asking for the value of each variable when its turn comes.

    Args:
        factors: The circuit's parameters.
        rows: Number N of samples.
        choose: Gets each variable and its conditional given the values chosen before.
        matmul: What multiplies matrices.
    """
    tree = factors.tree
    some = factors.leaves[next(iter(factors.leaves))]
    frames: dict[int, _Products | _Pairs] = {}
    for region, left in tree.walk:
        parent = tree.parent[region]
        alpha = frames[parent].message if parent >= 0 else some.new_ones(rows, 1)
        if (variable := tree.variable[region]) >= 0:
            leaf = factors.leaves[region]
            value = leaf.index_select(0, choose(variable, matmul(alpha, leaf.T)))
        elif left:
            value = frames.pop(region).close()
        else:
            weight = factors.weights[region]
            frames[region] = (_Products if weight.ndim == 2 else _Pairs)(weight, alpha, matmul)
            continue
        if parent >= 0:
            frames[parent].absorb(value, region == tree.children[parent][-1])


SCHEDULES = {"tour": tour, "paper": path_evaluation}
