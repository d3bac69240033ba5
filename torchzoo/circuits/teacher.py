"""Starts a circuit from a teacher's features: its latents are clusters of what the teacher sees.

Where each region's latent is observed, maximum likelihood is counting:

    w[l, k] is proportional to the number of samples with l above the region and k in it
    p_k(c)  is proportional to the number of samples with k above the variable and value c
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchzoo.circuits.circuit import Circuit

__all__ = ["init_from_teacher"]


@torch.no_grad()
def init_from_teacher(
    circuit: Circuit,
    x: Tensor,
    features: Tensor,
    *,
    pseudocount: float = 0.05,
    leaf_pseudocount: float = 0.05,
    generator: torch.Generator | None = None,
) -> None:
    """Start from a teacher: one step of supervised EM, the latents being clusters of its features.

    The latent of a region is the cluster, by k-means, of the features of the variables right below
    it (of all its variables where there are none), averaged. A region that is part of several
    others counts for each of them. `em_fit` goes on from there with latents hidden.

    Args:
        circuit: The circuit, changed in place: CP sums, one class, nothing tied.
        x: `(N, D)`, values.
        features: `(N, D, d)`, the teacher's features of each variable.
        pseudocount: Added to each entry of each row of weights.
        leaf_pseudocount: Added to each entry of each leaf's distribution.
        generator: Source of the seed of the clusters.

    Raises:
        ValueError: Another kind of circuit, a pseudocount that is not positive, features that do
            not fit, or values that leaves can't have.

    Source:
        A. Liu, H. Zhang and G. Van den Broeck, Scaling Up Probabilistic Circuits by Latent
        Variable Distillation, 2023, section 4, with means of features for regions of several
        variables.

    Example:
        >>> from torchzoo.circuits import CategoricalLeaf, hclt
        >>> circuit = Circuit(hclt([-1, 0]), CategoricalLeaf(2), num_units=2)
        >>> z = torch.tensor([[0], [0], [1], [1]]).expand(4, 2)
        >>> init_from_teacher(circuit, z, z[..., None].float(), pseudocount=0.001)
        >>> bool(circuit(torch.tensor([0, 0])).exp() > 0.4)
        True
    """
    _check(circuit, x, features)
    for name, value in (("pseudocount", pseudocount), ("leaf_pseudocount", leaf_pseudocount)):
        if not value > 0:
            raise ValueError(f"{name}: got {value}, expected a number above 0")
    seed = int(torch.randint(2**31, (), generator=generator))
    root = features.new_ones(len(x), 1)
    above: dict[int, list[Tensor]] = {circuit.region_graph.root: [root]}
    for layer in reversed(list(circuit.layers)):
        layer.blocks, states = None, layer.log_weight.shape[2]
        own = [_clusters(circuit, r, features, states, seed) for r in layer.plan.regions]
        for fold, (row, parts) in enumerate(layer.plan.folds):
            for part in parts:
                above.setdefault(part, []).append(own[row])
            up = torch.stack(above[layer.plan.regions[row]]).sum(0)  # (N, O)
            layer.log_weight[fold] = (up.mT @ own[row] + pseudocount).log()
        if layer.mixing is not None:
            layer.mixing.log_weight.zero_()
    flow = torch.stack([torch.stack(above[r]).sum(0) for r in circuit.leaf_regions])
    counts = circuit.leaf.statistics(circuit.by_fold(x), flow.to(circuit.layers[0].log_weight))
    circuit.leaf.update(counts, leaf_pseudocount, 1.0)


def _check(circuit: Circuit, x: Tensor, features: Tensor) -> None:
    if circuit.sum != "cp" or circuit.tie != "none" or circuit.num_classes != 1:
        expected = "sum='cp', tie='none', one class"
        raise ValueError(f"circuit: got {circuit.extra_repr()}, expected {expected}")
    if x.dim() != 2 or not len(x):
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (N, D) with N > 0")
    if features.dim() != 3 or features.shape[:2] != x.shape:
        raise ValueError(f"features: got shape {tuple(features.shape)}, expected {(*x.shape, 'd')}")
    circuit.leaf_values(x[:0])
    if circuit.leaf.invalid(circuit.by_fold(x)).any():
        raise ValueError(f"x: got values that {circuit.leaf!r} can't have")


def _clusters(circuit: Circuit, region: int, features: Tensor, k: int, seed: int) -> Tensor:
    """`(N, k)`, one-hot clusters of a region's features."""
    import numpy as np
    from scipy.cluster.vq import kmeans2

    graph = circuit.region_graph
    parts = [part for partition in graph.partitions(region) for part in partition]
    direct = {v for part in parts if not graph.partitions(part) for v in graph.scope(part)}
    variables = sorted(direct) or list(graph.scope(region))
    points = features[:, variables].double().mean(1).cpu().numpy()
    distinct = min(k, len(np.unique(points, axis=0)))
    rng = np.random.default_rng(seed)
    labels = kmeans2(points, distinct, minit="++", seed=rng)[1]
    return torch.eye(k, dtype=features.dtype)[torch.as_tensor(labels).long()].to(features.device)
