"""The fused softmax of scaled rows against float64 by hand, and what torch asks of an operator."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from torchzoo.activations import sdm_softmax
from torchzoo.ops import _elementwise, library, scaled_softmax
from torchzoo.ops.scaled_softmax import formula, slopes

DOUBLE = torch.float64
# half precision has its gradients from the rounded result
TYPES = {DOUBLE: 2e-14, torch.float32: 4e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SHAPES = [
    *((5,), (1,), (3, 5), (4, 1024), (2, 3, 1300), (7, 1), (2, 2, 33), (300, 2), (1, 40_000)),
    *((0,), (0, 4), (3, 0), (2, 0, 5), (700, 70)),
]
LAYOUTS = ["contiguous", "transposed", "strided", "expanded"]
op, backward = (
    getattr(torch.ops.torchzoo, name).default
    for name in ("scaled_softmax", "scaled_softmax_backward")
)


def problem(shape, dtype, layout="contiguous", seed=0):
    """Rows, scales of either sign with a 0 among them, and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    z, grad = (torch.randn(shape, generator=generator, dtype=DOUBLE).to(dtype) for _ in range(2))
    scale = 2 * torch.randn(shape[:-1], generator=generator, dtype=DOUBLE)
    scale = scale.to(torch.promote_types(dtype, torch.float32))
    if scale.numel() > 2:
        scale.view(-1)[1] = 0
    if layout == "transposed" and z.ndim > 1:
        z, grad = (t.transpose(0, -1).contiguous().transpose(0, -1) for t in (z, grad))
    if layout == "strided":
        z, grad = (t.repeat_interleave(2, -1)[..., ::2] for t in (z, grad))
        scale = scale.unsqueeze(-1).repeat_interleave(2, -1)[..., 0]
    if layout == "expanded" and z.ndim > 1 and z.numel():
        z, scale, grad = (t[:1].expand_as(t) for t in (z, scale, grad))
    return z, scale, grad


def by_hand(z, s, g):
    """The result and the gradients by z and s, in float64 by the definition, a row at a time."""
    rows, count = z.reshape(s.size, z.shape[-1]), z.shape[-1]
    y, dz, ds = np.zeros_like(rows), np.zeros_like(rows), np.zeros(s.size)
    for r, (row, scale, above) in enumerate(
        zip(rows, s.ravel(), g.reshape(s.size, count), strict=True)
    ):
        if not count:
            continue
        powers = np.exp(scale * row - (scale * row).max())
        y[r] = powers / powers.sum()
        by_scaled = y[r] * above - y[r] * (y[r] @ above)  # by the product s z
        dz[r], ds[r] = scale * by_scaled, row @ by_scaled
    return y.reshape(z.shape), dz.reshape(z.shape), ds.reshape(s.shape)


@pytest.mark.claim(141, "The fused operator equals the definition, gradients too", tolerance=4e-6)
@settings(max_examples=80, deadline=None)
@given(
    shape=st.sampled_from(SHAPES) | st.lists(st.integers(0, 9), min_size=1, max_size=4),
    dtype=st.sampled_from(list(TYPES)),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 9),
)
def test_equals_float64_by_hand(shape, dtype, layout, seed):
    z, scale, grad = problem(tuple(shape), dtype, layout, seed)
    before, tolerance = z.clone(), TYPES[dtype]
    y = op(z, scale)
    dz, ds = backward(grad, y, scale, z)
    assert (y.dtype, dz.dtype, ds.dtype) == (dtype, dtype, scale.dtype)
    assert y.is_contiguous()
    expected = by_hand(*(t.double().numpy() for t in (z, scale, grad)))
    exact_y, exact_dz, exact_ds = map(torch.from_numpy, expected)
    tiny = 6e-8 if dtype == torch.float16 else 0.0  # half its smallest number, twice
    torch.testing.assert_close(y.double(), exact_y, rtol=tolerance, atol=tiny)
    # what g − t cancels of is as large as the gradient's largest number
    size = grad.double().abs().amax(-1, keepdim=True) if z.shape[-1] else 0
    away = 4 * (tolerance * exact_y + tiny * (1 + z.shape[-1] * exact_y)) * size
    spread = scale.double().abs().unsqueeze(-1) * away + tolerance * exact_dz.abs() + tiny
    assert ((dz.double() - exact_dz).abs() <= spread).all()
    spread = (z.double().abs() * away).sum(-1) + 10 * tiny
    assert ((ds.double() - exact_ds).abs() <= spread).all()
    assert torch.equal(z, before)
    dz_alone, zero = backward(grad, y, scale, None)
    assert torch.equal(dz_alone, dz)
    assert torch.equal(zero, torch.zeros_like(scale))


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_equals_the_reference(dtype):
    for shape in SHAPES:
        z, scale, grad = problem(shape, dtype)
        close = {"rtol": TYPES[dtype], "atol": TYPES[dtype]}
        y = op(z, scale)
        torch.testing.assert_close(y, formula(z, scale), **close)
        found, expected = backward(grad, y, scale, z), slopes(grad, y, scale, z)
        torch.testing.assert_close(found, expected, **close)


