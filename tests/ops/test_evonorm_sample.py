"""The fused EvoNorm of samples against float64 by hand, and what torch asks of an operator."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from torchzoo.ops import evonorm_sample, library
from torchzoo.ops.evonorm_sample import formula, slopes

DOUBLE = torch.float64
TYPES = {DOUBLE: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
SHAPES = [  # of x, and groups
    *(((2, 6, 5), 1), ((3, 6, 3, 4), 3), ((2, 4, 2, 3, 2), 4), ((1, 2, 40, 33), 1), ((3, 4), 2)),
    *(((0, 4, 3), 2), ((2, 4, 0), 2), ((5, 8, 1, 1), 4), ((2, 2, 1100), 2)),
]
op, backward = (
    getattr(torch.ops.torchzoo, name).default
    for name in ("evonorm_sample", "evonorm_sample_backward")
)


def problem(shape, dtype, seed=0):
    """Inputs away from 0, a gradient, and γ, β, v in the type that is computed in."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(shape, generator=generator, dtype=DOUBLE) for _ in range(2))
    wide = DOUBLE if dtype == DOUBLE else torch.float32
    vectors = 0.5 + torch.randn(3, shape[1], generator=generator, dtype=DOUBLE)
    return (1.5 * x + 0.7).to(dtype), grad.to(dtype), *vectors.to(wide)


def by_hand(x, weight, bias, v, groups, eps, centred):
    """The definition, a group at a time, by the operations that autograd differentiates."""
    size, out = x.shape[1] // groups, []
    for sample in x.unbind():
        for first in range(0, x.shape[1], size):
            part = sample[first : first + size]
            middle = part.mean() if centred else 0.0
            spread = ((part - middle).square().sum() / part.numel() + eps).sqrt()
            for channel, row in enumerate(part.unbind(), first):
                y = row / (1 + (-v[channel] * row).exp()) / spread
                out.append(y * weight[channel] + bias[channel])
    return torch.stack(out).reshape(x.shape)


@pytest.mark.claim(40, "The fused operator equals the definition, gradients too", tolerance=3e-6)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("centred", [True, False])
def test_equals_float64_by_hand(dtype, centred):
    for shape, groups in SHAPES:
        x, grad, *vectors = problem(shape, dtype)
        options, tolerance = (groups, 1e-3, centred), TYPES[dtype]
        y = op(x, *vectors, *options)
        found = backward(grad, x, vectors[0], vectors[2], *options)
        assert (y.dtype, found[0].dtype) == (dtype, dtype)
        assert y.is_contiguous()
        assert {vector.dtype for vector in found[1:]} == {vectors[0].dtype}
        if not x.numel():
            assert not any(vector.any() for vector in found[1:])
            continue
        leaves = [t.double().requires_grad_() for t in (x, *vectors)]
        expected = by_hand(*leaves, *options)
        expected.backward(grad.double())
        close = {"rtol": tolerance, "atol": tolerance}
        torch.testing.assert_close(y.double(), expected.detach(), **close)
        size = 1 + grad.double().abs().sum() / shape[1]  # sums over samples and space
        sums = {"rtol": min(tolerance, 3e-6), "atol": min(tolerance, 3e-6) * float(size)}
        for k, (got, leaf) in enumerate(zip(found, leaves, strict=True)):
            torch.testing.assert_close(got.double(), leaf.grad, **(sums if k else close))


