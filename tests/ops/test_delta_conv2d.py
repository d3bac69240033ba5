"""The convolution's delta step against loops in float64, and what torch asks of an operator."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from torchzoo.ops import library
from torchzoo.ops.delta_conv2d import delta_conv2d, delta_conv2d_step, reach, reference

OP = torch.ops.torchzoo.delta_conv2d_step.default
DOUBLE = torch.float64
TOLERANCE = {DOUBLE: 1e-12, torch.float32: 1e-4}
GEOMETRIES = [
    ((3, 3), {"padding": 1}),
    ((3, 2), {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}),
    ((1, 1), {"stride": 2, "padding": 3}),
    ((2, 3), {"stride": (1, 3)}),
]


def pair(value):
    return (value, value) if isinstance(value, int) else value


def by_loops(x, x_ref, acc, weight, threshold=0.0, quantum=None, **options):
    """One frame: each changed input carried to the outputs that see it, one number at a time."""
    x, weight = x.double(), weight.double()
    acc, new_ref = acc.double().clone(), x_ref.double().clone()
    channels, height, width = x.shape
    if quantum is not None:
        step = torch.as_tensor(quantum, dtype=DOUBLE).expand(channels)[:, None, None]
        x = step * torch.round(x / step)
    s, p, d = (
        pair(options.get(name, n)) for name, n in (("stride", 1), ("padding", 0), ("dilation", 1))
    )
    for c, i, j in itertools.product(range(channels), range(height), range(width)):
        delta = x[c, i, j] - new_ref[c, i, j]
        if not abs(delta) > threshold:
            continue
        new_ref[c, i, j] = x[c, i, j]
        for k, l in itertools.product(*map(range, weight.shape[2:])):
            y, over_y = divmod(i + p[0] - k * d[0], s[0])
            z, over_z = divmod(j + p[1] - l * d[1], s[1])
            if over_y == over_z == 0 and 0 <= y < acc.shape[1] and 0 <= z < acc.shape[2]:
                acc[:, y, z] += delta * weight[:, c, k, l]
    return acc, new_ref


def problem(batch=(2,), channels=2, outputs=3, size=(5, 6), kernel=(3, 3), dtype=DOUBLE, **options):
    """Frames in which a share `still` of the inputs did not change, and the sums before."""
    still = options.pop("still", 0.6)
    generator = torch.Generator().manual_seed(options.pop("seed", 0))

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=DOUBLE)

    x_ref = draw(*batch, channels, *size)
    same = torch.rand(x_ref.shape, generator=generator) < still
    x = torch.where(same, x_ref, draw(*x_ref.shape))
    weight = draw(outputs, channels, *kernel)
    grid = F.conv2d(torch.zeros(1, channels, *size, dtype=DOUBLE), weight, **options).shape[2:]
    tensors = x, x_ref, draw(*batch, outputs, *grid), weight
    return tuple(tensor.to(dtype) for tensor in tensors)


def packed(weight):
    """The same weights, those of an input channel side by side."""
    return weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


@pytest.mark.claim(
    157,
    "A step of a convolution equals one changed input carried to its outputs at a time in float64",
    tolerance=1e-12,
)
@settings(max_examples=25, deadline=None)
@given(
    batch=st.sampled_from([(), (2,), (1, 2), (0,), (2, 0)]),
    channels=st.integers(1, 3),
    outputs=st.integers(1, 5),
    size=st.tuples(st.integers(3, 11), st.integers(5, 10)),
    geometry=st.sampled_from(GEOMETRIES),
    dtype=st.sampled_from(list(TOLERANCE)),
    threshold=st.sampled_from([0.0, 0.5]),
    quantum=st.sampled_from([None, 0.25, "each"]),
    layout=st.sampled_from(["contiguous", "channels last", "strided"]),
    seed=st.integers(0, 99),
)
def test_equals_one_input_at_a_time(
    batch, channels, outputs, size, geometry, dtype, threshold, quantum, layout, seed
):
    kernel, options = geometry
    tensors = problem(batch, channels, outputs, size, kernel, dtype, seed=seed, **options)
    options = {"threshold": threshold, **options}
    if quantum == "each":
        quantum = 0.125 * torch.arange(1, channels + 1, dtype=dtype)
    if layout == "channels last":
        frames = (t.movedim(-3, -1).contiguous().movedim(-1, -3) for t in tensors[:3])
        tensors = (*frames, packed(tensors[3]))
    elif layout == "strided":
        tensors = tuple(t.repeat_interleave(2, -1)[..., ::2] for t in tensors)
    before = [tensor.clone() for tensor in tensors]
    new_acc, new_ref = delta_conv2d_step(*tensors, quantum=quantum, **options)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    assert (new_acc.shape, new_ref.shape) == (tensors[2].shape, tensors[0].shape)
    assert new_acc.dtype == new_ref.dtype == dtype
    if 0 in batch:
        return
    rows = (t.reshape(-1, *t.shape[-3:]) for t in (*tensors[:3], new_acc, new_ref))
    for x1, ref1, acc1, new_acc1, new_ref1 in zip(*rows, strict=True):
        expected = by_loops(x1, ref1, acc1, tensors[3], quantum=quantum, **options)
        found = new_acc1.double(), new_ref1.double()
        torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.claim(
    157,
    "Convolution weights of inputs whose delta is zero are not read: filled with NaN they leave "
    "the step finite and equal",
    tolerance=0.0,
)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("outputs", [3, 40, 129])
def test_weights_of_unchanged_inputs_are_not_read(dtype, outputs):
    x, x_ref, acc, weight = problem((), 6, outputs, (12, 9), dtype=torch.float32, padding=1)
    weight = weight.to(dtype)
    x[[0, 3, 4]] = x_ref[[0, 3, 4]]
    expected = delta_conv2d_step(x, x_ref, acc, weight, padding=1)
    unread = weight.clone()
    unread[:, [0, 3, 4]] = torch.nan
    found = delta_conv2d_step(x, x_ref, acc, unread, padding=1)
    assert found[0].isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # nor does a frame see the weights that another one of its batch reads
    other = x_ref + 1.0
    both = delta_conv2d_step(
        torch.stack([x, other]), torch.stack([x_ref] * 2), torch.stack([acc] * 2), unread, padding=1
    )
    assert torch.equal(both[0][0], expected[0])
    assert both[0][1].isnan().any()
    # and outputs out of a changed input's reach keep their bits, whatever its weights
    x = x_ref.clone()
    x[1, 2, 2] += 1.0
    found = delta_conv2d_step(x, x_ref, acc, torch.full_like(weight, torch.nan), padding=1)[0]
    assert found[:, 1:4, 1:4].isnan().all()
    found[:, 1:4, 1:4] = acc[:, 1:4, 1:4]
    assert torch.equal(found, acc)


@pytest.mark.claim(
    157, "The convolution operator agrees with its reference on every device", tolerance=1e-4
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
@pytest.mark.parametrize(("threshold", "quantum"), [(0.0, None), (0.3, 0.1)])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("channels", [(1, 1), (5, 64), (67, 13), (3, 132)])
def test_devices_agree(device, channels, geometry, threshold, quantum):
    kernel, options = geometry
    x, x_ref, acc, weight = problem((2,), *channels, (17, 10), kernel, torch.float32, **options)
    found = delta_conv2d_step(
        *(t.to(device) for t in (x, x_ref, acc, weight)),
        threshold=threshold,
        quantum=quantum,
        **options,
    )
    pairs = [
        list(pair(options.get(name, n)))
        for name, n in (("stride", 1), ("padding", 0), ("dilation", 1))
    ]
    plain = reference(
        *(t.movedim(-3, -1) for t in (x, x_ref, acc)),
        weight.permute(1, 2, 3, 0),
        None if quantum is None else torch.tensor(quantum),
        threshold,
        *pairs,
    )
    for index in range(2):
        expected = plain[index].movedim(-1, -3)
        torch.testing.assert_close(found[index].cpu(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.claim(
    157, "A change of one pixel reaches its outputs wherever it lies", tolerance=1e-12
)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_one_changed_pixel_anywhere(geometry):
    kernel, options = geometry
    x = torch.eye(19 * 18, dtype=DOUBLE).view(-1, 1, 19, 18)  # a frame for each place
    weight = torch.randn(2, 1, *kernel, dtype=DOUBLE)
    expected = F.conv2d(x, weight, **options)
    acc, _ = delta_conv2d_step(x, 0 * x, 0 * expected, weight, **options)
    torch.testing.assert_close(acc, expected, atol=1e-12, rtol=0)


@pytest.mark.claim(
    157,
    "At every step of a stream acc = conv2d(x_ref, weight) + bias, whatever the threshold, and the "
    "sequence form gives the same",
    tolerance=1e-12,
)
@pytest.mark.parametrize(
    ("threshold", "quantum"), [(0.0, None), (0.0, 0.1), (0.4, None), (0.4, 0.1)]
)
@pytest.mark.parametrize("geometry", GEOMETRIES[:2])
def test_invariant_and_sequence_form(threshold, quantum, geometry):
    kernel, options = geometry
    torch.manual_seed(0)
    x = torch.randn(2, 10, 3, 6, 7, dtype=DOUBLE).cumsum(1) * 0.3
    x[:, 5:7] = x[:, 4:5]
    weight, bias = torch.randn(4, 3, *kernel, dtype=DOUBLE), torch.randn(4, dtype=DOUBLE)
    quantised = {"threshold": threshold, "quantum": quantum}
    y, refs, deltas = delta_conv2d(x, weight, bias, **quantised, **options)
    x_ref = torch.zeros(2, 3, 6, 7, dtype=DOUBLE)
    acc = bias[:, None, None].expand(2, *y.shape[2:])
    for t in range(10):
        old = x_ref
        acc, x_ref = delta_conv2d_step(x[:, t], x_ref, acc, weight, **quantised, **options)
        torch.testing.assert_close(
            acc, F.conv2d(x_ref, weight, bias, **options), atol=1e-12, rtol=0
        )
        torch.testing.assert_close(acc, y[:, t], atol=1e-12, rtol=0)
        assert torch.equal(x_ref, refs[:, t])
        assert torch.equal(x_ref - old, deltas[:, t])
    assert not deltas[:, 5:7].any()
    if threshold == 0:
        levels = x if quantum is None else quantum * torch.round(x / quantum)
        assert torch.equal(refs, levels)


def test_a_still_quantised_frame_changes_nothing():
    x = torch.randn(2, 3, 20, 20) * 7
    weight, acc = torch.randn(8, 3, 3, 3), torch.randn(2, 8, 18, 18)
    _, x_ref = delta_conv2d_step(x, torch.zeros_like(x), acc, weight, quantum=0.1)
    again, ref = delta_conv2d_step(x, x_ref, acc, weight * torch.nan, quantum=0.1)
    assert torch.equal(again, acc)
    assert torch.equal(ref, x_ref)


@pytest.mark.claim(
    157, "A convolution's step has the same bits for every number of threads", tolerance=0.0
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_nothing(dtype):
    x, x_ref, acc, weight = problem((2,), 24, 70, (30, 41), (3, 3), torch.float32, stride=(1, 2))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(delta_conv2d_step(x, x_ref, acc, weight.to(dtype), stride=(1, 2)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def leaves(tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize("batch", [(), (2,), (1, 2), (0,)])
def test_gradcheck(batch, threshold):
    options = {"stride": (2, 1), "padding": (1, 0)}
    tensors = leaves(problem(batch, 2, 2, (3, 4), (2, 2), still=0.0, **options))

    def step(*tensors):
        return delta_conv2d_step(*tensors, threshold=threshold, **options)

    assert gradcheck(step, tensors)
    assert gradgradcheck(step, tensors)


@pytest.mark.claim(
    157,
    "The gradient of a convolution's step is that of conv2d of Q(x), held where nothing was sent; "
    "at threshold 0 inputs that did not change get theirs too",
    tolerance=1e-12,
)
@pytest.mark.parametrize(
    ("threshold", "quantum"), [(0.0, None), (0.0, 0.3), (0.6, None), (0.6, 0.3)]
)
def test_gradient_closed_form(threshold, quantum):
    x, x_ref, acc, weight = problem((3,), still=0.5, padding=1)
    if quantum is not None:
        x_ref = quantum * torch.round(x_ref / quantum)
    tensors = x, x_ref, acc, weight = leaves((x, x_ref, acc, weight))
    grads = torch.randn_like(acc), torch.randn_like(x)
    out = delta_conv2d_step(*tensors, threshold=threshold, quantum=quantum, padding=1)
    dx, dref, dacc, dweight = torch.autograd.grad(out, tensors, grads)
    delta = (out[1] - x_ref).detach()
    assert (delta == 0).any()
    mask = torch.ones_like(delta) if threshold == 0 else (delta != 0).double()
    through = torch.nn.grad.conv2d_input(x.shape, weight, grads[0], padding=1) + grads[1]
    tolerance = {"atol": 1e-12, "rtol": 0}
    torch.testing.assert_close(dx, mask * through, **tolerance)
    torch.testing.assert_close(dref, grads[1] - mask * through, **tolerance)
    torch.testing.assert_close(dacc, grads[0], **tolerance)
    expected = torch.nn.grad.conv2d_weight(delta, weight.shape, grads[0], padding=1)
    torch.testing.assert_close(dweight, expected, **tolerance)


@pytest.mark.parametrize(
    ("batch", "quantum", "threshold"), [((), None, 0.5), ((2, 2), 0.25, 0.0), ((0,), None, 0.0)]
)
def test_opcheck(batch, quantum, threshold):
    x, x_ref, acc, weight = problem(batch, stride=(1, 2), padding=(0, 1))
    frames = (t.movedim(-3, -1).contiguous() for t in (x, x_ref, acc))
    tensors = leaves((*frames, weight.permute(1, 2, 3, 0).contiguous()))
    step = None if quantum is None else torch.tensor(quantum, dtype=DOUBLE)
    torch.library.opcheck(OP, (*tensors, step, threshold, [1, 2], [0, 1], [1, 1]))


def test_half_precision_keeps_the_state_in_float32():
    tensors = problem((2,), 8, 5, dtype=torch.bfloat16)
    new_acc, new_ref = delta_conv2d_step(*tensors)
    assert new_acc.dtype == new_ref.dtype == torch.float32
    expected = delta_conv2d_step(*(tensor.float() for tensor in tensors))
    torch.testing.assert_close((new_acc, new_ref), expected, atol=1e-4, rtol=0)


def test_autocast_leaves_the_step_in_float32():
    tensors = leaves(problem((2,), dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        found = delta_conv2d_step(*tensors)
        grads = torch.autograd.grad(found[0].sum(), tensors)
    expected = delta_conv2d_step(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    torch.testing.assert_close(grads, torch.autograd.grad(expected[0].sum(), tensors))


@pytest.mark.parametrize(
    "dims", [(0, 0, 0, None), (1, None, 0, None), (0, 0, 0, 0), (None, None, None, 1)]
)
def test_vmap(dims):
    x, x_ref, acc, weight = problem((3,), padding=1)
    tensors = [x, x_ref, acc, torch.stack([weight, 2 * weight, -weight])]
    args, rows = [], []
    for tensor, dim in zip(tensors, dims, strict=True):
        args.append(tensor[0] if dim is None else tensor.movedim(0, dim))
        rows.append([tensor[0]] * 3 if dim is None else tensor.unbind(0))

    def step(*tensors):
        return delta_conv2d_step(*tensors, padding=1, threshold=0.2)

    found = torch.func.vmap(step, dims)(*args)
    expected = [step(*row) for row in zip(*rows, strict=True)]
    for index in range(2):
        torch.testing.assert_close(found[index], torch.stack([pair[index] for pair in expected]))


def test_forward_mode_is_refused():
    tensors = problem()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(tensors[0], torch.ones_like(tensors[0]))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            delta_conv2d_step(dual, *tensors[1:])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(dynamic):
    tensors = leaves(problem((2,), padding=1))
    options = {"threshold": 0.2, "quantum": 0.1, "padding": 1}
    compiled = torch.compile(
        delta_conv2d_step, fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    expected, found = (step(*tensors, **options) for step in (delta_conv2d_step, compiled))
    torch.testing.assert_close(found, expected)
    grads = (torch.autograd.grad(sum(o.sum() for o in out), tensors) for out in (found, expected))
    torch.testing.assert_close(*grads)


def test_meta():
    acc, x_ref = delta_conv2d_step(*(t.to("meta") for t in problem((2, 3), 2, 4)))
    assert (acc.shape, x_ref.shape) == ((2, 3, 4, 3, 4), (2, 3, 2, 5, 6))
    assert acc.is_meta
    assert x_ref.is_meta


def test_reach_is_the_gradient_of_a_convolution_of_ones():
    for geometry in itertools.product((1, 4, 9), (1, 2, 3), (1, 2, 4), (0, 1, 3), (1, 2)):
        size, kernel, stride, padding, dilation = geometry
        if size + 2 * padding <= dilation * (kernel - 1):
            continue
        x = torch.zeros(1, 1, size, dtype=DOUBLE, requires_grad=True)
        y = F.conv1d(x, torch.ones(1, 1, kernel, dtype=DOUBLE), None, stride, padding, dilation)
        (seen,) = torch.autograd.grad(y.sum(), x)
        assert reach(*geometry).tolist() == seen.flatten().tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 3, 5, 6)}, r"x: expected shape \(..., 2, H, W\).* got \(2, 3, 5, 6\)"),
        ({"x": torch.ones(5, 6)}, r"x: expected shape"),
        ({"x": torch.ones(2, 2, 5, 6, dtype=torch.long)}, r"x: expected a floating-point"),
        ({"x": torch.ones(2, 2, 2, 6)}, r"x: expected a frame in which kernels of \(3, 3\)"),
        ({"x": torch.ones(2, 2, 0, 6), "padding": 3}, r"x: expected a frame"),
        ({"dilation": 3}, r"x: expected a frame .* dilation 3"),
        ({"x_ref": torch.ones(2, 5, 6)}, r"x_ref: expected the shape of x, \(2, 2, 5, 6\)"),
        ({"acc": torch.ones(2, 3, 5, 6)}, r"acc: expected shape \(2, 3, 3, 4\), got"),
        ({"weight": torch.ones(3, 2, 3)}, r"weight: expected shape \(O, C, k, l\)"),
        ({"weight": torch.ones(0, 2, 3, 3)}, r"weight: expected shape .* without a 0"),
        ({"weight": torch.ones(3, 2, 3, 3, device="meta")}, r"expected one device"),
        ({"stride": 0}, r"stride: expected one or two numbers ≥ 1, got 0"),
        ({"padding": (0, -1)}, r"padding: expected one or two numbers ≥ 0"),
        ({"dilation": (1, 1, 1)}, r"dilation: expected one or two numbers ≥ 1"),
        ({"threshold": -0.1}, r"threshold: expected a number ≥ 0, got -0.1"),
        ({"quantum": 0.0}, r"quantum: expected a number > 0, got 0.0"),
        ({"quantum": torch.ones(4)}, r"quantum: expected a scalar or shape \(2,\), got \(4,\)"),
    ],
)
def test_bad_input(change, message):
    names = ("x", "x_ref", "acc", "weight")
    arguments = dict(zip(names, problem(dtype=torch.float32), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        delta_conv2d_step(**arguments)


def test_bad_sequences():
    weight = torch.ones(2, 3, 1, 1)
    with pytest.raises(ValueError, match=r"x: expected shape \(..., T, C, H, W\)"):
        delta_conv2d(torch.ones(3, 4, 4), weight)
    with pytest.raises(ValueError, match="bias: expected shape"):
        delta_conv2d(torch.ones(4, 3, 4, 4), weight, torch.ones(3))


def test_short_sequences():
    y, x_ref, delta = delta_conv2d(torch.randn(2, 0, 3, 4, 4), torch.randn(5, 3, 3, 3))
    assert y.shape == (2, 0, 5, 2, 2)
    assert x_ref.shape == delta.shape == (2, 0, 3, 4, 4)


@pytest.mark.skipif(
    library.backend("delta_conv2d_step")[0] == "reference", reason="no kernel is loaded"
)
def test_the_kernel_refuses_what_does_not_fit():
    x, x_ref, acc, weight = problem((2,), dtype=torch.float32)
    frames = [t.movedim(-3, -1).contiguous() for t in (x, x_ref, acc)]
    weight_t = weight.permute(1, 2, 3, 0).contiguous()
    good = [*frames, weight_t, None, 0.0, [1, 1], [0, 0], [1, 1]]
    OP(*good)
    for index, bad in (
        (0, frames[0][..., :1]),
        (1, frames[1][:1]),
        (2, frames[2][:, 1:]),
        (3, weight_t.double()),
        (4, torch.ones(3)),
        (6, [0, 1]),
        (7, [-1, 0]),
        (8, [3, 1]),
    ):
        with pytest.raises(RuntimeError, match="delta_conv2d_step"):
            OP(*good[:index], bad, *good[index + 1 :])