@pytest.mark.claim(
    141, "Neither large logits nor logits of infinity overflow in the operator", tolerance=1e-6
)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_large_and_infinite(dtype):
    inf, top = torch.inf, torch.finfo(dtype).max
    half = 0.5 / top
    rows = [
        ([1.0, -inf, 1.0], 2.0, [0.5, 0.0, 0.5]),
        ([-inf, -inf, 3.0], 1e30, [0.0, 0.0, 1.0]),
        ([inf, 2.0, 2.0], -1.0, [0.0, 0.5, 0.5]),
        ([top, -top, top], 1.0, [0.5, 0.0, 0.5]),
        ([top, -top, -top], -1.0, [0.0, 0.5, 0.5]),
        ([top, -top, 0.0], 0.0, [1 / 3] * 3),
        ([-top, top, top], half, [1 / (1 + 2 * np.e), *[np.e / (1 + 2 * np.e)] * 2]),
        ([1000.0, 1000.0, -1000.0], 1e20, [0.5, 0.5, 0.0]),
        ([1.0, 1.5, 1.0], 1e30, [0.0, 1.0, 0.0]),
    ]
    z = torch.tensor([row for row, _, _ in rows], dtype=dtype)
    scale = torch.tensor([s for _, s, _ in rows], dtype=torch.promote_types(dtype, torch.float32))
    wanted = torch.tensor([y for _, _, y in rows], dtype=DOUBLE)
    y = op(z, scale)
    if library.backend("scaled_softmax")[0] != "native":  # of the formula s z must be finite
        kept = torch.tensor([0, 1, 2, 5, 6, 7, 8])
        y, wanted = y[kept], wanted[kept]
    close = {"rtol": max(TYPES[dtype], 1e-6), "atol": 0.0}
    torch.testing.assert_close(y.double(), wanted, **close)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_nan_where_the_product_has_no_softmax(dtype):
    nan, inf = torch.nan, torch.inf
    rows = [[nan, 1.0], [inf, 1.0], [-inf, -inf], [-inf, 1.0], [-inf, 1.0], [1.0, 2.0], [1.0, 2.0]]
    z = torch.tensor(rows, dtype=dtype)
    scale = torch.tensor([1.0, 1.0, 1.0, 0.0, -1.0, nan, inf])
    scale = scale.to(torch.promote_types(dtype, torch.float32))
    for count in (1, 40):  # the tail of a row, and its vectors
        wide = z.repeat(1, count)
        assert op(wide, scale).isnan().all()
        assert formula(wide, scale).isnan().all()
    z[:, 0] = -inf
    y = op(z, scale)
    assert torch.equal(y.isnan(), formula(z, scale).isnan())


def test_one_row_leaves_the_others_alone():
    z, scale, _ = problem((6, 50), torch.float32)
    y = op(z, scale)
    z[2, 7], scale[4] = torch.nan, torch.inf
    clean = torch.tensor([0, 1, 3, 5])
    assert torch.equal(op(z, scale)[clean], y[clean])


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 2), (5,), (3, 1), (2, 0)])
def test_first_and_second_derivatives(shape):
    z, scale, _ = problem(shape, DOUBLE)
    leaves = (z.requires_grad_(), scale.requires_grad_())
    assert gradcheck(scaled_softmax, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(scaled_softmax, leaves)
    if not z.numel():
        return
    for k in range(2):
        fixed = [t.detach() for t in leaves]
        one = lambda t, k=k, fixed=fixed: scaled_softmax(*fixed[:k], t, *fixed[k + 1 :])  # noqa: E731
        assert gradcheck(one, (leaves[k],))
        assert gradgradcheck(one, (leaves[k],))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [DOUBLE, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 5), (4,), (0, 4), (3, 0)])
