"""The integral of a Gaussian over a pixel against quadrature, error functions and limits."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch.autograd import gradcheck

from torchzoo.splatting import gaussian_cdf_logistic, pixel_integral

DOUBLE = torch.float64
TABLE = {  # deviations and angle: largest error of the integral, and of the value at the centre
    (1.0, 1.0, 0): (0.00367, 0.0787),
    (0.3, 0.3, 0): (0.00043, 0.537),
    (1.0, 0.3, 0): (0.00145, 0.347),
    (1.0, 0.3, 45): (0.0184, 0.328),
    (2.0, 0.2, 45): (0.0500, 0.459),
    (3.0, 2.0, 45): (0.00497, 0.0149),
}


def cov(s1, s2, degrees=0.0):
    """The covariance with these deviations, the first at an angle from the x axis."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    first, second = s1 * s1, s2 * s2
    entries = (
        c * c * first + s * s * second,
        c * s * (first - second),
        s * s * first + c * c * second,
    )
    return torch.tensor(entries, dtype=DOUBLE)


def grid(reach, count):
    """Offsets `(count, count, 2)` from -reach to reach."""
    along = torch.linspace(-reach, reach, count, dtype=DOUBLE)
    return torch.stack(torch.meshgrid(along, along, indexing="ij"), -1)


def value(cov2d, offset):
    """`exp(-q / 2)`."""
    xx, xy, yy = cov2d.tolist()
    conic = torch.tensor([[xx, xy], [xy, yy]], dtype=DOUBLE).inverse()
    return torch.exp(-0.5 * torch.einsum("...i,ij,...j->...", offset, conic, offset))


def quadrature(cov2d, offset, window=1.0, nodes=32):
    """Its integral over squares along the image's axes."""
    x, weight = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(nodes))
    place = torch.stack(torch.meshgrid(x, x, indexing="ij"), -1) * (window / 2)
    values = value(cov2d, offset[..., None, None, :] + place)
    return torch.einsum("...ij,i,j->...", values, weight, weight) * (window / 2) ** 2


@pytest.mark.claim(
    17,
    "The logistic function is within 3.92e-4 of the normal distribution function, worst at 0.595",
    tolerance=1e-5,
)
def test_logistic_function():
    x = torch.linspace(-8, 8, 160_001, dtype=DOUBLE)
    error = (gaussian_cdf_logistic(x) - torch.from_numpy(norm.cdf(x.numpy()))).abs()
    assert abs(error.max() - 3.92e-4) <= 1e-6
    assert abs(abs(x[error.argmax()]) - 0.595) <= 2e-3


@pytest.mark.claim(
    17, "The logistic function is S(-x) = 1 - S(x), and holds for any number", tolerance=1e-7
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, DOUBLE])
def test_logistic_function_anywhere(dtype):
    x = torch.tensor([0.0, 0.3, 1.0, 4.0, 9.9, 10.1, 1e4, math.inf], dtype=dtype)
    x.requires_grad_()
    y = gaussian_cdf_logistic(x)
    assert y.dtype == dtype
    rounding = max(1e-7, torch.finfo(dtype).eps)
    assert (1 - y - gaussian_cdf_logistic(-x)).abs().max() <= rounding
    assert y[0] == 0.5
    assert (y[-3:] - 1).abs().max() <= 1e-12
    y.sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad[-3:] == 0).all()
    if dtype == DOUBLE:  # S' = (1.6 + 0.21 x^2) S (1 - S)
        slope = (1.6 + 0.21 * x**2) * y * (1 - y)
        torch.testing.assert_close(x.grad[:4], slope[:4].detach(), atol=1e-12, rtol=0)


