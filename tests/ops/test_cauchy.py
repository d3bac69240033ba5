"""`cauchy` against dense sums and generating functions, and what torch asks of an operator."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from torchzoo.ops import cauchy

DOUBLE = torch.complex128
OP = torch.ops.torchzoo.cauchy.default
TOLERANCE = {torch.complex128: 1e-12, torch.complex64: 1e-5}


def dense(v, z, w, conj):
    v, z, w = (t.detach().numpy().astype(np.complex128) for t in (v, z, w))
    y = (v[..., None, :] / (z[..., :, None] - w[..., None, :])).sum(-1)
    if conj:
        y = y + (v.conj()[..., None, :] / (z[..., :, None] - w.conj()[..., None, :])).sum(-1)
    return y


def problem(shapes=((2, 3), (3,), (3,)), states=5, nodes=9, dtype=DOUBLE, seed=0):
    """Residues, nodes on the imaginary axis, and poles left of it."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=DOUBLE, generator=generator)

    v, z, w = normal(*shapes[0], states), normal(*shapes[1], nodes), normal(*shapes[2], states)
    z = torch.complex(torch.zeros_like(z.real), 20 * z.real)
    w = torch.complex(-0.3 - w.real.abs(), 20 * w.imag)
    return [t.to(dtype) for t in (v, z, w)]


@pytest.mark.claim(62, "The Cauchy operator equals dense sums", tolerance=1e-5)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@settings(max_examples=30, deadline=None)
@given(
    shapes=st.sampled_from(
        [
            ((), (), ()),
            ((3,), (), (3,)),
            ((2, 3), (3,), (3,)),
            ((3,), (2, 1), (3,)),
            ((0,), (), (1,)),
        ]
    ),
    states=st.sampled_from([0, 1, 3, 8, 17]),
    nodes=st.sampled_from([0, 1, 7, 16, 100]),
    conj=st.booleans(),
    seed=st.integers(0, 9),
)
def test_equals_dense_sums(dtype, shapes, states, nodes, conj, seed):
    v, z, w = problem(shapes, states, nodes, dtype, seed)
    y, expected = cauchy(v, z, w, conj=conj), dense(v, z, w, conj)
    assert y.shape == expected.shape
    assert y.dtype == dtype
    size = np.abs(expected).max(initial=0.0)
    assert np.abs(y.numpy() - expected).max(initial=0.0) <= TOLERANCE[dtype] * size


