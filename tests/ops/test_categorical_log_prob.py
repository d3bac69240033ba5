"""Log-probabilities at values against logsumexp in float64, and what torch asks of an op."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from torchzoo.ops import library
from torchzoo.ops.categorical_log_prob import (
    _categorical_log_prob,
    _categorical_log_prob_backward,
    categorical_log_prob,
)

DOUBLE = torch.float64
TOLERANCE = {DOUBLE: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2.0**-8}


def problem(f=2, c=5, k=3, b=7, dtype=DOUBLE, seed=0, hard=False):
    """Logits, some of which are minus infinity where `hard`, values, and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(f, c, k, generator=generator, dtype=DOUBLE)
    if hard:
        logits += 200 * torch.randn(f, 1, k, generator=generator, dtype=DOUBLE)
        logits[:, 1:][torch.rand(f, c - 1, k, generator=generator) < 0.4] = -torch.inf
    x = torch.randint(c, (f, b), generator=generator)
    return logits.to(dtype), x, torch.randn(f, b, k, generator=generator, dtype=DOUBLE).to(dtype)


def oracle(logits, x):
    """Value by value: the logit less the logarithm of the sum."""
    logits = logits.double()
    picked = torch.stack([table[row] for table, row in zip(logits, x, strict=True)])
    return picked - logits.logsumexp(1, keepdim=True)


@settings(max_examples=40, deadline=None)
@given(
    f=st.integers(1, 3),
    c=st.sampled_from([1, 2, 3, 256]),
    k=st.sampled_from([1, 7, 8, 15, 16, 17, 33, 48]),
    b=st.sampled_from([0, 1, 2, 70]),
    dtype=st.sampled_from(list(TOLERANCE)),
    hard=st.booleans(),
    strided=st.booleans(),
    index=st.sampled_from([torch.int64, torch.int32, torch.uint8]),
    seed=st.integers(0, 99),
)
def test_values_and_gradients(f, c, k, b, dtype, hard, strided, index, seed):
    logits, x, grad = problem(f, c, k, b, dtype, seed, hard)
    if strided:
        logits, grad = logits.mT.contiguous().mT, grad.mT.contiguous().mT
        x = x.T.contiguous().T
    logits.requires_grad_()
    out = categorical_log_prob(logits, x.to(index))
    assert (out.dtype, out.shape) == (dtype, (f, b, k))
    expected = oracle(logits.detach(), x)
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    (found,) = torch.autograd.grad(out, logits, grad)
    where = torch.nn.functional.one_hot(x, c).double()
    taken = torch.einsum("fbc,fbk->fck", where, grad.double())
    expected = taken - logits.detach().double().softmax(1) * grad.double().sum(1, keepdim=True)
    tolerance = TOLERANCE[dtype] * (1 + b)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_a_row_of_nothing_is_nan_as_in_log_softmax():
    logits = torch.full((1, 2, 3), -torch.inf)
    logits[0, 0, 1] = 0
    found = categorical_log_prob(logits, torch.tensor([[0, 1]]))
    expected = logits.log_softmax(1)
    assert torch.equal(found.isnan(), expected.isnan())
    assert found[0, :, 1].tolist() == [0, -torch.inf]


def test_gradcheck():
    logits, x, _ = problem()
    run = lambda logits: categorical_log_prob(logits, x)  # noqa: E731
    assert gradcheck(run, logits.requires_grad_(), check_batched_grad=True)
    assert gradgradcheck(run, logits)


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
@pytest.mark.parametrize("sizes", [(2, 5, 3, 7), (2, 5, 3, 0), (0, 5, 3, 7)])
def test_opcheck(sizes, dtype):
    logits, x, grad = problem(*sizes, dtype=dtype)
    torch.library.opcheck(_categorical_log_prob._opoverload, (logits.requires_grad_(), x))
    arguments = (grad, logits.detach(), x)
    torch.library.opcheck(_categorical_log_prob_backward._opoverload, arguments)


