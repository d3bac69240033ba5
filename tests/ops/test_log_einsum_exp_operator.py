"""What torch asks of sums in log space as operators, and their kernels against the reference."""

import pytest
import torch

from tests.ops.log_sums import DOUBLE, TOLERANCE, assert_near, by_terms, call, problem, tucker
from torchzoo.benchmark import peak_bytes
from torchzoo.ops import library, log_einsum_exp2
from torchzoo.ops.log_einsum_exp import _log_einsum_exp, _log_einsum_exp_backward


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
