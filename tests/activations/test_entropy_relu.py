"""CRReLU against its closed form in float64."""

import io
import math

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from torchzoo.activations import CRReLU, crrelu

DOUBLE = torch.float64


def by_hand(x, eps):
    """Element by element with Python's own numbers."""
    return torch.tensor(
        [max(0.0, v) + eps * v * math.exp(-v * v / 2) for v in x.tolist()], dtype=DOUBLE
    )


@pytest.mark.claim(
    3, "With eps = 0 CRReLU equals torch.relu bitwise on finite input", tolerance=0.0
)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.bfloat16, torch.float16])
def test_without_correction_it_is_relu(dtype):
    top = torch.finfo(dtype).max
    special = torch.tensor([0.0, -0.0, top, -top, torch.finfo(dtype).tiny], dtype=dtype)
    x = torch.cat([special, torch.randn(1003, dtype=DOUBLE).mul(3).to(dtype)])
    y = crrelu(x, 0.0)
    assert torch.equal(y, x.relu())
    assert torch.equal(y[5:].view(torch.uint8), x[5:].relu().view(torch.uint8))


@pytest.mark.claim(3, "Infinity gives infinity and minus infinity 0, for any eps", tolerance=0.0)
@pytest.mark.parametrize("eps", [0.0, 0.01, -3.0])
def test_infinities(eps):
    x = torch.tensor([torch.inf, -torch.inf], requires_grad=True)
    size = torch.tensor(eps, requires_grad=True)
    y = crrelu(x, size)
    assert y.tolist() == [torch.inf, 0.0]
    y.backward(torch.ones(2))
    assert x.grad.tolist() == [1.0, 0.0]
    assert size.grad.item() == 0.0


@pytest.mark.claim(
    3, "At -1, 0, 1, 2 and eps = 0.01: -0.0060653, 0, 1.0060653, 2.0027067", tolerance=1e-7
)
def test_values():
    x = torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=DOUBLE)
    expected = torch.tensor([-0.0060653, 0.0, 1.0060653, 2.0027067], dtype=DOUBLE)
    torch.testing.assert_close(CRReLU(dtype=DOUBLE)(x), expected, rtol=0, atol=1e-7)


def test_by_hand():
    x = torch.linspace(-6, 6, 401, dtype=DOUBLE)
    for eps in (0.01, -0.7, 2.5):
        torch.testing.assert_close(crrelu(x, eps), by_hand(x, eps), rtol=1e-14, atol=1e-15)
    single = crrelu(x.float(), -0.7).double()
    torch.testing.assert_close(single, by_hand(x.float().double(), -0.7), rtol=3e-7, atol=1e-7)


@pytest.mark.claim(
    3, "The correction's extremes are at x = -1 and 1, of size 0.6065 eps", tolerance=1e-4
)
def test_extremes():
    x = torch.linspace(-6, 6, 12001, dtype=DOUBLE)
    correction = crrelu(x, 1.0) - x.relu()
    assert x[correction.argmax()].item() == pytest.approx(1, abs=1e-3)
    assert x[correction.argmin()].item() == pytest.approx(-1, abs=1e-3)
    assert correction.max().item() == pytest.approx(math.exp(-0.5), abs=1e-4)
    assert correction.min().item() == pytest.approx(-math.exp(-0.5), abs=1e-4)


@pytest.mark.claim(3, "gradcheck in float64 in x, away from 0, and in eps", tolerance=1e-6)
@pytest.mark.parametrize("shape", [(), (1,), (4,)])
def test_gradcheck(shape):
    x = torch.randn(3, 4, dtype=DOUBLE)
    x = (x + 0.1 * x.sign()).requires_grad_()
    eps = torch.randn(shape, dtype=DOUBLE, requires_grad=True)
    assert gradcheck(crrelu, (x, eps))


@pytest.mark.claim(
    3,
    "The derivative at 0 is eps, and the gradient of eps is the sum of x exp(-x^2/2)",
    tolerance=1e-12,
)
def test_derivatives():
    x = torch.tensor([0.0, -0.0, 0.5, -2.0], dtype=DOUBLE, requires_grad=True)
    act = CRReLU(0.3, dtype=DOUBLE)
    act(x).sum().backward()
    v = x.detach()
    expected = (v > 0) + 0.3 * (1 - v * v) * (-v * v / 2).exp()
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-12)
    assert x.grad[:2].tolist() == [0.3, 0.3]
    total = (v * (-v * v / 2).exp()).sum()
    torch.testing.assert_close(act.eps.grad, total[None], rtol=0, atol=1e-12)


