"""Sums in log space against logsumexp by terms in float64, and what torch asks of an operator."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from torchzoo.benchmark import peak_bytes
from torchzoo.ops import library, log_einsum_exp, log_einsum_exp2
from torchzoo.ops.log_einsum_exp import _log_einsum_exp, _log_einsum_exp_backward

DOUBLE = torch.float64
INF = torch.inf
TOLERANCE = {DOUBLE: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
tucker = pytest.mark.parametrize("tucker", [False, True], ids=["plain", "tucker"])


def call(operands, w, **options):
    return (log_einsum_exp2 if len(operands) == 2 else log_einsum_exp)(*operands, w, **options)


def pairs(operands):
    """`(F, B, 1, K)` or `(F, B, 1, K1 K2)`."""
    if len(operands) == 1:
        return operands[0][:, :, None]
    a, b = operands
    return (a[..., None] + b[:, :, None]).flatten(2)[:, :, None]


def by_terms(operands, w):
    """The sums, and their slopes by values and weights, each term by itself in float64."""
    operands, w = [x.detach().double() for x in operands], w.detach().double()
    terms = pairs(operands)
    flat = w.flatten(2)[:, None]
    weighted = terms + flat.log()
    out = torch.logsumexp(weighted, -1) if w.shape[-1] else weighted.sum(-1).log()
    below = out.masked_fill(out == -INF, INF)[..., None]
    slopes = (terms - below).exp()
    return out, slopes, (weighted - below).exp()


def gradients_by_terms(operands, w, grad):
    _, slopes, flows = by_terms(operands, w)
    grad = grad.double()[..., None]
    flows = (flows * grad).sum(2).unflatten(-1, [x.shape[2] for x in operands])
    values = [flows.sum(-1), flows.sum(2)] if len(operands) == 2 else [flows]
    return *values, (slopes * grad).sum(1).reshape(w.shape)


def problem(tucker, f=2, b=5, o=3, k=4, dtype=DOUBLE, seed=0, spread=3.0, hard=False):
    """Log-values and weights; where `hard`, many weights are 0 and many values minus infinity."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [k, k + 1] if tucker else [k]
    shapes = [(f, b, size) for size in sizes]
    operands = [spread * torch.randn(s, generator=generator, dtype=DOUBLE) for s in shapes]
    w = torch.rand(f, o, *sizes, generator=generator, dtype=DOUBLE)
    grad = torch.randn(f, b, o, generator=generator, dtype=DOUBLE)
    if hard:
        w = w.masked_fill(torch.rand(w.shape, generator=generator) < 0.6, 0)
        w[:, ::3] *= 1e-30
        operands[-1][torch.rand(shapes[-1], generator=generator) < 0.3] = -INF
        operands[0][:, 1::4] = -INF
    return [x.to(dtype) for x in operands], w.to(dtype), grad.to(dtype)


