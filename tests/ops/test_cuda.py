"""CUDA kernels against the references on the CPU in float64, and what streams and graphs ask."""

import pytest
import torch

from torchzoo.ops import _spgemm, delta_linear_step, grouped_mm, library, spgemm
from torchzoo.ops.delta_linear import reference as step_reference

HAS_KERNELS = torch.cuda.is_available() and library.load()["cuda"].loaded
REASON = "no CUDA device" if not torch.cuda.is_available() else library.load()["cuda"].error
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not HAS_KERNELS, reason=REASON)]

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# A bound on one rounding of the result and those of the sum, relative to the sum of sizes.
TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: 2e-6,
    torch.bfloat16: 5e-3,
    torch.float16: 7e-4,
}
# (group sizes, K, N, rows past the last end): low and high tiles, ragged and aligned, many groups
GROUPS = {
    "few rows": ([5, 0, 33, 2], 40, 24, 3),
    "few rows, ragged": ([1, 0, 70, 2], 37, 21, 1),
    "many rows": ([130, 0, 600], 128, 256, 5),
    "many rows, ragged": ([300, 1, 257], 65, 131, 0),
    "bands of row tiles": ([2500], 64, 264, 0),
    "deep": ([3, 64], 4096, 128, 0),
    "a thousand groups": ([2 if i % 7 == 3 else 0 for i in range(1000)], 16, 24, 1),
    "all empty": ([0, 0], 8, 8, 4),
    "no inner dimension": ([3, 2], 0, 8, 1),
}


def problem(case, dtype, layout="along n"):
    sizes, k, n, surplus = GROUPS[case]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).cuda()

    shape = (n, k) if layout == "along k" else (k, 2 * n if layout == "strided" else n)
    weight = draw(len(sizes), *shape)
    if layout == "along k":
        weight = weight.mT
    elif layout == "strided":
        weight = weight[..., ::2]
    offsets = torch.tensor(sizes).cumsum(0).to(torch.int32).cuda()
    rows = sum(sizes) + surplus
    return draw(rows, k), weight, offsets, draw(rows, n)


def products(x, weight, offsets, grad):
    """y, dx and dweight in float64, group by group on the CPU."""
    x, weight, grad = (t.detach().double().cpu() for t in (x, weight, grad))
    y, dx, dweight = torch.zeros_like(grad), torch.zeros_like(x), torch.zeros_like(weight)
    start = 0
    for group, end in enumerate(offsets.tolist()):
        rows = slice(start, end)
        y[rows] = x[rows] @ weight[group]
        dx[rows] = grad[rows] @ weight[group].T
        dweight[group] = x[rows].T @ grad[rows]
        start = end
    return y, dx, dweight


def assert_near(found, expected, size, dtype):
    assert found.dtype == dtype
    excess = (found.double().cpu() - expected).abs() - TOLERANCE[dtype] * size
    assert (excess <= 0).all(), f"exceeds the bound by {float(excess.max()):.2g}"