def test_opcheck(shape, dtype, layout):
    z, scale, grad = problem(shape, dtype, layout)
    y = op(z, scale)
    torch.library.opcheck(backward, (grad, y, scale, z))
    torch.library.opcheck(backward, (grad, y, scale, None))
    leaves = (z.detach().requires_grad_(), scale.requires_grad_())
    torch.library.opcheck(op, leaves)
    torch.library.opcheck(op, (leaves[0], scale.detach()))


@pytest.mark.parametrize("dims", [(0, None), (1, 0), (None, 0), (0, 1), (2, 0)])
def test_vmap(dims):
    z, scale = torch.randn(3, 3, 3), torch.randn(3, 3)
    z = z[0] if dims[0] is None else z
    scale = scale[0] if dims[1] is None else scale
    zs = [z] * 3 if dims[0] is None else z.unbind(dims[0])
    scales = [scale] * 3 if dims[1] is None else scale.unbind(dims[1])
    pairs = list(zip(zs, scales, strict=True))
    for call in (scaled_softmax, op):
        expected = torch.stack([call(*pair) for pair in pairs])
        torch.testing.assert_close(torch.func.vmap(call, dims)(z, scale), expected)
    for with_z in (True, False):
        run = lambda z, s, w=with_z: backward(z.sin(), op(z, s), s, z if w else None)  # noqa: E731
        expected = [torch.stack(part) for part in zip(*(run(*p) for p in pairs), strict=True)]
        torch.testing.assert_close(torch.func.vmap(run, dims)(z, scale), tuple(expected))
    grad = torch.func.grad(lambda z, s: scaled_softmax(z, s).sin().sum(), (0, 1))
    expected = [torch.stack(part) for part in zip(*(grad(*p) for p in pairs), strict=True)]
    torch.testing.assert_close(torch.func.vmap(grad, dims)(z, scale), tuple(expected))


