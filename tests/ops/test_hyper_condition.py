"""`hyper_condition` against a loop in numpy, its gradients, and what torch asks of an operator."""

import math

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad, gradcheck

from torchzoo.ops import hyper_condition
from torchzoo.ops.hyper_condition import condition, solve_lower, solve_upper, unpack

DOUBLE = torch.float64


def inputs(*lead, num=5, d=4, m=3, shared=False, dtype=DOUBLE, seed=0):
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=random, dtype=DOUBLE).to(dtype)

    z = draw(*lead, 1 if shared else num, d)
    raw = 0.5 * draw(num, m * (m + 1) // 2)
    return z, draw(num, m), draw(num, d), raw, draw(num, d, m)


def lower(raw, m):
    """L11 of one item, entry by entry."""
    full, entries = np.zeros((m, m)), iter(raw.tolist())
    for i in range(m):
        for j in range(i + 1):
            value = next(entries)
            full[i, j] = math.exp(value) if i == j else value
    return full


@pytest.mark.claim(
    63,
    "The conditional mean is mu_o - L11^-T L21^T (z - mu_i), item by item as numpy solves it",
    tolerance=1e-12,
)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("shared", [False, True])
def test_is_the_formula_item_by_item(m, shared):
    z, mean_out, mean_latent, raw, l21 = inputs(2, m=m, shared=shared)
    found = hyper_condition(z, mean_out, mean_latent, raw, l21)
    assert found.shape == (2, 5, m)
    for n in range(5):
        l11 = lower(raw[n], m)
        for b in range(2):
            offset = (z[b, 0 if shared else n] - mean_latent[n]).numpy()
            x = np.linalg.solve(l11.T, l21[n].numpy().T @ offset)
            expected = mean_out[n].numpy() - x
            np.testing.assert_allclose(found[b, n].numpy(), expected, rtol=1e-12, atol=1e-12)


def test_solves():
    (_, _, _, raw, _), m = inputs(m=4), 4
    t = torch.randn(m, 3, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(3))
    upper, below = solve_upper(unpack(raw, m), t), solve_lower(unpack(raw, m), t)
    for n in range(5):
        l11 = torch.from_numpy(lower(raw[n], m))
        torch.testing.assert_close(l11.T @ upper[..., n], t[..., n], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(l11 @ below[..., n], t[..., n], rtol=1e-12, atol=1e-12)


@pytest.mark.claim(
    63,
    "The conditional mean's gradients by latents and all parameters are those of differences",
    tolerance=1e-6,
)
@pytest.mark.parametrize(("m", "shared"), [(1, False), (2, True), (3, True), (4, False)])
def test_gradients(m, shared):
    given = [x.requires_grad_() for x in inputs(2, num=3, d=2, m=m, shared=shared)]
    assert gradcheck(hyper_condition, given, atol=1e-6, rtol=1e-6)


@pytest.mark.claim(
    63,
    "The operator, whose backward pass is written out, agrees in single precision with its formula",
    tolerance=1e-6,
)
@pytest.mark.parametrize("shared", [False, True])
def test_operator_is_its_reference(shared):
    given = inputs(3, num=40, d=8, m=4, shared=shared)
    weight = torch.randn(3, 40, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    results = []
    for function, dtype in ((hyper_condition, torch.float32), (condition, DOUBLE)):
        leaves = [x.to(dtype).requires_grad_() for x in given]
        value = function(*leaves)
        gradients = torch.autograd.grad((value * weight.to(dtype)).sum(), leaves)
        results.append([value.detach(), *gradients])
    for found, exact in zip(*results, strict=True):
        assert (found - exact).norm() <= 1e-6 * exact.norm()


def test_leading_dimensions_and_none():
    z, *rest = inputs(2, 3)
    found = hyper_condition(z, *rest)
    assert found.shape == (2, 3, 5, 3)
    torch.testing.assert_close(hyper_condition(z[1, 2], *rest), found[1, 2], rtol=0, atol=1e-14)
    assert hyper_condition(z[:0], *rest).shape == (0, 3, 5, 3)
    none = [x.requires_grad_() for x in inputs(2, num=0)]
    hyper_condition(*none).sum().backward()
    assert all(x.grad.shape == x.shape for x in none)


def test_half_precision_is_computed_in_single():
    given = inputs(2, dtype=torch.bfloat16)
    found = hyper_condition(*given)
    assert found.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        again = hyper_condition(*(x.float() for x in given))
    assert torch.equal(found, again)


def test_forward_mode_is_refused():
    z, *rest = inputs(2)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="hyper_condition"):
        hyper_condition(forward_ad.make_dual(z, torch.ones_like(z)), *rest)


@pytest.mark.parametrize(
    ("which", "shape", "words"),
    [
        (0, (2, 4, 4), r"z: got \(2, 4, 4\), expected .*N=5, m=3, d=4"),
        (0, (4,), "z: got"),
        (1, (5, 0), "mean_out: got"),
        (2, (1, 4), "mean_latent: got"),
        (3, (5, 3), "raw_l11: got"),
        (4, (5, 3, 4), "l21: got"),
    ],
)
def test_what_does_not_fit(which, shape, words):
    given = list(inputs(2))
    given[which] = torch.zeros(shape, dtype=DOUBLE)
    with pytest.raises(ValueError, match=words):
        hyper_condition(*given)


@pytest.mark.claim(
    63, "The operator passes torch's own checks and compiles into one graph", tolerance=None
)
@pytest.mark.parametrize("shared", [False, True])
def test_torch_accepts_the_operator(shared):
    given = [x.requires_grad_() for x in inputs(2, shared=shared)]
    torch.library.opcheck(torch.ops.torchzoo.hyper_condition.default, given)
    z, _, *rest = (x.detach() for x in given)
    tests = ("test_schema", "test_faketensor")
    back = (z, *rest, torch.randn(2, 5, 3, dtype=DOUBLE))
    op = torch.ops.torchzoo.hyper_condition_backward.default
    torch.library.opcheck(op, back, test_utils=tests)
    compiled = torch.compile(hyper_condition, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), hyper_condition(*given))
    torch.compiler.reset()


def test_many_components_take_the_reference():
    given = inputs(2, num=3, m=70)
    torch.testing.assert_close(hyper_condition(*given), condition(*given), rtol=0, atol=0)


def values_and_gradients(given, device="cpu"):
    leaves = [x.to(device).requires_grad_() for x in given]
    found = hyper_condition(*leaves)
    return [x.cpu() for x in (found.detach(), *torch.autograd.grad(found.sin().sum(), leaves))]


@pytest.mark.parametrize("m", [1, 3, 4, 7])
@pytest.mark.parametrize("shared", [False, True])
def test_threads_change_no_bit(m, shared):
    given = inputs(2, num=3000, d=17, m=m, shared=shared, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = values_and_gradients(given)
        torch.set_num_threads(2)
        two = values_and_gradients(given)
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, one, two))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("m", [1, 2, 3, 4, 7, 64])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_devices_agree(m, shared, dtype):
    given = inputs(3, num=300, d=37, m=m, shared=shared, dtype=dtype)
    given = (*given[:3], given[3] / m, given[4])
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    for host, device in zip(
        values_and_gradients(given), values_and_gradients(given, "cuda"), strict=True
    ):
        assert (host - device).norm() <= tolerance * host.norm()