def test_derivatives():
    x, _, *vectors = problem((2, 4, 3, 2), DOUBLE)
    leaves = [t.requires_grad_() for t in (x, *vectors)]
    for centred in (True, False):
        call = lambda *args: evonorm_sample(*args, groups=2, centred=centred)  # noqa: B023, E731
        assert gradcheck(call, leaves, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(call, leaves)


def test_opcheck():
    for dtype in (DOUBLE, torch.bfloat16):
        x, grad, *vectors = problem((2, 4, 3), dtype)
        torch.library.opcheck(backward, (grad, x, vectors[0], vectors[2], 2, 1e-5, True))
        leaves = [t.requires_grad_() for t in (x, *vectors)]
        torch.library.opcheck(op, (*leaves, 2, 1e-5, True))


def test_layouts_and_compilers_take_the_formula():
    x, _, *vectors = problem((2, 4, 3, 5), torch.float32)
    y = evonorm_sample(x, *vectors, groups=2)
    last = x.to(memory_format=torch.channels_last)
    found = evonorm_sample(last, *vectors, groups=2)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, y)
    graphs = []

    def backend(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    call = torch.compile(
        lambda x: evonorm_sample(x, *vectors, groups=2), backend=backend, fullgraph=True
    )
    torch.testing.assert_close(call(x), y)
    assert not any("torchzoo" in target for target in graphs[0])
    each = torch.stack([evonorm_sample(part, *vectors, groups=2) for part in x.split(1)])
    mapped = torch.func.vmap(lambda x: evonorm_sample(x, *vectors, groups=2))(x.unsqueeze(1))
    torch.testing.assert_close(mapped, each)


@pytest.mark.claim(40, "One thread or two: the same bits", tolerance=0.0)
def test_threads():
    state, why = library.backend("evonorm_sample")
    if state != "native":
        pytest.skip(why)
    x, grad, *vectors = problem((9, 8, 30, 31), torch.float32)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found = backward(grad, x, vectors[0], vectors[2], 4, 1e-5, True)
            results.append((op(x, *vectors, 4, 1e-5, True), *found))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_large_offsets_and_large_values():
    """Two passes: the variance of values far from 0 is not lost; nor is the gate's overflow NaN."""
    x = torch.tensor([1e4 + 1.0, 1e4 - 1.0]).reshape(1, 1, 2)
    one = torch.ones(1)
    torch.testing.assert_close(op(x, one, 0 * one, one, 1, 0.0, True), x, rtol=1e-6, atol=0)
    far = torch.tensor([-1e18, 1e18, 0.0, 1.0]).reshape(1, 1, 4).requires_grad_()
    v = one.clone().requires_grad_()
    evonorm_sample(far, one, 0 * one, v, groups=1).sum().backward()
    assert far.grad.isfinite().all()
    assert v.grad.isfinite().all()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("centred", [True, False])
def test_cuda_equals_the_reference(dtype, centred):
    for shape, groups in [*SHAPES, ((4, 64, 56, 56), 32), ((2, 128, 7, 7), 4)]:
        x, grad, *vectors = problem(shape, dtype)
        options, close = (groups, 1e-3, centred), {"rtol": TYPES[dtype], "atol": 2 * TYPES[dtype]}
        cuda = [t.cuda() for t in (grad, x, *vectors)]
        y = op(*cuda[1:], *options)
        torch.testing.assert_close(y.cpu(), formula(x, *vectors, *options), **close)
        arguments = (cuda[0], cuda[1], cuda[2], cuda[4], *options)
        found, again = backward(*arguments), backward(*arguments)
        assert all(torch.equal(one, two) for one, two in zip(found, again, strict=True))
        expected = slopes(grad, x, vectors[0], vectors[2], *options)
        torch.testing.assert_close(found[0].cpu(), expected[0], **close)
        for got, wanted in zip(found[1:], expected[1:], strict=True):
            torch.testing.assert_close(got.cpu(), wanted, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 4, 3, dtype=torch.int64)}, "x: expected floating point"),
        ({"x": torch.ones(4)}, r"x: expected .* got torch.float32 \(4,\)"),
        ({"v": torch.ones(3)}, r"v: expected shape \(4,\), got \(3,\)"),
        ({"groups": 3}, "groups: expected a divisor of 4 channels, got 3"),
    ],
)
def test_bad_input(change, message):
    good = dict.fromkeys(("weight", "bias", "v"), torch.ones(4))
    with pytest.raises(ValueError, match=message):
        evonorm_sample(**{"x": torch.ones(2, 4, 3), **good, "groups": 2, **change})
