"""Circuits made from other models: hidden Markov models, Gaussian mixtures, Chow-Liu trees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from torchzoo.circuits.builders import factorised, hclt, linear
from torchzoo.circuits.chow_liu import chow_liu_tree
from torchzoo.circuits.gaussian_leaf import GaussianLeaf
from torchzoo.circuits.inputs import CategoricalLeaf

if TYPE_CHECKING:
    from torchzoo.circuits.circuit import Circuit


@torch.no_grad()
def from_hmm(
    cls: type[Circuit], initial: Tensor, transition: Tensor, emission: Tensor, *, length: int
) -> Circuit:
    """The circuit of a homogeneous hidden Markov model with categorical emissions.

    Args:
        cls: The class of circuit.
        initial: `(S,)`, probabilities of the first state.
        transition: `(S, S)`, from the row's state to the column's.
        emission: `(S, C)`, probabilities of values in each state.
        length: Number of steps `D`.

    Returns:
        The circuit, whose weights and leaves are tied.

    Raises:
        ValueError: Sizes that don't fit, or rows that don't sum to 1.

    Example:
        >>> from torchzoo.circuits import Circuit
        >>> half = torch.full((2, 2), 0.5)
        >>> circuit = Circuit.from_hmm(half[0], half, half, length=3)
        >>> circuit(torch.zeros(3, dtype=torch.long)).exp()
        tensor([0.1250], grad_fn=<ExpBackward0>)
    """
    states = len(initial)
    if transition.shape != (states, states) or emission.dim() != 2 or len(emission) != states:
        got = f"{tuple(transition.shape)} and {tuple(emission.shape)}"
        raise ValueError(f"transition: got {got} with emission, expected {states} states")
    rows = (("initial", initial), ("transition", transition), ("emission", emission))
    for name, value in rows:
        if (value < 0).any() or not torch.allclose(value.sum(-1), value.new_ones(())):
            raise ValueError(f"{name}: got rows that sum to {value.sum(-1).tolist()}, expected 1")
    leaf = CategoricalLeaf(emission.shape[1])
    circuit = cls(
        linear(length),
        leaf,
        num_units=states,
        tie="all",
        device=initial.device,
        dtype=initial.dtype,
    )
    cast(CategoricalLeaf, circuit.leaf).set_probs(emission.T[None])
    for layer in circuit.layers[:-1]:
        layer.log_weight.copy_(transition.log())
    circuit.layers[-1].log_weight.copy_(initial.log())
    return circuit


@torch.no_grad()
def from_gmm(cls: type[Circuit], mixture: Any) -> Circuit:
    """The circuit of a fitted scikit-learn `GaussianMixture` with diagonal covariances.

    Args:
        cls: The class of circuit.
        mixture: The mixture.

    Returns:
        The circuit in float64: one region, with a unit for each component.

    Raises:
        ValueError: The covariances are not diagonal.
    """
    if mixture.covariance_type != "diag":
        raise ValueError(f"mixture: got {mixture.covariance_type} covariances, expected 'diag'")
    means, std = (torch.from_numpy(v).T for v in (mixture.means_, mixture.covariances_**0.5))
    leaf = GaussianLeaf(min(1e-3, std.min().item() / 2))
    dim, components = means.shape
    circuit = cls(factorised(dim), leaf, num_units=components, dtype=torch.float64)
    cast(GaussianLeaf, circuit.leaf).set_moments(means[circuit.scope], std[circuit.scope])
    circuit.layers[0].log_weight.copy_(torch.from_numpy(mixture.weights_).log())
    return circuit


@torch.no_grad()
def from_chow_liu(
    cls: type[Circuit], x: Tensor, *, num_categories: int, alpha: float = 0.01
) -> Circuit:
    """The Chow-Liu tree of data as a circuit, which is deterministic.

    Units are the values themselves: leaves are indicators, and weights are the conditional
    probabilities of the tree's edges.

    Args:
        cls: The class of circuit.
        x: `(N, D)`, integers from 0 to `num_categories - 1`.
        num_categories: Number of values `C`.
        alpha: Added to the count of every pair of values.

    Returns:
        The circuit, with `C` units a region.

    Raises:
        ValueError: See `chow_liu_tree`.
    """
    parent = chow_liu_tree(x, num_categories=num_categories, alpha=alpha).tolist()
    hot = F.one_hot(x.long(), num_categories).double()
    circuit = cls(hclt(parent), CategoricalLeaf(num_categories), num_units=num_categories)
    circuit.to(x.device)
    eye = torch.eye(num_categories, device=x.device)
    cast(CategoricalLeaf, circuit.leaf).set_probs(eye.expand(circuit.leaf.num_folds, -1, -1))
    for layer in circuit.layers:
        for fold, (row, _) in enumerate(layer.plan.folds):
            node = _first_variable(circuit, layer.plan.regions[row])
            if parent[node] >= 0:
                counts = hot[:, parent[node]].T @ hot[:, node] + alpha
            else:
                counts = hot[:, node].sum(0, keepdim=True) + alpha * num_categories
            layer.log_weight[fold] = (counts / counts.sum(1, keepdim=True)).log()
    return circuit


def _first_variable(circuit: Circuit, region: int) -> int:
    """The variable whose leaf is the first part of a hidden tree's region."""
    (partition,) = circuit.region_graph.partitions(region)
    variable = circuit.region_graph.regions[partition[0]]
    assert isinstance(variable, int)
    return variable
