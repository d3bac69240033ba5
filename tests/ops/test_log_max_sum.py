"""The largest weighted log-value against torch.max over all terms, and what torch asks of an op."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from torchzoo.ops import log_einsum_exp, log_max_sum
from torchzoo.ops.log_max_sum import _log_max_sum

DOUBLE = torch.float64
OP = _log_max_sum._opoverload


def problem(f=2, b=5, o=3, k=4, dtype=DOUBLE, seed=0):
    """Log-values and weights, with zeros and minus infinities."""
    generator = torch.Generator().manual_seed(seed)
    a = 3 * torch.randn(f, b, k, generator=generator, dtype=DOUBLE)
    w = torch.rand(f, o, k, generator=generator, dtype=DOUBLE)
    a[torch.rand(a.shape, generator=generator) < 0.2] = -torch.inf
    w[torch.rand(w.shape, generator=generator) < 0.2] = 0
    return a.to(dtype), w.to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    f=st.integers(0, 2),
    b=st.integers(0, 70),
    o=st.integers(0, 35),
    k=st.sampled_from([1, 2, 9, 33]),
    dtype=st.sampled_from([DOUBLE, torch.float32, torch.bfloat16]),
    strided=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_max_over_terms(f, b, o, k, dtype, strided, seed):
    a, w = problem(f, b, o, k, dtype, seed)
    if strided:
        a, w = a.mT.contiguous().mT, w.repeat_interleave(2, -1)[..., ::2]
    wide = torch.promote_types(dtype, torch.float32)
    terms = a.to(wide)[:, :, None] + w.to(wide).log()[:, None]
    values, argmax = log_max_sum(a, w)
    assert (values.dtype, argmax.dtype, values.shape) == (dtype, torch.int64, (f, b, o))
    assert torch.equal(values, terms.amax(-1).to(dtype))
    first = (terms == terms.amax(-1, keepdim=True)).int().argmax(-1)
    assert torch.equal(argmax, first)


def test_first_of_equals_and_nothing():
    a = torch.tensor([[[0.0, 0.0, -1.0], [-torch.inf] * 3]])
    values, argmax = log_max_sum(a, torch.ones(1, 2, 3))
    assert values.tolist() == [[[0.0, 0.0], [-torch.inf] * 2]]
    assert argmax.tolist() == [[[0, 0], [0, 0]]]


def test_is_a_bound_of_the_sum():
    a, w = problem(dtype=DOUBLE)
    values, sums = log_max_sum(a, w)[0], log_einsum_exp(a, w)
    assert (values <= sums + 1e-12).all()
    assert (sums <= values + torch.tensor(4.0).log() + 1e-12).all()
    one = log_max_sum(a[..., :1], w[..., :1])[0]
    torch.testing.assert_close(one, log_einsum_exp(a[..., :1], w[..., :1]))


def test_gradients():
    a, w = torch.randn(2, 5, 4, dtype=DOUBLE), torch.rand(2, 3, 4, dtype=DOUBLE)
    leaves = a.requires_grad_(), w.requires_grad_()
    assert gradcheck(lambda a, w: log_max_sum(a, w)[0], leaves, check_batched_grad=True)
    grad = torch.randn(2, 5, 3, dtype=DOUBLE)
    found = torch.autograd.grad(log_max_sum(a, w)[0], leaves, grad)
    oracle = (a[:, :, None] + w.log()[:, None]).amax(-1)
    torch.testing.assert_close(found, torch.autograd.grad(oracle, leaves, grad))


def test_no_gradient_where_there_is_nothing():
    a, w = torch.tensor([[[-torch.inf, 0.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    values, _ = log_max_sum(a.requires_grad_(), w.requires_grad_())
    values.backward(torch.ones_like(values))
    assert a.grad.tolist() == [[[0.0, 1.0]]]
    assert w.grad.tolist() == [[[0.0, 0.0], [0.0, 1.0]]]


@pytest.mark.parametrize("sizes", [(2, 5, 3, 4), (0, 5, 3, 4), (2, 0, 3, 4)])
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_opcheck(sizes, dtype):
    a, w = problem(*sizes, dtype=dtype)
    torch.library.opcheck(OP, (a.requires_grad_(), w.log().requires_grad_()))


@pytest.mark.parametrize("dims", [(0, 0), (1, None), (None, 1)])
def test_vmap(dims):
    a, w = (torch.stack([x, x.flip(-1)], d or 0) for x, d in zip(problem(), dims, strict=True))
    a = a if dims[0] is not None else a[0]
    w = w if dims[1] is not None else w[0]
    values, argmax = torch.func.vmap(log_max_sum, dims)(a, w)
    for i in range(2):
        row = [x if d is None else x.select(d, i) for x, d in zip((a, w), dims, strict=True)]
        expected = log_max_sum(*row)
        assert torch.equal(values[i], expected[0])
        assert torch.equal(argmax[i], expected[1])


def test_equals_the_reference_in_every_batch_and_with_any_threads():
    a, w = problem(3, 150, 37, 19, torch.float32)
    whole = OP(a, w.log())
    expected = _log_max_sum._init_fn(a, w.log())
    assert all(torch.equal(one, two) for one, two in zip(whole, expected, strict=True))
    for rows in (slice(0, 1), slice(63, 66), slice(149, None)):
        part = OP(a[:, rows], w.log())
        assert all(torch.equal(x, y[:, rows]) for x, y in zip(part, whole, strict=True))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        again = OP(a, w.log())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(again, whole, strict=True))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("sizes", [(2, 100, 70, 33), (3, 7, 5, 100)])
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_cuda_equals_the_reference(sizes, dtype):
    a, w = problem(*sizes, dtype=dtype)
    found = OP(a.cuda(), w.log().cuda())
    expected = _log_max_sum._init_fn(a, w.log())
    assert all(torch.equal(one.cpu(), two) for one, two in zip(found, expected, strict=True))


def test_compiles_in_one_graph_and_knows_its_shapes():
    a, w = problem()
    torch._dynamo.reset()
    compiled = torch.compile(log_max_sum, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(x, y) for x, y in zip(compiled(a, w), log_max_sum(a, w), strict=True))
    assert log_max_sum(a.to("meta"), w.to("meta"))[1].shape == (2, 5, 3)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda a: log_max_sum(a, w)[0], (a,), (a,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.ones(3, 4)}, r"a: expected floats of shape \(F, B, K\)"),
        ({"a": torch.ones(2, 3, 0)}, r"a: expected at least one log-value, got \(2, 3, 0\)"),
        ({"w": torch.ones(2, 5, 3)}, r"w: expected \(2, O, 4\), got \(2, 5, 3\)"),
        ({"w": torch.ones(2, 5, 4, device="meta")}, "a, w: expected one device"),
    ],
)
def test_bad_input(change, message):
    good = {"a": torch.ones(2, 3, 4), "w": torch.ones(2, 5, 4)}
    log_max_sum(**good)
    with pytest.raises(ValueError, match=message):
        log_max_sum(**good | change)
