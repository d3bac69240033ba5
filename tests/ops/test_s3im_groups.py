"""`s3im_groups` against convolutions, its gradients, and what torch asks of an operator."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad, gradcheck

from torchzoo.ops import s3im_groups
from torchzoo.ops.s3im_groups import similarity

DOUBLE = torch.float64
SETTINGS = [(4, 4, 1), (4, 4, 0), (4, 2, 1), (5, 3, 4), (3, 5, 1), (1, 1, 0)]
"""Sides of windows, strides and margins."""


def inputs(count=40, channels=3, shape=(9, 14), dtype=DOUBLE, seed=0):
    """Two sets of pixels, and an image in which some pixels are several times, some never."""
    random = torch.Generator().manual_seed(seed)
    src, tar = torch.rand(2, count, channels, generator=random, dtype=DOUBLE).to(dtype)
    return src, tar, torch.randint(count - 3, shape, generator=random)


def by_convolution(src, tar, indices, kernel, stride, margin, sigma=1.5, span=1.0):
    """The similarities from raw moments, by depthwise convolutions of the image's pixels."""
    x, y = (pixels[indices].permute(2, 0, 1)[None] for pixels in (src, tar))
    offset = torch.arange(kernel, dtype=src.dtype) - kernel // 2
    weights = torch.exp(-(offset[:, None] ** 2 + offset**2) / (2 * sigma**2))
    weights = (weights / weights.sum()).expand(src.shape[1], 1, kernel, kernel)

    def mean(image):
        return F.conv2d(image, weights, padding=margin, stride=stride, groups=src.shape[1])

    mx, my = mean(x), mean(y)
    vx, vy, covariance = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    squares = mx**2 + my**2 + c1
    ratio = (2 * mx * my + c1) * (2 * covariance + c2) / (squares * (vx + vy + c2))
    return ratio[0].permute(1, 2, 0)


def values_and_gradients(function, src, tar, indices, *options, **named):
    leaves = [src.clone().requires_grad_(), tar.clone().requires_grad_()]
    found = function(*leaves, indices, *options, **named)
    above = torch.linspace(-1, 2, found.numel(), dtype=DOUBLE).view(found.shape).to(found)
    return [found.detach(), *torch.autograd.grad((above * found).sum(), leaves)]


def named(kernel, stride, margin, sigma=1.5, span=1.0):
    sizes = {"kernel_size": kernel, "stride": stride, "margin": margin}
    return {**sizes, "sigma": sigma, "data_range": span}


@pytest.mark.claim(
    133,
    "The operator's similarities and their gradients by both sets are those of convolutions of "
    "the shuffled pixels, window by window",
    tolerance=1e-10,
)
@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("setting", SETTINGS)
def test_is_a_convolution(setting, channels):
    for span in (1.0, 2.5):
        given, options = inputs(channels=channels), (*setting, 0.8, span)
        expected = values_and_gradients(by_convolution, *given, *options)
        found = values_and_gradients(s3im_groups, *given, **named(*options))
        for value, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(value, exact, rtol=1e-10, atol=1e-10)
        assert found[1][-3:].eq(0).all()  # pixels that are nowhere


@pytest.mark.claim(
    133,
    "The operator agrees in single precision with its formula in double, values and gradients",
    tolerance=1e-6,
)
@pytest.mark.parametrize("setting", SETTINGS)
def test_operator_is_its_reference(setting):
    given = inputs(500, shape=(24, 50))  # each pixel is in several windows
    expected = values_and_gradients(similarity, *given, *setting, 1.5, 1.0)
    single = [x.float() if x.is_floating_point() else x for x in given]
    for dtype, tolerance in ((torch.float32, 1e-6), (DOUBLE, 1e-13)):
        sets = single if dtype == torch.float32 else given
        found = values_and_gradients(s3im_groups, *sets, **named(*setting))
        for value, exact in zip(found, expected, strict=True):
            assert value.dtype == dtype
            assert (value - exact).norm() <= tolerance * exact.norm()


@pytest.mark.claim(
    133, "The operator's gradients by both sets are those of differences", tolerance=1e-6
)
@pytest.mark.parametrize("setting", [(4, 4, 1), (3, 2, 1)])
def test_gradients(setting):
    src, tar, indices = inputs(12, 2, (5, 7))
    leaves = src.requires_grad_(), tar.requires_grad_()
    assert gradcheck(lambda x, y: s3im_groups(x, y, indices, **named(*setting)), leaves, atol=1e-6)