@pytest.mark.claim(
    3, "Backward keeps x and eps only: saved tensors hold no more bytes than these", tolerance=0.0
)
def test_what_backward_keeps():
    x, saved = torch.randn(64, 16, requires_grad=True), []
    act = CRReLU(num_parameters=16)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append((t.data_ptr(), t.numel())) or t, lambda t: t
    ):
        act(x)
    assert sorted(numel for _, numel in saved) == [16, 64 * 16]
    assert x.data_ptr() in {pointer for pointer, _ in saved}


@pytest.mark.claim(
    3,
    "Half precision gives no NaN up to the type's largest number, in values and gradients",
    tolerance=None,
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    top = torch.finfo(dtype).max
    x = torch.cat([torch.linspace(-8, 8, 999), torch.tensor([top, -top])]).to(dtype)
    x.requires_grad_()
    act = CRReLU(0.5)
    y = act(x)
    y.float().sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert act.eps.grad.isfinite().all()
    exact = by_hand(x.detach().double(), 0.5).to(dtype)
    # float32 inside: but for a rounding on the verge, the value is the exact one, rounded
    ulps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.detach(), exact, rtol=ulps, atol=0)
    assert (y == exact).double().mean() > 0.99


@pytest.mark.claim(3, "torch.compile gives the values and gradients of eager mode", tolerance=1e-6)
def test_compiled():
    x = torch.randn(5, 8)
    act = CRReLU(0.4, num_parameters=8)
    compiled = torch.compile(act, fullgraph=True, backend="aot_eager")
    results = []
    for run in (act, compiled):
        leaf = x.clone().requires_grad_()
        act.eps.grad = None
        y = run(leaf)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad, act.eps.grad))
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


@pytest.mark.claim(3, "The state_dict has one key, eps", tolerance=None)
def test_state_dict():
    for learnable in (True, False):
        act = CRReLU(0.25, num_parameters=3, learnable=learnable)
        assert list(act.state_dict()) == ["eps"]
        assert isinstance(act.eps, nn.Parameter) == learnable
        file = io.BytesIO()
        torch.save(act.state_dict(), file)
        file.seek(0)
        other = CRReLU(num_parameters=3, learnable=learnable)
        other.load_state_dict(torch.load(file))
        assert other.eps.tolist() == [0.25] * 3
    assert CRReLU().eps.tolist() == [pytest.approx(0.01)]
    assert CRReLU().eps.shape == (1,)
    assert isinstance(CRReLU().eps, nn.Parameter)


def test_one_size_for_each_channel():
    x = torch.randn(2, 5, 3, dtype=DOUBLE)
    act = CRReLU(num_parameters=3, dtype=DOUBLE)
    with torch.no_grad():
        act.eps.copy_(torch.tensor([0.0, 1.0, -2.0]))
    y = act(x)
    for c, eps in enumerate((0.0, 1.0, -2.0)):
        torch.testing.assert_close(y[..., c].flatten(), by_hand(x[..., c].flatten(), eps))


def test_in_place():
    x = torch.randn(20)
    expected = CRReLU(0.5)(x.clone()).detach()
    act = CRReLU(0.5, inplace=True)
    with torch.no_grad():
        y = x.clone()
        assert act(y) is y
    assert torch.equal(y, expected)
    leaf = x.clone().requires_grad_()
    act(leaf * 1).sum().backward()
    other = x.clone().requires_grad_()
    CRReLU(0.5)(other).sum().backward()
    assert torch.equal(leaf.grad, other.grad)
    assert "inplace=True" in repr(act)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CRReLU(math.inf), "init: expected a finite number, got inf"),
        (lambda: CRReLU(num_parameters=0), "num_parameters: expected 1 or more, got 0"),
        (lambda: CRReLU(num_parameters=3)(torch.ones(3, 4)), r"x: expected \(..., 3\), got \(3, 4"),
        (lambda: CRReLU(num_parameters=3)(torch.ones(())), r"x: expected \(..., 3\), got \(\)"),
        (lambda: crrelu(torch.ones(3, dtype=torch.long), 0.1), "x: expected a floating-point"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
