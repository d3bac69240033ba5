"""The KAN layer equals its formula, whole and in tiles, and keeps little for the backward pass."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.interpolate import BSpline
from torch import nn

import torchzoo.activations.kan as kan
from torchzoo.activations import BSplineBasis, ChebyshevBasis, KANLinear, WaveletBasis


def numbers(*shape, low=-1.0, high=1.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (low + (high - low) * torch.rand(shape, generator=generator)).to(dtype)


def layer_and_input(basis="bspline", rows=37, **options):
    torch.manual_seed(0)
    layer = KANLinear(5, 4, basis, **{"dtype": torch.float64, **options})
    return layer, numbers(rows, 5)


def test_the_layer_is_the_sum_over_edges():
    layer, x = layer_and_input()
    knots = -1 + 0.4 * np.arange(-3, 9)
    expected = np.zeros((37, 4))
    for i in range(5):
        splines = BSpline.design_matrix(x[:, i].numpy(), knots, 3).toarray()
        silu = x[:, i].numpy() / (1 + np.exp(-x[:, i].numpy()))
        for o in range(4):
            spline = splines @ layer.coef[o, i].detach().numpy()
            expected[:, o] += spline + layer.base[o, i].item() * silu
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=0, atol=1e-12)
    edges = layer.edges(x)
    assert edges.shape == (37, 4, 5)
    np.testing.assert_allclose(edges.sum(-1).detach().numpy(), expected, rtol=0, atol=1e-12)


def test_without_a_base_branch_and_with_another():
    layer, x = layer_and_input(base_weight=False)
    assert layer.base is None
    torch.testing.assert_close(layer(x), torch.einsum("nik,oik->no", layer.basis(x), layer.coef))
    other, _ = layer_and_input(base_activation=nn.Tanh())
    other.load_state_dict(layer.state_dict() | {"base": torch.ones(4, 5)})
    torch.testing.assert_close(other(x) - layer(x), x.tanh().sum(-1, keepdim=True).expand(-1, 4))


def test_initial_scale():
    layer = KANLinear(100, 200, "bspline")
    assert layer.coef.std().item() == pytest.approx(0.1 / 10, rel=0.02)
    assert layer.coef.mean().abs().item() < 1e-4
    assert layer.base.abs().max().item() == pytest.approx(0.1, rel=0.01)


def results(layer, x, upstream):
    x = x.clone().requires_grad_()
    y = layer(x)
    layer.zero_grad()
    y.backward(upstream)
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]


@pytest.mark.claim(
    10,
    "A KAN layer computed in tiles equals the one computed at once, gradients too",
    tolerance=1e-5,
)
@pytest.mark.parametrize("basis", ["bspline", "wavelet", "gram"])
@pytest.mark.parametrize("rows", [1, 8, 9, 37])
def test_tiles_change_nothing(basis, rows, monkeypatch):
    layer, _ = layer_and_input(basis, dtype=torch.float32)
    x, upstream = numbers(rows, 5, dtype=torch.float32), torch.randn(rows, 4)
    at_once = results(layer, x, upstream)
    monkeypatch.setattr(kan, "TILE", 4 * 5 * layer.basis.num_basis)  # four rows a tile
    for tiled, whole in zip(results(layer, x, upstream), at_once, strict=True):
        torch.testing.assert_close(tiled, whole, rtol=1e-5, atol=1e-5)


def test_a_float32_layer_equals_the_plain_recursion_in_value_and_gradient():
    """The layer as it is mostly written: Cox and de Boor's recursion over all knots."""
    layer, _ = layer_and_input(rows=1, dtype=torch.float32)
    x = numbers(300, 5, low=-0.99, high=0.99, dtype=torch.float32).requires_grad_()
    knots = torch.arange(-3, 9) * 0.4 - 1

    def plain(x):
        column = x.unsqueeze(-1)
        values = ((column >= knots[:-1]) & (column < knots[1:])).float()
        for d in range(1, 4):
            rise = (column - knots[: -d - 1]) / (knots[d:-1] - knots[: -d - 1])
            fall = (knots[d + 1 :] - column) / (knots[d + 1 :] - knots[1:-d])
            values = rise * values[..., :-1] + fall * values[..., 1:]
        return F.linear(values.flatten(-2), layer.coef.flatten(-2)) + F.linear(
            F.silu(x), layer.base
        )

    upstream = torch.randn(300, 4)
    names = [x, layer.coef, layer.base]
    ours = torch.autograd.grad(layer(x), names, upstream)
    theirs = torch.autograd.grad(plain(x), names, upstream)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-5, atol=1e-5)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


class Saved:
    """Counts the numbers that autograd keeps while it is open."""

    def __enter__(self):
        self.sizes = {}
        pack = lambda t: self.sizes.update({t.untyped_storage().data_ptr(): t.numel()}) or t  # noqa: E731
        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    @property
    def total(self):
        return sum(self.sizes.values())