@pytest.mark.claim(
    133,
    "The operator passes torch's own checks, and new indices don't make it compile again",
    tolerance=None,
)
def test_torch_accepts_the_operator():
    src, tar, indices = inputs()
    options = (4, 4, 1, 1.5, 1.0)
    given = (src.requires_grad_(), tar.requires_grad_(), indices, *options)
    torch.library.opcheck(torch.ops.torchzoo.s3im_groups.default, given)
    back = (torch.rand(2, 4, 3, dtype=DOUBLE), src.detach(), tar.detach(), indices, *options)
    tests = ("test_schema", "test_faketensor")
    op = torch.ops.torchzoo.s3im_groups_backward.default
    torch.library.opcheck(op, back, test_utils=tests)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(s3im_groups, backend=counter, fullgraph=True)
    for seed in range(3):
        given = inputs(seed=seed)
        torch.testing.assert_close(compiled(*given), s3im_groups(*given))
    assert counter.frame_count == 1
    torch.compiler.reset()


def test_batches_of_vmap():
    src, tar, indices = inputs()
    many = torch.stack([src, tar, src])
    found = torch.func.vmap(lambda x: s3im_groups(x, tar, indices))(many)
    for values, pixels in zip(found, many, strict=True):
        assert torch.equal(values, s3im_groups(pixels, tar, indices))


def test_what_is_computed_in_which_type():
    src, tar, indices = inputs()
    found = s3im_groups(src.bfloat16(), tar.half(), indices.int())
    assert found.dtype == torch.float32
    expected = s3im_groups(src.bfloat16().double(), tar.half().double(), indices)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(s3im_groups(src.bfloat16(), tar.half(), indices), found)


def test_strides_and_nothing():
    src, tar, indices = inputs()
    expected = s3im_groups(src, tar, indices)
    turned = indices.T.contiguous().T
    assert torch.equal(s3im_groups(src.repeat_interleave(2, 0)[::2], tar, turned), expected)
    none = src[:, :0].clone().requires_grad_()
    s3im_groups(none, tar[:, :0], indices).sum().backward()
    assert none.grad.shape == (40, 0)


def test_wide_windows_take_the_reference():
    src, tar, indices = inputs(shape=(40, 41))
    found = s3im_groups(src, tar, indices, kernel_size=33, sigma=9.0)
    expected = by_convolution(src, tar, indices, 33, 4, 0, 9.0)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_threads_change_no_bit():
    given = inputs(900, shape=(60, 600), dtype=torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(values_and_gradients(s3im_groups, *given, margin=1))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"src": torch.rand(40)}, r"src: got \(40,\), expected \(N, C\)"),
        ({"tar": torch.rand(40, 1)}, r"tar: got \(40, 1\), expected \(40, 3\) as src"),
        ({"tar": torch.zeros(40, 3, dtype=torch.int64)}, "tar: got torch.int64"),
        ({"indices": torch.arange(36)}, r"indices: got \(36,\) of torch.int64, expected \(H, W\)"),
        ({"indices": torch.zeros(6, 6)}, "indices: got .* of torch.float32"),
        ({"indices": torch.full((6, 6), 40)}, "indices: got 40 to 40, expected 0 to 39"),
        ({"indices": torch.full((6, 6), -1)}, "indices: got -1 to -1, expected 0 to 39"),
        ({"kernel_size": 0}, "kernel_size: got 0, expected at least 1"),
        ({"kernel_size": 10, "margin": 0}, r"kernel_size: got 10 and an image of \(9, 14\)"),
        ({"stride": 0}, "stride: got 0"),
        ({"margin": 4}, "margin: got 4, expected 0 to 3"),
        ({"sigma": 0.0}, "sigma: got 0.0"),
        ({"data_range": -1.0}, "data_range: got -1.0"),
    ],
)
def test_what_does_not_fit(change, words):
    given = dict(zip(("src", "tar", "indices"), inputs(), strict=True))
    with pytest.raises(ValueError, match=words):
        s3im_groups(**given | change)


def test_kernel_refuses_indices_out_of_range():
    src, tar, indices = inputs()
    indices[3, 3] = 99
    with pytest.raises((RuntimeError, IndexError), match="out of"):
        torch.ops.torchzoo.s3im_groups(src, tar, indices, 4, 4, 0, 1.5, 1.0)


def test_forward_mode_is_refused():
    src, tar, indices = inputs()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="s3im_groups"):
        s3im_groups(forward_ad.make_dual(src, torch.ones_like(src)), tar, indices)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_devices_agree(setting, dtype):
    given = inputs(500, shape=(24, 50), dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    host = values_and_gradients(s3im_groups, *given, **named(*setting))
    device = values_and_gradients(s3im_groups, *(x.cuda() for x in given), **named(*setting))
    again = values_and_gradients(s3im_groups, *(x.cuda() for x in given), **named(*setting))
    for value, expected, repeated in zip(device, host, again, strict=True):
        assert (value.cpu() - expected).norm() <= tolerance * expected.norm()
        assert torch.equal(value, repeated)
    broken = given[2].cuda()
    broken[0, 0] = -1
    assert s3im_groups(given[0].cuda(), given[1].cuda(), broken)[0, 0].isnan().all()