def assert_near(found, expected, tolerance):
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@tucker
@settings(max_examples=40, deadline=None)
@given(
    f=st.integers(0, 3),
    b=st.integers(0, 14),
    o=st.sampled_from([0, 1, 3, 8, 17, 33]),
    k=st.sampled_from([0, 1, 2, 7, 8, 16, 33]),
    dtype=st.sampled_from(list(TOLERANCE)),
    spread=st.sampled_from([1.0, 170.0]),
    hard=st.booleans(),
    layout=st.sampled_from(["contiguous", "transposed", "strided"]),
    deterministic=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_logsumexp(tucker, f, b, o, k, dtype, spread, hard, layout, deterministic, seed):
    operands, w, _ = problem(tucker, f, b, o, k, dtype, seed, spread, hard)
    if layout == "transposed":
        operands, w = [x.mT.contiguous().mT for x in operands], w.mT.contiguous().mT
    elif layout == "strided":
        operands = [x.repeat_interleave(2, -1)[..., ::2] for x in operands]
        w = w.repeat_interleave(3, 1)[:, ::3]
    expected = by_terms(operands, w)[0]
    out = call(operands, w, deterministic=deterministic)
    assert (out.dtype, out.shape) == (dtype, (f, b, o))
    assert_near(out, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
@tucker
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("sizes", [(2, 5, 3, 4), (1, 200, 33, 20), (70, 9, 8, 17), (1, 20, 2, 300)])
def test_gradients_equal_those_by_terms(tucker, hard, sizes, dtype):
    if tucker and sizes[3] == 300:
        sizes = (1, 4, 2, 270)
    operands, w, grad = problem(tucker, *sizes, dtype=dtype, spread=20.0, hard=hard)
    leaves = [x.requires_grad_() for x in (*operands, w)]
    out = call(operands, w)
    assert (out == -INF).any() == hard
    found = torch.autograd.grad(out, leaves, grad)
    tolerance = {DOUBLE: 1e-11, torch.float32: 1e-4}[dtype]
    expected = gradients_by_terms(operands, w, grad)
    sizes = gradients_by_terms(operands, w, grad.abs())  # rounding is relative to these
    top = torch.tensor(85.0 if dtype == torch.float32 else 700.0, dtype=DOUBLE).exp()
    slopes = gradients_by_terms(operands, w, torch.ones_like(grad))
    for ours, theirs, size, slope in zip(found, expected, sizes, slopes, strict=True):
        assert ours.isfinite().all()
        reported = slope < top  # slopes by weights of zero may be larger than a float
        assert hard or reported.all()
        error = (ours.double() - theirs).abs()[reported]
        assert (error <= tolerance * size[reported].clamp(min=1e-3)).all()


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
@pytest.mark.parametrize("low", [-60.0, -200.0, -500.0])
@pytest.mark.parametrize("largest_weight", [0.0, 1e-30])
def test_weights_of_nearly_nothing_on_the_largest_value(dtype, low, largest_weight):
    a = torch.tensor([[[0.0, low, low - 1]]], dtype=dtype, requires_grad=True)
    w = torch.tensor([[[largest_weight, 0.75, 0.25]]], dtype=dtype, requires_grad=True)
    out, _, flows = by_terms([a], w)
    y = log_einsum_exp(a, w)
    assert_near(y, out, 1e-6)
    y.backward()
    assert_near(a.grad, flows[:, :, 0], 1e-5)
    assert w.grad.isfinite().all()
    assert_near((w * w.grad)[0, 0], flows[0, 0, 0], 1e-5)
    if low == -60.0 and largest_weight == 0.0:
        assert_near(w.grad[0, 0, 0] * out.exp(), torch.ones_like(out), 1e-4)
    b = torch.zeros(1, 1, 1, dtype=dtype)
    assert_near(log_einsum_exp2(b, a, w[:, :, None]), out, 1e-6)
    assert_near(log_einsum_exp2(a, b, w[..., None]), out, 1e-6)


def test_large_weights_do_not_hide_lost_terms():
    a, w = torch.tensor([[[0.0, -95.0]]]), torch.tensor([[[1e-29, 1e30]]])
    assert_near(log_einsum_exp(a, w), by_terms([a], w)[0], 1e-6)


@tucker
def test_rows_without_anything(tucker):
    operands, w, _ = problem(tucker)
    operands[0][:, 2] = -INF
    w[:, 1] = 0
    leaves = [x.requires_grad_() for x in (*operands, w)]
    out = call(operands, w)
    assert (out[:, 2] == -INF).all()
    assert (out[:, :, 1] == -INF).all()
    assert out[:, [0, 1, 3, 4]][..., [0, 2]].isfinite().all()
    found = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert all(x.isfinite().all() for x in found)
    assert all((x[:, 2] == 0).all() for x in found[:-1])
    assert (found[-1][:, 1] == 0).all()


@tucker
def test_nan_stays(tucker):
    operands, w, _ = problem(tucker)
    operands[0][0, 1, 2] = torch.nan
    assert torch.equal(call(operands, w).isnan().any(-1), operands[0].isnan().any(-1))


@tucker
@pytest.mark.parametrize("sizes", [(2, 5, 3, 4), (1, 3, 1, 1), (2, 1, 9, 3)])
def test_gradcheck(tucker, sizes):
    operands, w, _ = problem(tucker, *sizes)
    leaves = [x.requires_grad_() for x in (*operands, w)]
    run = lambda *xs: call(xs[:-1], xs[-1])  # noqa: E731
    assert gradcheck(run, leaves, check_batched_grad=True)
    assert gradgradcheck(run, leaves)


def test_gradcheck_at_weights_of_zero_on_the_largest_value():
    a = torch.tensor([[[0.0, -5.0], [1.0, -3.0]]], dtype=DOUBLE, requires_grad=True)
    w = torch.tensor([[[0.0, 1.0], [0.0, 0.5]]], dtype=DOUBLE, requires_grad=True)
    assert gradcheck(log_einsum_exp, (a, w))
    far = torch.tensor([[[0.0, -80.0, -81.0]]], dtype=DOUBLE, requires_grad=True)
    fixed = torch.tensor([[[0.0, 1.0, 0.5]]], dtype=DOUBLE)
    assert gradcheck(lambda a: log_einsum_exp(a, fixed), (far,))
    assert gradgradcheck(lambda a: log_einsum_exp(a, fixed), (far,))
    free = fixed[..., 1:].clone().requires_grad_()
    padded = lambda a, w: log_einsum_exp(a, torch.cat([fixed[..., :1], w], -1))  # noqa: E731
    assert gradcheck(padded, (far, free))


@tucker
def test_only_wanted_gradients(tucker):
    operands, w, grad = problem(tucker, hard=True)
    inputs = [*operands, w]
    full = torch.autograd.grad(
        call([x.requires_grad_() for x in operands], w.requires_grad_()), inputs, grad
    )
    for place in range(len(inputs)):
        fresh = [x.detach() for x in inputs]
        leaf = fresh[place].requires_grad_()
        (alone,) = torch.autograd.grad(call(fresh[:-1], fresh[-1]), leaf, grad)
        assert torch.equal(alone, full[place])


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
@tucker
@pytest.mark.parametrize("sizes", [(2, 5, 3, 4), (2, 0, 3, 4)])
def test_opcheck(tucker, sizes, dtype):
    operands, w, grad = problem(tucker, *sizes, dtype=dtype, hard=dtype == DOUBLE)
    left, right, weights = (*operands, w) if tucker else (None, *operands, w[:, :, None])
    leaves = [None if x is None else x.requires_grad_() for x in (left, right, weights)]
    torch.library.opcheck(_log_einsum_exp._opoverload, (*leaves, False))
    out = _log_einsum_exp(*leaves, False).detach()
    detached = [None if x is None else x.detach() for x in leaves]
    for flags in ((tucker, True, True), (False, False, True)):
        arguments = (grad, *detached, out, *flags)
        torch.library.opcheck(_log_einsum_exp_backward._opoverload, arguments)


@tucker
@pytest.mark.parametrize("batched", [(0, 0), (1, None), (None, 1)])
def test_vmap(tucker, batched):
    problems = [problem(tucker, seed=seed) for seed in range(3)]
    of_operands, of_w = batched
    first = [torch.stack(x, of_operands or 0) for x in zip(*(p[0] for p in problems), strict=True)]
    w = torch.stack([p[1] for p in problems], of_w or 0)
    first = first if of_operands is not None else problems[0][0]
    w = w if of_w is not None else problems[0][1]
    run = lambda w, *xs: call(xs, w)  # noqa: E731
    dims = (of_w, *[of_operands] * len(first))
    found = torch.func.vmap(run, dims)(w, *first)
    for i, (operands, weights, _) in enumerate(problems):
        operands = operands if of_operands is not None else problems[0][0]
        weights = weights if of_w is not None else problems[0][1]
        torch.testing.assert_close(found[i], call(operands, weights))


@tucker
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(tucker, dtype):
    operands, w, grad = problem(tucker, dtype=dtype)
    operands[-1] = operands[-1] - 1000  # where a rounded output would say nothing about its slopes
    leaves = [x.requires_grad_() for x in (*operands, w)]
    out = call(operands, w)
    wide = [x.detach().float().requires_grad_() for x in leaves]
    expected = call(wide[:-1], wide[-1])
    assert torch.equal(out, expected.to(dtype))
    ours = torch.autograd.grad(out, leaves, grad)
    theirs = torch.autograd.grad(expected, wide, grad.float())
    assert all(torch.equal(x, y.to(dtype)) for x, y in zip(ours, theirs, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(wide[:-1], wide[-1]), expected)


@tucker
def test_compiles_in_one_graph(tucker):
    operands, w, grad = problem(tucker, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    leaves = [x.requires_grad_() for x in (*operands, w)]
    found = torch.autograd.grad(compiled(operands, w), leaves, grad)
    expected = torch.autograd.grad(call(operands, w), leaves, grad)
    torch.testing.assert_close(found, expected)


@tucker
def test_meta_and_forward_mode(tucker):
    operands, w, _ = problem(tucker)
    assert call([x.to("meta") for x in operands], w.to("meta")).shape == (2, 5, 3)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda w: call(operands, w), (w,), (w,))


def native():
    backend, why = library.backend("log_einsum_exp")
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    return backend == "native" or registered("torchzoo::log_einsum_exp", "CPU"), why


@tucker
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
@pytest.mark.parametrize("hard", [False, True])
def test_a_sample_has_the_same_bits_in_every_batch(tucker, dtype, hard):
    sizes = (3, 150, 33, 19) if tucker else (3, 300, 33, 70)
    operands, w, _ = problem(tucker, *sizes, dtype=dtype, spread=30.0, hard=hard)
    whole = call(operands, w, deterministic=True)
    for rows in (slice(0, 1), slice(7, 8), slice(95, 98), slice(1, 102), slice(sizes[1] - 1, None)):
        part = call([x[:, rows] for x in operands], w, deterministic=True)
        assert torch.equal(part, whole[:, rows])
    assert torch.equal(call([x[1:] for x in operands], w[1:], deterministic=True), whole[1:])
    if native()[0]:
        assert torch.equal(call(operands, w), whole)


@tucker
@pytest.mark.parametrize("sizes", [(3, 500, 33, 20), (40, 70, 9, 8), (1, 1000, 4, 5)])
def test_threads(tucker, sizes):
    if not native()[0]:
        pytest.skip(native()[1])
    operands, w, grad = problem(tucker, *sizes, dtype=torch.float32, spread=30.0, hard=True)
    leaves = [x.requires_grad_() for x in (*operands, w)]
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = call(operands, w)
            results.append((out, *torch.autograd.grad(out, leaves, grad)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@tucker
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("sizes", [(2, 100, 33, 40), (66, 7, 5, 9), (1, 14, 8, 300)])
def test_equals_the_reference(tucker, hard, sizes):
    sizes = (*sizes[:3], 20) if tucker else sizes
    operands, w, grad = problem(tucker, *sizes, hard=hard)
    left, right, weights = (*operands, w) if tucker else (None, *operands, w[:, :, None])
    expected = _log_einsum_exp._init_fn(left, right, weights, False)
    found = _log_einsum_exp(left, right, weights, False)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    arguments = (grad, left, right, weights, expected, tucker, True, True)
    expected = _log_einsum_exp_backward._init_fn(*arguments)
    for one, two in zip(_log_einsum_exp_backward(*arguments), expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@tucker
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("sizes", [(2, 100, 70, 33), (3, 1000, 5, 9), (1, 64, 64, 64)])
def test_cuda_equals_the_reference(tucker, dtype, hard, sizes):
    operands, w, grad = problem(tucker, *sizes, dtype=dtype, hard=hard)
    leaves = [x.cuda().requires_grad_() for x in (*operands, w)]
    out = call(leaves[:-1], leaves[-1])
    assert_near(out.cpu(), by_terms(operands, w)[0], TOLERANCE[dtype])
    found = torch.autograd.grad(out, leaves, grad.cuda())
    again = torch.autograd.grad(call(leaves[:-1], leaves[-1]), leaves, grad.cuda())
    assert all(torch.equal(one, two) for one, two in zip(found, again, strict=True))
    left, right, weights = (*operands, w) if tucker else (None, *operands, w[:, :, None])
    arguments = (grad, left, right, weights, out.cpu(), tucker, True, True)
    expected = _log_einsum_exp_backward._init_fn(*arguments)[0 if tucker else 1 :]
    tolerance = {DOUBLE: 1e-10, torch.float32: 1e-3}[dtype]
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), two.view_as(one), rtol=tolerance, atol=tolerance)


def test_memory_of_a_tucker_sum_is_that_of_its_inputs():
    f, b, k, o = 1, 4096, 64, 4
    outer = 4 * f * b * k * k
    operands = [torch.randn(f, b, k, requires_grad=True) for _ in range(2)]
    w = torch.rand(f, o, k, k, requires_grad=True)

    def step():
        return torch.autograd.grad(log_einsum_exp2(*operands, w).sum(), [*operands, w])

    step()
    peak = peak_bytes(step, torch.device("cpu"))
    if peak is None:
        pytest.skip("this system does not count a process's peak memory")
    assert peak < outer / 4


def test_every_element_is_written():
    torch.use_deterministic_algorithms(True)  # memory that is not written holds NaN
    try:
        for tucker in (False, True):
            for sizes in ((2, 5, 3, 4), (1, 200, 17, 9), (2, 3, 4, 0), (2, 0, 3, 4)):
                operands, w, grad = problem(tucker, *sizes, dtype=torch.float32)
                leaves = [x.requires_grad_() for x in (*operands, w)]
                out = call(operands, w)
                found = (out, *torch.autograd.grad(out, leaves, grad))
                assert not any(value.isnan().any() for value in found)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        (log_einsum_exp, {"a": torch.ones(3, 4)}, r"a: expected floats of shape \(F, B, K\)"),
        (log_einsum_exp, {"a": torch.ones(2, 3, 4).long()}, "a: expected floats .*got torch.int64"),
        (log_einsum_exp, {"w": torch.ones(2, 5, 3)}, r"w: expected \(2, O, 4\), got \(2, 5, 3\)"),
        (log_einsum_exp, {"w": torch.ones(2, 5, 4).long()}, "w: expected floats, got torch.int64"),
        (log_einsum_exp, {"w": torch.ones(2, 5, 4).to("meta")}, "a, w: expected one device"),
        (log_einsum_exp2, {"b": torch.ones(2, 1, 6)}, r"b: expected \(2, 3, K2\), got \(2, 1, 6\)"),
        (log_einsum_exp2, {"w": torch.ones(2, 5, 4)}, r"w: expected \(2, O, 4, 6\), got"),
    ],
)
def test_bad_input(op, change, message):
    good = {"a": torch.ones(2, 3, 4), "w": torch.ones(2, 5, 4)}
    if op is log_einsum_exp2:
        good |= {"b": torch.ones(2, 3, 6), "w": torch.ones(2, 5, 4, 6)}
    op(**good)
    with pytest.raises(ValueError, match=message):
        op(**good | change)
