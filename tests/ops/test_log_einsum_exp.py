"""Sums in log space against logsumexp by terms in float64, with their gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from tests.ops.log_sums import (
    DOUBLE,
    INF,
    TOLERANCE,
    assert_near,
    by_terms,
    call,
    gradients_by_terms,
    problem,
    tucker,
)
from torchzoo.ops import log_einsum_exp, log_einsum_exp2


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