@pytest.mark.claim(
    62,
    "Cauchy sums at the roots of unity are the transform of a diagonal system's kernel",
    tolerance=1e-10,
)
def test_equals_the_transform_of_a_dense_kernel():
    length, states, dt = 64, 6, 0.1
    generator = torch.Generator().manual_seed(0)
    A = torch.complex(-0.5 * torch.ones(states).double(), torch.pi * torch.arange(states).double())
    CB = torch.randn(states, dtype=DOUBLE, generator=generator)
    a_bar = (1 + dt / 2 * A) / (1 - dt / 2 * A)
    b_bar = dt / (1 - dt / 2 * A)
    kernel = 2 * (CB * b_bar * a_bar ** torch.arange(length)[:, None]).sum(-1).real
    # with g = 2 / dt (1 - omega) / (1 + omega), the transform of the kernel is
    # 2 / (1 + omega) sum_n C_n B_n (1 - a_bar_n^L) / (g - A_n)
    omega = torch.exp(-2j * torch.pi * torch.arange(length).to(DOUBLE) / length)
    omega[length // 2] += 1e-9  # where g has its pole
    g = 2 / dt * (1 - omega) / (1 + omega)
    spectrum = 2 / (1 + omega) * cauchy(CB * (1 - a_bar**length), g, A)
    kept = torch.arange(length) != length // 2
    expected = torch.fft.fft(kernel.to(DOUBLE))
    torch.testing.assert_close(spectrum[kept], expected[kept], atol=1e-10, rtol=0)


def test_halves_of_conjugate_pairs_equal_the_full_sum():
    v, z, w = problem()
    both = [torch.cat([t, t.conj()], -1) for t in (v, w)]
    full = cauchy(both[0], z, both[1], conj=False)
    torch.testing.assert_close(cauchy(v, z, w), full, atol=1e-12, rtol=0)


@pytest.mark.claim(62, "cauchy has the gradients of finite differences", tolerance=1e-6)
@pytest.mark.parametrize("conj", [True, False])
def test_gradcheck(conj):
    shapes = ((2,), (), (1,)) if conj else ((), (), ())
    leaves = [t.requires_grad_() for t in problem(shapes, 2, 2)]
    assert gradcheck(lambda *t: cauchy(*t, conj=conj), leaves)
    assert gradgradcheck(lambda *t: cauchy(*t, conj=conj), leaves)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_gradients_equal_those_of_the_dense_formula(dtype):
    tensors = problem(states=21, nodes=40, dtype=dtype)
    leaves = [t.requires_grad_() for t in tensors]
    exact = [t.detach().to(DOUBLE).requires_grad_() for t in tensors]
    v, z, w = exact
    terms = v[..., None, :] / (z[..., :, None] - w[..., None, :])
    terms = terms + v.conj()[..., None, :] / (z[..., :, None] - w.conj()[..., None, :])
    grad = torch.randn(2, 3, 40, dtype=DOUBLE)
    expected = torch.autograd.grad(terms.sum(-1), exact, grad)
    found = torch.autograd.grad(cauchy(*leaves), leaves, grad.to(dtype))
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= TOLERANCE[dtype] * b.abs().max()


@pytest.mark.parametrize("power", [1, 2])
def test_opcheck(power):
    v, z, w = (torch.view_as_real(t).requires_grad_() for t in problem(((3,),) * 3, 4, 5))
    torch.library.opcheck(OP, (v, z, w, power))


def test_threads_do_not_change_a_bit():
    threads, results = torch.get_num_threads(), []
    tensors = problem(states=33, nodes=700, dtype=torch.complex64)
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(cauchy(*tensors))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_autocast_leaves_it_in_float32():
    tensors = problem(dtype=torch.complex64)
    with torch.autocast("cpu", torch.bfloat16):
        found = cauchy(*tensors)
    assert torch.equal(found, cauchy(*tensors))


def test_compiles_in_one_graph():
    leaves = [t.requires_grad_() for t in problem()]
    compiled = torch.compile(cauchy, fullgraph=True, backend="aot_eager")
    found, expected = compiled(*leaves), cauchy(*leaves)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(y.abs().square().sum(), leaves) for y in (found, expected)]
    torch.testing.assert_close(*grads)


def test_vmap_and_meta():
    v, z, w = problem()
    found = torch.func.vmap(lambda v: cauchy(v, z, w))(v)
    torch.testing.assert_close(found, cauchy(v, z, w))
    assert cauchy(*(t.to("meta") for t in (v, z, w))).shape == (2, 3, 9)


def test_forward_mode_is_refused():
    v, z, w = problem()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(v, torch.ones_like(v))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            cauchy(dual, z, w)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.ones(2, 5)}, r"v: expected complex numbers .* got torch.float32 \(2, 5\)"),
        ({"z": torch.tensor(1j)}, r"z: expected complex numbers of at least 1 dimension"),
        ({"w": torch.ones(4, dtype=DOUBLE)}, r"w: expected \(..., 5\), as v, got \(4,\)"),
        ({"w": torch.ones(4, 5, dtype=DOUBLE)}, r"leading dimensions that broadcast"),
        ({"z": torch.ones(3, 9, dtype=DOUBLE, device="meta")}, r"z: expected it on cpu"),
    ],
)
def test_bad_input(change, message):
    arguments = dict(zip("vzw", problem(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        cauchy(**arguments)