@pytest.mark.claim(141, "One thread or two: the same bits", tolerance=0.0)
@pytest.mark.parametrize("shape", [(3000, 100), (37, 5000), (100_001, 3)])
def test_threads(shape):
    state, why = library.backend("scaled_softmax")
    if state != "native":
        pytest.skip(why)
    z, scale, grad = problem(shape, torch.float32)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = op(z, scale)
            results.append((y, *backward(grad, y, scale, z)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_every_element_is_written():
    torch.use_deterministic_algorithms(True)  # memory that is not written holds NaN
    try:
        for shape in SHAPES:
            z, scale, grad = problem(shape, torch.float32)
            y = op(z, scale)
            for kept in (z, None):
                found = (y, *backward(grad, y, scale, kept))
                assert not any(value.isnan().any() for value in found)
    finally:
        torch.use_deterministic_algorithms(False)


def test_backward_keeps_the_rows_only_for_the_scale():
    z, scale, grad = problem((3, 4), torch.float32)
    for trained in (False, True):
        kept = []

        def pack(t, kept=kept):
            kept.append(t.data_ptr())
            return t

        leaf = scale.clone().requires_grad_(trained)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = scaled_softmax(z.requires_grad_(), leaf)
        assert (z.data_ptr() in kept) == trained
        y.backward(grad)
        assert (leaf.grad is not None) == trained


@pytest.mark.parametrize("large", [True, False])
def test_compiled(large, monkeypatch):
    """Large ones stay the operator in a compiled graph, small ones are left to the compiler."""
    monkeypatch.setattr(_elementwise, "LARGE", 0 if large else 1000)
    z, scale, grad = problem((9, 5), DOUBLE)
    leaves, targets = [z.requires_grad_(), scale.requires_grad_()], set()

    def backend(graph, inputs):
        targets.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compiler.reset()
    found = torch.compile(scaled_softmax, backend=backend, fullgraph=True)(z, scale)
    torch.testing.assert_close(found, scaled_softmax(z, scale))
    assert any("torchzoo" in target for target in targets) == large
    torch.compiler.reset()
    compiled = torch.compile(scaled_softmax, backend="aot_eager", fullgraph=True)
    found, expected = (
        torch.autograd.grad(call(z, scale), leaves, grad) for call in (compiled, scaled_softmax)
    )
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_meta_autocast_and_types():
    z, scale, grad = problem((2, 3), torch.float32)
    assert scaled_softmax(z.to("meta"), scale.to("meta")).shape == (2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(scaled_softmax(z, scale), formula(z, scale))
        assert scaled_softmax(z.bfloat16(), scale).dtype == torch.bfloat16
    other = scale.double().requires_grad_()
    y = scaled_softmax(z, other)
    y.backward(grad)
    assert (y.dtype, other.grad.dtype) == (torch.float32, DOUBLE)
    counts = torch.tensor([1, 2])
    torch.testing.assert_close(scaled_softmax(z, counts), (z * counts[:, None]).softmax(-1))


def test_the_activation_goes_through_it():
    z, _, grad = problem((6, 5), DOUBLE)
    q, d = torch.arange(6.0), torch.linspace(0, 1, 6, dtype=DOUBLE)
    leaves = [z.requires_grad_(), d.requires_grad_()]
    y = sdm_softmax(z, q, d)
    assert "scaled_softmax" in y.grad_fn.name()
    expected = (z * (d * (2 + q.double()).log())[:, None]).softmax(-1)
    torch.testing.assert_close(y, expected)
    found, wanted = (torch.autograd.grad(out, leaves, grad) for out in (y, expected))
    torch.testing.assert_close(found, wanted)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuda_equals_the_reference(dtype, layout):
    for shape in [*SHAPES, (8192, 1024), (3, 100_000)]:
        z, scale, grad = problem(shape, dtype, layout)
        close = {"rtol": 2 * TYPES[dtype], "atol": TYPES[dtype]}
        on_device = [t.cuda() for t in (z, scale, grad)]
        y = op(*on_device[:2])
        torch.testing.assert_close(y.cpu(), formula(z, scale), **close)
        found, again = (backward(on_device[2], y, on_device[1], on_device[0]) for _ in range(2))
        assert all(torch.equal(one, two) for one, two in zip(found, again, strict=True))
        expected = slopes(grad, y.cpu(), scale, z)
        torch.testing.assert_close(found[0].cpu(), expected[0], **close)
        torch.testing.assert_close(found[1].cpu(), expected[1], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("z", "scale", "message"),
    [
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(2), "z: expected floating point"),
        (torch.tensor(1.0), torch.ones(()), r"z: expected .* got torch.float32 \(\)"),
        (torch.ones(2, 3), torch.ones(3), r"scale: .* last axis, \(2,\), got \(3,\)"),
        (torch.ones(2, 3), torch.ones(2, 1), r"scale: .* got \(2, 1\)"),
        (torch.ones(2, 3), torch.ones(()), r"scale: .* got \(\)"),
        (torch.ones(2, 3), torch.ones(2, device="meta"), "scale: .* on cpu, .* on meta"),
        (torch.ones(2, 3), torch.ones(2) + 1j, "scale: expected real .*complex"),
    ],
)
def test_bad_input(z, scale, message):
    with pytest.raises(ValueError, match=message):
        scaled_softmax(z, scale)


def test_kernels_refuse_what_they_would_misread():
    if library.backend("scaled_softmax")[0] != "native":
        pytest.skip("the reference needs no such checks")
    z, scale, grad = problem((3, 4), torch.float32)
    y = op(z, scale)
    for bad in (scale.double(), scale[:2], scale[:, None]):
        with pytest.raises(RuntimeError, match="scale"):
            op(z, bad)
    for above, rows in ((grad[:2], z), (grad.double(), z), (grad, z[:, :3]), (grad, z.double())):
        with pytest.raises(RuntimeError, match="gradient"):
            backward(above, y, scale, rows)
