"""S3IM against convolutions, loops and closed forms."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from torchzoo.splatting import S3IMLoss, s3im
from torchzoo.splatting.s3im_loss import draw_indices

SMALL = {"patch_height": 12, "patch_width": 8, "repeat": 3}


def pixels(size=96, channels=3, dtype=torch.float64, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.rand(2, size, channels, generator=random, dtype=dtype).unbind(0)


def by_convolution(src, tar, indices, height, *, kernel=4, stride=4, sigma=1.5, pad=1, span=1.0):
    """The loss from raw moments, by depthwise convolutions of the virtual image."""
    images = [x[indices].T.reshape(1, x.shape[1], height, -1) for x in (src, tar)]
    offset = torch.arange(kernel, dtype=src.dtype) - kernel // 2
    weights = torch.exp(-(offset[:, None] ** 2 + offset**2) / (2 * sigma**2))
    weights = (weights / weights.sum()).expand(src.shape[1], 1, kernel, kernel)

    def mean(image):
        return F.conv2d(image, weights, padding=pad, stride=stride, groups=src.shape[1])

    x, y = images
    mx, my = mean(x), mean(y)
    vx, vy, c = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    ratio = (2 * mx * my + c1) * (2 * c + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return 1 - ratio.mean()


@pytest.mark.claim(
    133, "the loss is 0 for equal colours, symmetric, and within [0, 2]", tolerance=1e-6
)
def test_value_range():
    src, tar = pixels(dtype=torch.float32)
    indices = draw_indices(96, 3)
    assert abs(s3im(src, src, **SMALL)) < 1e-6
    forth = s3im(src, tar, indices=indices, **SMALL)
    torch.testing.assert_close(s3im(tar, src, indices=indices, **SMALL), forth)
    assert 0 < forth < 2
    worst = s3im(src, 1 - src, **SMALL)
    assert 1.5 < worst <= 2
    for seed in range(20):
        pair = pixels(seed=seed)
        assert 0 <= s3im(pair[0], 5 * pair[1] - 2, data_range=0.1, **SMALL) <= 2


@pytest.mark.claim(
    133, "it equals an independent convolution of the same virtual image", tolerance=1e-12
)
@pytest.mark.parametrize(
    ("kernel", "stride", "sigma", "span"),
    [(4, 4, 1.5, 1.0), (4, 2, 1.5, 2.5), (5, 3, 0.8, 1.0), (3, 4, 1.5, 1.0), (1, 1, 1.0, 1.0)],
)
@pytest.mark.parametrize("padding", ["reference", "none"])
def test_convolution(kernel, stride, sigma, span, padding):
    src, tar = pixels()
    indices = draw_indices(96, 3, generator=torch.Generator().manual_seed(1))
    pad = (kernel - 1) // 2 if padding == "reference" else 0
    expected = by_convolution(
        src, tar, indices, 12, kernel=kernel, stride=stride, sigma=sigma, pad=pad, span=span
    )
    options = {"kernel_size": kernel, "stride": stride, "sigma": sigma, "data_range": span}
    found = s3im(src, tar, indices=indices, padding=padding, **options, **SMALL)
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)
    single = s3im(src.float(), tar.float(), indices=indices, padding=padding, **options, **SMALL)
    assert single.item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.claim(
    133, "by default windows are 4 x 4 of ten permutations of 64 x 64 pixels", tolerance=1e-12
)
def test_defaults_of_the_paper():
    src, tar = pixels(4096)
    indices = draw_indices(4096, 10, generator=torch.Generator().manual_seed(3))
    loss = S3IMLoss(generator=torch.Generator().manual_seed(3))
    expected = by_convolution(src, tar, indices, 64)
    assert loss(src, tar).item() == pytest.approx(expected.item(), abs=1e-12)
    assert s3im(src, tar, indices=indices).item() == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.claim(133, "without padding it is a plain loop over groups of 16", tolerance=1e-12)
def test_loop_over_windows():
    src, tar = (x.numpy() for x in pixels())
    indices = draw_indices(96, 3)
    place = indices.numpy().reshape(12, 24)
    offset = np.arange(4) - 2
    weights = np.exp(-np.add.outer(offset**2, offset**2) / 4.5).ravel()
    weights /= weights.sum()
    values = []
    for row in range(0, 12, 4):
        for column in range(0, 24, 4):
            group = place[row : row + 4, column : column + 4].ravel()
            for c in range(3):
                x, y = src[group, c], tar[group, c]
                mx, my = weights @ x, weights @ y
                spread = weights @ (x - mx) ** 2 + weights @ (y - my) ** 2
                covariance = weights @ ((x - mx) * (y - my))
                values.append(
                    (2 * mx * my + 1e-4)
                    / (mx**2 + my**2 + 1e-4)
                    * (2 * covariance + 9e-4)
                    / (spread + 9e-4)
                )
    found = s3im(*pixels(), indices=indices, padding="none", **SMALL)
    assert found.item() == pytest.approx(1 - np.mean(values), abs=1e-12)


@pytest.mark.claim(133, "its gradient is that of finite differences", tolerance=1e-6)
def test_gradcheck():
    src, tar = pixels(48, 2)
    options = {"patch_height": 6, "patch_width": 8, "repeat": 2, "indices": draw_indices(48, 2)}
    src.requires_grad_(), tar.requires_grad_()
    for padding in ("reference", "none"):
        assert torch.autograd.gradcheck(
            lambda a, b, p=padding: s3im(a, b, padding=p, **options), (src, tar)
        )


@pytest.mark.claim(
    133, "the mean over calls depends on the pairs of colours only, not on their order"
)
def test_only_pairs_matter():
    src, tar = pixels()
    tar = 0.5 * src + 0.5 * tar
    random = torch.Generator().manual_seed(2)
    loss = S3IMLoss(patch_height=12, patch_width=8, repeat=10, generator=random)
    order = torch.randperm(96, generator=random)

    def calls(a, b):
        values = torch.stack([loss(a, b) for _ in range(200)])
        return values.mean(), values.std() / 200**0.5

    first, error = calls(src, tar)
    second, other = calls(src[order], tar[order])
    # The identity comes first at every call, a tenth of the windows, so its share is taken out.
    share = 1 / 10
    shift = share * (
        s3im(src[order], tar[order], repeat=1, patch_height=12, patch_width=8)
        - s3im(src, tar, repeat=1, patch_height=12, patch_width=8)
    )
    assert abs(second - first - shift) < 3 * torch.hypot(error, other) + 0.005 * abs(first)
    assert calls(src[order], tar)[0] - first > 100 * error


@pytest.mark.claim(133, "the first permutation is the identity, the others new at every call")
def test_permutations():
    src, tar = pixels()
    plain = S3IMLoss(patch_height=12, patch_width=8, repeat=1)
    assert plain(src, tar) == plain(src, tar)
    expected = by_convolution(src, tar, torch.arange(96), 12)
    assert plain(src, tar).item() == pytest.approx(expected.item(), abs=1e-12)
    drawn = draw_indices(96, 4).view(4, 96)
    assert torch.equal(drawn[0], torch.arange(96))
    assert torch.equal(drawn.sort(-1).values, torch.arange(96).expand(4, 96))
    assert len({tuple(row.tolist()) for row in drawn}) == 4
    many = S3IMLoss(patch_height=12, patch_width=8)
    assert many(src, tar) != many(src, tar)
    again = [
        S3IMLoss(patch_height=12, patch_width=8, generator=torch.Generator().manual_seed(5))
        for _ in range(2)
    ]
    assert again[0](src, tar) == again[1](src, tar)


@pytest.mark.claim(133, "more permutations make the loss less noisy")
def test_noise_of_the_loss():
    src, tar = pixels()
    random = torch.Generator().manual_seed(0)
    spread = []
    for repeat in (2, 10):
        loss = S3IMLoss(patch_height=12, patch_width=8, repeat=repeat, generator=random)
        spread.append(torch.stack([loss(src, tar) for _ in range(100)]).std())
    assert spread[1] < spread[0] / 1.3  # sqrt(1) / 2 against sqrt(9) / 10 of a permutation's


@pytest.mark.claim(
    133, "constant colours a and b give the closed form, in padded windows too", tolerance=1e-6
)
@pytest.mark.parametrize(("a", "b"), [(0.3, 0.7), (0.9, 0.1), (0.0, 0.5)])
def test_constant_colours(a, b):
    src, tar = (torch.full((4096, 2), v, dtype=torch.float64) for v in (a, b))
    c1, c2 = 1e-4, 9e-4
    inner = (2 * a * b + c1) / (a * a + b * b + c1)
    assert s3im(src, tar, padding="none").item() == pytest.approx(1 - inner, abs=1e-12)
    single = s3im(src.float(), tar.float(), padding="none")
    assert single.item() == pytest.approx(1 - inner, abs=1e-6)

    weights = np.exp(-((np.arange(4) - 2) ** 2) / 4.5)
    edge = 1 - weights[0] / weights.sum()
    assert edge == pytest.approx(0.8635, abs=5e-5)

    def window(w):
        spread = (a * a + b * b) * w * (1 - w) + c2
        return (
            (2 * a * b * w * w + c1)
            * (2 * a * b * w * (1 - w) + c2)
            / (((a * a + b * b) * w * w + c1) * spread)
        )

    rows, columns = 16, 160  # of windows: the first of each reaches one pixel over the border
    total = window(edge**2) + (rows - 1 + columns - 1) * window(edge)
    total += (rows - 1) * (columns - 1) * window(1.0)
    expected = 1 - total / (rows * columns)
    assert s3im(src, tar).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.claim(133, "the gradient vanishes where both agree", tolerance=1e-7)
def test_no_gradient_at_the_truth():
    src, _ = pixels(4096, dtype=torch.float32)
    src.requires_grad_()
    (slope,) = torch.autograd.grad(s3im(src, src.detach()), src)
    assert slope.abs().max() < 1e-7


@pytest.mark.claim(133, "the mean gradient of a window pulls its mean to the true mean")
@pytest.mark.parametrize("shift", [0.2, -0.2])
def test_pull_of_the_mean(shift):
    _, tar = pixels(16, 1)
    tar = 0.3 + 0.4 * tar
    src = (tar + shift).requires_grad_()
    loss = s3im(src, tar, patch_height=4, patch_width=4, repeat=1, padding="none")
    (slope,) = torch.autograd.grad(loss, src)
    assert slope.mean().sign() == np.sign(shift)
    assert abs(slope.mean()) > 0.01


@pytest.mark.claim(
    133, "loss of contrast costs more than noise of the same squared error", tolerance=0.015
)
def test_what_it_punishes():
    random = torch.Generator().manual_seed(0)

    def mean(change):
        values = []
        for _ in range(8):
            tar = torch.rand(4096, 1, generator=random)
            values.append(s3im(change(tar), tar, padding="none", generator=random))
        return torch.stack(values).mean().item()

    def noisy(error):
        return lambda tar: tar + error**0.5 * torch.randn(tar.shape, generator=random)

    faded, noise = mean(lambda tar: 0.5 + 0.3 * (tar - 0.5)), mean(noisy(0.49 / 12))
    assert faded == pytest.approx(0.448, abs=0.015)
    assert noise == pytest.approx(0.210, abs=0.015)
    up = (1 / 12) ** 0.5
    assert mean(lambda tar: tar + up) == pytest.approx(0.099, abs=0.015)
    assert mean(lambda tar: tar - up) == pytest.approx(0.314, abs=0.015)
    assert mean(lambda tar: 0.5 * tar) == pytest.approx(0.358, abs=0.015)
    assert mean(noisy(1 / 12)) == pytest.approx(0.352, abs=0.015)
    assert faded > 2 * noise


@pytest.mark.claim(133, "half precision is computed in single, where variances keep their digits")
def test_half_precision():
    src, tar = (0.9 + 0.02 * x.bfloat16() for x in pixels())
    indices = draw_indices(96, 3)
    found = s3im(src, tar, indices=indices, **SMALL)
    assert found.dtype == torch.float32
    expected = s3im(src.double(), tar.double(), indices=indices, **SMALL)
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.claim(
    133, "batches of any size are laid out as wide as they go, pixels dropped in pairs at random"
)
def test_any_batch_size():
    src, tar = pixels(101)
    loose = S3IMLoss(patch_height=12, patch_width=64, repeat=1, strict=False)
    values = torch.stack([loose(src, tar) for _ in range(6)])
    assert values.unique().numel() > 1
    assert loose(src, src).abs() < 1e-12
    exact = s3im(src[:96], tar[:96], patch_height=12, patch_width=8, repeat=1)
    assert loose(src[:96], tar[:96]) == exact
    with pytest.raises(ValueError, match=r"src: got \(11, 3\), expected more pixels for 12 rows"):
        loose(src[:11], tar[:11])


def test_compiled_without_recompilation():
    torch.compiler.reset()
    loss = S3IMLoss(patch_height=12, patch_width=8)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    src, tar = pixels(dtype=torch.float32)
    values = [compiled(src, tar) for _ in range(5)]
    assert counter.frame_count == 1
    assert len({v.item() for v in values}) == 5
    assert torch.stack(values).mean().item() == pytest.approx(loss(src, tar).item(), abs=0.05)


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({}, (96, 3), r"src: got \(96, 3\), expected \(4096, 3\) for a 64 x 64 patch"),
        (SMALL, (96,), r"src: got \(96,\), expected \(B, C\)"),
        (
            {**SMALL, "indices": torch.arange(96)},
            (96, 3),
            r"indices: got \(96,\), expected \(288,\)",
        ),
        ({**SMALL, "kernel_size": 13}, (96, 3), "kernel_size: got 13, expected at most the patch"),
        ({**SMALL, "stride": 0}, (96, 3), "stride: got 0, expected at least 1"),
        ({**SMALL, "repeat": 0}, (96, 3), "repeat: got 0"),
        ({**SMALL, "padding": "same"}, (96, 3), "padding: got 'same', expected one of"),
        ({**SMALL, "sigma": 0.0}, (96, 3), "sigma: got 0.0"),
        ({**SMALL, "data_range": 0.0}, (96, 3), "data_range: got 0.0"),
    ],
)
def test_bad_input(options, shape, message):
    with pytest.raises(ValueError, match=message):
        s3im(torch.rand(shape), torch.rand(shape), **options)
    with pytest.raises(ValueError, match=r"tar: got \(96, 1\), expected \(96, 3\) as src"):
        s3im(torch.rand(96, 3), torch.rand(96, 1), **SMALL)