def test_tiles_keep_only_the_input(monkeypatch):
    monkeypatch.setattr(kan, "TILE", 2**14)
    rows, width, out = 4096, 16, 8
    x = torch.rand(rows, width, requires_grad=True)
    tiled = KANLinear(width, out, "bspline")
    whole = KANLinear(width, out, "bspline", fused=False)
    with Saved() as kept:
        y = whole(x)
    assert kept.total > rows * width * 8
    with Saved() as kept:
        y = tiled(x)
    weights = sum(p.numel() for p in tiled.parameters())
    assert kept.total <= rows * (width + out) + 2 * weights
    y.sum().backward()


def test_tiles_compile_without_a_break(monkeypatch):
    layer, x = layer_and_input(rows=12)
    monkeypatch.setattr(kan, "TILE", 4 * 5 * 8)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    upstream = torch.randn(12, 4, dtype=torch.float64)
    expected = results(layer, x, upstream)
    y = compiled(x.clone().requires_grad_())
    layer.zero_grad()
    y.backward(upstream)
    torch.testing.assert_close(y.detach(), expected[0])
    torch.testing.assert_close(layer.coef.grad, expected[2])
    torch.compiler.reset()


def test_second_derivatives_through_tiles(monkeypatch):
    layer, x = layer_and_input(rows=9)
    monkeypatch.setattr(kan, "TILE", 4 * 5 * 8)
    assert torch.autograd.gradgradcheck(layer, (x.requires_grad_(),))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-4), (torch.bfloat16, 3e-3)])
def test_half_precision_finds_the_place_in_the_grid_in_float32(dtype, tolerance):
    layer, x = layer_and_input(rows=500)
    layer, x = layer.to(dtype), x.to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    exact = layer.double()(x.double())  # of the same rounded weights and inputs
    assert (y.double() - exact).norm() / exact.norm() < tolerance


def test_an_updated_grid_keeps_functions_that_both_splines_can_express():
    layer, _ = layer_and_input()
    x = numbers(500, 5)
    # coefficients whose spline is a cubic polynomial, one for each edge: by interpolation
    design = layer.basis(x)
    cubic = numbers(4, 5, 4, seed=3)
    wanted = torch.einsum("nip,oip->noi", x.unsqueeze(-1) ** torch.arange(4), cubic)
    for i in range(5):
        fit = torch.linalg.lstsq(design[:, i], wanted[:, :, i]).solution
        layer.coef.data[:, i] = fit.T
    before = layer(x)
    layer.update_grid(x)
    assert isinstance(layer.basis, BSplineBasis)
    assert layer.basis.knots.shape == (5, 12)
    torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-8)
    layer.update_grid(x**3, margin=0.05)
    torch.testing.assert_close(layer(x**3), layer(x**3))
    assert layer.basis.knots[:, 3].min() > -1.06


def test_an_updated_grid_is_the_least_squares_fit():
    layer, _ = layer_and_input()
    x = numbers(300, 5) ** 3
    old = torch.einsum("nik,oik->noi", layer.basis(x), layer.coef)
    layer.update_grid(x)
    new = torch.einsum("nik,oik->noi", layer.basis(x), layer.coef)
    residual = torch.einsum("noi,nik->oik", new - old, layer.basis(x))  # orthogonal to all splines
    assert (new - old).abs().max() > 1e-4
    assert residual.abs().max() < 1e-9


def test_saved_with_knots_of_its_own(tmp_path):
    layer = KANLinear(5, 4, BSplineBasis(in_features=5))
    layer.update_grid(numbers(100, 5, dtype=torch.float32) ** 3)
    layer.save_pretrained(tmp_path)
    again = KANLinear.from_pretrained(tmp_path)
    x = numbers(10, 5, dtype=torch.float32)
    assert torch.equal(again(x), layer.eval()(x))


def test_regularization_is_size_and_entropy():
    layer, x = layer_and_input(base_weight=False)
    size = np.abs(layer.edges(x).detach().numpy()).mean(0)
    share = size / size.sum()
    entropy = -(share * np.log(share)).sum()
    value = layer.regularization(x, l1=0.3, entropy=0.7).item()
    assert value == pytest.approx(0.3 * size.sum() + 0.7 * entropy, rel=1e-12)
    with torch.no_grad():
        layer.coef.zero_()
        layer.coef[1, 2] = 1.0
    assert layer.regularization(x, l1=0.0).item() == pytest.approx(0, abs=1e-12)
    assert layer.regularization(x, entropy=0.0).item() == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: KANLinear(0, 2), "in_features: expected an integer of at least 1, got 0"),
        (lambda: KANLinear(2, 2, "sine"), "basis: expected one of bspline"),
        (lambda: KANLinear(2, 2, WaveletBasis(3)), "basis: expected one for 2 inputs, got .* 3"),
        (lambda: KANLinear(2, 2)(torch.zeros(4, 3)), r"x: expected .*2\), got"),
        (
            lambda: KANLinear(2, 2, ChebyshevBasis()).update_grid(torch.zeros(4, 2)),
            "basis: expected a BSplineBasis, got ChebyshevBasis",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
