"""Triangles and distances on graphs against networkx, scipy and brute force."""

import networkx as nx
import numpy as np
import pytest
import torch
from scipy.sparse.csgraph import shortest_path
from torch.autograd import gradcheck

from torchzoo.sparsity import csr
from torchzoo.sparsity.graph import hop_distances, triangles

GRAPHS = {
    "power law": nx.barabasi_albert_graph(150, 4, seed=0),
    "random": nx.gnp_random_graph(60, 0.15, seed=1),
    "clustered": nx.powerlaw_cluster_graph(80, 3, 0.7, seed=2),
    "complete": nx.complete_graph(9),
    "bipartite": nx.complete_bipartite_graph(4, 6),
    "a star and a loop": nx.Graph([(0, i) for i in range(1, 7)] + [(3, 3)]),
    "no edges": nx.empty_graph(5),
    "no nodes": nx.empty_graph(0),
}


def adjacency(graph, dtype=float, **options):
    if not len(graph):
        return torch.zeros(0, 0).to_sparse_csr()
    return csr.from_scipy(nx.to_scipy_sparse_array(graph, dtype=dtype, **options))


@pytest.mark.claim(135, "Triangles counted by products equal networkx's, node by node", tolerance=0)
@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("dtype", [float, np.float32])
def test_triangles(name, dtype):
    graph = GRAPHS[name]
    with torch.no_grad():  # it takes a derivative of its own
        found = triangles(adjacency(graph, dtype))
    graph = nx.Graph(graph)
    graph.remove_edges_from(list(nx.selfloop_edges(graph)))
    expected = nx.triangles(graph)
    assert found.dtype == torch.int64
    assert found.tolist() == [expected[node] for node in range(len(graph))]


def test_stored_zeros_are_no_edges_and_weights_do_not_count():
    a = torch.ones(3, 3) * 7
    assert triangles(a.to_sparse_csr()).tolist() == [1, 1, 1]
    cut = a.to_sparse_csr()
    cut.values()[[1, 3]] = 0  # entries (0, 1) and (1, 0)
    assert triangles(cut).tolist() == [0, 0, 0]


@pytest.mark.claim(135, "Nodes within h hops, and how many, equal a breadth-first search's")
@pytest.mark.parametrize("name", list(GRAPHS)[:-1])
@pytest.mark.parametrize("hops", [1, 2, 3, 5])
def test_hops_equal_a_breadth_first_search(name, hops):
    graph = GRAPHS[name]
    found = csr.to_scipy(hop_distances(adjacency(graph), hops))
    for node in graph:
        reach = nx.single_source_shortest_path_length(graph, node, cutoff=hops)
        own = slice(found.indptr[node], found.indptr[node + 1])
        pairs = zip(found.indices[own].tolist(), found.data[own].tolist(), strict=True)
        assert dict(pairs) == reach


@pytest.mark.claim(135, "Enough hops give the shortest paths of scipy", tolerance=1e-12)
def test_enough_hops_are_shortest_paths():
    graph = nx.gnp_random_graph(40, 0.08, seed=3, directed=True)
    generator = np.random.default_rng(0)
    for *_, data in graph.edges(data=True):
        data["weight"] = generator.uniform(0.1, 2.0)
    a = adjacency(graph)
    stored = hop_distances(a, 40)
    row, col, length = csr.entries(stored)
    found = torch.full((40, 40), torch.inf, dtype=torch.float64)
    found[row.long(), col.long()] = length
    expected = torch.from_numpy(shortest_path(csr.to_scipy(a), method="D"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_few_hops_are_the_brute_force_over_paths():
    """Of at most 3 edges: a detour of 4 light edges doesn't count."""
    a = torch.zeros(5, 5, dtype=torch.float64)
    for i in range(4):
        a[i, i + 1] = 1.0
    a[0, 4] = 10.0
    a = a.to_sparse_csr()
    assert [hop_distances(a, hops).to_dense()[0, 4].item() for hops in (1, 3, 4)] == [10, 10, 4]


def test_lengths_get_gradients():
    a = adjacency(nx.path_graph(5))
    generator = torch.Generator().manual_seed(0)
    lengths = torch.rand(a.values().shape, generator=generator, dtype=torch.float64) + 0.5

    def far(values):
        return hop_distances(csr.with_values(a, values), 3).values()

    assert gradcheck(far, lengths.requires_grad_())


def test_bad_graphs_are_named():
    with pytest.raises(ValueError, match="adjacency: expected a symmetric"):
        triangles(torch.ones(3, 3).triu().to_sparse_csr())
    with pytest.raises(ValueError, match="adjacency: expected a square"):
        hop_distances(torch.ones(2, 3).to_sparse_csr())
    with pytest.raises(ValueError, match="hops: expected a number ≥ 1, got 0"):
        hop_distances(torch.ones(2, 2).to_sparse_csr(), 0)