@pytest.mark.parametrize("sizes", [(2, 5, 3, 7), (1, 256, 40, 300), (30, 2, 33, 9)])
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_equals_the_reference(sizes, dtype):
    logits, x, grad = problem(*sizes, dtype=dtype, hard=True)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == DOUBLE else {"rtol": 1e-5, "atol": 1e-4}
    expected = _categorical_log_prob._init_fn(logits, x)
    torch.testing.assert_close(_categorical_log_prob(logits, x), expected, **tolerance)
    expected = _categorical_log_prob_backward._init_fn(grad, logits, x)
    found = _categorical_log_prob_backward(grad, logits, x)
    torch.testing.assert_close(found, expected, **tolerance)


def test_a_value_has_the_same_bits_in_every_batch():
    logits, x, _ = problem(5, 17, 33, 60, torch.float32)
    whole = categorical_log_prob(logits, x)
    assert torch.equal(categorical_log_prob(logits, x[:, 7:9]), whole[:, 7:9])
    assert torch.equal(categorical_log_prob(logits[3:], x[3:]), whole[3:])


def test_threads():
    if not torch._C._dispatch_has_kernel_for_dispatch_key("torchzoo::categorical_log_prob", "CPU"):
        pytest.skip(library.backend("categorical_log_prob")[1])
    logits, x, grad = problem(5, 17, 33, 60, torch.float32)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            back = _categorical_log_prob_backward(grad, logits, x)
            results.append((categorical_log_prob(logits, x), back))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_vmap_compile_and_autocast():
    logits, x, grad = problem(dtype=torch.float32)
    many = torch.stack([logits, 2 * logits])
    found = torch.func.vmap(categorical_log_prob, (0, None))(many, x)
    assert torch.equal(found[1], categorical_log_prob(2 * logits, x))
    torch._dynamo.reset()
    compiled = torch.compile(categorical_log_prob, fullgraph=True, backend="aot_eager")
    leaf = logits.clone().requires_grad_()
    ours = torch.autograd.grad(compiled(leaf, x), leaf, grad)
    assert torch.equal(ours[0], torch.autograd.grad(categorical_log_prob(leaf, x), leaf, grad)[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(categorical_log_prob(logits, x), categorical_log_prob(logits, x))
        assert categorical_log_prob(logits, x).dtype == torch.float32
    assert categorical_log_prob(logits.to("meta"), x.to("meta")).shape == (2, 7, 3)


def test_every_element_is_written():
    torch.use_deterministic_algorithms(True)  # memory that is not written holds NaN
    try:
        for sizes in ((2, 5, 3, 7), (3, 256, 33, 2), (2, 5, 3, 0)):
            logits, x, grad = problem(*sizes, dtype=torch.float32)
            assert categorical_log_prob(logits, x).isfinite().all()
            assert _categorical_log_prob_backward(grad, logits, x).isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("value", [-1, 5])
def test_values_outside_the_table(value):
    logits, x, _ = problem()
    x[1, 3] = value
    with pytest.raises((IndexError, RuntimeError)):
        categorical_log_prob(logits, x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.ones(2, 5)}, r"logits: expected floats of shape \(F, C, K\)"),
        ({"logits": torch.ones(2, 5, 3).long()}, "logits: expected floats .*got torch.int64"),
        ({"x": torch.ones(3, 7).long()}, r"x: expected integers of shape \(2, B\).* \(3, 7\)"),
        ({"x": torch.ones(2, 7)}, r"x: expected integers .*got torch.float32"),
        ({"x": torch.ones(2, 7).long().to("meta")}, "x: expected it on cpu"),
    ],
)
def test_bad_input(change, message):
    good = {"logits": torch.ones(2, 5, 3), "x": torch.zeros(2, 7).long()}
    with pytest.raises(ValueError, match=message):
        categorical_log_prob(**good | change)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda t: categorical_log_prob(t, good["x"]), *[(good["logits"],)] * 2)