@pytest.mark.claim(
    17,
    "Along the axes the integral is within 3.8e-3 of the error functions' for deviations up to one "
    "pixel, and within 5.4e-3 for any",
    tolerance=5.4e-3,
)
def test_integral_along_axes():
    def exact(u, s):
        edges = [norm.cdf((u.numpy() + side) / s) for side in (0.5, -0.5)]
        return torch.from_numpy(math.sqrt(2 * math.pi) * s * (edges[0] - edges[1]))

    def worst(s1, s2):
        offset = grid(1, 61) * torch.tensor([4 * max(s1, 0.5), 4 * max(s2, 0.5)], dtype=DOUBLE)
        truth = exact(offset[..., 0], s1) * exact(offset[..., 1], s2)
        return float((pixel_integral(cov(s1, s2), offset) - truth).abs().max())

    sizes = (0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
    small = [worst(a, b) for a in sizes for b in sizes]
    assert max(small) <= 3.8e-3
    assert abs(worst(1.0, 1.0) - 0.0037) <= 1e-4  # it is the logistic function, not erf
    assert abs(worst(2.0, 2.0) - 0.0048) <= 1e-4
    large = [worst(a, b) for a in (0.3, 2.0, 10.0, 300.0) for b in (1.0, 5.0, 300.0)]
    assert max(large) <= 5.4e-3


@pytest.mark.claim(
    17,
    "Against quadrature over the pixel the integral's errors are those documented, 4e-4 to "
    "0.05, and 3 to 1,200 times below those of the value at the pixel's centre",
    tolerance=0.02,
)
@pytest.mark.parametrize("shape", TABLE)
def test_accuracy_table(shape):
    integral, centre = TABLE[shape]
    offset = grid(1.5, 31)
    truth = quadrature(cov(*shape), offset)
    for found, error in ((pixel_integral, integral), (value, centre)):
        assert abs((found(cov(*shape), offset) - truth).abs().max() / error - 1) <= 0.02


@pytest.mark.claim(
    17, "The window is a square of any side, turned to the splat's axes", tolerance=1e-9
)
def test_window_turns_with_the_axes():
    offset, window = grid(2.0, 9), 0.6
    straight = pixel_integral(cov(1.5, 0.4), offset, window=window)
    turn = math.radians(25)
    c, s = math.cos(turn), math.sin(turn)
    turned = offset @ torch.tensor([[c, s], [-s, c]], dtype=DOUBLE)
    found = pixel_integral(cov(1.5, 0.4, 25), turned, window=window)
    torch.testing.assert_close(found, straight, atol=1e-9, rtol=0)
    assert (straight - quadrature(cov(1.5, 0.4), offset, window)).abs().max() <= 1.5e-3
    small = pixel_integral(cov(3.0, 2.0, 25), offset, window=0.01) / 0.01**2
    assert (small - value(cov(3.0, 2.0, 25), offset)).abs().max() <= 1.2 * 0.0053


@pytest.mark.claim(
    17,
    "Splats far larger than a pixel are shaded by their value, up to the logistic function's slope",
    tolerance=1.2 * 0.0053,
)
def test_large_splats():
    offset, large = grid(150, 101), cov(30.0, 30.0)
    w = pixel_integral(large, offset)
    assert abs(pixel_integral(large, torch.zeros(2).double()) - 2 * math.pi * 0.16) <= 5e-4
    error = (w - value(large, offset)).abs().max()
    assert 0.005 <= error <= 1.2 * 0.0053
    z = offset / 30
    s = gaussian_cdf_logistic(z)
    slope = ((1.6 + 0.21 * z**2) * s * (1 - s)).prod(-1)
    assert (w - 2 * math.pi * slope).abs().max() <= 5e-4


@pytest.mark.claim(
    17, "Splats far smaller than a pixel have the weight 2 pi s1 s2 within it", tolerance=1e-9
)
def test_small_splats_fade():
    inside = grid(0.3, 5)
    for s1, s2, degrees in ((0.02, 0.01, 0), (0.01, 0.004, 0), (0.01, 0.005, 30)):
        w = pixel_integral(cov(s1, s2, degrees), inside)
        torch.testing.assert_close(w, torch.full_like(w, 2 * math.pi * s1 * s2), rtol=1e-9, atol=0)
    thin = pixel_integral(torch.tensor([1e-12, 0.0, 1e-12]).double(), torch.zeros(2).double())
    assert abs(thin / (2 * math.pi * 1e-6) - 1) <= 1e-9  # variances are at least 1e-6


@pytest.mark.claim(
    17,
    "The integral's gradients are those of finite differences, for slanted splats too",
    tolerance=1e-6,
)
@pytest.mark.parametrize("shape", [(1.0, 0.3, 45), (2.0, 0.2, -45), (0.4, 0.3, 10), (3.0, 1.0, 95)])
def test_gradients(shape):
    def run(entries, offset):
        return pixel_integral(entries, offset, window=0.9)

    offset = grid(0.9, 3).requires_grad_()
    assert gradcheck(run, (cov(*shape).requires_grad_(), offset), eps=1e-6, atol=1e-6, rtol=1e-4)


def test_round_splats_have_gradients():
    offset = grid(1.3, 5)
    entries = cov(0.6, 0.6).requires_grad_()
    (slope,) = torch.autograd.grad(pixel_integral(entries, offset).sum(), entries)
    assert slope.isfinite().all()
    step = 1e-5
    grown, shrunk = (pixel_integral(cov(r, r), offset).sum() for r in _radii(0.36, step))
    assert abs(slope[0] + slope[2] - (grown - shrunk) / (2 * step)) <= 1e-6


def _radii(variance, step):
    return math.sqrt(variance + step), math.sqrt(variance - step)


def test_leading_dimensions_broadcast():
    random = torch.Generator().manual_seed(0)
    spread = 0.1 + torch.rand(4, 1, 2, generator=random)
    entries = torch.stack((spread[..., 0], 0 * spread[..., 0], spread[..., 1]), -1)
    offset = torch.randn(5, 2, generator=random)
    w = pixel_integral(entries, offset)
    assert w.shape == (4, 5)
    for i in range(4):
        torch.testing.assert_close(w[i], pixel_integral(entries[i, 0], offset))
    assert pixel_integral(entries[:0], offset).shape == (0, 5)


def test_it_compiles_whole():
    torch.compiler.reset()
    run = torch.compile(pixel_integral, fullgraph=True, backend="aot_eager")
    offset = grid(1.0, 4)
    torch.testing.assert_close(
        run(cov(1.0, 0.3, 45), offset), pixel_integral(cov(1, 0.3, 45), offset)
    )


@pytest.mark.parametrize(
    ("entries", "offset", "options", "words"),
    [
        (torch.ones(2, 2), torch.zeros(2), {}, r"cov2d: got \(2, 2\), expected \(..., 3\)"),
        (torch.tensor(1.0), torch.zeros(2), {}, "cov2d"),
        (torch.ones(3), torch.zeros(3), {}, r"offset: got \(3,\), expected \(..., 2\)"),
        (torch.tensor([0.0, 0.0, 1.0]), torch.zeros(2), {}, "cov2d: got a variance"),
        (torch.tensor([[1.0, 0, 1], [1, 0, -1]]), torch.zeros(2), {}, "cov2d: got a variance"),
        (torch.ones(3), torch.zeros(2), {"window": 0.0}, "window: got 0.0"),
        (torch.ones(3), torch.zeros(2), {"window": -1.0}, "window: got -1.0"),
    ],
)
def test_what_does_not_fit(entries, offset, options, words):
    with pytest.raises(ValueError, match=words):
        pixel_integral(entries, offset, **options)
