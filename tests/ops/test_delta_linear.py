"""The delta step against one input at a time in float64, and what torch asks of an operator."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from torchzoo.ops import delta_linear, delta_linear_step, delta_scan, library
from torchzoo.ops.delta_linear import reference
from torchzoo.sparsity import DeltaMeter

OP = torch.ops.torchzoo.delta_linear_step.default
DOUBLE = torch.float64


def by_inputs(x, x_ref, acc, weight_t, threshold=0.0, quantum=None):
    """One stream, one input at a time, in float64: (acc', x_ref', Δ)."""
    x, x_ref, acc = x.double(), x_ref.double().clone(), acc.double().clone()
    delta = torch.zeros_like(x)
    for j in range(len(x)):
        step = (
            None
            if quantum is None
            else float(torch.as_tensor(quantum, dtype=DOUBLE).expand(len(x))[j])
        )
        level = x[j] if step is None else step * torch.round(x[j] / step)
        if abs(level - x_ref[j]) > threshold:
            delta[j] = level - x_ref[j]
            acc += delta[j] * weight_t[j].double()
            x_ref[j] = level
    return acc, x_ref, delta


def problem(batch=(2,), inputs=5, outputs=4, dtype=DOUBLE, seed=0, still=0.4):
    """Streams in which a share of the inputs did not change."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=DOUBLE)

    x_ref = draw(*batch, inputs)
    same = torch.rand(*batch, inputs, generator=generator) < still
    x = torch.where(same, x_ref, draw(*batch, inputs))
    tensors = x, x_ref, draw(*batch, outputs), draw(inputs, outputs)
    return tuple(tensor.to(dtype) for tensor in tensors)


def strided(tensor):
    return tensor.repeat_interleave(2, -1)[..., ::2]


TOLERANCE = {DOUBLE: 1e-13, torch.float32: 1e-5}


@pytest.mark.claim(157, "A step equals one input at a time in float64", tolerance=1e-12)
@settings(max_examples=40, deadline=None)
@given(
    batch=st.sampled_from([(), (1,), (3,), (0,), (2, 3), (2, 0)]),
    inputs=st.integers(0, 6),
    outputs=st.integers(0, 5),
    dtype=st.sampled_from(list(TOLERANCE)),
    threshold=st.sampled_from([0.0, 0.5]),
    quantum=st.sampled_from([None, 0.25, "each"]),
    layout=st.sampled_from(["contiguous", "strided"]),
    seed=st.integers(0, 99),
)
def test_equals_one_input_at_a_time(
    batch, inputs, outputs, dtype, threshold, quantum, layout, seed
):
    x, x_ref, acc, weight_t = problem(batch, inputs, outputs, dtype, seed)
    if quantum == "each":
        quantum = 0.125 * torch.arange(1, inputs + 1, dtype=dtype)
    tensors = (x, x_ref, acc, weight_t)
    if layout == "strided":
        tensors = (*map(strided, tensors[:3]), weight_t.mT.contiguous().mT)
    before = [tensor.clone() for tensor in tensors]
    new_acc, new_ref = delta_linear_step(*tensors, threshold=threshold, quantum=quantum)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    assert new_acc.shape == acc.shape
    assert new_ref.shape == x.shape
    assert new_acc.dtype == new_ref.dtype == dtype
    rows = (
        t.reshape(-1, n) if t.numel() else t.new_empty(0, n)
        for t, n in (
            (x, inputs),
            (x_ref, inputs),
            (acc, outputs),
            (new_acc, outputs),
            (new_ref, inputs),
        )
    )
    for x1, ref1, acc1, new_acc1, new_ref1 in zip(*rows, strict=False):
        expected_acc, expected_ref, _ = by_inputs(x1, ref1, acc1, weight_t, threshold, quantum)
        tolerance = {"atol": 10 * TOLERANCE[dtype], "rtol": 0}
        torch.testing.assert_close(new_acc1.double(), expected_acc, **tolerance)
        torch.testing.assert_close(new_ref1.double(), expected_ref, **tolerance)


