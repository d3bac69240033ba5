"""Mixtures of pairs of activations: on the operator or in tiles, the layer stays the same."""

import pytest
import torch

import torchzoo.activations.kan as kan
from tests.activations.test_af_kan import inputs, moved
from torchzoo.activations import AFKANLayer, PairBasis
from torchzoo.activations.af_kan import REDUCTIONS


def with_gradients(layer, x):
    """Outputs, and gradients by the input and all parameters."""
    upstream = torch.randn(*x.shape[:-1], 3, generator=torch.Generator().manual_seed(2)).to(x.dtype)
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], upstream)]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("combine", ["quad1", "sum"])
def test_tiles_change_nothing(reduction, combine, monkeypatch):
    torch.manual_seed(0)
    layer = AFKANLayer(6, 3, reduction=reduction, combine=combine, dtype=torch.float64)
    x = torch.as_tensor(inputs(11, 6)).requires_grad_()
    whole = with_gradients(layer, x)
    monkeypatch.setattr(kan, "TILE", 3 * 6 * 8)
    for one, two in zip(with_gradients(layer, x), whole, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


@pytest.mark.claim(
    8,
    "A layer on the fused operator is that on the tensor formula, gradients too",
    tolerance=1e-10,
)
@pytest.mark.parametrize("reduction", ["global_attn", "multistep"])
@pytest.mark.parametrize("func_norm", ["sample", "batch", "none"])
@pytest.mark.parametrize("shape", [(2, 7, 6), (1, 6), (40, 6), (0, 6)])
def test_operator_is_the_formula(shape, func_norm, reduction, monkeypatch):
    torch.manual_seed(0)
    layer = moved(AFKANLayer(6, 3, reduction=reduction, func_norm=func_norm, dtype=torch.float64))
    x = torch.as_tensor(inputs(*shape, low=-2.0, high=3.0)).requires_grad_()
    assert layer.basis.has_operator()
    found = with_gradients(layer, x)
    monkeypatch.setattr(PairBasis, "has_operator", lambda self: False)
    for one, two in zip(found, with_gradients(layer, x), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{"activation": "gelu"}, {"combine": "quad2"}])
def test_other_pairs_have_no_operator(options):
    assert not PairBasis(**options).has_operator()
    assert not AFKANLayer(6, 3, **options).basis.has_operator()


@pytest.mark.claim(
    8, "What a layer keeps for the backward pass does not grow with the functions", tolerance=0
)
@pytest.mark.parametrize("reduction", ["global_attn", "multistep"])
def test_kept_memory(reduction):
    def kept(grid_size):
        layer, sizes = AFKANLayer(300, 3, grid_size=grid_size, reduction=reduction), {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = layer(torch.rand(50, 300, requires_grad=True))
        y.sum().backward()
        return sum(sizes.values())

    parameters = 4 * (300 - 5) * 5  # shifts, weights of the scores and their copies, at the most
    assert kept(300) - kept(5) <= parameters


def test_the_batch_is_scaled_whole_however_large(monkeypatch):
    layer = AFKANLayer(6, 3, func_norm="batch")
    x = torch.rand(11, 6)
    y = layer(x)
    monkeypatch.setattr(kan, "TILE", 3 * 6 * 8)
    assert torch.equal(layer(x), y)