@pytest.mark.parametrize("layout", ["along n", "along k", "strided"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", GROUPS)
def test_grouped_mm(case, dtype, layout):
    x, weight, offsets, grad = problem(case, dtype, layout)
    expected = products(x, weight, offsets, grad)
    sizes = products(x.abs(), weight.abs(), offsets, grad.abs())
    x.requires_grad_(), weight.requires_grad_()
    y = grouped_mm(x, weight, offsets)
    found = (y, *torch.autograd.grad(y, (x, weight), grad))
    for one, other, size in zip(found, expected, sizes, strict=True):
        assert_near(one, other, size, dtype)
    assert torch.equal(y, grouped_mm(x, weight, offsets.long()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["few rows", "many rows, ragged"])
def test_grouped_mm_does_not_read_what_it_need_not(case, dtype):
    x, weight, offsets, grad = problem(case, dtype)
    last, empty = int(offsets[-1]), offsets.diff(prepend=offsets.new_zeros(1)) == 0
    clean = grouped_mm(x, weight, offsets)
    dweight = torch.ops.torchzoo.grouped_mm_dweight(x, grad, offsets)
    x[last:], grad[last:], weight[empty] = torch.nan, torch.nan, torch.nan
    y = grouped_mm(x, weight, offsets)
    assert torch.equal(y, clean)
    assert (y[last:] == 0).all()
    again = torch.ops.torchzoo.grouped_mm_dweight(x, grad, offsets)
    assert torch.equal(again, dweight)
    assert (again[empty] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_mm_of_unaligned_views(dtype):
    x, weight, offsets, _ = problem("many rows", dtype)
    moved = torch.empty(x.numel() + 1, dtype=dtype, device="cuda")[1:].view_as(x).copy_(x)
    held = torch.empty(weight.numel() + 1, dtype=dtype, device="cuda")[1:].view_as(weight)
    assert torch.equal(
        grouped_mm(moved, held.copy_(weight), offsets), grouped_mm(x, weight, offsets)
    )


def test_ends_that_leave_the_rows_do_no_harm():
    x, weight, offsets, grad = problem("few rows", torch.bfloat16)
    expected = grouped_mm(x, weight, offsets)
    for bad in ([50, -7, 10**6, 3], [-1, -1, -1, -1], [2**31 - 1] * 4):
        ends = torch.tensor(bad, dtype=torch.int32, device="cuda")
        torch.ops.torchzoo.grouped_mm(x, weight, ends)
        torch.ops.torchzoo.grouped_mm_dweight(x, grad, ends)
    torch.cuda.synchronize()
    assert torch.equal(grouped_mm(x, weight, offsets), expected)


def stream_problem(batch, inputs, outputs, dtype, held=None, still=0.7):
    generator = torch.Generator().manual_seed(1)
    draw = [
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((batch, inputs), (batch, inputs), (batch, outputs), (inputs, outputs))
    ]
    same = torch.rand(batch, inputs, generator=generator) < still
    draw[0] = torch.where(same, draw[1], draw[0])
    types = (dtype, dtype, dtype, held or dtype)
    return tuple(t.to(kind).cuda() for t, kind in zip(draw, types, strict=True))


STREAMS = [(1, 2048, 1024), (3, 300, 257), (600, 70, 40), (2, 20000, 8), (4, 0, 5), (4, 5, 0)]


@pytest.mark.parametrize(
    ("dtype", "held"),
    [
        (torch.float32, None),
        (torch.float64, None),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float64, torch.bfloat16),
    ],
)
@pytest.mark.parametrize(("threshold", "quantum"), [(0.0, None), (0.5, None), (0.5, 0.25)])
@pytest.mark.parametrize("shape", STREAMS)
def test_delta_step(shape, threshold, quantum, dtype, held):
    batch, inputs, outputs = shape
    x, x_ref, acc, weight_t = stream_problem(batch, inputs, outputs, dtype, held)
    step = None if quantum is None else torch.tensor(quantum, dtype=torch.float64)
    now, ref, start, rows = (t.double().cpu() for t in (x, x_ref, acc, weight_t))
    expected, expected_ref = step_reference(now, ref, start, rows, step, threshold)
    size = start.abs() + (expected_ref - ref).abs() @ rows.abs()
    new_acc, new_ref = delta_linear_step(
        x, x_ref, acc, weight_t, threshold=threshold, quantum=quantum
    )
    assert torch.equal(new_ref.double().cpu(), expected_ref)
    assert_near(new_acc, expected, size, dtype)


def test_a_quantised_input_that_stays_is_no_change():
    x, x_ref, acc, weight_t = stream_problem(2, 4096, 64, torch.float32, still=0.0)
    quantum = torch.rand(4096, device="cuda") + 0.1
    acc, x_ref = delta_linear_step(x, x_ref, acc, weight_t, quantum=quantum)
    unread = torch.full_like(weight_t, torch.nan)
    again, ref = delta_linear_step(x, x_ref, acc, unread, quantum=quantum)
    assert torch.equal(again, acc)
    assert torch.equal(ref, x_ref)


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_a_stream_does_not_depend_on_its_batch_or_on_unread_rows(held):
    x, x_ref, acc, weight_t = stream_problem(600, 700, 64, torch.float32, held)
    batch, _ = delta_linear_step(x, x_ref, acc, weight_t)
    for s in (0, 599):
        unread = weight_t.clone()
        unread[x[s] == x_ref[s]] = torch.nan
        alone, _ = delta_linear_step(x[s], x_ref[s], acc[s], unread)
        assert torch.equal(alone, batch[s])


def test_delta_gradients():
    tensors = stream_problem(3, 50, 20, torch.float64)
    plain = [t.cpu().requires_grad_() for t in tensors]
    tensors = [t.requires_grad_() for t in tensors]
    for threshold in (0.0, 0.5):
        grads = []
        for inputs in (tensors, plain):
            new_acc, new_ref = delta_linear_step(*inputs, threshold=threshold)
            grads.append(torch.autograd.grad((new_acc**2).sum() + (new_ref**3).sum(), inputs))
        for ours, oracle in zip(*grads, strict=True):
            torch.testing.assert_close(ours.cpu(), oracle, rtol=1e-12, atol=1e-12)


def sparse(rows, columns, density, dtype, index=torch.int64, seed=0):
    """CSR arrays of a random matrix with an empty row, a full one and one that is not sorted."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=generator) < density
    kept[0], kept[rows // 2] = False, True
    row, col = kept.nonzero().unbind(1)
    crow = torch.searchsorted(row, torch.arange(rows + 1))
    last = slice(int(crow[-2]), int(crow[-1]))
    col[last] = col[last].flip(0)
    values = torch.randn(len(col), generator=generator, dtype=torch.float64)
    return crow.to(index), col.to(index), values.to(dtype)


# (rows, inner, columns, density): short rows, rows longer than a warp's table, several windows
PRODUCTS = {
    "short rows": (300, 200, 150, 0.02),
    "long rows": (70, 300, 5000, 0.1),
    "several windows": (5, 60, 600_000, 0.003),
    "one column": (40, 30, 1, 0.5),
}


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", PRODUCTS)
def test_spgemm(case, dtype, index):
    rows, inner, columns, density = PRODUCTS[case]
    a = sparse(rows, inner, density, dtype, index)
    b = sparse(inner, columns, density, dtype, index, seed=1)
    known = [a[0], a[1], b[0], b[1]]
    known += _spgemm.pattern_of._init_fn(known, columns)
    on_gpu = [t.cuda() for t in known]
    x, y = a[2], b[2]
    g = torch.randn(known[5].shape, dtype=torch.float64).to(dtype)

    def same(found, expected):
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one.cpu(), other)

    same(_spgemm.pattern_of(on_gpu[:4], columns), known[4:])
    for op, first, second in (
        (_spgemm.values_of, x, y),
        (_spgemm.grad_a, y, g),
        (_spgemm.grad_b, x, g),
    ):
        expected = op._init_fn(known, first.double(), second.double(), columns)
        size = op._init_fn(known, first.double().abs(), second.double().abs(), columns)
        found = op(on_gpu, first.cuda(), second.cuda(), columns)
        assert_near(found, expected, 10 * size, dtype)
        assert torch.equal(op(on_gpu, first.cuda(), second.cuda(), columns), found)
    for product in (False, True):
        rounded = x.round(), y.round()  # so that there are ties, and zeros of both signs
        expected = _spgemm.select._init_fn(known, *rounded, columns, product)
        same(_spgemm.select(on_gpu, *(t.cuda() for t in rounded), columns, product), expected)
    expected = _spgemm.values_of._init_fn(known, x.double(), y.double(), columns)
    size = _spgemm.values_of._init_fn(known, x.double().abs(), y.double().abs(), columns)
    for method in ("inner", "esc"):
        crow, col, values, held = _spgemm.dataflow(on_gpu[:4], x.cuda(), y.cuda(), columns, method)
        same((crow, col), known[4:])
        assert_near(values, expected, 10 * size, dtype)
        assert int(held) > 0


def test_empty_sparse_products():
    for rows, inner, columns in ((0, 3, 4), (3, 0, 4), (3, 4, 0), (2, 2, 2)):
        a = torch.sparse_csr_tensor(
            torch.zeros(rows + 1, dtype=torch.long),
            torch.zeros(0, dtype=torch.long),
            torch.zeros(0),
            (rows, inner),
        ).cuda()
        b = torch.zeros(inner, columns).to_sparse_csr().cuda()
        for options in ({}, {"_method": "inner"}, {"_method": "esc"}, {"semiring": "min_plus"}):
            c = spgemm(a, b, **options)
            assert c.shape == (rows, columns)
            assert c.values().numel() == 0


def calls():
    x, weight, offsets, grad = problem("many rows", torch.bfloat16)
    tensors = stream_problem(1, 2048, 1024, torch.float32)
    a = [t.cuda() for t in sparse(200, 200, 0.1, torch.float32)]
    known = [a[0], a[1]] * 2
    known += _spgemm.pattern_of(known, 200)
    return {
        "grouped_mm": lambda: (grouped_mm(x, weight, offsets),),
        "grouped_mm_dweight": lambda: (torch.ops.torchzoo.grouped_mm_dweight(x, grad, offsets),),
        "delta_linear_step": lambda: delta_linear_step(*tensors, threshold=0.1),
        "spgemm_values": lambda: (_spgemm.values_of(known, a[2], a[2], 200),),
        "spgemm_grad_b": lambda: (_spgemm.grad_b(known, a[2], known[5].float(), 200),),
    }


OPS = ["grouped_mm", "grouped_mm_dweight", "delta_linear_step", "spgemm_values", "spgemm_grad_b"]


@pytest.mark.parametrize("op", OPS)
def test_the_current_stream_is_used(op):
    call, side = calls()[op], torch.cuda.Stream()
    expected = call()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        call()  # so that the stream has memory of its own
        torch.cuda._sleep(10**8)  # results of another stream would be there before this ends
        begun = torch.cuda.Event()
        begun.record()
        found = call()
        assert not begun.query(), "the call waited for its stream"
    side.synchronize()
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("op", OPS)
def test_calls_can_be_captured_in_a_graph(op):
    call = calls()[op]
    expected = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    for result in found:
        result.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_captured_stream_follows_its_inputs():
    x, x_ref, acc, weight_t = stream_problem(1, 512, 256, torch.float32)
    graph = torch.cuda.CUDAGraph()
    delta_linear_step(x, x_ref, acc, weight_t)
    with torch.cuda.graph(graph):
        new_acc, _ = delta_linear_step(x, x_ref, acc, weight_t)
    for share in (0.0, 0.01, 1.0):  # how many rows are read is not known to the graph
        x.copy_(torch.where(torch.rand_like(x) < share, torch.randn_like(x), x_ref))
        graph.replay()
        assert torch.equal(new_acc, delta_linear_step(x, x_ref, acc, weight_t)[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_device_that_is_not_current():
    x, weight, offsets, _ = problem("few rows", torch.bfloat16)
    expected = grouped_mm(x, weight, offsets)
    found = grouped_mm(*(t.to("cuda:1") for t in (x, weight, offsets)))
    assert found.device.index == 1
    assert torch.equal(found.cpu(), expected.cpu())
    assert torch.cuda.current_device() == 0
    tensors = stream_problem(2, 300, 64, torch.float32)
    expected, _ = delta_linear_step(*tensors)
    found, _ = delta_linear_step(*(t.to("cuda:1") for t in tensors))
    assert torch.equal(found.cpu(), expected.cpu())


def test_tensors_of_two_devices_are_refused():
    x, weight, offsets, _ = problem("few rows", torch.float32)
    with pytest.raises(RuntimeError, match="expected tensors of one CUDA device"):
        torch.ops.torchzoo.grouped_mm(x, weight, offsets.cpu())
