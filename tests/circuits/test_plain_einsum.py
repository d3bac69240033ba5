"""Hidden Chow-Liu trees of digits against the plain formulation of Einsum networks.

The same tree, number of states, batches, step sizes, pseudocounts and epochs on both sides.
"""

import math
import statistics

import pytest
import torch

from tests.circuits.plain_einsum import PlainTree
from torchzoo.circuits import (
    CategoricalLeaf,
    Circuit,
    chow_liu_tree,
    em_fit,
    hclt,
    init_from_data,
)
from torchzoo.data.digits import digits

LEVELS = 17


def levels(seed):
    split = digits(seed=seed, test_fraction=497 / 1797)
    return tuple((16 * x).round().long().flatten(1) for x in (split.train_x, split.test_x))


def options(train, *, epochs, seed):
    marginal = torch.stack([x.bincount(minlength=LEVELS) for x in train.T]) + 1 / LEVELS
    return {
        "epochs": epochs,
        "batch_size": 100,
        "step_size": (0.1, 0.01),
        "pseudocount": 0.05,
        "leaf_pseudocount": marginal / marginal.sum(1, keepdim=True),
        "generator": torch.Generator().manual_seed(seed),
    }


def bits_per_dim(circuit, x):
    with torch.no_grad():
        return -circuit.log_prob(x).mean().item() / (math.log(2) * x.shape[1])


@torch.no_grad()
def copy_tables(circuit, plain):
    """Give the circuit the tables of the plain tree, region by region."""
    regions = circuit.region_graph.regions
    circuit.leaf.logits.copy_(plain.emit[circuit.scope].log())
    for layer in circuit.layers:
        for fold, (_, parts) in enumerate(layer.plan.folds):
            (node,) = (regions[part] for part in parts if isinstance(regions[part], int))
            table = plain.start[None] if plain.parent[node] == -1 else plain.move[node]
            layer.log_weight[fold] = table.log()


@pytest.mark.claim(82, "Mini-batch EM of a tree of digits goes where the plain one goes", 1e-9)
def test_from_the_same_start_both_learn_the_same():
    train, test = levels(0)
    train, test = train[:300], test[:200]
    parent = chow_liu_tree(train, num_categories=LEVELS)
    plain = PlainTree(parent, LEVELS, 4, seed=0, dtype=torch.float64)
    circuit = Circuit(hclt(parent), CategoricalLeaf(LEVELS), num_units=4, dtype=torch.float64)
    copy_tables(circuit, plain)
    before = plain.bits_per_dim(test)
    assert bits_per_dim(circuit, test) == pytest.approx(before, abs=1e-9)
    plain.fit(train, **options(train, epochs=3, seed=1))
    em_fit(circuit, train, **options(train, epochs=3, seed=1))
    after = plain.bits_per_dim(test)
    assert bits_per_dim(circuit, test) == pytest.approx(after, abs=1e-9)
    assert after < before - 1


@pytest.mark.slow
@pytest.mark.claim(
    82, "A hidden Chow-Liu tree of digits gets test bits no worse than the plain peer's", None
)
def test_from_their_own_starts_ours_is_no_worse():
    """Three splits; the margin is half the standard error of the paired difference."""
    gaps, ours, peers = [], [], []
    for seed in range(3):
        train, test = levels(seed)
        parent = chow_liu_tree(train, num_categories=LEVELS)
        plain = PlainTree(parent, LEVELS, 16, seed=seed)
        plain.fit(train, **options(train, epochs=12, seed=seed))
        circuit = Circuit(hclt(parent), CategoricalLeaf(LEVELS), num_units=16)
        init_from_data(circuit, train, generator=torch.Generator().manual_seed(seed))
        em_fit(circuit, train, **options(train, epochs=12, seed=seed))
        ours.append(bits_per_dim(circuit, test))
        peers.append(plain.bits_per_dim(test))
        gaps.append(ours[-1] - peers[-1])
    print(f"bits a pixel: {ours} against {peers}")
    margin = 0.5 * statistics.stdev(gaps) / math.sqrt(len(gaps))
    assert statistics.mean(gaps) <= margin
