"""Chow-Liu trees against brute-force mutual information and networkx."""

import math

import networkx as nx
import pytest
import torch

from torchzoo.circuits import chow_liu_tree
from torchzoo.circuits.chow_liu import maximum_spanning_tree, mutual_information


def brute_force_information(x, count, alpha):
    """From one smoothed joint table of each pair."""
    size, dim = x.shape
    found = torch.zeros(dim, dim, dtype=torch.float64)
    for i in range(dim):
        for j in range(dim):
            joint = torch.full((count, count), alpha, dtype=torch.float64)
            for a, b in zip(x[:, i].tolist(), x[:, j].tolist(), strict=True):
                joint[a, b] += 1
            joint /= size + count**2 * alpha
            rows, columns = joint.sum(1, keepdim=True), joint.sum(0, keepdim=True)
            found[i, j] = (joint * (joint / (rows * columns)).log()).nan_to_num().sum()
    return found


def edges(parent):
    return {frozenset((i, p)) for i, p in enumerate(parent.tolist()) if p >= 0}


def tree_samples(parent, count, size, seed=0):
    """Ancestral samples of a tree whose children mostly copy their parents, shifted by one."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(size, len(parent), dtype=torch.long)
    for node, up in enumerate(parent):
        drawn = torch.randint(count, (size,), generator=generator)
        if up >= 0:
            copied = (x[:, up] + 1) % count
            drawn = torch.where(torch.rand(size, generator=generator) < 0.5, copied, drawn)
        x[:, node] = drawn
    return x


@pytest.mark.parametrize("alpha", [0.01, 0.7])
def test_information_equals_brute_force(alpha):
    x = tree_samples([-1, 0, 1, 1, 0], 3, 60)
    found = mutual_information(x, num_categories=4, alpha=alpha)
    off = ~torch.eye(5, dtype=torch.bool)
    expected = brute_force_information(x, 4, alpha)
    torch.testing.assert_close(found[off], expected[off], rtol=1e-10, atol=1e-12)


@pytest.mark.claim(
    82, "The Chow-Liu tree is networkx's maximum spanning tree on brute-force information"
)
def test_tree_is_the_maximum_spanning_tree():
    x = torch.randint(3, (50, 7), generator=torch.Generator().manual_seed(1))
    parent = chow_liu_tree(x, num_categories=3, alpha=0.5)
    weight = brute_force_information(x, 3, 0.5)
    graph = nx.Graph()
    graph.add_weighted_edges_from((i, j, weight[i, j].item()) for i in range(7) for j in range(i))
    tree = nx.maximum_spanning_tree(graph)
    assert edges(parent) == {frozenset(edge) for edge in tree.edges}
    assert (parent == -1).sum() == 1
    assert parent.tolist().index(-1) in nx.center(tree)


@pytest.mark.claim(82, "20000 samples of a tree-structured law recover its tree")
def test_samples_of_a_tree_recover_it():
    true = [-1, 0, 0, 1, 1, 2, 5, 6, 3]
    x = tree_samples(true, 4, 20000)
    assert edges(chow_liu_tree(x, num_categories=4)) == edges(torch.tensor(true))


def test_bins_coarsen_values_for_the_information_only():
    true = [-1, 0, 1, 1]
    x = tree_samples(true, 4, 5000) * 64 + torch.randint(64, (5000, 4))
    parent = chow_liu_tree(x, num_categories=256, bins=4)
    assert edges(parent) == edges(torch.tensor(true))
    coarse = mutual_information(x, num_categories=256, bins=4)
    torch.testing.assert_close(coarse, mutual_information(x // 64, num_categories=4))


def test_gaussian_information_is_that_of_the_correlation():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 3, generator=generator, dtype=torch.float64)
    x[:, 1] += 2 * x[:, 0]
    x[:, 2] += x[:, 1]
    rho = torch.corrcoef(x.T)[0, 1].item()
    found = mutual_information(x, num_categories=None)
    assert found[0, 1].item() == pytest.approx(-0.5 * math.log(1 - rho**2), rel=1e-10)
    assert edges(chow_liu_tree(x, num_categories=None)) == {frozenset((0, 1)), frozenset((1, 2))}


def test_the_root_is_the_centre_and_not_the_median():
    """A path of nodes 0 to 6, from whose end hang five more: most nodes are near that end."""
    weight = torch.zeros(12, 12)
    for i, j in [(k, k + 1) for k in range(6)] + [(6, k) for k in range(7, 12)]:
        weight[i, j] = weight[j, i] = 1.0
    parent = maximum_spanning_tree(weight)
    assert parent.tolist().index(-1) == 3  # 3 and 4 are four steps from the ends; the first one
    assert parent.tolist()[6:] == [5, 6, 6, 6, 6, 6]


def test_constant_columns_say_nothing():
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 1] = 2.0
    found = mutual_information(x, num_categories=None)
    assert (found[1, ::2] == 0).all()
    assert len(edges(chow_liu_tree(x, num_categories=None))) == 2


def test_ties_and_zero_weights_still_span():
    parent = maximum_spanning_tree(torch.zeros(5, 5))
    assert len(edges(parent)) == 4
    assert maximum_spanning_tree(torch.zeros(1, 1)).tolist() == [-1]


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(0, 3, dtype=torch.long), {"num_categories": 2}, "x: got shape"),
        (torch.zeros(3, 3), {"num_categories": 2}, "x: got torch.float32"),
        (torch.full((3, 3), 2), {"num_categories": 2}, "expected integers from 0 to 1"),
        (torch.zeros(3, 3, dtype=torch.long), {"num_categories": 2, "alpha": -1}, "alpha: got -1"),
        (torch.zeros(3, 3, dtype=torch.long), {"num_categories": 2, "bins": 3}, "bins: got 3"),
        (torch.zeros(2, 784, dtype=torch.long), {"num_categories": 256}, "coarsen the values"),
    ],
)
def test_refusals(x, options, message):
    with pytest.raises(ValueError, match=message):
        chow_liu_tree(x, **options)
