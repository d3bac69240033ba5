"""Nearest neighbours against scikit-learn and against sorting all distances."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from torchzoo.ops import knn

MODULE = sys.modules["torchzoo.ops.knn"]  # the name itself is the function


def drawn(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("chunk", [1, 100, 1 << 22])
def test_scikit_learn(chunk, monkeypatch):
    monkeypatch.setattr(MODULE, "_CHUNK_ENTRIES", chunk)
    x, y = drawn(37, 5), drawn(90, 5, seed=1)
    peer = NearestNeighbors(n_neighbors=11, algorithm="brute").fit(y.numpy())
    theirs, places = peer.kneighbors(x.numpy())
    distances, indices = knn(x, y, 11)
    np.testing.assert_allclose(distances.numpy(), theirs, rtol=1e-12)
    np.testing.assert_array_equal(indices.numpy(), places)
    assert indices.dtype == torch.int64


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(2, 12),
    d=st.integers(1, 3),
    chunk=st.integers(1, 40),
    exclude=st.booleans(),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_ties_go_to_the_lowest_index(n, d, chunk, exclude, seed, data):
    """Points on a coarse grid: most distances tie, many points are equal."""
    x = torch.randint(3, (n, d), generator=torch.Generator().manual_seed(seed)).double()
    k = data.draw(st.integers(1, n - exclude))
    old, MODULE._CHUNK_ENTRIES = MODULE._CHUNK_ENTRIES, chunk
    try:
        distances, indices = knn(x, x, k, exclude_self=exclude)
    finally:
        MODULE._CHUNK_ENTRIES = old
    for i in range(n):
        all_of_them = [
            (float((x[i] - x[j]).norm()), j) for j in range(n) if not (exclude and i == j)
        ]
        expected = sorted(all_of_them)[:k]
        assert indices[i].tolist() == [j for _, j in expected]
        np.testing.assert_allclose(distances[i].numpy(), [e for e, _ in expected], atol=1e-12)


def test_distances_do_not_cancel():
    """Points 1e-3 apart at 1e4 from 0, where products of float32 have no digit left."""
    y = 1e4 + torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]) / 128
    distances, indices = knn(y, y, 2)
    assert distances[:, 0].tolist() == [0.0] * 3
    assert distances[0, 1].item() == 1 / 128
    assert indices[:, 0].tolist() == [0, 1, 2]


def test_unordered_and_far_values():
    y = torch.tensor([[float("nan")], [float("inf")], [1.0], [2.0]])
    distances, indices = knn(torch.zeros(1, 1), y, 4)
    assert indices.tolist() == [[2, 3, 0, 1]]
    assert distances.tolist() == [[1.0, 2.0, float("inf"), float("inf")]]
    same = torch.full((3, 1), float("nan"))
    assert knn(same, same, 2, exclude_self=True)[1].tolist() == [[1, 2], [0, 2], [0, 1]]


def test_dtypes_layouts_and_gradients():
    x, y = drawn(6, 4), drawn(8, 4, seed=1)
    expected = knn(x, y, 3)[1]
    assert torch.equal(knn(x.float(), y.float(), 3)[1], expected)
    half, places = knn(x.bfloat16(), y.bfloat16(), 3)
    assert half.dtype == torch.float32
    assert torch.equal(places, knn(x.bfloat16().double(), y.bfloat16().double(), 3)[1])
    strided = knn(x.T.contiguous().T, torch.stack([y, y], -1)[..., 0], 3)
    assert torch.equal(strided[1], expected)
    assert not knn(x.requires_grad_(), y, 3)[0].requires_grad
    empty = knn(x[:0], y, 3)
    assert (empty[0].shape, empty[1].shape) == ((0, 3), (0, 3))


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (drawn(3), drawn(3, 2), {"k": 1}, r"x: expected \(N, d\), got \(3,\)"),
        (drawn(3, 2), drawn(3, 4), {"k": 1}, r"y: expected \(M, 2\), got \(3, 4\)"),
        (drawn(3, 2), drawn(3, 2).float(), {"k": 1}, "y: expected the floating dtype"),
        (drawn(3, 2), drawn(4, 2), {"k": 5}, "k: expected 1 to 4 neighbours, got 5"),
        (drawn(3, 2), drawn(4, 2), {"k": 0}, "k: expected 1 to 4 neighbours, got 0"),
        (drawn(4, 2), drawn(4, 2), {"k": 4, "exclude_self": True}, "k: expected 1 to 3"),
        (drawn(3, 2), drawn(4, 2), {"k": 1, "exclude_self": True}, "x: expected the 4 points"),
    ],
)
def test_what_is_refused(x, y, options, message):
    with pytest.raises(ValueError, match=message):
        knn(x, y, **options)