@pytest.mark.claim(
    157,
    "Rows of weights whose delta is zero are not read: filled with NaN they leave the step finite "
    "and equal; a step does nnz(delta) * outputs multiplications",
    tolerance=0.0,
)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.bfloat16])
def test_rows_of_zero_delta_are_not_read(dtype):
    x, x_ref, acc, weight_t = problem((3,), 64, 8, torch.float32, still=0.9)
    weight_t = weight_t.to(dtype)
    expected, ref = delta_linear_step(x, x_ref, acc, weight_t)
    for stream in range(3):
        unread = weight_t.clone()
        unread[x[stream] == x_ref[stream]] = torch.nan
        assert unread.isnan().any()
        with DeltaMeter() as meter:
            new_acc, new_ref = delta_linear_step(x[stream], x_ref[stream], acc[stream], unread)
        assert torch.equal(new_acc, expected[stream])
        assert torch.equal(new_ref, ref[stream])
        assert meter.macs == int((x[stream] != x_ref[stream]).sum()) * 8
        # in a batch a row that another stream reads must not reach this one either
        batch_acc, _ = delta_linear_step(x, x_ref, acc, unread)
        assert torch.equal(batch_acc[stream], expected[stream])


@pytest.mark.claim(
    157, "The operator agrees with its reference and with float64 by hand", tolerance=1e-5
)
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
    ],
)
@pytest.mark.parametrize(("threshold", "quantum"), [(0.0, None), (0.3, None), (0.3, 0.1)])
@pytest.mark.parametrize("shape", [(1, 300, 257), (4, 33, 64), (7, 1, 1)])
def test_devices_agree(device, shape, threshold, quantum):
    batch, inputs, outputs = shape
    tensors = problem((batch,), inputs, outputs, torch.float32, still=0.8)
    step = None if quantum is None else torch.tensor(quantum)
    plain = reference(*tensors, step, threshold)
    moved = [tensor.to(device) for tensor in tensors]
    found = delta_linear_step(*moved, threshold=threshold, quantum=quantum)
    by_hand = [
        by_inputs(*row, tensors[3], threshold, quantum)[:2]
        for row in zip(*tensors[:3], strict=True)
    ]
    for index in range(2):
        expected = torch.stack([row[index] for row in by_hand]).float()
        torch.testing.assert_close(found[index].cpu(), plain[index], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[index].cpu(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.claim(
    157,
    "At every step of a stream acc = x_ref · weight_t + bias, whatever the threshold",
    tolerance=1e-12,
)
@pytest.mark.parametrize(
    ("threshold", "quantum"), [(0.0, None), (0.0, 0.1), (0.4, None), (0.4, 0.1)]
)
def test_invariant_and_sequence_form(threshold, quantum):
    torch.manual_seed(0)
    x = torch.randn(3, 20, 6, dtype=DOUBLE).cumsum(1) * 0.3
    weight_t, bias = torch.randn(6, 4, dtype=DOUBLE), torch.randn(4, dtype=DOUBLE)
    options = {"threshold": threshold, "quantum": quantum}
    y, refs, deltas = delta_linear(x, weight_t, bias, **options)
    acc, x_ref = bias.expand(3, 4), torch.zeros(3, 6, dtype=DOUBLE)
    for t in range(20):
        old = x_ref
        acc, x_ref = delta_linear_step(x[:, t], x_ref, acc, weight_t, **options)
        torch.testing.assert_close(acc, x_ref @ weight_t + bias, atol=1e-12, rtol=0)
        torch.testing.assert_close(acc, y[:, t], atol=1e-12, rtol=0)
        assert torch.equal(x_ref, refs[:, t])
        assert torch.equal(x_ref - old, deltas[:, t])
        if threshold == 0:
            level = x[:, t] if quantum is None else quantum * torch.round(x[:, t] / quantum)
            assert torch.equal(x_ref, level)
        else:
            assert (
                x_ref - (x[:, t] if quantum is None else quantum * torch.round(x[:, t] / quantum))
            ).abs().max() <= threshold
    assert 0 < (deltas[:, 1:] == 0).double().mean() < 1 or threshold == 0


@pytest.mark.claim(157, "A change counts where it is strictly above the threshold", tolerance=0.0)
def test_a_change_of_exactly_the_threshold_does_not_count():
    x, x_ref = torch.tensor([0.5, 0.75, -0.5, -0.75]), torch.zeros(4)
    acc, sent = delta_linear_step(x, x_ref, torch.zeros(4), torch.eye(4), threshold=0.5)
    assert acc.tolist() == sent.tolist() == [0.0, 0.75, 0.0, -0.75]


def leaves(tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize("batch", [(), (2,), (2, 2), (0,)])
def test_gradcheck(batch, threshold):
    # away from |Δ| = threshold the step is smooth; at threshold 0 it is linear in every input
    tensors = leaves(problem(batch, 4, 3, still=0.0))

    def step(*tensors):
        return delta_linear_step(*tensors, threshold=threshold)

    assert gradcheck(step, tensors)
    assert gradgradcheck(step, tensors)


@pytest.mark.claim(
    157,
    "The gradient of a step is the closed form: through the quantiser unchanged, by the sent mask, "
    "and at threshold 0 to inputs that did not change as well",
    tolerance=1e-12,
)
@pytest.mark.parametrize(
    ("threshold", "quantum"), [(0.0, None), (0.0, 0.3), (0.6, None), (0.6, 0.3)]
)
def test_gradient_closed_form(threshold, quantum):
    x, x_ref, acc, weight_t = problem((3,), 8, 4, still=0.5)
    if quantum is not None:  # what was sent is a level too
        x_ref = quantum * torch.round(x_ref / quantum)
    tensors = x, x_ref, acc, weight_t = leaves((x, x_ref, acc, weight_t))
    grads = torch.randn(3, 4, dtype=DOUBLE), torch.randn(3, 8, dtype=DOUBLE)
    out = delta_linear_step(*tensors, threshold=threshold, quantum=quantum)
    dx, dref, dacc, dweight = torch.autograd.grad(out, tensors, grads)
    found = [
        by_inputs(*row, weight_t, threshold, quantum)[2]
        for row in zip(x.detach(), x_ref.detach(), acc.detach(), strict=True)
    ]
    delta = torch.stack(found)
    mask = torch.ones_like(delta) if threshold == 0 else (delta != 0).double()
    assert (delta == 0).any()
    whole = grads[0] @ weight_t.T + grads[1]
    tolerance = {"atol": 1e-12, "rtol": 0}
    torch.testing.assert_close(dx, mask * whole, **tolerance)
    torch.testing.assert_close(dref, grads[1] - mask * whole, **tolerance)
    torch.testing.assert_close(dacc, grads[0], **tolerance)
    torch.testing.assert_close(dweight, delta.T @ grads[0], **tolerance)


@pytest.mark.parametrize("quantum", [None, 0.3])
def test_without_threshold_a_scan_passes_gradients_of_still_inputs(quantum):
    x = torch.zeros(2, 4, 3, dtype=DOUBLE)
    x[:, 2:] = 0.6
    x.requires_grad_()
    grad = torch.randn_like(x)
    (dx,) = torch.autograd.grad(delta_scan(x, 0.0, quantum)[0], x, grad)
    assert torch.equal(dx, grad)


@pytest.mark.claim(
    157,
    "The gradient of the scan is the reverse scan G_t = g_t + (1 - m_{t+1}) G_{t+1}",
    tolerance=1e-12,
)
@pytest.mark.parametrize("quantum", [None, 0.3])
def test_gradient_of_a_scan_is_the_reverse_scan(quantum):
    x = (torch.randn(2, 7, 5, dtype=DOUBLE) * 0.6).requires_grad_()
    grad = torch.randn(2, 7, 5, dtype=DOUBLE)
    x_ref, delta = delta_scan(x, 0.5, quantum)
    (dx,) = torch.autograd.grad(x_ref, x, grad)
    sent = (delta != 0).double()
    assert 0 < sent.mean() < 1
    total = torch.zeros(2, 5, dtype=DOUBLE)
    for t in reversed(range(7)):
        total = grad[:, t] + (1 - sent[:, t + 1]) * total if t < 6 else grad[:, t]
        torch.testing.assert_close(dx[:, t], sent[:, t] * total, atol=1e-12, rtol=0)


def test_gradients_of_stream_and_sequence_agree():
    torch.manual_seed(1)
    x = (torch.randn(2, 6, 5, dtype=DOUBLE) * 0.6).requires_grad_()
    weight_t = torch.randn(5, 3, dtype=DOUBLE, requires_grad=True)
    bias = torch.randn(3, dtype=DOUBLE, requires_grad=True)
    grad = torch.randn(2, 6, 3, dtype=DOUBLE)
    sequence, *_ = delta_linear(x, weight_t, bias, threshold=0.5)
    acc, x_ref, outputs = bias.expand(2, 3), torch.zeros(2, 5, dtype=DOUBLE), []
    for x_t in x.unbind(1):
        acc, x_ref = delta_linear_step(x_t, x_ref, acc, weight_t, threshold=0.5)
        outputs.append(acc)
    inputs = (x, weight_t, bias)
    a = torch.autograd.grad(sequence, inputs, grad)
    b = torch.autograd.grad(torch.stack(outputs, 1), inputs, grad)
    torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_short_sequences(steps, threshold):
    x = torch.randn(2, steps, 3)
    y, x_ref, delta = delta_linear(x, torch.randn(3, 4), threshold=threshold)
    assert y.shape == (2, steps, 4)
    assert torch.equal(x_ref, delta)


@pytest.mark.parametrize(
    ("batch", "quantum", "threshold"), [((), None, 0.5), ((2, 2), 0.25, 0.0), ((0,), None, 0.0)]
)
def test_opcheck(batch, quantum, threshold):
    tensors = leaves(problem(batch, 4, 3))
    step = None if quantum is None else torch.tensor(quantum, dtype=DOUBLE)
    torch.library.opcheck(OP, (*tensors, step, threshold))


def test_half_precision_keeps_the_state_in_float32():
    x, x_ref, acc, weight_t = problem((2,), 64, 8, torch.bfloat16)
    new_acc, new_ref = delta_linear_step(x, x_ref, acc, weight_t)
    assert new_acc.dtype == new_ref.dtype == torch.float32
    expected = delta_linear_step(*(tensor.float() for tensor in (x, x_ref, acc, weight_t)))
    torch.testing.assert_close((new_acc, new_ref), expected, atol=1e-5, rtol=0)


def test_autocast_leaves_the_step_in_float32():
    tensors = leaves(problem((2,), 64, 8, torch.float32))
    expected = delta_linear_step(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        found = delta_linear_step(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "dims", [(0, 0, 0, None), (1, None, 0, None), (0, 0, 0, 0), (None, None, None, 1)]
)
def test_vmap(dims):
    x, x_ref, acc, weight_t = problem((3,), 4, 5)
    tensors = [x, x_ref, acc, torch.stack([weight_t, 2 * weight_t, -weight_t])]
    args, rows = [], []
    for tensor, dim in zip(tensors, dims, strict=True):
        args.append(tensor[0] if dim is None else tensor.movedim(0, dim))
        rows.append([tensor[0]] * 3 if dim is None else tensor.unbind(0))
    found = torch.func.vmap(delta_linear_step, dims)(*args)
    expected = [delta_linear_step(*row) for row in zip(*rows, strict=True)]
    for index in range(2):
        torch.testing.assert_close(found[index], torch.stack([pair[index] for pair in expected]))


def test_forward_mode_is_refused():
    tensors = problem()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(tensors[0], torch.ones_like(tensors[0]))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            delta_linear_step(dual, *tensors[1:])


def test_compiles_in_one_graph():
    tensors = leaves(problem((2,), 6, 4))
    compiled = torch.compile(delta_linear_step, fullgraph=True, backend="aot_eager")
    expected = delta_linear_step(*tensors, threshold=0.2, quantum=0.1)
    found = compiled(*tensors, threshold=0.2, quantum=0.1)
    torch.testing.assert_close(found, expected)
    grads = (torch.autograd.grad(sum(o.sum() for o in out), tensors) for out in (found, expected))
    torch.testing.assert_close(*grads)


def test_meta():
    tensors = [tensor.to("meta") for tensor in problem((2, 3), 4, 5)]
    acc, x_ref = delta_linear_step(*tensors)
    assert (acc.shape, x_ref.shape) == ((2, 3, 5), (2, 3, 4))
    assert acc.is_meta
    assert x_ref.is_meta


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 3)}, r"x: expected last dimension 5"),
        ({"x": torch.ones(2, 5, dtype=torch.long)}, r"x: expected a floating-point"),
        ({"x_ref": torch.ones(3, 5)}, r"x_ref: expected the shape of x, \(2, 5\), got \(3, 5\)"),
        ({"acc": torch.ones(2, 5)}, r"acc: expected shape \(2, 4\), got \(2, 5\)"),
        ({"weight_t": torch.ones(5)}, r"weight_t: expected shape \(I, O\), got \(5,\)"),
        ({"weight_t": torch.ones(5, 4, device="meta")}, r"expected one device"),
        ({"threshold": -0.1}, r"threshold: expected a number ≥ 0, got -0.1"),
        ({"threshold": float("nan")}, r"threshold: expected a number ≥ 0"),
        ({"quantum": 0.0}, r"quantum: expected a number > 0, got 0.0"),
        ({"quantum": torch.ones(4)}, r"quantum: expected a scalar or shape \(5,\), got \(4,\)"),
    ],
)
def test_bad_input(change, message):
    names = ("x", "x_ref", "acc", "weight_t")
    arguments = dict(zip(names, problem((2,), 5, 4, torch.float32), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        delta_linear_step(**arguments)


PLAIN = torch.ops.torchzoo.delta_linear_step_plain.default
no_kernel = pytest.mark.skipif(
    library.backend("delta_linear_step_plain")[0] != "native", reason="the step has no kernel"
)


@no_kernel
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("batch", [(), (3,), (2, 2), (0,)])
def test_the_plain_step_is_the_step(batch, dtype):
    tensors = problem(batch, 6, 4, dtype)
    expected = OP(*tensors, None, 0.3)
    assert all(map(torch.equal, PLAIN(*tensors, None, 0.3), expected))
    assert all(map(torch.equal, delta_linear_step(*tensors, threshold=0.3), expected))


@no_kernel
@pytest.mark.parametrize(
    "change",
    [
        {"x_ref": torch.ones(1, 2, 5)},
        {"x_ref": torch.ones(10).as_strided((5, 2), (2, 1))},
        {"acc": torch.ones(1, 2, 4)},
        {"acc": torch.ones(4, 2)},
        {"acc": torch.ones(2, 4).double()},
        {"x": torch.ones(2, 5).double()},
        {"x": torch.ones(())},
        {"weight_t": torch.ones(5, 2, 2)},
        {"weight_t": torch.ones(5, 4).double()},
        {"weight_t": torch.ones(5, 4, device="meta")},
        {"threshold": -0.1},
        {"threshold": float("nan")},
    ],
)
def test_the_plain_step_refuses_what_does_not_fit(change):
    names = ("x", "x_ref", "acc", "weight_t")
    given = dict(zip(names, problem((2,), 5, 4, torch.float32), strict=True))
    PLAIN(**given, quantum=None, threshold=0.0)
    with pytest.raises(RuntimeError):
        PLAIN(**({**given, "quantum": None, "threshold": 0.0} | change))


def test_only_a_step_that_learns_is_recorded():
    x, x_ref, acc, weight_t = problem()
    weight = torch.nn.Parameter(weight_t)
    with torch.no_grad():
        found = delta_linear_step(x, x_ref, acc, weight)
    assert not any(t.requires_grad for t in found)
    learned = delta_linear_step(x, x_ref, acc, weight)
    assert learned[0].requires_grad
    assert all(map(torch.equal, found, learned))


def test_fake_tensors():
    with FakeTensorMode():
        x, acc, weight_t = torch.empty(2, 5), torch.empty(2, 4), torch.empty(5, 4)
        new_acc, new_ref = delta_linear_step(x, x, acc, weight_t)
        assert (new_acc.shape, new_ref.shape) == ((2, 4), (2, 5))
        with pytest.raises(ValueError, match="acc: expected shape"):
            delta_linear_step(x, x, x, weight_t)


def test_bad_sequences():
    weight_t = torch.ones(3, 2)
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        delta_linear(torch.ones(3), weight_t)
    with pytest.raises(ValueError, match="bias: expected shape"):
        delta_linear(torch.ones(4, 3), weight_t, torch.ones(3))
