"""The sparse-sparse linear layer against the dense layer that it stands for."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

from torchzoo.sparsity.smash import SparseSparseLinear

PATTERN = [[0, 2], [], [1, 2, 4], [4]]


def sparse_input(rows=6, columns=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return torch.where(torch.rand(rows, columns, generator=generator) < 0.4, x, 0.0)


@pytest.mark.claim(
    135, "The layer on sparse inputs equals the dense one on the stored entries", tolerance=1e-12
)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_dense_layer(bias):
    layer = SparseSparseLinear(5, 4, pattern=PATTERN, bias=bias, dtype=torch.float64)
    x = sparse_input()
    weight = layer.to_dense()
    dense = F.linear(x, weight, layer.bias)
    kept = ((x != 0).double() @ (weight != 0).double().T) > 0
    for given in (x.to_sparse_csr(), x.to_sparse_coo()):
        y = layer(given)
        assert y.layout == torch.sparse_csr
        stored = torch.zeros_like(kept)
        rows = torch.repeat_interleave(y.crow_indices().diff())
        stored[rows, y.col_indices()] = True
        assert torch.equal(stored, kept)
        torch.testing.assert_close(y.to_dense(), dense * kept, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(x), dense, rtol=0, atol=0)


@pytest.mark.claim(135, "Its gradients equal finite differences, for weights and sparse inputs")
def test_gradients():
    layer = SparseSparseLinear(5, 4, pattern=PATTERN, dtype=torch.float64)
    x = sparse_input().to_sparse_csr()
    crow, col = x.crow_indices(), x.col_indices()

    def values(x_values, weight, bias):
        given = torch.sparse_csr_tensor(crow, col, x_values, x.shape)
        parameters = {"weight": weight, "bias": bias}
        return torch.func.functional_call(layer, parameters, given).values()

    leaves = [t.detach().clone().requires_grad_() for t in (x.values(), *layer.parameters())]
    assert gradcheck(values, leaves)


def test_depth_keeps_sparsity_and_learns():
    """Two layers are a product of three sparse matrices, and gradients reach both."""
    first = SparseSparseLinear(5, 4, pattern=PATTERN, bias=False, dtype=torch.float64)
    second = SparseSparseLinear(4, 3, pattern=[[0], [2, 3], [1]], bias=False, dtype=torch.float64)
    x = sparse_input()
    y = second(first(x.to_sparse_csr()))
    expected = x @ first.to_dense().T @ second.to_dense().T
    torch.testing.assert_close(y.to_dense(), expected, rtol=0, atol=1e-12)
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    rows = torch.repeat_interleave(y.crow_indices().diff())
    loss = (y.values() * upstream[rows, y.col_indices()]).sum()
    ours = torch.autograd.grad(loss, [first.weight, second.weight])
    dense = torch.autograd.grad((expected * upstream).sum(), [first.weight, second.weight])
    for one, two in zip(ours, dense, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


def test_patterns():
    dense = torch.zeros(4, 5)
    for output, reads in enumerate(PATTERN):
        dense[output, reads] = 1.0
    for pattern in (dense, dense.bool(), dense.to_sparse(), dense.to_sparse_csr()):
        layer = SparseSparseLinear(5, 4, pattern=pattern)
        assert torch.equal(layer.to_dense() != 0, dense != 0)
        assert torch.equal(layer.to_csr().to_dense(), layer.to_dense().T)
    bound = 1 / torch.tensor([2.0, 1.0, 3.0, 1.0]).sqrt()
    assert (layer.to_dense().abs() <= bound[:, None]).all()
    assert (layer.bias.abs() <= bound).all()


def test_from_linear_keeps_the_weights_above_the_threshold():
    linear = nn.Linear(7, 3)
    layer = SparseSparseLinear.from_linear(linear, threshold=0.2)
    kept = linear.weight.abs() > 0.2
    assert torch.equal(layer.to_dense(), torch.where(kept, linear.weight, 0.0))
    assert torch.equal(layer.bias, linear.bias)
    assert SparseSparseLinear.from_linear(nn.Linear(7, 3, bias=False)).bias is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_features": 0}, "in_features: expected a number ≥ 1, got 0"),
        ({"pattern": [[0]]}, "pattern: expected a list for each of 4, got 1"),
        ({"pattern": [[0], [5], [], []]}, r"pattern: expected inputs in \[0, 5\), got 5"),
        ({"pattern": [[0, 0], [], [], []]}, "pattern: an output reads an input twice"),
        ({"pattern": torch.ones(3, 5)}, r"pattern: expected shape \(4, 5\), got \(3, 5\)"),
    ],
)
def test_bad_options(change, message):
    with pytest.raises(ValueError, match=message):
        SparseSparseLinear(**{"in_features": 5, "out_features": 4, "pattern": PATTERN} | change)


def test_bad_input():
    layer = SparseSparseLinear(5, 4, pattern=PATTERN)
    with pytest.raises(ValueError, match="x: expected last dimension 5, got shape"):
        layer(torch.ones(2, 6).to_sparse_csr())
